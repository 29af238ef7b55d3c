"""Stage `item_taste`: what users' tastes act on, fitted to a sample of users (DESIGN section 8)."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.anchors import visible
from jobs.context import JobContext
from negrec_core.config import TasteConfig
from negrec_core.generator import CODEBOOK, open_generator
from negrec_core.schemas import ITEM_TASTE
from negrec_core.semantic_ids import SemanticIds, load_semantic_ids
from negrec_core.taste import Events, ItemTastes, fit_items, fold_in

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SHARES = 10_000


def judged_items(feedback: "DataFrame") -> "DataFrame":
    """(user_id, item_id, disliked): one row per user and item; both disliked and liked is disliked."""
    from pyspark.sql import functions as F

    return feedback.groupBy("user_id", "item_id").agg((F.min("polarity") == -1).alias("disliked"))


def sampled(judged: "DataFrame", max_events: int) -> "DataFrame":
    """All rows of as many users, in the order of a hash, as have about `max_events`."""
    from pyspark.sql import functions as F

    n = judged.count()
    if n <= max_events:
        return judged
    place = F.pmod(F.xxhash64(F.lit("taste"), "user_id"), F.lit(_SHARES))
    return judged.where(place < max(1, _SHARES * max_events // n))


def fit_item_tastes(
    feedback: "DataFrame", ids: SemanticIds, unit: np.ndarray, settings: TasteConfig
) -> ItemTastes:
    """Items' side of the tastes, as of some anchors.

    Args:
        feedback: rows of `feedback` before the anchors.
        ids: the items.
        unit: their unit embeddings.
        settings: `taste` of the configuration.
    """
    rows = sampled(judged_items(feedback), settings.max_events).toArrow()
    # Sums of floating-point numbers depend on their order.
    rows = rows.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    users, items, disliked = (rows[name].combine_chunks() for name in ("user_id", "item_id", "disliked"))
    return fit_items(events_of(users.dictionary_encode().indices, items, disliked, ids), unit, settings)


def events_of(users: pa.Array, items: pa.Array, disliked: pa.Array, ids: SemanticIds) -> Events:
    """Events by rows of users and items; those of items without a semantic ID are left out."""
    row = pc.index_in(items, pa.array(ids.items, items.type)).fill_null(-1).to_numpy(zero_copy_only=False)
    known = row >= 0
    return Events(
        users.to_numpy(zero_copy_only=False).astype(np.int64)[known],
        row.astype(np.int64)[known],
        disliked.to_numpy(zero_copy_only=False).astype(np.float64)[known],
    )


def folded_in(
    judged: pa.Table, ids: SemanticIds, unit: np.ndarray, items: ItemTastes, settings: TasteConfig
) -> dict[str, np.ndarray]:
    """Tastes of the users of `judged_items`, as in `user_taste`."""
    rows = judged.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    users, names, disliked = (rows[name].combine_chunks() for name in ("user_id", "item_id", "disliked"))
    users = users.dictionary_encode()
    events = events_of(users.indices, names, disliked, ids)
    weights = fold_in(events, len(users.dictionary), unit, items, settings)
    return dict(zip(users.dictionary.to_pylist(), weights.astype(np.float32), strict=True))


def run(ctx: JobContext) -> None:
    generator = open_generator(ctx.warehouse.models, ctx.ds)
    version = generator.codebook_manifest.version
    ctx.use_model(CODEBOOK, version)
    ctx.require("item_semantic_id", [ctx.ds])
    pinned = ctx.pin("item_semantic_id")["item_semantic_id"]
    ids = load_semantic_ids(ctx.store, version, ctx.ds, pinned)
    feedback = visible(ctx, ctx.read_window("feedback"))
    tastes = fit_item_tastes(feedback, ids, generator.codebook.unit(ids.codes), ctx.config.taste)
    rows = {
        "item_id": ids.items,
        "log_odds": tastes.log_odds,
        "factors": tastes.factors.tolist(),
        "ds": [ctx.ds] * len(ids.items),
    }
    ctx.write_arrow("item_taste", pa.table(rows, ITEM_TASTE.schema))
