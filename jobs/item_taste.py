"""Stage `item_taste`: what users' tastes act on, fitted to a sample of users (DESIGN section 8)."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.anchors import visible
from jobs.context import JobContext
from negrec_core.block_score import without_id
from negrec_core.config import TasteConfig
from negrec_core.generator import CODEBOOK, open_generator
from negrec_core.schemas import ITEM_TASTE
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.taste import Events, ItemTastes, fit_items, fold_in

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SHARES = 10_000


def taste_events(ctx: JobContext, feedback: "DataFrame") -> "DataFrame":
    """Feedback and, where they count, events of polarity 0, of which only what happened is known.

    Args:
        ctx: the run.
        feedback: rows of the window's `feedback`.
    """
    from pyspark.sql import functions as F

    if ctx.config.taste.neutral is None:
        return feedback
    neutral = [action for action, polarity in ctx.config.feedback.polarity.items() if not polarity]
    shown = ctx.read_window("behavior_log").where(F.col("action").isin(neutral))
    rows = shown.select("user_id", "item_id", "event_time", F.lit(0).alias("polarity"))
    return feedback.unionByName(rows, allowMissingColumns=True)


def judged_items(events: "DataFrame", neutral: float | None) -> "DataFrame":
    """(user_id, item_id, disliked), one row per user and item: 1 for a dislike, 0 for a like.

    Both disliked and liked is disliked; neither is `neutral`.
    """
    from pyspark.sql import functions as F

    worst, best = F.min("polarity"), F.max("polarity")
    disliked = F.when(worst == -1, 1.0).when(best == 1, 0.0).otherwise(neutral)
    return events.groupBy("user_id", "item_id").agg(disliked.alias("disliked"))


def sampled(judged: "DataFrame", max_events: int) -> "DataFrame":
    """All rows of as many users, in the order of a hash, as have about `max_events`."""
    from pyspark.sql import functions as F

    n = judged.count()
    if n <= max_events:
        return judged
    place = F.pmod(F.xxhash64(F.lit("taste"), "user_id"), F.lit(_SHARES))
    return judged.where(place < max(1, _SHARES * max_events // n))


def fit_item_tastes(
    events: "DataFrame", items: list[str], unit: np.ndarray, settings: TasteConfig
) -> tuple[list[str], ItemTastes]:
    """Items' side of the tastes, as of some anchors.

    Args:
        events: rows of `taste_events` before the anchors.
        items: those with a semantic ID.
        unit: their unit embeddings.
        settings: `taste` of the configuration.

    Returns:
        `items` and, after them, what was judged and has no semantic ID, by name; their tastes.
    """
    rows = sampled(judged_items(events, settings.neutral), settings.max_events).toArrow()
    # Sums of floating-point numbers depend on their order.
    rows = rows.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    users, judged, disliked = (rows[name].combine_chunks() for name in ("user_id", "item_id", "disliked"))
    names = items + sorted(set(pc.unique(judged).to_pylist()).difference(items))
    found = events_of(users.dictionary_encode().indices, judged, disliked, names)
    return names, fit_items(found, without_id(unit, len(names)), settings)


def events_of(users: pa.Array, judged: pa.Array, disliked: pa.Array, items: list[str]) -> Events:
    """Events by rows of users and of `items`; those of other items are left out."""
    row = pc.index_in(judged, pa.array(items, judged.type)).fill_null(-1).to_numpy(zero_copy_only=False)
    known = row >= 0
    return Events(
        users.to_numpy(zero_copy_only=False).astype(np.int64)[known],
        row.astype(np.int64)[known],
        disliked.to_numpy(zero_copy_only=False).astype(np.float64)[known],
    )


def folded_in(
    judged: pa.Table, items: list[str], unit: np.ndarray, tastes: ItemTastes, settings: TasteConfig
) -> dict[str, np.ndarray]:
    """Tastes of the users of `judged_items`, as in `user_taste`; the rest as `fit_item_tastes` has it."""
    rows = judged.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    users, names, disliked = (rows[name].combine_chunks() for name in ("user_id", "item_id", "disliked"))
    users = users.dictionary_encode()
    events = events_of(users.indices, names, disliked, items)
    weights = fold_in(events, len(users.dictionary), without_id(unit, len(items)), tastes, settings)
    return dict(zip(users.dictionary.to_pylist(), weights.astype(np.float32), strict=True))


def run(ctx: JobContext) -> None:
    generator = open_generator(ctx.warehouse.models, ctx.ds)
    version = generator.codebook_manifest.version
    ctx.use_model(CODEBOOK, version)
    ctx.require("item_semantic_id", [ctx.ds])
    pinned = ctx.pin("item_semantic_id")["item_semantic_id"]
    ids = load_semantic_ids(ctx.store, version, ctx.ds, pinned)
    events = visible(ctx, taste_events(ctx, ctx.read_window("feedback")))
    unit = generator.codebook.unit(ids.codes)
    items, tastes = fit_item_tastes(events, ids.items, unit, ctx.config.taste)
    rows = {
        "item_id": items,
        "log_odds": tastes.log_odds,
        "factors": tastes.factors.tolist(),
        "ds": [ctx.ds] * len(items),
    }
    ctx.write_arrow("item_taste", pa.table(rows, ITEM_TASTE.schema))
