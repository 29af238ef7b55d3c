"""`negrec evaluate`: a published list against what its users did next (DESIGN section 8).

One row is a (user, anchor). The block score and the rules it is compared with see the same events: all
feedback before the anchors. Nothing here changes a table.
"""

import datetime as dt
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from negrec_core.artefacts import on_this_machine
from negrec_core.block_score import FEATURES
from negrec_core.blocklist import load_snapshot
from negrec_core.config import Config
from negrec_core.delta import DeltaStore, day_range
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK
from negrec_core.items import load_items
from negrec_core.metrics import (
    FIGURES,
    RECALLS,
    Estimate,
    Ranking,
    bootstrap,
    mean_over_users,
    user_pairs,
    within_user_auc,
)
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.set_order import ANYBODY
from negrec_core.storage import Place
from negrec_core.trie import Trie
from train.baselines import SET_SIZE, Known, baselines, judged
from train.candidates import Candidates, chosen, draw_candidates
from train.coverage import coverage
from train.ours import OURS, ours, pair_features
from train.sequential import sequential_baselines

log = logging.getLogger("negrec")

_LONG_TAIL_USER = 3
_LONG_TAIL_ITEM = 5


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: its name.
        figures: by the names of `negrec_core.metrics.FIGURES`; a method that predicts no sets lacks
            those that judge sets.
        difference: ours minus this method's, with the interval of the paired difference; empty for ours.
    """

    method: str
    figures: dict[str, Estimate]
    difference: dict[str, Estimate]


@dataclass(frozen=True)
class CandidateCounts:
    """Users behind the candidate accuracy, as in `train.candidates.Candidates`."""

    users: int
    whole: int
    other_days: int
    alone: int


@dataclass(frozen=True)
class Evaluation:
    """All figures of one list.

    Attributes:
        ds: log date of the list.
        seed: of the random method and of the candidates drawn.
        users: users with judged exposures after their anchors.
        dislikes: disliked exposures.
        likes: liked exposures.
        listed: users with a list.
        illegal: predicted IDs that no item has.
        rows: the methods, ours first.
        draws: method -> figure -> the figure and its value in each resample of the users, as
            `negrec_core.metrics.bootstrap` gives them. Two lists of the same users have the same resamples,
            so that the difference or the mean of their draws has an interval, too.
        candidates: whom the candidate accuracy judges.
        coverage: of the users' main negative interests, see `train.coverage`.
        without: feature -> share of dislikes blocked at 1 % of likes with the feature held at its
            mean: what each part of the block score adds.
        threshold: the published one.
        likes_over: share of the likes at or over it.
        dislikes_over: share of the dislikes at or over it.
    """

    ds: str
    seed: int
    users: int
    dislikes: int
    likes: int
    listed: int
    illegal: int
    rows: list[Row]
    draws: dict[str, dict[str, np.ndarray]]
    candidates: CandidateCounts
    coverage: dict[str, dict[str, Estimate]]
    without: dict[str, float]
    threshold: float
    likes_over: float
    dislikes_over: float


def evaluate(
    warehouse: Place, config: Config, ds: str, *, seed: int, sequential: Path | None = None
) -> Evaluation:
    """Judge the list of `ds` by the feedback of the horizon after its anchors.

    `sequential` is the Python of the sequential recommenders' environment; without, they are left out.

    Raises:
        MissingError: no list for `ds`, or the horizon after it was not logged to its end.
    """
    store, day = DeltaStore(warehouse), dt.date.fromisoformat(ds)
    if ds not in store.days("block_list"):
        raise MissingError(f"table block_list: no entries for ds={ds}; run `negrec run --ds {ds}`")
    if config.anchors == "end_of_day":
        first, last = (day + dt.timedelta(days=n) for n in (1, config.labels.horizon_days))
        hint = (
            f"the list is judged by the {config.labels.horizon_days} days after it: import them, then"
            f" run `negrec backfill --start {first} --end {last} --stages feedback`"
        )
        store.require("feedback", day_range(first, last), hint)
    snapshot = load_snapshot(warehouse, day)
    past, future = split_feedback(store, config, ds)
    exposures = judged(future)
    if exposures["disliked"].nunique() < 2:
        raise MissingError(
            f"table feedback: no dislikes and likes within {config.labels.horizon_days} days after"
            f" ds={ds}; import the days that follow and backfill `feedback`"
        )
    version = store.commit_of("block_list", ds).provenance.models[CODEBOOK]
    ids = load_semantic_ids(store, version, ds)
    trie = Trie.build(ids.codes, tuple(int(n) + 1 for n in ids.codes.max(0)))
    leaf_of_item = dict(zip(ids.items, trie.find(ids.codes).tolist(), strict=True))
    users = sorted(future["user_id"].unique())
    predicted, illegal = load_predictions(store, ds, trie, users)

    items = load_items(store, ds, columns=["category"]).to_pandas()
    columns = ["item_id", "neighbor_id", "score", "rank"]
    graph = store.read("item_graph", columns, days=[ds]).to_pandas()
    category = items.set_index("item_id")["category"]
    pseudo = config.calibration.rate_pseudo_events
    shown = load_shown(store, config, ds)
    neither = load_neither(store, config, ds, past)
    known = Known(past, category, graph, leaf_of_item, trie.n_ids, pseudo, neither)
    candidates = draw_candidates(future, shown, config.timezone, seed)
    methods = ours(store, warehouse / "models", config.generation, snapshot, predicted)
    methods |= baselines(known, users, seed)
    if sequential:
        unfinished = on_this_machine(warehouse / "models") / "sequential" / f"{ds}-{seed}"
        methods |= sequential_baselines(known, users, seed, sequential, unfinished)
    else:
        log.info("without sequential recommenders; `make recbole`, then --sequential PYTHON, adds them")
    # Most candidates are exposures too, and a generator reads the user's prompt once for both.
    columns = ["user_id", "item_id"]
    pairs = pd.concat([exposures[columns], candidates.pairs[columns]], ignore_index=True)
    draws = {}
    for name, method in methods.items():
        scores, of_candidates = np.split(method.score(pairs), [len(exposures)])
        draws[name] = _blocked(scores, exposures) | _long_tail(scores, exposures, past)
        if method.sets is not None:
            draws[name] |= predicted_draws(hit_table(past, future, method.sets, leaf_of_item))
        draws[name]["candidate accuracy"] = mean_over_users(chosen(candidates.pairs, of_candidates))
    features = pair_features(snapshot, exposures)
    disliked = exposures["disliked"].to_numpy()
    over = snapshot.score.score(features) >= snapshot.score.threshold
    return Evaluation(
        ds=ds,
        seed=seed,
        users=int(exposures["user"].nunique()),
        dislikes=int(disliked.sum()),
        likes=int((~disliked).sum()),
        listed=len(snapshot.users),
        illegal=illegal,
        rows=[_row(name, own, draws[OURS]) for name, own in draws.items()],
        draws=draws,
        candidates=_counts(candidates),
        coverage=coverage(past, future, category, graph, config.labels.expansion),
        without={
            name: _ranking(snapshot.score.score(_flattened(features, n)), exposures).curve().blocked_at(0.01)
            for n, name in enumerate(FEATURES)
        },
        threshold=snapshot.score.threshold,
        likes_over=float(over[~disliked].mean()),
        dislikes_over=float(over[disliked].mean()),
    )


def split_feedback(store: DeltaStore, config: Config, ds: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Feedback before its user's anchor, and in the horizon after it; columns of `feedback`.

    A user without an explicit anchor is not judged, and all of that user's feedback is past.
    """
    day, horizon = dt.date.fromisoformat(ds), dt.timedelta(days=config.labels.horizon_days)
    first = (day - dt.timedelta(days=config.window_days - 1)).isoformat()
    last = (day + horizon).isoformat()
    days = [d for d in store.days("feedback") if first <= d <= last]
    rows = store.read("feedback", ["user_id", "item_id", "event_time", "polarity"], days=days)
    rows = rows.to_pandas()
    anchor = _anchors(store, config, ds, rows["user_id"])
    past = rows[anchor.isna() | (rows["event_time"] < anchor)]
    return past, rows[_in_horizon(rows, anchor, config)]


