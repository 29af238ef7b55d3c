"""What a team would use instead of negrec, given the same events (DESIGN section 8).

Every method scores (user, item) pairs, and a baseline predicts a set of semantic IDs for each user, without
those of items that the user has disliked already.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier

from negrec_core.block_score import smoothed_log_odds

RANDOM, TIMES_DISLIKED, ITEM_RATE, ITEM_USER_RATE, CATEGORY, SWING, CLASSIFIER = (
    "random",
    "times disliked",
    "item rate",
    "item + user rate",
    "category rule",
    "Swing neighbours",
    "boosted classifier",
)
SET_SIZE = 20
# The classifier ranks this many of the most disliked items for each user; all would take hours.
_CANDIDATES = 100
_USERS_AT_ONCE = 2000
# Items looked at for a set of 20 IDs, several of which may share one.
_MOST_OF_ONE_ID = 10 * SET_SIZE


# Takes pairs (user_id, item_id) and gives scores [n], higher for likelier dislikes.
Score = Callable[[pd.DataFrame], np.ndarray]


@dataclass(frozen=True)
class Method:
    """What is judged: a score of pairs, and user -> up to 20 leaves; None where it predicts no sets."""

    score: Score
    sets: dict[str, np.ndarray] | None


@dataclass(frozen=True)
class Known:
    """What was known before the anchors.

    Attributes:
        past: feedback (user_id, item_id, event_time, polarity), dislikes and likes.
        category: item -> category path.
        graph: rows of `item_graph` (item_id, neighbor_id, score).
        leaf: item -> its leaf in the trie of semantic IDs.
        n_ids: number of leaves.
        pseudo: pseudo-events that rates are smoothed by.
        shown: as `past`, with polarity 0: what was shown and neither disliked nor liked, if the block score
            may use it.
    """

    past: pd.DataFrame
    category: pd.Series
    graph: pd.DataFrame
    leaf: dict[str, int]
    n_ids: int
    pseudo: float
    shown: pd.DataFrame = field(default_factory=pd.DataFrame)


def judged(feedback: pd.DataFrame) -> pd.DataFrame:
    """One row per (user, item) shown and judged: user_id, item_id, disliked, user (integer code).

    An item both disliked and liked counts as disliked.
    """
    rows = feedback.groupby(["user_id", "item_id"], sort=True)["polarity"].min().reset_index()
    rows["disliked"] = rows["polarity"] == -1
    rows["user"] = pd.factorize(rows["user_id"])[0]
    return rows


def baselines(known: Known, users: list[str], seed: int) -> dict[str, Method]:
    """All baselines, by name.

    Args:
        known: what they may use.
        users: whom they predict sets for.
        seed: of the random one and of the classifier.
    """
    rng = np.random.default_rng(seed)
    by_count = _times_disliked(known)
    own = own_dislikes(known)
    ids_by_rate = _ids_by_rate(known)
    by_rate = {user: first_new(ids_by_rate, own.get(user)) for user in users}

    def rates(pairs: pd.DataFrame) -> pd.DataFrame:
        return features(known.past, known.category, pairs, known.pseudo)

    found = {
        RANDOM: Method(
            lambda pairs: np.random.default_rng(seed).random(len(pairs)),
            {user: first_new(_random_leaves(known.n_ids, rng), own.get(user)) for user in users},
        ),
        TIMES_DISLIKED: times_disliked(known, users),
        # The user's rate moves no item before another.
        ITEM_RATE: Method(lambda pairs: rates(pairs)["item"].to_numpy(), by_rate),
        ITEM_USER_RATE: Method(lambda pairs: rates(pairs)[["item", "user"]].sum(axis=1).to_numpy(), by_rate),
    }
    if known.category.nunique() > 1:
        sets = _category_sets(known, by_count.index, users, own)
        found[CATEGORY] = Method(lambda pairs: rates(pairs)["user_category"].to_numpy(), sets)
    found[SWING] = _swing(known, users, own)
    classify = fit_classifier(known, seed)
    if classify:
        found[CLASSIFIER] = Method(classify, _ranked_sets(known, by_count.index, users, own, classify))
    return found


def times_disliked(known: Known, users: list[str]) -> Method:
    """Items by how often they were disliked; the same for all users but for what they disliked themselves."""
    by_count, own = _times_disliked(known), own_dislikes(known)
    most_disliked = _leaves(by_count.index, known.leaf)
    return Method(
        lambda pairs: pairs["item_id"].map(by_count).fillna(0).to_numpy(float),
        {user: first_new(most_disliked, own.get(user)) for user in users},
    )


def _times_disliked(known: Known) -> pd.Series:
    return _counts(known.past, ["item_id"])["negatives"].sort_values(ascending=False, kind="stable")


def features(history: pd.DataFrame, category: pd.Series, pairs: pd.DataFrame, pseudo: float) -> pd.DataFrame:
    """Smoothed log odds of dislike against like in `history`, for (user_id, item_id) `pairs`.

    Columns: item, user, category, top (the category's first level), user_category, user_top, the counts
    n_item and n_user of dislikes, and shown_item and shown_user: the log odds of neither against like, 0
    where nothing is neither.
    """
    top = category.str.split("/").str[0]
    neither = history[history["polarity"] >= 0]
    history = history[history["polarity"] != 0]
    rows, asked = (
        frame[[*kept, "item_id"]].assign(
            category=frame["item_id"].map(category), top=frame["item_id"].map(top)
        )
        for frame, kept in ((history, ["user_id", "polarity"]), (pairs, ["user_id"]))
    )
    share = _share(history)
    out = pd.DataFrame(index=pairs.index)
    for name, keys in {
        "item": ["item_id"],
        "user": ["user_id"],
        "category": ["category"],
        "top": ["top"],
        "user_category": ["user_id", "category"],
        "user_top": ["user_id", "top"],
    }.items():
        counts = _counts(rows, keys)
        found = asked[keys].merge(counts, how="left", left_on=keys, right_index=True).fillna(0)
        out[name] = smoothed_log_odds(
            found["negatives"].to_numpy(), found["positives"].to_numpy(), share, pseudo
        )
        if name in ("item", "user"):
            out[f"n_{name}"] = found["negatives"].to_numpy()
            out[f"shown_{name}"] = 0.0
            if (neither["polarity"] == 0).any():
                others = _counts(neither, keys, 0)
                found = asked[keys].merge(others, how="left", left_on=keys, right_index=True).fillna(0)
                out[f"shown_{name}"] = smoothed_log_odds(
                    found["negatives"].to_numpy(), found["positives"].to_numpy(), _share(neither, 0), pseudo
                )
    return out


def fit_classifier(known: Known, seed: int) -> Score | None:
    """Gradient-boosted trees that tell dislikes from likes by `features`; scores pairs.

    It learns the last third of each user's past from everybody's first two thirds, and then scores by
    the whole past. None where there is nothing to tell apart.
    """
    past = pd.concat([known.past, known.shown]).sort_values("event_time", kind="stable")
    place = past.groupby("user_id").cumcount() / past.groupby("user_id")["item_id"].transform("size")
    late = judged(past[(place >= 2 / 3) & (past["polarity"] != 0)])
    if late["disliked"].nunique() < 2:
        return None
    early = features(past[place < 2 / 3], known.category, late, known.pseudo)
    model = HistGradientBoostingClassifier(random_state=seed).fit(early, late["disliked"])

    def classify(pairs: pd.DataFrame) -> np.ndarray:
        known_now = features(past, known.category, pairs, known.pseudo)
        return np.asarray(model.predict_proba(known_now)[:, 1])

    return classify


def _share(rows: pd.DataFrame, polarity: int = -1) -> float:
    """Share of dislikes, or of another polarity; inside 0 and 1, so that its log odds are finite."""
    return float(np.clip((rows["polarity"] == polarity).mean(), 1e-3, 1 - 1e-3)) if len(rows) else 0.5


def _counts(rows: pd.DataFrame, keys: list[str], polarity: int = -1) -> pd.DataFrame:
    """Rows of a polarity, by default dislikes (negatives), and the others (positives) per key."""
    counts = rows.assign(negative=rows["polarity"] == polarity).groupby(keys)["negative"].agg(["sum", "size"])
    return pd.DataFrame({"negatives": counts["sum"], "positives": counts["size"] - counts["sum"]})


def _leaves(items: pd.Index, leaf: dict[str, int]) -> np.ndarray:
    """The distinct leaves of items in order; items without a semantic ID are left out."""
    return np.array(list(dict.fromkeys(leaf[item] for item in items if item in leaf)), np.int64)


def _random_leaves(n_ids: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(n_ids, min(_MOST_OF_ONE_ID, n_ids), replace=False)


def own_dislikes(known: Known) -> dict[str, np.ndarray]:
    """Leaves of what each user has disliked."""
    rows = known.past[known.past["polarity"] == -1]
    rows = rows.assign(leaf=rows["item_id"].map(known.leaf)).dropna(subset=["leaf"])
    leaf = rows["leaf"].to_numpy(np.int64)
    return {str(user): np.unique(leaf[at]) for user, at in rows.groupby("user_id").indices.items()}


def first_new(ranked: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    """The first 20 of distinct leaves in order, without the user's own dislikes."""
    if own is not None:
        ranked = ranked[: SET_SIZE + len(own)]
        ranked = ranked[~np.isin(ranked, own)]
    return ranked[:SET_SIZE]


def _ids_by_rate(known: Known) -> np.ndarray:
    """The IDs by descending smoothed rate; items that share an ID are counted together."""
    rows = known.past.assign(leaf=known.past["item_id"].map(known.leaf)).dropna(subset=["leaf"])
    counts = _counts(rows, ["leaf"])
    share = _share(rows)
    odds = smoothed_log_odds(
        counts["negatives"].to_numpy(), counts["positives"].to_numpy(), share, known.pseudo
    )
    return counts.index.to_numpy()[np.argsort(-odds, kind="stable")].astype(np.int64)


def _category_sets(
    known: Known, by_count: pd.Index, users: list[str], own: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The most disliked items of the category each user disliked most; of all, without one."""
    disliked = known.past[known.past["polarity"] == -1]
    counts = disliked.assign(category=disliked["item_id"].map(known.category))
    sizes = counts.groupby(["user_id", "category"]).size().sort_values(ascending=False, kind="stable")
    worst = sizes.reset_index().drop_duplicates("user_id").set_index("user_id")["category"]
    of = pd.Series(by_count, by_count).map(known.category)
    tops = {name: _leaves(of.index[of == name], known.leaf) for name in worst.unique()}
    everything = _leaves(by_count, known.leaf)
    ranked = {user: tops[worst[user]] if user in worst else everything for user in users}
    return {user: first_new(leaves, own.get(user)) for user, leaves in ranked.items()}


def _swing(known: Known, users: list[str], own: dict[str, np.ndarray]) -> Method:
    """Sum of the Swing scores from the user's past dislikes to the item."""
    disliked = known.past[known.past["polarity"] == -1].drop_duplicates(["user_id", "item_id"])
    items = pd.Index(pd.concat([disliked["item_id"], known.graph["neighbor_id"]]).unique())
    who = pd.Index(pd.concat([disliked["user_id"], pd.Series(users, dtype=object)]).unique())
    edges = known.graph[known.graph["item_id"].isin(items)]
    links = (items.get_indexer(edges["item_id"]), items.get_indexer(edges["neighbor_id"]))
    graph = sparse.csr_matrix((edges["score"], links), (len(items), len(items)))
    at = (who.get_indexer(disliked["user_id"]), items.get_indexer(disliked["item_id"]))
    dislikes = sparse.csr_matrix((np.ones(len(disliked)), at), (len(who), len(items)))

    def sums(rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Some of the users' rows at a time, and their sums for all items."""
        for first in range(0, len(rows), _USERS_AT_ONCE):
            some = rows[first : first + _USERS_AT_ONCE]
            yield some, (dislikes[some] @ graph).tocsr()

    def score(pairs: pd.DataFrame) -> np.ndarray:
        row, column = who.get_indexer(pairs["user_id"]), items.get_indexer(pairs["item_id"])
        known_pair = (row >= 0) & (column >= 0)
        scores = np.zeros(len(pairs))
        for some, block in sums(np.unique(row[known_pair])):
            here = np.flatnonzero(known_pair & np.isin(row, some))
            scores[here] = np.asarray(block[np.searchsorted(some, row[here]), column[here]]).ravel()
        return scores

    sets = {}
    for some, block in sums(who.get_indexer(users)):
        for n, at_user in enumerate(some):
            span = slice(block.indptr[n], block.indptr[n + 1])
            best = np.argsort(-block.data[span], kind="stable")[:_MOST_OF_ONE_ID]
            ranked = _leaves(items[block.indices[span][best]], known.leaf)
            sets[str(who[at_user])] = first_new(ranked, own.get(str(who[at_user])))
    return Method(score, sets)


def _ranked_sets(
    known: Known,
    by_count: pd.Index,
    users: list[str],
    own: dict[str, np.ndarray],
    classify: Score,
) -> dict[str, np.ndarray]:
    """The 20 of the most disliked items that a classifier ranks first for each user."""
    candidates = pd.Index([item for item in by_count if item in known.leaf][:_CANDIDATES])

    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        for first in range(0, len(users), _USERS_AT_ONCE):
            some = users[first : first + _USERS_AT_ONCE]
            pairs = pd.DataFrame(
                {"user_id": np.repeat(some, len(candidates)), "item_id": np.tile(candidates, len(some))}
            )
            for user, scores in zip(some, classify(pairs).reshape(len(some), -1), strict=True):
                best = np.argsort(-scores, kind="stable")
                yield user, first_new(_leaves(candidates[best], known.leaf), own.get(user))

    return dict(blocks())
