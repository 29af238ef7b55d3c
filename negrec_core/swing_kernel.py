"""The compiled loops of `negrec_core.swing`: one anchor item after another, on plain arrays.

Items and users are indices; "rows" are the kept items of an anchor's kept users, in hash order.
"""

import heapq
from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Formula(NamedTuple):
    alpha1: float
    alpha2: float
    theta: float
    min_common: int
    top_k: int


class Scratch(NamedTuple):
    """Work space of one anchor: no array of it is larger than the largest anchor or the catalogue.

    Attributes:
        kept: int32 [n_items], rows of the anchor that hold each item; all zero between anchors.
        column: int32 [n_items], column of each item the rows hold, -1 where one row alone holds it.
        cells: int32 [4, entries in the rows]: items seen, item of each column, end of each column,
            rows of each column.
        overlap: int32 [rows * rows], |I(u) & I(v)|.
    """

    kept: Array
    column: Array
    cells: Array
    overlap: Array


@nb.njit(cache=True, nogil=True)
def new_scratch(n_items: int, n_cells: int, n_rows: int) -> Scratch:
    return Scratch(
        np.zeros(n_items, np.int32),
        np.empty(n_items, np.int32),
        np.empty((4, n_cells), np.int32),
        np.empty(n_rows * n_rows, np.int32),
    )


@nb.njit(cache=True, nogil=True)
def range_kernel(start: int, stop: int, index: Any, formula: Formula) -> tuple[Array, Array, Array]:
    """Score the anchors of a range; returns edges per anchor, neighbours, scores."""
    user_ptr, item_ptr, item_kept = index.user_ptr, index.item_ptr, index.item_kept
    most_users, most_cells, most_edges = 0, 0, 0
    for i in range(start, stop):
        n_cells = 0
        for u in index.item_users[item_ptr[i] : item_ptr[i] + item_kept[i]]:
            n_cells += index.user_kept[u]
        most_users = max(most_users, item_kept[i])
        most_cells = max(most_cells, n_cells)
        most_edges += min(formula.top_k, n_cells)
    # Allocated once: each anchor leaves `kept` and `rest` at zero again and writes the others anew.
    scratch = new_scratch(item_kept.size, most_cells, most_users)
    rest = np.zeros(item_kept.size, np.int32)
    row_start, row_stop, degree = np.empty((3, most_users), np.int64)
    counts = np.zeros(stop - start, np.int64)
    neighbor, score = np.empty(most_edges, np.int32), np.empty(most_edges, np.float64)

    done = 0
    for i in range(start, stop):
        n = item_kept[i]
        # No pair of items has more common users than either item has users.
        if n < 2 or item_ptr[i + 1] - item_ptr[i] <= formula.min_common:
            continue
        for a in range(n):
            u = index.item_users[item_ptr[i] + a]
            row_start[a] = user_ptr[u]
            row_stop[a] = user_ptr[u] + index.user_kept[u]
            degree[a] = user_ptr[u + 1] - user_ptr[u]
        _add_rest(i, 1, index, rest)
        found = anchor_kernel(
            i,
            row_start[:n],
            row_stop[:n],
            degree[:n],
            index.user_items,
            rest,
            item_ptr,
            formula,
            scratch,
            neighbor[done:],
            score[done:],
        )
        _add_rest(i, -1, index, rest)
        counts[i - start] = found
        done += found
    return counts, neighbor[:done].copy(), score[:done].copy()


@nb.njit(cache=True, nogil=True)
def _add_rest(i: int, sign: int, index: Any, rest: Array) -> None:
    """Add `sign` times the users that each item shares with `i` outside the kept rows to `rest`."""
    for p in range(index.item_ptr[i], index.item_ptr[i + 1]):
        u = index.item_users[p]
        first = index.user_ptr[u]
        if p < index.item_ptr[i] + index.item_kept[i]:
            first += index.user_kept[u]
        for j in index.user_items[first : index.user_ptr[u + 1]]:
            rest[j] += sign


