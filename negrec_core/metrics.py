"""Figures of DESIGN section 8, as functions of arrays.

Two families: whether what was predicted was later disliked (HR, FHR, LUF, LIF), and what a block list
is for, the deployment figure: the share of disliked exposures that is blocked when a given share of the
liked is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float


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
        ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
        return cls(order, disliked[order], ends)

    def blocked_at(self, likes_lost: float, weights: np.ndarray | None = None) -> float:
        """Share of disliked exposures blocked when at most the share `likes_lost` of the liked are.

        Equal scores are blocked together or not at all.

        Args:
            likes_lost: share of likes that may be blocked.
            weights: [n] how often each row counts, in the order given to `of`; absent: once.

        Returns:
            NaN where nothing was disliked or nothing liked.
        """
        disliked, liked = self._counts(weights)
        if not disliked[-1] or not liked[-1]:
            return float("nan")
        # A little more: 0.29 * 100 is less than 29 in floating point.
        allowed = np.floor(likes_lost * liked[-1] + 1e-9)
        # Where all likes may go, the lowest of them is the threshold.
        if allowed < liked[-1]:
            group = int(np.searchsorted(liked, allowed, "right")) - 1
        else:
            group = int(np.searchsorted(liked, allowed))
        return float(disliked[group] / disliked[-1]) if group >= 0 else 0.0

    def auc(self, weights: np.ndarray | None = None) -> float:
        """Probability that a disliked exposure scores above a liked one; a tie counts half.

        NaN where nothing was disliked or nothing liked; `weights` as in `blocked_at`.
        """
        disliked, liked = self._counts(weights)
        pairs = disliked[-1] * liked[-1]
        if not pairs:
            return float("nan")
        likes_here = np.diff(liked, prepend=0.0)
        won = (liked[-1] - liked + likes_here / 2) * np.diff(disliked, prepend=0.0)
        return float(won.sum() / pairs)

    def _counts(self, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Disliked and liked down to the end of each group of equal scores."""
        ordered = np.ones(len(self.order)) if weights is None else weights[self.order]
        disliked = np.cumsum(np.where(self.disliked, ordered, 0.0))[self.ends]
        return disliked, np.cumsum(ordered)[self.ends] - disliked


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
    figure: Callable[[np.ndarray], float], users: np.ndarray, seed: int, rounds: int = 200
) -> Estimate:
    """A figure with its percentile interval from resampling users.

    Args:
        figure: takes how often each row counts [n], float64, and gives the figure.
        users: codes of the rows' users [n]; a user's rows are drawn together.
        seed: of the resampling; the same seed draws the same users for every figure, so that
            differences can be compared.
        rounds: resamples.
    """
    who, codes = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(rounds):
        times = np.bincount(rng.integers(len(who), size=len(who)), minlength=len(who))
        draws.append(figure(times.astype(float)[codes]))
    known = [draw for draw in draws if not np.isnan(draw)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (np.nan, np.nan)
    return Estimate(figure(np.ones(len(users))), float(low), float(high))