def load_shown(store: DeltaStore, config: Config, ds: str) -> pd.DataFrame:
    """Events of any action in the horizon after their users' anchors: user_id, item_id, event_time."""
    day = dt.date.fromisoformat(ds)
    last = (day + dt.timedelta(days=config.labels.horizon_days)).isoformat()
    # The log of an archive lies under one day, whenever things happened.
    first = "" if config.anchors == "explicit" else ds
    days = [d for d in store.days("behavior_log") if first <= d <= last]
    rows = store.read("behavior_log", ["user_id", "item_id", "event_time"], days=days).to_pandas()
    return rows[_in_horizon(rows, _anchors(store, config, ds, rows["user_id"]), config)]


def load_neither(store: DeltaStore, config: Config, ds: str, past: pd.DataFrame) -> pd.DataFrame:
    """Columns of `feedback` of what was shown before its user's anchor and was, by `past`, never judged.

    Nothing where tastes do not use it, so that every method knows the same.
    """
    columns = ["user_id", "item_id", "event_time"]
    first = (dt.date.fromisoformat(ds) - dt.timedelta(days=config.window_days - 1)).isoformat()
    days = (
        [d for d in store.days("behavior_log") if first <= d <= ds]
        if config.taste.neutral is not None
        else []
    )
    rows = store.read("behavior_log", [*columns, "action"], days=days).to_pandas()
    neutral = [action for action, polarity in config.feedback.polarity.items() if not polarity]
    anchor = _anchors(store, config, ds, rows["user_id"])
    kept = (anchor.isna() | (rows["event_time"] < anchor)) & rows["action"].isin(neutral)
    pairs, known = (pd.MultiIndex.from_frame(frame[["user_id", "item_id"]]) for frame in (rows, past))
    return rows.loc[kept & ~pairs.isin(known), columns].assign(polarity=0)


