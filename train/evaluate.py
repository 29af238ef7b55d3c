"""`negrec evaluate`: a published list against what its users did next (DESIGN section 8).

One row is a (user, anchor). The block score and the rules it is compared with see the same events: all
feedback before the anchors. Nothing here changes a table.
"""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from negrec_core.block_score import FEATURES
from negrec_core.blocklist import Snapshot, load_snapshot
from negrec_core.config import Config
from negrec_core.delta import DeltaStore, day_range
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK
from negrec_core.items import load_items
from negrec_core.metrics import LEADS, Estimate, Ranking, bootstrap, user_pairs, within_user_auc
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.trie import Trie
from train.baselines import SET_SIZE, Baseline, Known, baselines, judged

OURS = "negrec"
_LONG_TAIL_USER = 3
_LONG_TAIL_ITEM = 5


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: its name.
        figures: by the names of `negrec_core.metrics.FIGURES`.
        lead: what ours has more than this method, of `LEADS`, with the interval of the paired
            difference; empty for ours.
    """

    method: str
    figures: dict[str, Estimate]
    lead: dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """All figures of one list.

    Attributes:
        ds: log date of the list.
        seed: of the random method and the bootstrap.
        users: users with judged exposures after their anchors.
        dislikes: disliked exposures.
        likes: liked exposures.
        listed: users with a list.
        illegal: predicted IDs that no item has.
        rows: the methods, ours first.
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
    without: dict[str, float]
    threshold: float
    likes_over: float
    dislikes_over: float


