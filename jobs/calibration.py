"""Users put back to an earlier anchor: what was known of them then, and what they did next.

The order of predicted sets and the block score are fitted to it (DESIGN section 8).
"""

import datetime as dt
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.anchors import before, held_out, last_dislike_anchors
from jobs.context import JobContext
from jobs.generation import GenerationTask, generate, generation_task
from jobs.item_rate import item_rate
from jobs.item_taste import fit_item_tastes, folded_in, judged_items
from jobs.predicted_sets import SET_SCHEMA, Market, fit_order, recent_counts, set_rows, users_of
from jobs.user_context import user_context, with_categories, with_newcomers
from negrec_core.block_score import (
    FEATURES,
    Items,
    Tally,
    features,
    sigmoid,
    smoothed_log_odds,
    user_weights,
)
from negrec_core.codebook import Codebook
from negrec_core.generator import Generator
from negrec_core.items import load_categories
from negrec_core.semantic_ids import SemanticIds, load_semantic_ids
from negrec_core.set_order import SetOrder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class PutBack:
    """Users as their calibration anchors found them, and what they did next.

    Attributes:
        labels: (user_id, item_id, polarity, held_out), one row per user and item judged after the anchor;
            held_out: whether no generator was trained on the user.
        contexts: (user_id, n_negatives, n_positives, categories) as in `user_context`.
        rates: (item_id, n_negatives, n_positives, log_odds) as in `item_rate`.
        items: those with a semantic ID and, after them, those without.
        item_tastes: the `tastes` of `Items.of`, [items, 1 + factors].
        user_tastes: user -> weights as in `user_taste`.
        prior_log_odds: of dislike against like over all feedback before the anchors.
    """

    labels: pa.Table
    contexts: pa.Table
    rates: pa.Table
    items: list[str]
    item_tastes: np.ndarray
    user_tastes: dict[str, np.ndarray]
    prior_log_odds: float


@dataclass(frozen=True)
class Calibration:
    """What users judged after their anchors, with the features it had before.

    Attributes:
        features: float64 [n, F]; those of the generator are 0 where it predicted nothing.
        disliked: bool [n].
        held_out: which are of users that no generator was trained on, bool [n].
        users: whose they are, by number, int64 [n].
        prior_log_odds: of dislike against like over all feedback before the anchors.
    """

    features: np.ndarray
    disliked: np.ndarray
    held_out: np.ndarray
    users: np.ndarray
    prior_log_odds: float

    def of_held_out(self) -> "Calibration":
        """The rows of held-out users alone."""
        own, prior = self.held_out, self.prior_log_odds
        return Calibration(self.features[own], self.disliked[own], own[own], self.users[own], prior)


def calibration_anchors(ctx: JobContext, feedback: "DataFrame") -> "DataFrame":
    """(user_id, anchor_time, held_out) from which users' next days are predicted.

    Daily: one anchor for all, `calibration.days` before the end of `ds`. Explicit: each user's last stretch
    with a dislike before the own anchor.
    """
    from pyspark.sql import functions as F

    settings = ctx.config.calibration
    if ctx.config.anchors == "end_of_day":
        anchor = ctx.anchor - dt.timedelta(days=settings.days)
        anchors = feedback.select("user_id").distinct().withColumn("anchor_time", F.lit(anchor))
    else:
        anchors = last_dislike_anchors(feedback, settings.days)
    return anchors.withColumn("held_out", held_out(F.col("user_id"), settings.held_out_share))


