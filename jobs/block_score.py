"""Stage `block_score`: fit the block score and its threshold on held-back feedback (DESIGN section 8).

Users that no model was trained on are put back to an earlier anchor; the generator predicts for them
from what was known then, and what they did next is what the score is fitted to. Before it, the order that
chooses predicted sets is fitted to the same.
"""

import datetime as dt
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.anchors import before, held_out, last_dislike_anchors, visible
from jobs.context import JobContext, log
from jobs.generation import GenerationTask, generate, generation_task
from jobs.item_rate import item_rate
from jobs.item_taste import fit_item_tastes, folded_in, judged_items
from jobs.predicted_sets import SET_SCHEMA, Market, fit_order, recent_counts, set_rows, users_of
from jobs.user_context import user_context, with_categories, with_newcomers
from negrec_core.block_score import (
    FEATURES,
    BlockScore,
    Items,
    Tally,
    curve,
    features,
    sigmoid,
    smoothed_log_odds,
    threshold_at,
    user_weights,
)
from negrec_core.codebook import Codebook
from negrec_core.config import CalibrationConfig
from negrec_core.errors import InputError
from negrec_core.generator import CODEBOOK, GENERATOR, Generator, open_generator
from negrec_core.items import load_categories
from negrec_core.schemas import BLOCK_SCORE
from negrec_core.semantic_ids import SemanticIds, load_semantic_ids
from negrec_core.set_order import SET_FEATURES, SetOrder

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_CURVE_SHARES = np.array([0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5])
_LEAST = 20
_RIDGE = 10.0  # a small site has but some hundred labels of held-out users


@dataclass(frozen=True)
class HeldBack:
    """Held-out users as their calibration anchors found them, and what they did next.

    Attributes:
        labels: (user_id, item_id, polarity), one row per user and item judged after the anchor.
        predictions: (user_id, rank, codes, log_prob) as in `negative_item_set`.
        contexts: (user_id, n_negatives, n_positives, categories) as in `user_context`.
        rates: (item_id, log_odds) as in `item_rate`.
        item_tastes: the `tastes` of `Items.of`, [items, 1 + factors].
        user_tastes: user -> weights as in `user_taste`.
        prior_log_odds: of dislike against like over all feedback before the anchors.
    """

    labels: pa.Table
    predictions: pa.Table
    contexts: pa.Table
    rates: pa.Table
    item_tastes: np.ndarray
    user_tastes: dict[str, np.ndarray]
    prior_log_odds: float


@dataclass(frozen=True)
class Calibration:
    """Held-back feedback with the features it had at its anchor.

    Attributes:
        features: float64 [n, F].
        disliked: bool [n].
        n_users: users among the rows.
        prior_log_odds: of dislike against like over all feedback before the anchors.
    """

    features: np.ndarray
    disliked: np.ndarray
    n_users: int
    prior_log_odds: float


def calibration_anchors(ctx: JobContext, feedback: "DataFrame") -> "DataFrame":
    """(user_id, anchor_time) from which the held-out users' next days are predicted.

    Daily: one anchor for all, `calibration.days` before the end of `ds`. Explicit: the held-out users'
    last stretch with a dislike before their own anchor.
    """
    from pyspark.sql import functions as F

    settings = ctx.config.calibration
    if ctx.config.anchors == "end_of_day":
        anchor = ctx.anchor - dt.timedelta(days=settings.days)
        return feedback.select("user_id").distinct().withColumn("anchor_time", F.lit(anchor))
    chosen = feedback.where(held_out(F.col("user_id"), settings.held_out_share))
    return last_dislike_anchors(chosen, settings.days)


def collect_calibration(
    ctx: JobContext, feedback: "DataFrame", generator: Generator
) -> tuple[Calibration, SetOrder]:
    """Predict for the held-out users at their calibration anchors and look at what came after.

    The order that their sets were chosen by is fitted to the same labels; it goes with them.
    """
    task = generation_task(ctx.store, generator, ctx.ds, ctx.config.generation)
    ids = load_semantic_ids(ctx.store, task.codebook_version, ctx.ds, task.ids_version)
    unit = generator.codebook.unit(ids.codes)
    held_back, order = _held_back(ctx, feedback, task, ids, unit)
    categories = load_categories(ctx.store, ctx.ds, ids.items, ctx.pin("item")["item"])
    items = Items.of(unit, categories.of_items, held_back.item_tastes)
    pseudo_events = ctx.config.calibration.rate_pseudo_events
    return _features_of(held_back, ids, items, categories.numbers, generator.codebook, pseudo_events), order