def _anchors(store: DeltaStore, config: Config, ds: str, users: pd.Series) -> pd.Series:
    """Anchor of each row's user; NaT where there is none."""
    if config.anchors == "explicit":
        anchors = store.read("anchor", ["user_id", "anchor_time"], days=[ds]).to_pandas()
        return users.map(anchors.set_index("user_id")["anchor_time"])
    return pd.Series(pd.Timestamp(config.end_of_day(ds)), index=users.index)


def _in_horizon(rows: pd.DataFrame, anchor: pd.Series, config: Config) -> pd.Series:
    horizon = dt.timedelta(days=config.labels.horizon_days)
    return (rows["event_time"] > anchor) & (rows["event_time"] <= anchor + horizon)


def load_predictions(
    store: DeltaStore, ds: str, trie: Trie, users: list[str]
) -> tuple[dict[str, np.ndarray], int]:
    """Predicted leaves of some users, best first, and how many predicted IDs of all are illegal.

    Those of whom nothing was known have the set of `ANYBODY`.
    """
    rows = store.read("negative_item_set", ["user_id", "rank", "codes"], days=[ds])
    rows = rows.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    codes = rows["codes"].combine_chunks().flatten().to_numpy().reshape(-1, trie.depth)
    inside = (codes < np.array(trie.code_counts)).all(1)
    leaf = np.where(inside, trie.find(np.where(inside[:, None], codes, 0)), -1)
    groups = pd.Series(leaf).groupby(rows["user_id"].to_numpy(zero_copy_only=False)).indices
    nothing = np.zeros(0, np.intp)
    rows_of = {user: groups.get(user, groups.get(ANYBODY, nothing)) for user in users}
    return {user: leaf[at][:SET_SIZE] for user, at in rows_of.items()}, int((leaf < 0).sum())


def hit_table(
    past: pd.DataFrame,
    future: pd.DataFrame,
    predicted: dict[str, np.ndarray],
    leaf_of_item: dict[str, int],
) -> pd.DataFrame:
    """One row per user with a later dislike: whether what was predicted holds it.

    Columns: hr (one of the first dislikes), fhr (any), short (fewer than 3 past dislikes), tail (a
    later dislike of an item with fewer than 5 past ones exists), lif (one of those is predicted).
    """
    events = future[future["polarity"] == -1]
    leaf = events["item_id"].map(leaf_of_item).fillna(-1).to_numpy(np.int64)
    hit = np.zeros(len(events), bool)
    for user, at in events.groupby("user_id").indices.items():
        hit[at] = (leaf[at] >= 0) & np.isin(leaf[at], predicted.get(str(user), ()))
    first = events["event_time"] == events.groupby("user_id")["event_time"].transform("min")
    rare = _rare_items(past, events["item_id"])
    marks = pd.DataFrame(
        {"user_id": events["user_id"], "hr": hit & first, "fhr": hit, "tail": rare, "lif": hit & rare}
    )
    rows = marks.groupby("user_id").any().reset_index()
    rows["short"] = _new_users(past, rows["user_id"])
    return rows