@nb.njit(cache=True, nogil=True)
def anchor_kernel(
    anchor: int,
    row_start: Array,
    row_stop: Array,
    degree: Array,
    row_items: Array,
    rest: Array,
    item_ptr: Array,
    formula: Formula,
    scratch: Scratch,
    neighbor: Array,
    score: Array,
) -> int:
    """Score one anchor from its users' rows; writes the best neighbours, returns their number.

    `rest[j]` is how many users `anchor` and `j` have in common in the whole log beyond these rows.
    """
    kept, touched = scratch.kept, scratch.cells[0]
    n_touched = 0
    for a in range(row_start.size):
        for p in range(row_start[a], row_stop[a]):
            j = row_items[p]
            if kept[j] == 0:
                touched[n_touched] = j
                n_touched += 1
            kept[j] += 1
    kept[anchor] = 0  # all rows hold it: it is no neighbour, and `_fill_overlap` starts at 1 for it
    n_candidates, n_columns = _name_columns(touched[:n_touched], rest, formula, scratch)
    found = 0
    if n_candidates > 0:
        _fill_columns(row_start, row_stop, row_items, n_columns, scratch)
        _fill_overlap(row_start.size, n_columns, scratch)
        weight = (degree + formula.alpha1) ** -formula.theta
        found = _best_columns(n_candidates, weight, item_ptr, formula, scratch, neighbor, score)
    for j in touched[:n_touched]:
        kept[j] = 0
    return found


@nb.njit(cache=True, nogil=True)
def _name_columns(touched: Array, rest: Array, formula: Formula, scratch: Scratch) -> tuple[int, int]:
    """Number the items that rows share, possible neighbours first; returns both counts."""
    kept, column, column_item = scratch.kept, scratch.column, scratch.cells[1]
    n_candidates = 0
    for j in touched:
        column[j] = -1
        if kept[j] > 1 and kept[j] + rest[j] > formula.min_common:
            column[j] = n_candidates
            column_item[n_candidates] = j
            n_candidates += 1
    n_columns = n_candidates
    if n_candidates > 0:
        for j in touched:
            if kept[j] > 1 and column[j] < 0:
                column[j] = n_columns
                column_item[n_columns] = j
                n_columns += 1
    return n_candidates, n_columns


@nb.njit(cache=True, nogil=True)
def _fill_columns(
    row_start: Array, row_stop: Array, row_items: Array, n_columns: int, scratch: Scratch
) -> None:
    """Turn the rows into columns: the rows (ascending) of column c end at `column_end[c]`."""
    column, column_item = scratch.column, scratch.cells[1]
    column_end, column_rows = scratch.cells[2], scratch.cells[3]
    total = 0
    for c in range(n_columns):
        column_end[c] = total
        total += scratch.kept[column_item[c]]
    for a in range(row_start.size):
        for p in range(row_start[a], row_stop[a]):
            c = column[row_items[p]]
            if c >= 0:
                column_rows[column_end[c]] = a
                column_end[c] += 1


@nb.njit(cache=True, nogil=True)
def _fill_overlap(n: int, n_columns: int, scratch: Scratch) -> None:
    """Count |I(u) & I(v)| for rows u < v at `overlap[u * n + v]`."""
    column_end, column_rows, overlap = scratch.cells[2], scratch.cells[3], scratch.overlap
    overlap[: n * n] = 1
    begin = 0
    for c in range(n_columns):
        end = column_end[c]
        for x in range(begin, end):
            row = column_rows[x] * n
            for y in range(x + 1, end):
                overlap[row + column_rows[y]] += 1
        begin = end


@nb.njit(cache=True, nogil=True)
def _best_columns(
    n_candidates: int,
    weight: Array,
    item_ptr: Array,
    formula: Formula,
    scratch: Scratch,
    neighbor: Array,
    score: Array,
) -> int:
    """Score each possible neighbour and write the `top_k` best in order; returns their number."""
    column_item, column_end, column_rows = scratch.cells[1], scratch.cells[2], scratch.cells[3]
    overlap, n = scratch.overlap, weight.size
    best = [(0.0, np.int64(0)) for _ in range(0)]  # heap of (score, -item): lower items win ties
    begin = 0
    for c in range(n_candidates):
        end = column_end[c]
        total = 0.0
        for x in range(begin, end):
            row = column_rows[x] * n
            inner = 0.0
            for y in range(x + 1, end):
                v = column_rows[y]
                inner += weight[v] / (overlap[row + v] + formula.alpha2)
            total += weight[column_rows[x]] * inner
        begin = end
        j = np.int64(column_item[c])
        entry = (2.0 * total / np.sqrt(item_ptr[j + 1] - item_ptr[j]), -j)
        if len(best) < formula.top_k:
            heapq.heappush(best, entry)
        elif entry > best[0]:
            heapq.heapreplace(best, entry)
    found = len(best)
    for k in range(found - 1, -1, -1):
        entry = heapq.heappop(best)
        score[k], neighbor[k] = entry[0], -entry[1]
    return found
