"""Stage `user_taste`: every user's taste, from all that user judged before the anchor (DESIGN section 8)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.anchors import visible
from jobs.context import JobContext
from jobs.item_taste import events_of, judged_items, taste_events
from negrec_core.block_score import without_id
from negrec_core.config import TasteConfig
from negrec_core.delta import DeltaStore
from negrec_core.generator import CODEBOOK, open_codebook
from negrec_core.items import load_item_tastes
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.storage import place
from negrec_core.taste import ItemTastes, fold_in

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCHEMA = "user_id string, weights array<float>"
_ARROW_SCHEMA = pa.schema([("user_id", pa.string()), ("weights", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class FoldInTask:
    """Where an executor finds the items."""

    warehouse: str
    models: str
    ds: str
    codebook_version: str
    ids_version: int
    tastes_version: int
    settings: TasteConfig


def user_taste(events: "DataFrame", task: FoldInTask) -> "DataFrame":
    """Rows of `user_taste`.

    Args:
        events: rows of `taste_events` before the anchors.
        task: what to fold in with.
    """
    from pyspark.sql import functions as F

    users = (
        judged_items(events, task.settings.neutral)
        .groupBy("user_id")
        .agg(F.sort_array(F.collect_list(F.struct("item_id", "disliked"))).alias("judged"))
    )

    def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        catalogue = None
        for batch in batches:
            if batch.num_rows:
                catalogue = catalogue or _Catalogue(task)
                yield catalogue.fold_in(batch, task.settings)

    return users.mapInArrow(rows, _SCHEMA)


class _Catalogue:
    """The items as an executor holds them."""

    def __init__(self, task: FoldInTask) -> None:
        store = DeltaStore(task.warehouse)
        ids = load_semantic_ids(store, task.codebook_version, task.ds, task.ids_version)
        codebook, _ = open_codebook(place(task.models), task.codebook_version)
        self._items, tastes = load_item_tastes(store, task.ds, ids.items, task.tastes_version, 0.0)
        self._unit = without_id(codebook.unit(ids.codes), len(self._items))
        self._tastes = ItemTastes(tastes[:, 0], tastes[:, 1:])

    def fold_in(self, users: pa.RecordBatch, settings: TasteConfig) -> pa.RecordBatch:
        owner, flat = pc.list_parent_indices(users["judged"]), pc.list_flatten(users["judged"])
        items, disliked = (pc.struct_field(flat, name) for name in ("item_id", "disliked"))
        events = events_of(owner, items, disliked, self._items)
        weights = fold_in(events, users.num_rows, self._unit, self._tastes, settings)
        width = np.arange(users.num_rows + 1) * weights.shape[1]
        lists = pa.ListArray.from_arrays(pa.array(width, pa.int32()), weights.ravel().astype(np.float32))
        return pa.RecordBatch.from_arrays([users["user_id"], lists], schema=_ARROW_SCHEMA)


def run(ctx: JobContext) -> None:
    ctx.require("item_taste", [ctx.ds])
    versions = ctx.pin("item_semantic_id", "item_taste")
    codebook = ctx.store.commit_of("item_taste", ctx.ds, versions["item_taste"]).provenance.models[CODEBOOK]
    ctx.use_model(CODEBOOK, codebook)
    task = FoldInTask(
        str(ctx.store.root),
        str(ctx.warehouse.models),
        ctx.ds,
        codebook,
        versions["item_semantic_id"],
        versions["item_taste"],
        ctx.config.taste,
    )
    events = visible(ctx, taste_events(ctx, ctx.read_window("feedback")))
    ctx.write("user_taste", user_taste(events, task))