def _new_users(past: pd.DataFrame, users: pd.Series) -> pd.Series:
    """Which users have fewer than 3 past dislikes."""
    counts = past[past["polarity"] == -1].groupby("user_id").size()
    return users.map(counts).fillna(0) < _LONG_TAIL_USER


def _rare_items(past: pd.DataFrame, items: pd.Series) -> pd.Series:
    """Which items were disliked by fewer than 5 users."""
    counts = past[past["polarity"] == -1].groupby("item_id")["user_id"].nunique()
    return items.map(counts).fillna(0) < _LONG_TAIL_ITEM


def _flattened(features: np.ndarray, column: int) -> np.ndarray:
    flat = features.copy()
    flat[:, column] = flat[:, column].mean()
    return flat


def _row(name: str, own: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> Row:
    """Figures of a method, and their distance from ours, from the draws of both."""
    difference = {} if own is ours else {of: Estimate.of(ours[of] - draws) for of, draws in own.items()}
    return Row(name, {of: Estimate.of(draws) for of, draws in own.items()}, difference)


def _ranking(scores: np.ndarray, exposures: pd.DataFrame) -> Ranking:
    return Ranking.of(scores, exposures["disliked"].to_numpy())


def _blocked(scores: np.ndarray, exposures: pd.DataFrame) -> dict[str, np.ndarray]:
    """Draws of the figures that judge scores of exposures."""
    ranking, users = _ranking(scores, exposures), exposures["user"].to_numpy()

    def overall(times: np.ndarray) -> list[float]:
        curve = ranking.curve(times)
        lost = [curve.likes_blocked_at(recall) for recall in RECALLS]
        return [curve.blocked_at(0.01), curve.blocked_at(0.05), curve.auc(), *lost]

    names = ("blocked at 1 %", "blocked at 5 %", "AUC", *FIGURES["likes lost at equal recall"])
    found = dict(zip(names, bootstrap(overall, users).T, strict=True))
    found["AUC within user"] = within_user_draws(scores, exposures)
    return found


def within_user_draws(scores: np.ndarray, exposures: pd.DataFrame) -> np.ndarray:
    """Draws of the within-user AUC of scores of exposures, as `train.baselines.judged` makes them."""
    # Summed per user beforehand: a user drawn twice must count twice, not pair with itself.
    ordered, pairs = user_pairs(scores, exposures["disliked"].to_numpy(), exposures["user"].to_numpy())
    return bootstrap(lambda times: within_user_auc(ordered * times, pairs * times), np.arange(len(pairs)))


def _long_tail(scores: np.ndarray, exposures: pd.DataFrame, past: pd.DataFrame) -> dict[str, np.ndarray]:
    """Draws of the blocked shares among the exposures of new users, and among those of rare items."""
    found: dict[str, np.ndarray] = {}
    for who, mask in (
        ("new users", _new_users(past, exposures["user_id"])),
        ("rare items", _rare_items(past, exposures["item_id"])),
    ):
        rows = exposures[mask]
        ranking = _ranking(scores[mask.to_numpy()], rows)

        def blocked(times: np.ndarray, ranking: Ranking = ranking) -> list[float]:
            curve = ranking.curve(times)
            return [curve.blocked_at(0.01), curve.blocked_at(0.05)]

        names = (f"{who}: blocked at 1 %", f"{who}: blocked at 5 %")
        found |= dict(zip(names, bootstrap(blocked, rows["user"].to_numpy()).T, strict=True))
    return found


def predicted_draws(hits: pd.DataFrame) -> dict[str, np.ndarray]:
    """Draws of the figures that judge predicted sets."""
    values = {
        "HR@20": hits["hr"],
        "FHR@20": hits["fhr"],
        "LUF@20": hits["fhr"][hits["short"]],
        "LIF@20": hits["lif"][hits["tail"]],
    }
    return {name: mean_over_users(own.to_numpy(float)) for name, own in values.items()}


def _counts(candidates: Candidates) -> CandidateCounts:
    users = int(candidates.pairs["user_id"].nunique())
    return CandidateCounts(users, candidates.whole, candidates.other_days, candidates.alone)
