"""Tastes: what each user's dislikes and likes say about other items (DESIGN section 8).

A logistic matrix factorisation of dislike against like. The log odds that user u dislikes item i are

    prior + item_i + user_u + w_u . e_i + p_u . q_i

with e_i the unit embedding of the item's semantic ID (so that a new item is known by its text) and q_i a few
learnt factors of the item (what text does not tell). All terms are ridge-penalised, those of users towards
what all users have in common. That is counted to the items, so that a user of whom nothing is known has
zeros, and an item that few judged is known by how what is like it is judged. Given the items, a user's
weights are the optimum of a convex problem of that user alone: they are fitted to a sample of users together
with the items, and folded in for everybody afterwards.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from negrec_core.config import TasteConfig
from negrec_core.taste_kernel import LONGEST_STEP, log_odds, solve

Array = npt.NDArray[Any]

_FOLD_IN_STEPS = 20
# Factors begin as small random numbers: zeros would stay zeros.
_USER_START, _ITEM_START = 0.1, 0.3
_COMMON_PENALTY = 3.0  # ridge penalty of what all users have in common


@dataclass(frozen=True, eq=False)
class Events:
    """Judged items, one event per user and item.

    Attributes:
        users: row of each event's user, int64 [events].
        items: row of its item, int64 [events].
        disliked: 1 for a dislike, 0 for a like, something between for what was neither, float64 [events].
    """

    users: Array
    items: Array
    disliked: Array


@dataclass(frozen=True, eq=False)
class ItemTastes:
    """What users' tastes act on.

    Attributes:
        log_odds: that a user of whom nothing is known dislikes each item, float64 [items].
        factors: what the text does not tell, float64 [items, factors].
    """

    log_odds: Array
    factors: Array


def fit_items(events: Events, unit: Array, settings: TasteConfig) -> ItemTastes:
    """Items' side of the factorisation; users and items are solved for in turn, one Newton step each.

    The result depends on nothing but the arguments. Without events all is 0.

    Args:
        events: of a sample of users.
        unit: unit embeddings of all items, [items, dim].
        settings: `taste` of the configuration.
    """
    n_items, dim = unit.shape
    k = settings.factors
    if not len(events.users):
        return ItemTastes(np.zeros(n_items), np.zeros((n_items, k)))
    rng = np.random.default_rng(0)
    n_users = int(events.users.max()) + 1
    by_user, by_item = _Order.of(events.users, n_users), _Order.of(events.items, n_items)
    content = np.ascontiguousarray(unit, np.float64)
    share = np.clip(events.disliked.mean(), 1e-3, 1 - 1e-3)
    start = np.zeros(1 + dim)
    start[0] = np.log(share / (1 - share))
    mean = np.concatenate([start, np.zeros(k)])
    users = np.tile(mean, (n_users, 1))
    users[:, 1 + dim :] = _USER_START * rng.standard_normal((n_users, k))
    items = np.zeros((n_items, 1 + k))
    items[:, 1:] = _ITEM_START * rng.standard_normal((n_items, k))
    user_penalty = _user_penalty(settings, dim, k)
    item_penalty = np.array([settings.item_penalty] + [settings.factor_penalty] * k)
    for _ in range(settings.sweeps):
        vectors = np.hstack([np.ones((n_items, 1)), content, items[:, 1:]])
        by_user.solve(events.items, events, items[events.items, 0], vectors, user_penalty, mean, 1, users)
        # Their mean alone would come near the optimum in many sweeps, a step of its own does in a few.
        mean[: 1 + dim] = users[np.diff(by_user.starts) > 0, : 1 + dim].mean(0)
        step = _common_step(events, users, items, content, mean[: 1 + dim] - start)
        mean[: 1 + dim] += step
        users[:, : 1 + dim] += step
        known = log_odds(events.users, events.items, users[:, : 1 + dim], content)
        vectors = np.hstack([np.ones((n_users, 1)), users[:, 1 + dim :]])
        by_item.solve(events.users, events, known, vectors, item_penalty, np.zeros(1 + k), 1, items)
    return ItemTastes(mean[0] + content @ mean[1 : 1 + dim] + items[:, 0], items[:, 1:])


def _common_step(events: Events, users: Array, items: Array, content: Array, common: Array) -> Array:
    """A Newton step of what all users have in common, their differences and the items given: [1 + dim]."""
    dim = content.shape[1]
    vectors = np.hstack([np.ones((len(content), 1)), content])
    odds = log_odds(events.users, events.items, users[:, : 1 + dim], content)
    own = np.hstack([np.ones((len(users), 1)), users[:, 1 + dim :]])
    odds += np.einsum("ek,ek->e", own[events.users], items[events.items])
    probability = 0.5 * (1.0 + np.tanh(0.5 * odds))
    # All events of an item have one vector.
    surprise = np.bincount(events.items, probability - events.disliked, len(content))
    curvature = np.bincount(events.items, probability * (1.0 - probability), len(content))
    slope = vectors.T @ surprise + _COMMON_PENALTY * common
    hessian = (vectors * curvature[:, None]).T @ vectors + _COMMON_PENALTY * np.eye(1 + dim)
    step = -np.linalg.solve(hessian, slope)
    return np.asarray(step * min(1.0, LONGEST_STEP / max(float(np.linalg.norm(step)), 1e-300)))


def fold_in(events: Events, n_users: int, unit: Array, items: ItemTastes, settings: TasteConfig) -> Array:
    """Tastes of users, float64 [users, 1 + dim + factors]; zeros for one without events.

    The optimum given the items, so that it does not matter who else is folded in.

    Args:
        events: all that these users judged.
        n_users: how many there are.
        unit: unit embeddings of the items, [items, dim].
        items: of `fit_items`.
        settings: those of `fit_items`.
    """
    dim, k = unit.shape[1], items.factors.shape[1]
    tastes = np.zeros((n_users, 1 + dim + k))
    vectors = np.hstack([np.ones((len(unit), 1)), unit, items.factors])
    nothing, penalty = np.zeros(1 + dim + k), _user_penalty(settings, dim, k)
    known = items.log_odds[events.items]
    by_user = _Order.of(events.users, n_users)
    by_user.solve(events.items, events, known, vectors, penalty, nothing, _FOLD_IN_STEPS, tastes)
    return tastes


def _user_penalty(settings: TasteConfig, dim: int, k: int) -> Array:
    parts = [settings.user_penalty] + [settings.content_penalty] * dim + [settings.factor_penalty] * k
    return np.array(parts)


@dataclass(frozen=True, eq=False)
class _Order:
    """Events by user, or by item.

    Attributes:
        order: where each event is, int64 [events].
        starts: int64 [rows + 1]; those of a row are `order[starts[row]:starts[row + 1]]`.
    """

    order: Array
    starts: Array

    @classmethod
    def of(cls, rows: Array, n_rows: int) -> "_Order":
        counts = np.bincount(rows, minlength=n_rows)
        return cls(np.argsort(rows, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))

    def solve(
        self,
        others: Array,
        events: Events,
        known: Array,
        vectors: Array,
        penalty: Array,
        mean: Array,
        steps: int,
        weights: Array,
    ) -> None:
        """`taste_kernel.solve` of events in any order."""
        solve(
            self.starts,
            others[self.order],
            events.disliked[self.order],
            known[self.order],
            np.ascontiguousarray(vectors, np.float64),
            penalty,
            mean,
            steps,
            weights,
        )
