"""Swing item graph from negative feedback (CoNRec, DESIGN section 4).

With `U(i)` the users of item `i`, `I(u)` the items of user `u` and `C = U(i) & U(j)`:

    Swi(i, j) = sum over u in C, v in C, v != u of
                w(u) w(v) * Id(|C|) / (|I(u) & I(v)| + alpha2) / sqrt(|U(j)|)
    w(u)      = (|I(u)| + alpha1) ^ -theta
    Id(x)     = 1 if x > min_common_users else 0

over ordered user pairs. One anchor item at a time: the rows of `U(i)` are turned into columns, one
|U(i)| x |U(i)| matrix takes every |I(u) & I(v)|, and each neighbour is a sum over its column.

Two caps bound the work of one anchor to `max_users_per_item` rows of `max_items_per_user` items:

- A user keeps the first `max_items_per_user` items of one hash order of all items; an interaction
  that is not kept takes part in no user pair.
- An anchor keeps the first `max_users_per_item` of its remaining users in one hash order of all
  users. The neighbours' users are not cut, so every neighbour of an anchor is measured on the same
  sample of users and their order does not depend on how popular they are.

The caps choose which user pairs are summed: `w(u)`, `|U(j)|` and `Id` use the whole log. The
overlap `|I(u) & I(v)|` is counted on kept items. It is exact for two users under the cap. Else,
since all users keep the same end of one order, it is the number of their common items before the
earlier of their two cuts: too low, so such a pair weighs more than its whole rows would give it,
while `w` of the whole rows still holds it down.
"""