def _held_back(
    ctx: JobContext, feedback: "DataFrame", task: GenerationTask, ids: SemanticIds, unit: np.ndarray
) -> tuple[HeldBack, SetOrder]:
    from pyspark.sql import functions as F

    settings = ctx.config.calibration
    anchors = calibration_anchors(ctx, feedback).persist()
    past = before(feedback, anchors).persist()
    chosen = (
        anchors.where(held_out(F.col("user_id"), settings.held_out_share))
        .orderBy(F.xxhash64("user_id"))
        .limit(settings.max_users)
        .persist()
    )
    window = ctx.config.window_days
    contexts = user_context(past, chosen, ctx.config.context, window)
    contexts = with_categories(contexts, past, ctx.read_items(), window)
    contexts = with_newcomers(contexts, chosen).persist()
    labels = (
        feedback.join(chosen, "user_id")
        .where(F.col("event_time") > F.col("anchor_time"))
        .groupBy("user_id", "item_id")
        .agg(F.min("polarity").alias("polarity"))
    )
    events = {row["polarity"]: row["count"] for row in past.groupBy("polarity").count().collect()}
    known = labels.toArrow()
    rates = item_rate(past, settings.rate_pseudo_events).toArrow()
    recent = recent_counts(past, contexts, ctx.config.generation.recent_days).toArrow()
    market = Market.of(ids, rates, recent, settings.rate_pseudo_events, ctx.config.generation.popular_ids)
    users = users_of(generate(contexts, task), contexts, past).toArrow().sort_by("user_id")
    order = fit_order(_rows(users), known, market)
    found = contexts.select("user_id", "n_negatives", "n_positives", "categories").toArrow()
    if ctx.config.anchors == "end_of_day":
        # Such a day has no list for users without feedback.
        found = found.filter(pc.greater(pc.add(found["n_negatives"], found["n_positives"]), 0))
    listed = set(found["user_id"].to_pylist())
    sets = [
        pa.Table.from_pylist(list(set_rows(user, market, order, ctx.config.generation)), SET_SCHEMA)
        for user in _rows(users)
        if user["user_id"] in listed
    ]
    item_tastes = fit_item_tastes(past, ids, unit, ctx.config.taste)
    own = judged_items(past.join(chosen.select("user_id"), "user_id", "left_semi"))
    held_back = HeldBack(
        labels=known,
        predictions=pa.concat_tables([SET_SCHEMA.empty_table(), *sets]),
        contexts=found,
        rates=rates,
        item_tastes=np.column_stack([item_tastes.log_odds, item_tastes.factors]),
        user_tastes=folded_in(own.toArrow(), ids, unit, item_tastes, ctx.config.taste),
        prior_log_odds=float(np.log((events.get(-1, 0) + 1) / (events.get(1, 0) + 1))),
    )
    for frame in (anchors, past, chosen, contexts):
        frame.unpersist()
    return held_back, order


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Its rows, few at a time: as Python objects all would take fifteen times the memory."""
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _features_of(
    held_back: HeldBack,
    ids: SemanticIds,
    items: Items,
    category_numbers: dict[str, tuple[int, int]],
    codebook: Codebook,
    pseudo_events: float,
) -> Calibration:
    """Features of every label as the ranking service would compute them; ordered by user and item."""
    prior = held_back.prior_log_odds
    catalogue = items.with_unknown(prior)
    item_log_odds = dict(
        zip(*(held_back.rates[name].to_pylist() for name in ("item_id", "log_odds")), strict=True)
    )
    predictions = held_back.predictions.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    entries = _by_user(predictions)
    predicted = np.array(predictions["codes"].to_pylist(), np.int32).reshape(-1, codebook.levels)
    entry_unit = codebook.unit(predicted)
    log_probs = predictions["log_prob"].to_numpy().astype(np.float64)
    contexts = {row["user_id"]: row for row in held_back.contexts.to_pylist()}
    nothing = {"n_negatives": 0, "n_positives": 0, "categories": []}
    labels = held_back.labels.sort_by([("user_id", "ascending"), ("item_id", "ascending")])
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
            catalogue.take([ids.index.get(item, -1) for item in judged[span]]),
            entry_unit[own],
            log_probs[own],
            Tally.of(context["categories"], category_numbers),
            user_weights(held_back.user_tastes.get(user), catalogue),
            np.array([item_log_odds.get(item, prior) for item in judged[span]]),
            float(user_log_odds),
            prior,
            pseudo_events,
        )
    return Calibration(out, labels["polarity"].to_numpy() == -1, len(spans), prior)


def _by_user(rows: pa.Table) -> dict[str, slice]:
    """Row range of each user in a table sorted by user."""
    users = rows["user_id"].to_pylist()
    edges = [n for n, user in enumerate(users) if n == 0 or users[n - 1] != user] + [len(users)]
    return {users[start]: slice(start, stop) for start, stop in itertools.pairwise(edges)}


def fit(calibration: Calibration, settings: CalibrationConfig) -> BlockScore:
    """Logistic regression of disliked against liked, then the threshold.

    Raises:
        InputError: too little held-back feedback to calibrate on.
    """
    from sklearn.linear_model import LogisticRegression

    n_dislikes = int(calibration.disliked.sum())
    n_likes = len(calibration.disliked) - n_dislikes
    if min(n_dislikes, n_likes) < _LEAST:
        raise InputError(
            f"block_score: {n_dislikes} dislikes and {n_likes} likes of held-out users in the"
            f" calibration days, at least {_LEAST} of each are needed; raise"
            " calibration.held_out_share or calibration.days"
        )
    # Standardised, so that the ridge penalty treats all features alike.
    mean, spread = calibration.features.mean(0), calibration.features.std(0)
    # The deviation of equal values may be a rounding error instead of 0.
    spread[np.ptp(calibration.features, axis=0) == 0] = 1.0
    model = LogisticRegression(C=1 / _RIDGE, max_iter=1000)
    model.fit((calibration.features - mean) / spread, calibration.disliked)
    coefficients = model.coef_[0] / spread
    intercept = float(model.intercept_[0] - coefficients @ mean)
    scores = sigmoid(calibration.features @ coefficients + intercept)
    return BlockScore(
        coefficients,
        intercept,
        threshold_at(scores[~calibration.disliked], settings.max_likes_blocked),
        calibration.prior_log_odds,
        settings.rate_pseudo_events,
    )


def run(ctx: JobContext) -> None:
    generator = open_generator(ctx.warehouse.models, ctx.ds)
    ctx.use_model(GENERATOR, generator.manifest.version)
    ctx.use_model(CODEBOOK, generator.codebook_manifest.version)
    ctx.require("item_semantic_id", [ctx.ds])
    ctx.read("item_semantic_id", [ctx.ds])
    feedback = visible(ctx, ctx.read_window("feedback"))
    calibration, order = collect_calibration(ctx, feedback, generator)
    score = fit(calibration, ctx.config.calibration)
    scores = score.score(calibration.features)
    liked, disliked = scores[~calibration.disliked], scores[calibration.disliked]
    points = curve(liked, disliked, _CURVE_SHARES)
    row = {
        "features": list(FEATURES),
        "coefficients": score.coefficients.tolist(),
        "intercept": score.intercept,
        "threshold": score.threshold,
        "likes_blocked": float(np.mean(liked >= score.threshold)),
        "dislikes_blocked": float(np.mean(disliked >= score.threshold)),
        "curve": [vars(point) for point in points],
        "set_features": list(SET_FEATURES),
        "set_weights": order.weights.tolist(),
        "prior_log_odds": score.prior_log_odds,
        "pseudo_events": score.pseudo_events,
        "n_users": calibration.n_users,
        "n_likes": len(liked),
        "n_dislikes": len(disliked),
        "ds": ctx.ds,
    }
    ctx.write_arrow("block_score", pa.Table.from_pylist([row], BLOCK_SCORE.schema))
    log.info(
        "block_score: %d likes and %d dislikes of %d users; threshold %.3f blocks %.1f%% of the"
        " dislikes and %.1f%% of the likes",
        row["n_likes"],
        row["n_dislikes"],
        row["n_users"],
        row["threshold"],
        100 * row["dislikes_blocked"],
        100 * row["likes_blocked"],
    )
