"""Figures of DESIGN section 8, as functions of arrays.

Two families: whether what was predicted was later disliked (HR, FHR, LUF, LIF), and what a block list
is for, the deployment figure: the share of disliked exposures that is blocked when a given share of the
liked is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The figures by the table they stand in, named as every report prints them.
RECALLS = (0.1, 0.2, 0.5)
FIGURES = {
    "what a block list is for": ("blocked at 1 %", "blocked at 5 %", "AUC", "AUC within user"),
    "what was predicted": ("HR@20", "FHR@20", "LUF@20", "LIF@20", "candidate accuracy"),
    "likes lost at equal recall": tuple(f"likes lost at {recall * 100:.0f} %" for recall in RECALLS),
}
# The same among new users and rare items alone, where LUF and LIF are the FHR; too much for a terminal.
LONG_TAIL = tuple(f"{who}: blocked at {share} %" for who in ("new users", "rare items") for share in (1, 5))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> "Estimate":
        """From what `bootstrap` gives; the difference of two such arrays gives a paired interval.

        Resamples in which there is no figure (NaN) are left out.
        """
        known = draws[1:][~np.isnan(draws[1:])]
        low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
        return cls(float(draws[0]), float(low), float(high))


@dataclass(frozen=True)
class Curve:
    """What is blocked down to the end of each group of equal scores, best first.

    Attributes:
        disliked: disliked exposures down to there, float64 [groups].
        liked: liked ones.
    """

    disliked: np.ndarray
    liked: np.ndarray

    def blocked_at(self, likes_lost: float) -> float:
        """Share of disliked exposures blocked when at most the share `likes_lost` of the liked are.

        Equal scores are blocked together or not at all. NaN where nothing was disliked or nothing liked.
        """
        if not self._judges():
            return float("nan")
        total = self.liked[-1]
        # A little more: 0.29 * 100 is less than 29 in floating point.
        allowed = np.floor(likes_lost * total + 1e-9)
        # Where all likes may go, the lowest of them is the threshold.
        if allowed < total:
            group = int(np.searchsorted(self.liked, allowed, "right")) - 1
        else:
            group = int(np.searchsorted(self.liked, allowed))
        return float(self.disliked[group] / self.disliked[-1]) if group >= 0 else 0.0

    def likes_blocked_at(self, recall: float) -> float:
        """Share of liked exposures blocked when exactly the share `recall` > 0 of the disliked are.

        Of equal scores as many are blocked as it takes, at random. NaN as in `blocked_at`.
        """
        if not self._judges():
            return float("nan")
        # A little less: 0.1 * 30 is more than 3 in floating point.
        wanted = recall * self.disliked[-1] - 1e-9
        group = int(np.searchsorted(self.disliked, wanted))
        bad, good = (self.disliked[group - 1], self.liked[group - 1]) if group else (0.0, 0.0)
        part = (wanted - bad) / (self.disliked[group] - bad)
        return float((good + part * (self.liked[group] - good)) / self.liked[-1])

    def auc(self) -> float:
        """Probability that a disliked exposure scores above a liked one; a tie counts half.

        NaN where nothing was disliked or nothing liked.
        """
        if not self._judges():
            return float("nan")
        likes_here = np.diff(self.liked, prepend=0.0)
        won = (self.liked[-1] - self.liked + likes_here / 2) * np.diff(self.disliked, prepend=0.0)
        return float(won.sum() / (self.disliked[-1] * self.liked[-1]))

    def _judges(self) -> bool:
        return bool(len(self.liked) and self.disliked[-1] and self.liked[-1])


@dataclass(frozen=True)
class Ranking:
    """Judged exposures by descending score, sorted once for all resamples.

    Attributes:
        order: [n] rows by descending score.
        disliked: bool [n], in that order.
        ends: last position of each group of equal scores.
    """

    order: np.ndarray
    disliked: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, disliked: np.ndarray) -> "Ranking":
        """Rank exposures by `scores` [n], higher means more likely disliked; `disliked` is bool [n]."""
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))[: len(ordered)]
        return cls(order, disliked[order], ends)

    def curve(self, weights: np.ndarray | None = None) -> Curve:
        """What is blocked as the threshold falls.

        Args:
            weights: [n] how often each row counts, in the order given to `of`; absent: once.
        """
        ordered = np.ones(len(self.order)) if weights is None else weights[self.order]
        disliked = np.cumsum(np.where(self.disliked, ordered, 0.0))[self.ends]
        return Curve(disliked, np.cumsum(ordered)[self.ends] - disliked)


def user_pairs(scores: np.ndarray, disliked: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a disliked and a liked exposure of the same user.

    Args:
        scores: [n].
        disliked: bool [n].
        users: integer codes of users [n], from 0.

    Returns:
        Per user code, float64: the pairs whose disliked one scores higher, a tie counting half, and
        all pairs.
    """
    if not len(users):
        return np.zeros(0), np.zeros(0)
    order = np.lexsort((-scores, users))
    user, score, bad = users[order], scores[order], disliked[order].astype(float)
    ends = np.append((user[1:] != user[:-1]) | (score[1:] != score[:-1]), True)
    # One entry per user and score, best first.
    owner = user[ends]
    bad_here = np.diff(np.cumsum(bad)[ends], prepend=0.0)
    good_here = np.diff(np.cumsum(1 - bad)[ends], prepend=0.0)
    good_of, bad_of = np.bincount(owner, good_here), np.bincount(owner, bad_here)
    # Likes below: all of the user's and of the users before, less those down to here.
    below = np.cumsum(good_of)[owner] - np.cumsum(good_here)
    return np.bincount(owner, bad_here * (below + good_here / 2)), good_of * bad_of


def within_user_auc(ordered: np.ndarray, pairs: np.ndarray) -> float:
    """AUC over pairs of the same user, all pairs counting alike; NaN without any.

    Args:
        ordered: per user, of `user_pairs`.
        pairs: per user, of `user_pairs`.
    """
    total = float(pairs.sum())
    return float(ordered.sum()) / total if total else float("nan")


def bootstrap(
    figures: Callable[[np.ndarray], float | list[float]], users: np.ndarray, seed: int = 7, rounds: int = 1000
) -> np.ndarray:
    """Figures over all users, and over resamples of them.

    Args:
        figures: takes how often each row counts [n], float64, and gives one or more figures.
        users: codes of the rows' users [n]; a user's rows are drawn together.
        seed: of the resampling; the same seed draws the same of the same users for every figure, so that
            the difference of two results is that of paired resamples, and so is the mean over models.
        rounds: resamples.

    Returns:
        float64 [1 + rounds, ...]: the figures themselves, then those of each resample; see `Estimate.of`.
    """
    who, codes = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = [figures(np.ones(len(users)))]
    for _ in range(rounds):
        times = np.bincount(rng.integers(len(who), size=len(who)), minlength=len(who))
        draws.append(figures(times.astype(float)[codes]))
    return np.array(draws, float)


def mean_over_users(values: np.ndarray) -> np.ndarray:
    """`bootstrap` of the mean of one value per user, in the same order for every figure; NaN without any."""
    return bootstrap(
        lambda times: float(np.average(values, weights=times)) if len(times) else float("nan"),
        np.arange(len(values)),
    )
