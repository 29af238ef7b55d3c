"""Stage `item_semantic_id`: an ID for every item that has none yet (DESIGN section 5)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from jobs.context import JobContext
from negrec_core.codebook import encode_unique
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK, newest, open_codebook, open_generator
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.storage import Place

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCHEMA = "item_id string, codes array<int>"


def item_semantic_id(
    items: "DataFrame", models: Place, media: Path, version: str, taken: np.ndarray | None
) -> "DataFrame":
    """Semantic IDs of items by their content.

    Args:
        items: `item` rows, one per item.
        models: directory of the model versions, readable by every executor.
        media: folder that a relative `media_uri` starts from, likewise.
        version: codebook version.
        taken: IDs [n, D] that other items have. If given, each new item gets an ID of its own as far as
            the last level has free codes, which takes one pass in order of item id; None: by
            nearest codes alone, in parallel.
    """
    from pyspark.sql import functions as F

    def assign(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = [batch for batch in batches if batch.num_rows]
        if not rows:
            return
        # Imports torch, which takes seconds that a day without new items need not spend.
        from negrec_core.item_encoder import ItemEncoder

        codebook, manifest = open_codebook(models, version)
        item_encoder = ItemEncoder.of_codebook(models, manifest, media)
        for part in [pa.Table.from_batches(rows)] if taken is not None else rows:
            embeddings = item_encoder.encode(part.to_pylist())
            if taken is None:
                codes = codebook.encode(embeddings)
            else:
                codes = encode_unique(codebook, embeddings, taken)
            yield pa.RecordBatch.from_pydict(
                {
                    "item_id": part["item_id"].to_pylist(),
                    "codes": pa.array(codes.tolist(), pa.list_(pa.int32())),
                }
            )

    if taken is not None:
        items = items.repartition(1).sortWithinPartitions("item_id")
    return items.mapInArrow(assign, _SCHEMA).withColumn("codebook_version", F.lit(version))


def first_ids(semantic_ids: "DataFrame", version: str) -> "DataFrame":
    """(item_id, codes) under a codebook: the ID an item got first, which is the one that counts.

    Args:
        semantic_ids: `item_semantic_id` rows.
        version: codebook version.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    first = Window.partitionBy("item_id").orderBy("ds")
    known = semantic_ids.where(F.col("codebook_version") == version)
    return known.withColumn("n", F.row_number().over(first)).where("n = 1").select("item_id", "codes")


def run(ctx: JobContext) -> None:
    """The IDs that a run of this day uses: those of its generator's codebook, or else of the newest."""
    try:
        version = open_generator(ctx.warehouse.models, ctx.ds).codebook_manifest.version
    except MissingError:
        version = newest(ctx.warehouse.models, CODEBOOK, ctx.ds).version
    _append(ctx, version)


def run_for_training(ctx: JobContext) -> None:
    """The IDs that a generator is trained on: those of the newest codebook.

    A day whose items all have one stays as it is, so that what was made from it is not outdated.
    """
    _append(ctx, newest(ctx.warehouse.models, CODEBOOK, ctx.ds).version, only_new=True)


def _append(ctx: JobContext, version: str, only_new: bool = False) -> None:
    """A published ID stays, whatever happens to the item's text or to later days or codebooks.

    Args:
        ctx: the run.
        version: codebook version.
        only_new: commit nothing where no item lacks an ID and the day was committed before.
    """
    from pyspark.sql import functions as F

    models = ctx.warehouse.models
    codebook, _ = open_codebook(models, version)
    ctx.use_model(CODEBOOK, version)
    catalogue = ctx.read_items()
    known = ctx.read("item_semantic_id")
    of_codebook = known.where((F.col("codebook_version") == version) & (F.col("ds") <= ctx.ds))
    unnamed = catalogue.join(of_codebook, "item_id", "left_anti")
    if only_new and ctx.revision > 1 and unnamed.isEmpty():
        return
    # A later day may have run before this one: its IDs hold here too.
    later = first_ids(known, version).withColumn("codebook_version", F.lit(version))
    inherited = later.join(unnamed.select("item_id"), "item_id", "left_semi")
    new = unnamed.join(later, "item_id", "left_anti")
    taken = None
    if ctx.config.codebook.unique_ids:
        # Of all days, also later ones: an ID that was published belongs to its item for good.
        taken = load_semantic_ids(ctx.store, version, "9999-12-31").codes
        taken = taken.reshape(-1, codebook.levels)
    assigned = item_semantic_id(new, models, ctx.warehouse.media, version, taken)
    kept = ctx.read("item_semantic_id", [ctx.ds])
    added = assigned.unionByName(inherited).withColumn("ds", F.lit(ctx.ds))
    ctx.write("item_semantic_id", kept.unionByName(added))
