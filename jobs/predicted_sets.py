"""From beams to predicted sets: what else may be predicted, and the order that decides (DESIGN section 8)."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from negrec_core.config import GenerationConfig
from negrec_core.semantic_ids import SemanticIds
from negrec_core.set_order import SET_FEATURES, Candidates, Popularity, SetOrder, candidates
from negrec_core.trie import Trie

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCHEMA = (
    "user_id string, rank int, codes array<int>, log_prob float, codebook_version string,"
    " model_version string, carried_from string"
)
_RIDGE = 1.0  # on standardised features


@dataclass(frozen=True, eq=False)
class Market:
    """What everybody did to each ID, as of any of some anchors.

    Attributes:
        trie: the legal IDs.
        leaf_of_item: item -> its leaf in the trie.
        negatives: users that disliked each ID, int64 [ids].
        positives: users that liked it, int64 [ids].
        recent: anchor, in microseconds -> (leaves, dislikes, likes) of the days before it, int64 each.
        pseudo_events: that log odds are smoothed by.
        popular_ids: how many of the most disliked IDs are candidates for everybody.
    """

    trie: Trie
    leaf_of_item: dict[str, int]
    negatives: npt.NDArray[np.int64]
    positives: npt.NDArray[np.int64]
    recent: dict[int, tuple[npt.NDArray[np.int64], ...]]
    pseudo_events: float
    popular_ids: int

    @classmethod
    def of(
        cls, ids: SemanticIds, rates: pa.Table, recent: pa.Table, pseudo_events: float, popular_ids: int
    ) -> "Market":
        """From what was counted by item.

        Args:
            ids: the legal IDs and their items.
            rates: (item_id, n_negatives, n_positives) as in `item_rate`.
            recent: (anchor_time, item_id, n_negatives, n_positives), of `recent_counts`.
            pseudo_events: that log odds are smoothed by.
            popular_ids: how many of the most disliked IDs are candidates for everybody.
        """
        trie = Trie.build(ids.codes, tuple(int(n) + 1 for n in ids.codes.max(0)))
        leaf_of_item = dict(zip(ids.items, trie.find(ids.codes).tolist(), strict=True))
        leaf, (negatives, positives) = _counted(rates, leaf_of_item)
        anchors = recent["anchor_time"].cast(pa.int64()).to_numpy()
        recent_leaf, counts = _counted(recent, leaf_of_item)
        order = np.argsort(anchors, kind="stable")
        order = order[recent_leaf[order] >= 0]
        names, starts = np.unique(anchors[order], return_index=True)
        spans = itertools.pairwise([*starts.tolist(), len(order)])
        of_anchor = [tuple(c[order[slice(*span)]] for c in (recent_leaf, *counts)) for span in spans]
        return cls(
            trie,
            leaf_of_item,
            _summed(leaf, negatives, trie.n_ids),
            _summed(leaf, positives, trie.n_ids),
            dict(zip(names.tolist(), of_anchor, strict=True)),
            pseudo_events,
            popular_ids,
        )

    @functools.lru_cache(maxsize=64)  # noqa: B019  # one for each task of Spark; of a daily run all users ask for one
    def at(self, anchor: int) -> tuple[Popularity, npt.NDArray[np.int64]]:
        """Popularity as of an anchor, in microseconds, and the IDs that are candidates for everybody."""
        nothing = np.zeros(0, np.int64)
        leaf, negatives, positives = self.recent.get(anchor, (nothing, nothing, nothing))
        popularity = Popularity.of(
            self.negatives,
            self.positives,
            _summed(leaf, negatives, self.trie.n_ids),
            _summed(leaf, positives, self.trie.n_ids),
            self.pseudo_events,
        )
        return popularity, popularity.most_disliked(self.popular_ids)

    def candidates(self, user: dict[str, Any]) -> tuple[Candidates, Popularity]:
        """Candidates of a row of `users_of`, and what their users' anchor knew."""
        popularity, most_disliked = self.at(user["anchor"])
        known = [self.leaf_of_item[item] for item in user["known"] or [] if item in self.leaf_of_item]
        codes = np.array([entry["codes"] for entry in user["entries"]], np.int64)
        log_probs = np.array([entry["log_prob"] for entry in user["entries"]], np.float64)
        beams = self.trie.find(codes.reshape(-1, self.trie.depth))
        found = candidates(beams, log_probs, most_disliked, np.array(known, np.int64), popularity)
        return found, popularity


