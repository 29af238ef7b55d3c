"""Stage `block_score`: fit the block score and its threshold on held-back feedback (DESIGN section 8).

Users are put back to an earlier anchor, and what they did next is what the score is fitted to: first all
but the generator's part to all users, then, that given, the generator's part to those that no generator was
trained on, whose sets are predicted from what was known then. Before it, the order that chooses predicted
sets is fitted to the same.
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

from jobs.anchors import before, held_out, last_dislike_anchors, visible
from jobs.context import JobContext, log
from jobs.generation import GenerationTask, generate, generation_task
from jobs.item_rate import item_rate
from jobs.item_taste import fit_item_tastes, folded_in, judged_items, taste_events
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
_OF_GENERATOR = 2  # the first features


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
        return _features_of(back, predictions, items, categories.numbers, generator.codebook, pseudo_events)

    explicit = ctx.config.anchors == "explicit"
    with _put_back(ctx, events, anchors.where("held_out") if explicit else anchors, ids, unit) as put:
        predictions, order = _predicted(ctx, *put, task, ids)
        everybody = calibration(put[0], predictions)
    held_out = everybody.of_held_out()
    if explicit:
        with _put_back(ctx, events, anchors, ids, unit) as (back, _):
            everybody = calibration(back, SET_SCHEMA.empty_table())
    anchors.unpersist()
    return everybody, held_out, order


@dataclass(frozen=True)
class _Frames:
    """Feedback before the anchors, and the contexts of the users put back."""

    past: "DataFrame"
    contexts: "DataFrame"


@contextmanager
def _put_back(
    ctx: JobContext, events: "DataFrame", anchors: "DataFrame", ids: SemanticIds, unit: np.ndarray
) -> Iterator[tuple[PutBack, _Frames]]:
    """Put users back to their anchors, no more than `calibration.max_users` of them, the held-out first."""
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
    yield back, _Frames(past, contexts.join(chosen.select("user_id", "held_out"), "user_id"))
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


def _features_of(
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


def fit(everybody: Calibration, held_out: Calibration, settings: CalibrationConfig) -> BlockScore:
    """Logistic regression of disliked against liked in two steps, then the threshold.

    The first step leaves the generator's features out and is fitted to everybody; the second adds them, and
    weighs them against the log odds of the first, on the held-out alone.

    Args:
        everybody: of all users.
        held_out: of those whom the generator has not seen.
        settings: `calibration` of the configuration.

    Raises:
        InputError: too little feedback of held-out users to calibrate on.
    """
    n_dislikes = int(held_out.disliked.sum())
    n_likes = len(held_out.disliked) - n_dislikes
    if min(n_dislikes, n_likes) < _LEAST:
        raise InputError(
            f"block_score: {n_dislikes} dislikes and {n_likes} likes of held-out users in the"
            f" calibration days, at least {_LEAST} of each are needed; raise"
            " calibration.held_out_share or calibration.days"
        )
    rest, intercept = _logistic(everybody.features[:, _OF_GENERATOR:], everybody.disliked)
    given = held_out.features[:, _OF_GENERATOR:] @ rest + intercept
    columns = np.column_stack([held_out.features[:, :_OF_GENERATOR], given])
    weights, shift = _logistic(columns, held_out.disliked, given)
    scale = 1.0 + weights[_OF_GENERATOR]
    coefficients = np.concatenate([weights[:_OF_GENERATOR], rest * scale])
    intercept = intercept * scale + shift
    scores = sigmoid(held_out.features @ coefficients + intercept)
    return BlockScore(
        coefficients,
        intercept,
        threshold_at(scores[~held_out.disliked], settings.max_likes_blocked),
        held_out.prior_log_odds,
        settings.rate_pseudo_events,
    )


def _logistic(
    features: np.ndarray, disliked: np.ndarray, given: np.ndarray | float = 0.0
) -> tuple[np.ndarray, float]:
    """Coefficients and intercept of a ridge-penalised logistic regression, beside log odds that are given.

    scikit-learn's takes no such offset.
    """
    from scipy.optimize import minimize

    # Standardised, so that the penalty treats all features alike.
    mean, spread = features.mean(0), features.std(0)
    # The deviation of equal values may be a rounding error instead of 0.
    spread[np.ptp(features, axis=0) == 0] = np.inf
    scaled = (features - mean) / spread

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds = given + scaled @ weights[1:] + weights[0]
        surprise = sigmoid(log_odds) - disliked
        slope = np.concatenate([[surprise.sum()], scaled.T @ surprise + _RIDGE * weights[1:]])
        likelihood = (disliked * log_odds - np.logaddexp(0.0, log_odds)).sum()
        return float(_RIDGE * weights[1:] @ weights[1:] / 2 - likelihood), slope

    found = minimize(loss, np.zeros(1 + features.shape[1]), jac=True, method="L-BFGS-B").x
    coefficients = found[1:] / spread
    return coefficients, float(found[0] - coefficients @ mean)


def run(ctx: JobContext) -> None:
    generator = open_generator(ctx.warehouse.models, ctx.ds)
    ctx.use_model(GENERATOR, generator.manifest.version)
    ctx.use_model(CODEBOOK, generator.codebook_manifest.version)
    ctx.require("item_semantic_id", [ctx.ds])
    ctx.read("item_semantic_id", [ctx.ds])
    events = visible(ctx, taste_events(ctx, ctx.read_window("feedback")))
    everybody, held_out, order = collect_calibration(ctx, events, generator)
    score = fit(everybody, held_out, ctx.config.calibration)
    scores = score.score(held_out.features)
    liked, disliked = scores[~held_out.disliked], scores[held_out.disliked]
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
        "n_users": len(np.unique(held_out.users)),
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
