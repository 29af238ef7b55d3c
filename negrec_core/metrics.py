"""Figures of DESIGN section 8, as functions of arrays.

Two families: whether what was predicted was later disliked (HR, FHR, LUF, LIF), and what a block list
is for, the deployment figure: the share of disliked exposures that is blocked when a given share of the
liked is.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from negrec_core.block_score import threshold_at


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float


def blocked_at(scores: np.ndarray, disliked: np.ndarray, likes_lost: float) -> float:
    """Share of disliked exposures blocked when at most `likes_lost` of the liked are.

    Args:
        scores: [n], higher means more likely disliked.
        disliked: bool [n], disliked or liked.
        likes_lost: share of likes that may be blocked.

    Returns:
        NaN where nothing was disliked or nothing liked.
    """
    if disliked.all() or not disliked.any():
        return float("nan")
    return float(np.mean(scores[disliked] >= threshold_at(scores[~disliked], likes_lost)))


def auc(scores: np.ndarray, disliked: np.ndarray) -> float:
    """Probability that a disliked exposure scores above a liked one; a tie counts half."""
    positives, negatives = int(disliked.sum()), int((~disliked).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = middle_rank[inverse][disliked].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


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
    order = np.argsort(users, kind="stable")
    n_users = int(users.max()) + 1 if len(users) else 0
    bounds = np.searchsorted(users[order], np.arange(n_users + 1))
    ordered, pairs = np.zeros(n_users), np.zeros(n_users)
    for user, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rows = order[start:stop]
        pairs[user] = float(disliked[rows].sum()) * float((~disliked[rows]).sum())
        if pairs[user]:
            ordered[user] = auc(scores[rows], disliked[rows]) * pairs[user]
    return ordered, pairs


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
        figure: takes row indices, gives the figure on those rows.
        users: integer codes of the rows' users [n]; a user's rows are drawn together.
        seed: of the resampling; the same seed draws the same users for every figure, so that
            differences can be compared.
        rounds: resamples.
    """
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[order], prepend=-1))
    groups = np.split(order, starts[1:])
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(rounds):
        picked = rng.integers(len(groups), size=len(groups))
        draws.append(figure(np.concatenate([groups[g] for g in picked])))
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if draws else (np.nan, np.nan)
    return Estimate(figure(order), float(low), float(high))
