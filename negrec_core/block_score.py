"""The block score: how likely a user is to reject an item (DESIGN section 8).

A logistic model of a few figures that the ranking service can compute from published tables: how
near the item's semantic ID is to the user's predicted ones, weighed by the generator's
probabilities or not, the smoothed dislike rates of the item, of the user, and of the user within
the item's category, and what `negrec_core.taste` makes of all feedback. One definition serves
calibration, the published entries and the reader.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEATURES = (
    "similarity",
    "affinity",
    "item_log_odds",
    "user_log_odds",
    "category_log_odds",
    "top_category_log_odds",
    "taste",
    "user_taste",
    "newcomer",
)


@dataclass(frozen=True)
class Items:
    """Items as the score sees them.

    Attributes:
        vectors: what users' vectors are multiplied with, float32 [n, 1 + dim + factors]: the item's own log
            odds, the unit embedding of its semantic ID (zeros for one without) and its factors.
        categories: numbers of their category and top category, int32 [n, 2]; see `Categories`.
        dim: length of the embeddings.
    """

    vectors: np.ndarray
    categories: np.ndarray
    dim: int

    @classmethod
    def of(cls, unit: np.ndarray, categories: np.ndarray, tastes: np.ndarray) -> "Items":
        """Items from their parts.

        Args:
            unit: unit embeddings of their semantic IDs, [m, dim]; the last n - m items have none.
            categories: as the attribute, [n, 2].
            tastes: their own log odds and factors, see `negrec_core.taste`, [n, 1 + factors].
        """
        unit = without_id(unit, len(tastes))
        vectors = np.column_stack([tastes[:, :1], unit, tastes[:, 1:]]).astype(np.float32)
        return cls(vectors, categories, unit.shape[1])

    @property
    def unit(self) -> np.ndarray:
        """Unit embeddings [n, dim]."""
        return self.vectors[:, 1 : 1 + self.dim]

    def take(self, rows: np.ndarray | list[int]) -> "Items":
        """The items of some rows."""
        return Items(self.vectors.take(rows, axis=0), self.categories.take(rows, axis=0), self.dim)

    def with_unknown(self, prior_log_odds: float) -> "Items":
        """The same and a last one, row -1, that stands for items of which nothing is known."""
        unknown = np.zeros((1, self.vectors.shape[1]), np.float32)
        unknown[0, 0] = prior_log_odds
        none = np.zeros((1, 2), np.int32)
        return Items(np.vstack([self.vectors, unknown]), np.vstack([self.categories, none]), self.dim)


@dataclass(frozen=True)
class Tally:
    """How often one user disliked and liked items of each category, over the whole window.

    Attributes:
        categories: numbers of the category and its top category, as those of `Items`, int32 [k, 2]; a number
            may be there more than once.
        negatives: dislikes, [k].
        positives: likes, [k].
    """

    categories: np.ndarray
    negatives: np.ndarray
    positives: np.ndarray

    @classmethod
    def of(cls, counts: Sequence[Mapping[str, Any]], numbers: Mapping[str, tuple[int, int]]) -> "Tally":
        """The tally of a `user_context` row's `categories`; `numbers` are those of the candidates."""
        known = [count for count in counts if count["category"] in numbers]
        return cls(
            np.array([numbers[count["category"]] for count in known], np.int32).reshape(-1, 2),
            np.array([count["n_negatives"] for count in known], np.int64),
            np.array([count["n_positives"] for count in known], np.int64),
        )


@dataclass(frozen=True)
class CurvePoint:
    """What a threshold blocks of the held-back feedback, as shares."""

    threshold: float
    likes_blocked: float
    dislikes_blocked: float


@dataclass(frozen=True)
class BlockScore:
    """A fitted block score.

    Attributes:
        coefficients: float64 [F], log odds per unit of each of `FEATURES`.
        intercept: log odds where all features are 0.
        threshold: an item is blocked where its score is at least this.
        prior_log_odds: of dislike against like over all feedback.
        pseudo_events: how many events' worth of prior a user's log odds hold.
    """

    coefficients: np.ndarray
    intercept: float
    threshold: float
    prior_log_odds: float
    pseudo_events: float

    def score(self, features: np.ndarray) -> np.ndarray:
        """Probabilities [n] of features [n, F]."""
        return sigmoid(features @ self.coefficients + self.intercept)

    def user_log_odds(self, n_negatives: np.ndarray, n_positives: np.ndarray) -> np.ndarray:
        """Smoothed log odds of users by their counts; 0 events give the prior."""
        return smoothed_log_odds(n_negatives, n_positives, sigmoid(self.prior_log_odds), self.pseudo_events)