def collect_calibration(
    ctx: JobContext, events: "DataFrame", generator: Generator
) -> tuple[Calibration, Calibration, SetOrder]:
    """What all users did after their calibration anchors, and what the held-out did.

    Daily anchors put everybody back at once. With explicit ones, the held-out alone are put back before
    their sets are predicted, so that these are chosen by what the others have told; then everybody is.

    Args:
        ctx: the run.
        events: rows of `taste_events` that may be used.
        generator: predicts for the held-out.

    Returns:
        All users', in which the generator's features are of no use; the held-out users', and the order that
        their sets were chosen by, fitted to the same labels.
    """
    task = generation_task(ctx.store, generator, ctx.ds, ctx.config.generation)
    ids = load_semantic_ids(ctx.store, task.codebook_version, ctx.ds, task.ids_version)
    unit = generator.codebook.unit(ids.codes)
    anchors = calibration_anchors(ctx, events.where("polarity <> 0")).persist()

    def calibration(back: PutBack, predictions: pa.Table) -> Calibration:
        categories = load_categories(ctx.store, ctx.ds, back.items, ctx.pin("item")["item"])
        items = Items.of(unit, categories.of_items, back.item_tastes)
        pseudo_events = ctx.config.calibration.rate_pseudo_events
        return features_of(back, predictions, items, categories.numbers, generator.codebook, pseudo_events)

    explicit = ctx.config.anchors == "explicit"
    with put_back(ctx, events, anchors.where("held_out") if explicit else anchors, ids, unit) as put:
        predictions, order = _predicted(ctx, *put, task, ids)
        everybody = calibration(put[0], predictions)
    held_out = everybody.of_held_out()
    if explicit:
        with put_back(ctx, events, anchors, ids, unit) as (back, _):
            everybody = calibration(back, SET_SCHEMA.empty_table())
    anchors.unpersist()
    return everybody, held_out, order


@dataclass(frozen=True)
class _Frames:
    """Feedback before the anchors, and the contexts of the users put back."""

    past: "DataFrame"
    contexts: "DataFrame"


@contextmanager
def put_back(
    ctx: JobContext, events: "DataFrame", anchors: "DataFrame", ids: SemanticIds, unit: np.ndarray
) -> Iterator[tuple[PutBack, _Frames]]:
    """Put users back to their anchors, no more than `calibration.max_users` of them, the held-out first.

    Args:
        ctx: the run.
        events: rows of `taste_events` that may be used.
        anchors: (user_id, anchor_time, held_out), one row per user.
        ids: the items that have a semantic ID.
        unit: their unit embeddings, [items, dim].
    """
    from pyspark.sql import functions as F

    settings, window = ctx.config.calibration, ctx.config.window_days
    earlier = before(events, anchors.drop("held_out")).persist()
    past = earlier.where("polarity <> 0")
    chosen = anchors.orderBy(F.desc("held_out"), F.xxhash64("user_id")).limit(settings.max_users).persist()
    contexts = user_context(past, chosen.drop("held_out"), ctx.config.context, window)
    contexts = with_categories(contexts, past, ctx.read_items(), window)
    contexts = with_newcomers(contexts, chosen.drop("held_out")).persist()
    labels = (
        events.where("polarity <> 0")
        .join(chosen, "user_id")
        .where(F.col("event_time") > F.col("anchor_time"))
        .where(F.col("event_time") <= F.col("anchor_time") + F.expr(f"make_dt_interval({settings.days})"))
        .groupBy("user_id", "item_id", "held_out")
        .agg(F.min("polarity").alias("polarity"))
    )
    counts = {row["polarity"]: row["count"] for row in past.groupBy("polarity").count().collect()}
    found = contexts.select("user_id", "n_negatives", "n_positives", "categories").toArrow()
    if ctx.config.anchors == "end_of_day":
        # Such a day has no list for users without feedback.
        found = found.filter(pc.greater(pc.add(found["n_negatives"], found["n_positives"]), 0))
    items, tastes = fit_item_tastes(earlier, ids.items, unit, ctx.config.taste)
    own = judged_items(
        earlier.join(chosen.select("user_id"), "user_id", "left_semi"), ctx.config.taste.neutral
    )
    back = PutBack(
        labels=labels.toArrow(),
        contexts=found,
        rates=item_rate(past, settings.rate_pseudo_events).toArrow(),
        items=items,
        item_tastes=np.column_stack([tastes.log_odds, tastes.factors]),
        user_tastes=folded_in(own.toArrow(), items, unit, tastes, ctx.config.taste),
        prior_log_odds=float(np.log((counts.get(-1, 0) + 1) / (counts.get(1, 0) + 1))),
    )
    try:
        yield back, _Frames(past, contexts.join(chosen.select("user_id", "held_out"), "user_id"))
    finally:
        for frame in (earlier, chosen, contexts):
            frame.unpersist()