def _counted(
    rows: pa.Table, leaf_of_item: dict[str, int]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """Leaf of each row's item, -1 for one without an ID, and its dislikes and likes."""
    leaf = [leaf_of_item.get(item, -1) for item in rows["item_id"].to_pylist()]
    counts = [rows[name].to_numpy().astype(np.int64) for name in ("n_negatives", "n_positives")]
    return np.array(leaf, np.int64), counts


def _summed(leaf: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Sums of counts by leaf, [n]; rows of leaf -1 are left out."""
    out = np.zeros(n, np.int64)
    np.add.at(out, leaf[leaf >= 0], counts[leaf >= 0])
    return out


def recent_counts(feedback: "DataFrame", anchors: "DataFrame", days: int) -> "DataFrame":
    """(anchor_time, item_id, n_negatives, n_positives) of the `days` days before each distinct anchor.

    Args:
        feedback: rows of `feedback` that may be used.
        anchors: (anchor_time), in any number.
        days: how far back to look.
    """
    from pyspark.sql import functions as F

    # Joined by the day, so that as many anchors as there are users cost no comparison of all with all.
    first, last = F.to_date(F.expr(f"anchor_time - INTERVAL {days} DAYS")), F.to_date("anchor_time")
    spans = anchors.select("anchor_time").distinct().withColumn("day", F.explode(F.sequence(first, last)))
    rows = feedback.select("item_id", "event_time", "polarity").withColumn("day", F.to_date("event_time"))
    return (
        rows.join(spans, "day")
        .where("event_time < anchor_time")
        .where(f"event_time >= anchor_time - INTERVAL {days} DAYS")
        .groupBy("anchor_time", "item_id")
        .agg(
            F.count_if(F.col("polarity") == -1).alias("n_negatives"),
            F.count_if(F.col("polarity") == 1).alias("n_positives"),
        )
    )


def users_of(beams: "DataFrame", contexts: "DataFrame", feedback: "DataFrame") -> "DataFrame":
    """One row per user with beams: their entries, the anchor in microseconds, all known dislikes.

    Args:
        beams: rows of `negative_item_set_shard`, or of what `jobs.generation` makes.
        contexts: (user_id, anchor_time) of the same users.
        feedback: rows of `feedback` before the anchors.
    """
    from pyspark.sql import functions as F

    others = [name for name in ("codebook_version", "model_version", "carried_from") if name in beams.columns]
    entries = beams.groupBy("user_id").agg(
        F.sort_array(F.collect_list(F.struct("rank", "codes", "log_prob"))).alias("entries"),
        *(F.max(name).alias(name) for name in others),
    )
    known = feedback.where("polarity = -1").groupBy("user_id").agg(F.collect_set("item_id").alias("known"))
    anchor = F.unix_micros("anchor_time").alias("anchor")
    return entries.join(contexts.select("user_id", anchor), "user_id").join(known, "user_id", "left")


def predicted_sets(
    users: "DataFrame", market: Market, order: SetOrder, settings: GenerationConfig
) -> "DataFrame":
    """Rows of `negative_item_set` of all users of `users_of`."""
    shared = users.sparkSession.sparkContext.broadcast((market, order))

    def choose(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        market, order = shared.value
        for batch in batches:
            rows = [row for user in batch.to_pylist() for row in set_rows(user, market, order, settings)]
            yield pa.RecordBatch.from_pylist(rows, SET_SCHEMA)

    return users.mapInArrow(choose, _SCHEMA)


SET_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("rank", pa.int32()),
        ("codes", pa.list_(pa.int32())),
        ("log_prob", pa.float32()),
        ("codebook_version", pa.string()),
        ("model_version", pa.string()),
        ("carried_from", pa.string()),
    ]
)


def set_rows(
    user: dict[str, Any], market: Market, order: SetOrder, settings: GenerationConfig
) -> Iterator[dict[str, Any]]:
    """The predicted set of one row of `users_of`."""
    found, popularity = market.candidates(user)
    # For a user of whom little is known, what many dislike is the better guess.
    rare_places = settings.rare_places if len(user["known"] or []) >= settings.rare_from else 0
    chosen = order.choose(found, popularity, settings.set_size, rare_places)
    codes = market.trie.codes_of(found.ids[chosen]).tolist()
    for rank, (own, log_prob) in enumerate(zip(codes, found.log_probs[chosen].tolist(), strict=True), 1):
        yield {
            "user_id": user["user_id"],
            "rank": rank,
            "codes": own,
            "log_prob": log_prob,
            "codebook_version": user.get("codebook_version"),
            "model_version": user.get("model_version"),
            "carried_from": user.get("carried_from"),
        }


def fit_order(users: Iterable[dict[str, Any]], labels: pa.Table, market: Market) -> SetOrder:
    """The order that puts what users disliked next before their other candidates.

    Args:
        users: rows of `users_of`.
        labels: (user_id, item_id, polarity), what they judged after their anchors.
        market: as of the anchors.
    """
    disliked = labels.filter(pc.equal(labels["polarity"], -1))
    next_leaves: dict[str, list[int]] = {}
    for user, item in zip(*(disliked[name].to_pylist() for name in ("user_id", "item_id")), strict=True):
        if item in market.leaf_of_item:
            next_leaves.setdefault(user, []).append(market.leaf_of_item[item])
    features, hits, owners = [np.zeros((0, len(SET_FEATURES)))], [np.zeros(0, bool)], [np.zeros(0, np.int64)]
    for n, row in enumerate(users):
        found, _ = market.candidates(row)
        hit = np.isin(found.ids, next_leaves.get(row["user_id"], []))
        # Others say nothing about an order.
        if hit.any():
            features.append(found.features)
            hits.append(hit)
            owners.append(np.full(len(hit), n))
    return conditional_logit(np.concatenate(features), np.concatenate(hits), np.concatenate(owners))


def conditional_logit(
    features: npt.NDArray[np.float64], disliked: npt.NDArray[np.bool_], users: npt.NDArray[np.int64]
) -> SetOrder:
    """Weights by which users chose their dislikes among their candidates, with a ridge penalty.

    Each dislike is one choice among all candidates of its user. Where no candidate was disliked, the order
    is the generator's.

    Args:
        features: of the candidates of all users, [n, F].
        disliked: which of them were disliked next, at least one of each user, [n].
        users: whose they are, ascending, [n].
    """
    from scipy.optimize import minimize

    if not disliked.any():
        return SetOrder(np.eye(len(SET_FEATURES))[0])
    spread = features.std(0)
    # The deviation of equal values may be a rounding error instead of 0.
    spread[np.ptp(features, axis=0) == 0] = np.inf
    scaled = (features - features.mean(0)) / spread
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    owner = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(users))))
    count = np.add.reduceat(disliked.astype(np.float64), starts)

    def loss(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        scores = scaled @ weights
        most = np.maximum.reduceat(scores, starts)
        mass = np.exp(scores - most[owner])
        total = np.add.reduceat(mass, starts)
        likelihood = np.add.reduceat(disliked * scores, starts) - count * (np.log(total) + most)
        surprise = disliked - (count / total)[owner] * mass
        slope = _RIDGE * weights - scaled.T @ surprise
        return float(_RIDGE * weights @ weights / 2 - likelihood.sum()), slope

    found = minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B")
    return SetOrder(found.x / spread)
