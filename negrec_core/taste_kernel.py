"""The compiled loop of `negrec_core.taste`: ridge-penalised logistic regressions, one row after another."""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LONGEST_STEP = 3.0  # far from the optimum a Newton step may overshoot
_CONVERGED = 1e-4


@nb.njit(cache=True)
def solve(
    starts: Array,
    others: Array,
    disliked: Array,
    known: Array,
    vectors: Array,
    penalty: Array,
    mean: Array,
    steps: int,
    weights: Array,
) -> None:
    """Newton's method on each row r: min over w of the log loss of its events + penalty (w - mean)^2 / 2.

    The log odds of event e are `known[e] + vectors[others[e]] @ w`.

    Args:
        starts: int64 [rows + 1]; events of row r are `starts[r]:starts[r + 1]`.
        others: int64 [events], row of `vectors` of each event.
        disliked: float64 [events], from 0 to 1.
        known: float64 [events], what the log odds are without the row's own weights.
        vectors: float64 [others, dim].
        penalty: float64 [dim], over 0.
        mean: float64 [dim], the weights of a row without events.
        steps: most Newton steps.
        weights: float64 [rows, dim]; where to begin, and the result.
    """
    n_rows, dim = weights.shape
    hessian = np.empty((dim, dim))
    slope = np.empty(dim)
    for row in range(n_rows):
        first, last = starts[row], starts[row + 1]
        own = weights[row]
        if first == last:
            own[:] = mean
            continue
        for _ in range(steps):
            hessian[:] = 0.0
            for a in range(dim):
                hessian[a, a] = penalty[a]
                slope[a] = penalty[a] * (own[a] - mean[a])
            for event in range(first, last):
                vector = vectors[others[event]]
                log_odds = known[event]
                for a in range(dim):
                    log_odds += vector[a] * own[a]
                probability = 1.0 / (1.0 + np.exp(-log_odds))
                curvature = probability * (1.0 - probability)
                surprise = probability - disliked[event]
                for a in range(dim):
                    slope[a] += surprise * vector[a]
                    bent = curvature * vector[a]
                    for b in range(a + 1):
                        hessian[a, b] += bent * vector[b]
            for a in range(dim):
                for b in range(a):
                    hessian[b, a] = hessian[a, b]
            step = np.linalg.solve(hessian, slope)
            length = np.sqrt((step * step).sum())
            own -= step * min(1.0, LONGEST_STEP / max(length, 1e-300))
            if length < _CONVERGED:
                break


@nb.njit(cache=True)
def log_odds(users: Array, items: Array, weights: Array, vectors: Array) -> Array:
    """`weights[users, 0] + weights[users, 1:] . vectors[items]` of each event, float64 [events]."""
    out = np.empty(len(users))
    for event in range(len(users)):
        own, vector = weights[users[event]], vectors[items[event]]
        total = own[0]
        for a in range(len(vector)):
            total += own[1 + a] * vector[a]
        out[event] = total
    return out