def evaluate(warehouse: Path, config: Config, ds: str, *, seed: int) -> Evaluation:
    """Judge the list of `ds` by the feedback of the horizon after its anchors.

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
    predicted, illegal = load_predictions(store, ds, trie)

    items = load_items(store, ds, columns=["category"]).to_pandas()
    graph = store.read("item_graph", ["item_id", "neighbor_id", "score"], days=[ds]).to_pandas()
    category = items.set_index("item_id")["category"]
    pseudo = config.calibration.rate_pseudo_events
    known = Known(past, category, graph, leaf_of_item, trie.n_ids, pseudo)
    users = sorted(future["user_id"].unique())
    features = exposure_features(snapshot, exposures)
    methods = {OURS: Baseline(snapshot.score.score(features), predicted)}
    methods |= baselines(known, exposures, users, seed)
    draws = {}
    for name, method in methods.items():
        hits = hit_table(past, future, method.sets, leaf_of_item)
        draws[name] = _blocked(method.scores, exposures, seed) | _predicted(hits, seed)
    disliked = exposures["disliked"].to_numpy()
    over = methods[OURS].scores >= snapshot.score.threshold
    return Evaluation(
        ds=ds,
        seed=seed,
        users=int(exposures["user"].nunique()),
        dislikes=int(disliked.sum()),
        likes=int((~disliked).sum()),
        listed=len(snapshot.users),
        illegal=illegal,
        rows=[_row(name, own, draws[OURS]) for name, own in draws.items()],
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
    if config.anchors == "explicit":
        anchors = store.read("anchor", ["user_id", "anchor_time"], days=[ds]).to_pandas()
        anchor = rows["user_id"].map(anchors.set_index("user_id")["anchor_time"])
        past = rows[anchor.isna() | (rows["event_time"] < anchor)]
    else:
        anchor = pd.Series(pd.Timestamp(config.end_of_day(ds)), index=rows.index)
        past = rows[rows["event_time"] < anchor]
    future = rows[(rows["event_time"] > anchor) & (rows["event_time"] <= anchor + horizon)]
    return past, future


def exposure_features(snapshot: Snapshot, exposures: pd.DataFrame) -> np.ndarray:
    """Block-score features [n, F] of the exposures, as the ranking service computes them."""
    out = np.zeros((len(exposures), len(FEATURES)))
    for user, rows in exposures.groupby("user_id", sort=False).indices.items():
        out[rows] = snapshot.features(str(user), exposures["item_id"].to_numpy()[rows].tolist())
    return out


def load_predictions(store: DeltaStore, ds: str, trie: Trie) -> tuple[dict[str, np.ndarray], int]:
    """Predicted leaves of each user, best first, and how many predicted IDs are illegal."""
    rows = store.read("negative_item_set", ["user_id", "rank", "codes"], days=[ds])
    rows = rows.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    codes = rows["codes"].combine_chunks().flatten().to_numpy().reshape(-1, trie.depth)
    inside = (codes < np.array(trie.code_counts)).all(1)
    leaf = np.where(inside, trie.find(np.where(inside[:, None], codes, 0)), -1)
    groups = pd.Series(leaf).groupby(rows["user_id"].to_numpy(zero_copy_only=False)).indices
    sets = {str(user): leaf[at][:SET_SIZE] for user, at in groups.items()}
    return sets, int((leaf < 0).sum())


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
    negatives = past[past["polarity"] == -1]
    by_user = negatives.groupby("user_id").size()
    by_item = negatives.groupby("item_id")["user_id"].nunique()
    events = future[future["polarity"] == -1]
    leaf = events["item_id"].map(leaf_of_item).fillna(-1).to_numpy(np.int64)
    hit = np.zeros(len(events), bool)
    for user, at in events.groupby("user_id").indices.items():
        hit[at] = (leaf[at] >= 0) & np.isin(leaf[at], predicted.get(str(user), ()))
    first = events["event_time"] == events.groupby("user_id")["event_time"].transform("min")
    rare = events["item_id"].map(by_item).fillna(0) < _LONG_TAIL_ITEM
    marks = pd.DataFrame(
        {"user_id": events["user_id"], "hr": hit & first, "fhr": hit, "tail": rare, "lif": hit & rare}
    )
    rows = marks.groupby("user_id").any().reset_index()
    rows["short"] = rows["user_id"].map(by_user).fillna(0) < _LONG_TAIL_USER
    return rows


def _flattened(features: np.ndarray, column: int) -> np.ndarray:
    flat = features.copy()
    flat[:, column] = flat[:, column].mean()
    return flat


def _row(name: str, own: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> Row:
    """Figures of a method, and the lead of ours over it, from their draws."""
    lead = {} if own is ours else {of: Estimate.of(ours[of] - own[of]) for of in LEADS}
    return Row(name, {of: Estimate.of(draws) for of, draws in own.items()}, lead)


def _ranking(scores: np.ndarray, exposures: pd.DataFrame) -> Ranking:
    return Ranking.of(scores, exposures["disliked"].to_numpy())


def _blocked(scores: np.ndarray, exposures: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Draws of the figures that judge scores of exposures."""
    ranking, users = _ranking(scores, exposures), exposures["user"].to_numpy()
    # Summed per user beforehand: a user drawn twice must count twice, not pair with itself.
    ordered, pairs = user_pairs(scores, exposures["disliked"].to_numpy(), users)

    def overall(times: np.ndarray) -> list[float]:
        curve = ranking.curve(times)
        return [curve.blocked_at(0.01), curve.blocked_at(0.05), curve.auc()]

    names = ("blocked at 1 %", "blocked at 5 %", "AUC")
    found = dict(zip(names, bootstrap(overall, users, seed).T, strict=True))
    found["AUC within user"] = bootstrap(
        lambda times: within_user_auc(ordered * times, pairs * times), np.arange(len(pairs)), seed
    )
    return found


def _predicted(hits: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Draws of the figures that judge predicted sets."""
    return {
        "HR@20": _mean_over_users(hits["hr"], seed),
        "FHR@20": _mean_over_users(hits["fhr"], seed),
        "LUF@20": _mean_over_users(hits["fhr"][hits["short"]], seed),
        "LIF@20": _mean_over_users(hits["lif"][hits["tail"]], seed),
    }


def _mean_over_users(values: pd.Series, seed: int) -> np.ndarray:
    """Draws of the mean of one value per user; NaN without any."""
    own = values.to_numpy(float)
    if not len(own):
        return np.array([np.nan])
    return bootstrap(lambda times: float(np.average(own, weights=times)), np.arange(len(own)), seed)