def features(
    candidates: Items,
    entries: np.ndarray,
    log_probs: np.ndarray,
    tally: Tally,
    taste: np.ndarray,
    item_log_odds: np.ndarray,
    user_log_odds: float,
    prior_log_odds: float,
    pseudo_events: float,
) -> np.ndarray:
    """Features of candidate items for one user.

    Args:
        candidates: n items.
        entries: unit embeddings of the user's predicted IDs, [m, dim]; m may be 0.
        log_probs: the generator's log-probabilities of the entries, finite, [m].
        tally: the user's feedback by category.
        taste: the user's: own log odds, weights of the embedding and of the factors, [1 + dim + factors]; all
            zeros for a user of whom nothing is known.
        item_log_odds: of the candidates, [n].
        user_log_odds: of the user.
        prior_log_odds: of dislike against like over all feedback.
        pseudo_events: how many events' worth of prior the log odds within a category hold.

    Returns:
        float64 [n, F], columns in the order of `FEATURES`.
    """
    queries = np.zeros((2 + len(entries), len(taste)), np.float32)
    queries[0] = taste
    queries[0, 0] = 1.0  # the item's own log odds
    if len(entries):
        weight = np.exp(log_probs - log_probs.max())
        queries[2:, 1 : 1 + candidates.dim] = entries
        queries[1] = (weight / weight.sum()) @ queries[2:]
    products = queries @ candidates.vectors.T
    out = np.empty((len(FEATURES), len(candidates.vectors)))
    out[0] = products[2:].max(axis=0) if len(entries) else 0.0
    out[1] = products[1]
    out[2] = item_log_odds
    out[3] = user_log_odds
    out[4:6] = _category_log_odds(candidates.categories, tally, prior_log_odds, pseudo_events).T
    out[6] = products[0]
    out[7] = taste[0]
    out[8] = not taste.any()
    return out.T


def _category_log_odds(categories: np.ndarray, tally: Tally, prior: float, pseudo: float) -> np.ndarray:
    """The user's smoothed log odds within categories, in the shape of `categories`; the prior within none."""
    own = tally.categories.ravel()
    negatives, positives = (
        np.bincount(own, np.repeat(counts, 2)).take(own) for counts in (tally.negatives, tally.positives)
    )
    log_odds = np.full(1 + max(categories.max(initial=0), own.max(initial=0)), prior)
    log_odds[own] = smoothed_log_odds(negatives, positives, sigmoid(prior), pseudo)
    log_odds[0] = prior  # number 0 is no category
    return log_odds.take(categories)


def without_id(unit: np.ndarray, n: int) -> np.ndarray:
    """Unit embeddings of `n` items, those that `unit` has not being zeros: items without a semantic ID."""
    return np.pad(unit, ((0, n - len(unit)), (0, 0)))


def user_weights(weights: Sequence[float] | np.ndarray | None, items: Items) -> np.ndarray:
    """The taste of a row of `user_taste`, float64 [1 + dim + factors]; zeros where there is none."""
    return np.zeros(items.vectors.shape[1]) if weights is None else np.array(weights, np.float64)


def smoothed_log_odds(
    n_negatives: np.ndarray, n_positives: np.ndarray, prior: np.ndarray | float, pseudo: float
) -> np.ndarray:
    """log((n- + pseudo * prior) / (n+ + pseudo * (1 - prior)))."""
    return np.asarray(np.log((n_negatives + pseudo * prior) / (n_positives + pseudo * (1.0 - prior))))


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, np.float64))))


def threshold_at(liked_scores: np.ndarray, share: float) -> float:
    """Lowest threshold at which at most `share` of the liked are blocked (score >= threshold).

    Where all may be blocked it is the lowest score; without any liked score it is 1.
    """
    if not len(liked_scores):
        return 1.0
    descending = np.sort(liked_scores)[::-1]
    # A little more: 0.29 * 100 is less than 29 in floating point.
    allowed = int(np.floor(share * len(descending) + 1e-9))
    if allowed >= len(descending):
        return float(descending[-1])
    # Just above the first like that must pass: equal scores cannot be told apart.
    return float(np.nextafter(descending[allowed], np.inf))


def curve(liked: np.ndarray, disliked: np.ndarray, shares: np.ndarray) -> list[CurvePoint]:
    """Points of the threshold curve at the given shares of likes blocked."""
    points = []
    for share in shares:
        threshold = threshold_at(liked, float(share))
        points.append(CurvePoint(threshold, _blocked(liked, threshold), _blocked(disliked, threshold)))
    return points


def _blocked(scores: np.ndarray, threshold: float) -> float:
    return float(np.mean(scores >= threshold)) if len(scores) else 0.0