import hashlib
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from negrec_core.errors import ArtefactError, ConfigError, InputError, MissingError
from negrec_core.swing_kernel import Formula, anchor_kernel, new_scratch, range_kernel

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SwingParams:
    """Parameters of the formula and bounds of the work.

    Attributes:
        alpha1: smoothing of user activity in `w(u)`, >= 0.
        alpha2: smoothing of the users' overlap, >= 0.
        theta: strength of the penalty on active users, >= 0.
        min_common_users: a pair of items needs more common users than this.
        top_k: neighbours kept per item.
        max_users_per_item: users of an anchor whose pairs are summed.
        max_items_per_user: items of a user that take part.
    """

    alpha1: float = 5.0
    alpha2: float = 1.0
    theta: float = 0.3
    min_common_users: int = 5
    top_k: int = 100
    max_users_per_item: int = 1000
    max_items_per_user: int = 1000

    def __post_init__(self) -> None:
        for name in ("alpha1", "alpha2", "theta", "min_common_users"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"swing.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("top_k", "max_users_per_item", "max_items_per_user"):
            if getattr(self, name) < 1:
                raise ConfigError(f"swing.{name} is {getattr(self, name)}; it must be 1 or more")


class InteractionIndex(NamedTuple):
    """Who interacted with what, without duplicates, by user and by item. All arrays are read-only.

    Rows hold every interaction; what the caps keep comes first in each row, in hash order.

    Attributes:
        user_ptr: int64 [n_users + 1], row bounds in `user_items`; differences are |I(u)|.
        user_items: int32 [n_edges], items of each user.
        user_kept: int32 [n_users], length of the kept part of each user's row.
        item_ptr: int64 [n_items + 1], row bounds in `item_users`; differences are |U(i)|.
        item_users: int32 [n_edges], users of each item.
        item_kept: int32 [n_items], length of the kept part of each item's row.
        caps: int64 [2], `max_users_per_item` and `max_items_per_user` that it was built with.
    """

    user_ptr: Array
    user_items: Array
    user_kept: Array
    item_ptr: Array
    item_users: Array
    item_kept: Array
    caps: Array

    @property
    def n_users(self) -> int:
        return len(self.user_kept)

    @property
    def n_items(self) -> int:
        return len(self.item_kept)

    @property
    def capped_items(self) -> Array:
        """Items (int64, ascending) whose sums leave out some of their users, by either cap."""
        return np.flatnonzero(self.item_kept < np.diff(self.item_ptr))

    @property
    def capped_users(self) -> Array:
        """Users (int64, ascending) with more items than `max_items_per_user`."""
        return np.flatnonzero(self.user_kept < np.diff(self.user_ptr))


class SwingEdges(NamedTuple):
    """Directed edges, ordered by item and rank; all arrays have one entry per edge.

    Attributes:
        item: int32, the anchor `i`.
        neighbor: int32, `j`.
        score: float64, `Swi(i, j)` > 0.
        rank: int32, from 1, by falling score and then rising neighbour.
    """

    item: Array
    neighbor: Array
    score: Array
    rank: Array


def stable_hash64(ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """64-bit BLAKE2b of each id: the same in every process and on every machine. Shape [n]."""
    digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def build_index(
    users: Array, items: Array, user_keys: Array, item_keys: Array, params: SwingParams
) -> InteractionIndex:
    """Index a log of interactions given as dense integers.

    Equal scores are ranked by item index, so number the items in the order of their ids to have a
    graph that does not depend on the numbering.

    Args:
        users: integers [n], user of each interaction, below `len(user_keys)`; repeats are ignored.
        items: integers [n], item of each interaction, below `len(item_keys)`.
        user_keys: uint64 [n_users], `stable_hash64` of the user ids; their order is the hash order.
        item_keys: uint64 [n_items], the same for items.
        params: the two caps are read.

    Raises:
        InputError: the arrays differ in length, or an index is out of range.
    """
    n_users, n_items = len(user_keys), len(item_keys)
    if len(users) != len(items):
        raise InputError(f"Swing log has {len(users)} users for {len(items)} items; pair them up")
    for name, values, size in (("user", users, n_users), ("item", items, n_items)):
        if size > np.iinfo(np.int32).max:
            raise InputError(f"Swing log has {size} {name}s; at most 2^31 - 1 can be indexed")
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise InputError(f"Swing log has a {name} index outside 0..{size - 1}; number them anew")

    # One integer per interaction, made so that plain sorting gives the order: no argsort.
    item_order, item_rank = _order(item_keys)
    edges = users.astype(np.int64) * n_items + item_rank[items]
    edges.sort()
    # Not np.unique: its hash table takes fifteen times as long.
    edges = edges[np.diff(edges, prepend=-1) > 0]
    user, rank = np.divmod(edges, max(n_items, 1))
    item = item_order[rank]
    user_ptr = _pointers(user, n_users)
    dropped = np.arange(len(edges)) - user_ptr[user] >= params.max_items_per_user

    user_order, user_rank = _order(user_keys)
    edges = (item * 2 + dropped) * n_users + user_rank[user]
    edges.sort()
    item_ptr = _pointers(edges // max(2 * n_users, 1), n_items)
    still_there = np.bincount(item[~dropped], minlength=n_items)
    return _freeze(
        InteractionIndex(
            user_ptr=user_ptr,
            user_items=item.astype(np.int32),
            user_kept=np.minimum(np.diff(user_ptr), params.max_items_per_user).astype(np.int32),
            item_ptr=item_ptr,
            item_users=user_order[edges % max(n_users, 1)].astype(np.int32),
            item_kept=np.minimum(still_there, params.max_users_per_item).astype(np.int32),
            caps=_caps(params),
        )
    )


def save_index(index: InteractionIndex, path: str | os.PathLike[str]) -> None:
    """Write the index, one `.npy` file per array, as the new directory `path`: whole or not at all.

    Raises:
        OSError: `path` exists already and is not empty, or cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    for name, array in index._asdict().items():
        np.save(partial / f"{name}.npy", array, allow_pickle=False)
    partial.replace(path)


def load_index(path: str | os.PathLike[str]) -> InteractionIndex:
    """Open a saved index by memory map, so that all processes of one machine share its pages.

    Raises:
        MissingError: a file is not there.
        ArtefactError: a file is not a readable array, or the arrays do not fit together.
    """
    arrays = {}
    for name in InteractionIndex._fields:
        try:
            array = np.load(Path(path) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise MissingError(f"Swing index {path}: no {name}.npy; build it again") from None
        except ValueError as error:
            raise ArtefactError(
                f"Swing index {path}: {name}.npy is not readable ({error}); build it again"
            ) from None
        # A plain view: numba knows no memory maps, and compiles one kernel for all indexes.
        arrays[name] = np.asarray(array)
    index = InteractionIndex(**arrays)
    for ptr, kept, row in (
        (index.user_ptr, index.user_kept, index.user_items),
        (index.item_ptr, index.item_kept, index.item_users),
    ):
        if len(ptr) != len(kept) + 1 or len(row) != ptr[-1] or len(row) != index.user_ptr[-1]:
            raise ArtefactError(f"Swing index {path}: its files do not fit together; build it again")
    return _freeze(index)


def balanced_ranges(index: InteractionIndex, parts: int) -> list[tuple[int, int]]:
    """Split the items into at most `parts` ranges [start, stop) of about equal work.

    Work is the sum of |U(i)|^2 over kept users; no range exceeds the mean by more than one item's
    work. Together the ranges hold every item once; none is empty.
    """
    work = np.cumsum(np.square(index.item_kept, dtype=np.int64) + 1)
    if len(work) == 0:
        return []
    targets = work[-1] * (np.arange(1, parts) / parts)
    cuts = np.unique([0, *np.searchsorted(work, targets), index.n_items])
    return [(int(start), int(stop)) for start, stop in pairwise(cuts)]


def swing_range(index: InteractionIndex, start: int, stop: int, params: SwingParams) -> SwingEdges:
    """Neighbours of the anchors `start <= i < stop`; all splits into ranges give the same edges.

    One thread, without the GIL. Besides its result it takes 12 bytes per item of the catalogue and,
    for the largest anchor, 4 bytes per pair of kept users and 16 per kept interaction of theirs.

    Raises:
        ConfigError: the index was built with other caps than those of `params`.
        ValueError: the range leaves the catalogue.
    """
    if not 0 <= start <= stop <= index.n_items:
        raise ValueError(f"items {start}..{stop} of {index.n_items}")
    if not np.array_equal(index.caps, _caps(params)):
        raise ConfigError(
            f"Swing index was built with caps {index.caps.tolist()}, swing.max_users_per_item and"
            f" max_items_per_user are {_caps(params).tolist()}; build it again"
        )
    counts, neighbor, score = range_kernel(start, stop, index, _formula(params))
    return _edges(np.arange(start, stop), counts, neighbor, score)


def swing_anchor_rows(
    anchor: int,
    row_ptr: Array,
    row_items: Array,
    row_item_users: Array,
    user_degrees: Array,
    rest_items: Array,
    rest_users: Array,
    params: SwingParams,
) -> SwingEdges:
    """Neighbours of one anchor from its own data alone, equal to `swing_range` bit for bit.

    For logs beyond one machine: rows shuffled by anchor. The caller applies the caps.

    Args:
        anchor: item index.
        row_ptr: integers [n + 1], bounds in `row_items` of the anchor's kept users, in hash order.
        row_items: integers [row_ptr[-1]], kept items of each of these users, `anchor` among them.
        row_item_users: integers [row_ptr[-1]], |U(j)| of each of these items in the whole log.
        user_degrees: integers [n], |I(u)| of each of these users in the whole log.
        rest_items: integers [m], distinct items that share users with the anchor beyond the rows.
        rest_users: integers [m], the number of these users.
        params: the caps are not read.

    Raises:
        InputError: a row does not hold the anchor.
    """
    n = len(row_ptr) - 1
    # Local numbers keep the order of the items, so that equal scores are ranked alike.
    names, first, local = np.unique(row_items, return_index=True, return_inverse=True)
    own = int(np.searchsorted(names, anchor))
    if np.count_nonzero(local == own) != n or (n > 0 and names[own] != anchor):
        raise InputError(f"Swing anchor {anchor}: a row does not hold it; pass rows of its users only")
    if n < 2:
        nothing = np.empty(0)
        return _edges(np.array([anchor]), np.array([0]), nothing, nothing)
    rest = np.zeros(len(names), dtype=np.int32)
    in_rows = np.isin(rest_items, names)
    rest[np.searchsorted(names, rest_items[in_rows])] = rest_users[in_rows]
    neighbor, score = np.empty(len(names), np.int32), np.empty(len(names))
    found = anchor_kernel(
        own,
        row_ptr[:-1].astype(np.int64),
        row_ptr[1:].astype(np.int64),
        user_degrees.astype(np.int64),
        local.astype(np.int32),
        rest,
        np.concatenate([[0], np.cumsum(row_item_users[first], dtype=np.int64)]),
        _formula(params),
        new_scratch(len(names), len(local), n),
        neighbor,
        score,
    )
    return _edges(np.array([anchor]), np.array([found]), names[neighbor[:found]], score[:found])


def _formula(params: SwingParams) -> Formula:
    return Formula(
        float(params.alpha1),
        float(params.alpha2),
        float(params.theta),
        int(params.min_common_users),
        int(params.top_k),
    )


def _order(keys: Array) -> tuple[Array, Array]:
    """Indices in the order of their keys, and the place of each index in that order; int64."""
    order = np.argsort(keys, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return order, rank


def _pointers(rows: Array, n_rows: int) -> Array:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))]).astype(np.int64)


def _caps(params: SwingParams) -> Array:
    return np.array([params.max_users_per_item, params.max_items_per_user], dtype=np.int64)


def _freeze(index: InteractionIndex) -> InteractionIndex:
    for array in index:
        array.flags.writeable = False
    return index


def _edges(anchors: Array, counts: Array, neighbor: Array, score: Array) -> SwingEdges:
    first = np.cumsum(counts) - counts
    rank = np.arange(len(score)) - np.repeat(first, counts) + 1
    return SwingEdges(
        np.repeat(anchors, counts).astype(np.int32),
        neighbor.astype(np.int32),
        score,
        rank.astype(np.int32),
    )