def _predicted(
    ctx: JobContext, back: PutBack, frames: _Frames, task: GenerationTask, ids: SemanticIds
) -> tuple[pa.Table, SetOrder]:
    """Predicted sets of the held-out users that have a context, and the order that chose them."""
    pseudo_events, settings = ctx.config.calibration.rate_pseudo_events, ctx.config.generation
    contexts = frames.contexts.where("held_out")
    recent = recent_counts(frames.past, contexts, settings.recent_days).toArrow()
    market = Market.of(ids, back.rates, recent, pseudo_events, settings.popular_ids)
    users = users_of(generate(contexts, task), contexts, frames.past).toArrow().sort_by("user_id")
    order = fit_order(_rows(users), back.labels, market)
    listed = set(back.contexts["user_id"].to_pylist())
    sets = [
        pa.Table.from_pylist(list(set_rows(user, market, order, settings)), SET_SCHEMA)
        for user in _rows(users)
        if user["user_id"] in listed
    ]
    return pa.concat_tables([SET_SCHEMA.empty_table(), *sets]), order


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Its rows, few at a time: as Python objects all would take fifteen times the memory."""
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def features_of(
    back: PutBack,
    predictions: pa.Table,
    items: Items,
    category_numbers: dict[str, tuple[int, int]],
    codebook: Codebook,
    pseudo_events: float,
) -> Calibration:
    """Features of every label as the ranking service would compute them; ordered by user and item."""
    prior = back.prior_log_odds
    catalogue = items.with_unknown(prior)
    item_log_odds = dict(
        zip(*(back.rates[name].to_pylist() for name in ("item_id", "log_odds")), strict=True)
    )
    index = {item: n for n, item in enumerate(back.items)}
    predictions = predictions.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    entries = _by_user(predictions)
    predicted = np.array(predictions["codes"].to_pylist(), np.int32).reshape(-1, codebook.levels)
    entry_unit = codebook.unit(predicted)
    log_probs = predictions["log_prob"].to_numpy().astype(np.float64)
    contexts = {row["user_id"]: row for row in back.contexts.to_pylist()}
    nothing = {"n_negatives": 0, "n_positives": 0, "categories": []}
    labels = back.labels.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    judged = labels["item_id"].to_pylist()
    out = np.zeros((len(judged), len(FEATURES)))
    spans = _by_user(labels)
    for user, span in spans.items():
        own = entries.get(user, slice(0, 0))
        context = contexts.get(user, nothing)
        user_log_odds = smoothed_log_odds(
            context["n_negatives"], context["n_positives"], sigmoid(prior), pseudo_events
        )
        out[span] = features(
            catalogue.take([index.get(item, -1) for item in judged[span]]),
            entry_unit[own],
            log_probs[own],
            Tally.of(context["categories"], category_numbers),
            user_weights(back.user_tastes.get(user), catalogue),
            np.array([item_log_odds.get(item, prior) for item in judged[span]]),
            float(user_log_odds),
            prior,
            pseudo_events,
        )
    return Calibration(
        out,
        labels["polarity"].to_numpy() == -1,
        labels["held_out"].to_numpy(zero_copy_only=False),
        np.repeat(np.arange(len(spans)), [span.stop - span.start for span in spans.values()]),
        prior,
    )


def _by_user(rows: pa.Table) -> dict[str, slice]:
    """Row range of each user in a table sorted by user."""
    users = rows["user_id"].to_pylist()
    edges = [n for n, user in enumerate(users) if n == 0 or users[n - 1] != user] + [len(users)]
    return {users[start]: slice(start, stop) for start, stop in itertools.pairwise(edges)}
