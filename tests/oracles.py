"""Brute-force oracles that several test files share, and the made-up logs they are asked about."""

from collections import defaultdict

import numpy as np

from negrec_core.swing import SwingParams, stable_hash64

Log = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Scores = dict[tuple[int, int], float]


class SwingOracle:
    """The formula of DESIGN section 4 by loops over sets: the log whole and capped."""

    def __init__(self, log: Log, params: SwingParams) -> None:
        users, items, user_keys, item_keys = log
        self.params = params
        self.items_of: dict[int, set[int]] = defaultdict(set)
        self.users_of: dict[int, set[int]] = defaultdict(set)
        for u, i in zip(users.tolist(), items.tolist(), strict=True):
            self.items_of[u].add(i)
            self.users_of[i].add(u)
        self.kept_items = {
            u: set(sorted(row, key=lambda i: int(item_keys[i]))[: params.max_items_per_user])
            for u, row in self.items_of.items()
        }
        self.kept_users = {
            i: sorted((u for u in row if i in self.kept_items[u]), key=lambda u: int(user_keys[u]))[
                : params.max_users_per_item
            ]
            for i, row in self.users_of.items()
        }

    def score(self, i: int, j: int) -> float:
        p = self.params
        if len(self.users_of[i] & self.users_of[j]) <= p.min_common_users:
            return 0.0
        total = 0.0
        for u in self.kept_users[i]:
            for v in self.kept_users[i]:
                both = self.kept_items[u] & self.kept_items[v]
                if u != v and j in both:
                    total += self.weight(u) * self.weight(v) / (len(both) + p.alpha2)
        return total / len(self.users_of[j]) ** 0.5

    def weight(self, u: int) -> float:
        return (len(self.items_of[u]) + self.params.alpha1) ** -self.params.theta

    def scores(self) -> Scores:
        pairs = ((i, j) for i in sorted(self.users_of) for j in sorted(self.users_of) if i != j)
        return {(i, j): s for i, j in pairs if (s := self.score(i, j)) > 0}


def make_log(edges: list[tuple[int, int]], n_users: int, n_items: int) -> Log:
    pairs = np.array(edges, dtype=np.int64).reshape(-1, 2)
    return (
        pairs[:, 0],
        pairs[:, 1],
        stable_hash64(f"user-{u}" for u in range(n_users)),
        stable_hash64(f"item-{i}" for i in range(n_items)),
    )


def random_log(seed: int, n_users: int, n_items: int, n_edges: int) -> Log:
    """Skewed on both sides, with repeats."""
    rng = np.random.default_rng(seed)
    users = (rng.random(n_edges) ** 2 * n_users).astype(np.int64)
    items = (rng.random(n_edges) ** 2 * n_items).astype(np.int64)
    return make_log(np.stack([users, items], axis=1).tolist(), n_users, n_items)
