"""The catalogue of legal semantic IDs as a trie in flat arrays.

A node is a prefix of a legal ID. Nodes of one depth are numbered 0, 1, ... in the order of their
codes, so the children of a node are one contiguous range one depth further down and the leaves are
the legal IDs in lexicographic order. Depth 0 holds the root alone (node 0); a node of depth l
chooses among codes of level l, and its children have depth l + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from negrec_core.errors import InputError

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Trie:
    """Legal semantic IDs of D levels, level l with `code_counts[l]` codes.

    Attributes:
        code_counts: D numbers K_l.
        offsets: one int64 array per level l, `[nodes of depth l + 1]`: the children of node n of
            depth l are the nodes `offsets[l][n]` up to, not including, `offsets[l][n + 1]` of
            depth l + 1. Level 0 is the root's, dense: `[0, number of first codes]`.
        edges: one int64 array per level l, `[nodes of depth l + 1]`, strictly ascending:
            `parent node * K_l + code` of each node of depth l + 1.
    """

    code_counts: tuple[int, ...]
    offsets: tuple[npt.NDArray[np.int64], ...]
    edges: tuple[npt.NDArray[np.int64], ...]

    @classmethod
    def build(cls, codes: IntArray, code_counts: Sequence[int]) -> "Trie":
        """Build the trie of `codes`, integers `[n, D]`; IDs that occur more than once are merged.

        Raises:
            InputError: no IDs, another number of levels than `code_counts`, codes that are not
                integers, or a code outside its level (the message names the first such row).
        """
        codes = np.asarray(codes)
        _check(codes, code_counts)
        # lexsort takes the least significant key first.
        ids = codes[np.lexsort(codes.T[::-1])].astype(np.int64)
        parent = np.zeros(len(ids), np.int64)
        starts_prefix = np.zeros(len(ids), bool)
        starts_prefix[0] = True
        offsets, edges = [], []
        for level, count in enumerate(code_counts):
            starts_prefix[1:] |= ids[1:, level] != ids[:-1, level]
            rows = np.flatnonzero(starts_prefix)
            children = np.bincount(parent[rows])
            offsets.append(np.concatenate([[0], np.cumsum(children)]).astype(np.int64))
            edges.append(parent[rows] * count + ids[rows, level])
            parent = np.cumsum(starts_prefix) - 1
        return cls(tuple(int(count) for count in code_counts), tuple(offsets), tuple(edges))

    @property
    def depth(self) -> int:
        """Number of levels D."""
        return len(self.code_counts)

    @property
    def n_ids(self) -> int:
        """Number of distinct legal IDs, which is the number of leaves."""
        return len(self.edges[-1])

    def n_nodes(self, depth: int) -> int:
        """Number of nodes of one depth, 0 (the root) to D (the leaves)."""
        return 1 if depth == 0 else len(self.edges[depth - 1])

    def max_children(self, level: int) -> int:
        """Largest number of legal codes of `level` under one node of that depth."""
        return int(np.diff(self.offsets[level]).max())

    def children(
        self, level: int, nodes: IntArray
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Legal codes of `level` under each node of that depth; the cost is that of the answer.

        Args:
            level: 0 to D - 1.
            nodes: node numbers of depth `level`, `[m]`.

        Returns:
            codes int32 `[total]`, ascending within a node; their nodes of depth `level + 1`, int64
            `[total]`; row splits int64 `[m + 1]`: node i has entries `splits[i]:splits[i + 1]`.
        """
        nodes = np.asarray(nodes, np.int64)
        first = self.offsets[level][nodes]
        splits = np.zeros(len(nodes) + 1, np.int64)
        np.cumsum(self.offsets[level][nodes + 1] - first, out=splits[1:])
        counts = np.diff(splits)
        child = np.arange(splits[-1]) + np.repeat(first - splits[:-1], counts)
        codes = self.edges[level][child] - np.repeat(nodes * self.code_counts[level], counts)
        return codes.astype(np.int32), child, splits

    def child(self, level: int, nodes: IntArray, codes: IntArray) -> npt.NDArray[np.int64]:
        """Node of depth `level + 1` reached from `nodes` `[m]` by `codes` `[m]`, or -1 `[m]`.

        A node of -1 stays -1, so whole IDs can be followed level by level.
        """
        nodes, codes = np.asarray(nodes, np.int64), np.asarray(codes, np.int64)
        edges, count = self.edges[level], self.code_counts[level]
        wanted = nodes * count + codes
        place = np.minimum(np.searchsorted(edges, wanted), len(edges) - 1)
        # A code outside 0..K-1 would otherwise name an edge of a neighbouring node.
        legal = (nodes >= 0) & (codes >= 0) & (codes < count) & (edges[place] == wanted)
        return np.where(legal, place, -1)

    def find(self, codes: IntArray) -> npt.NDArray[np.int64]:
        """Leaf of each ID of `codes` `[n, D]`, or -1 where it is not legal, `[n]`."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.depth:
            raise InputError(
                f"semantic IDs to look up have shape {codes.shape}; this trie needs [n, {self.depth}]"
            )
        node = np.zeros(len(codes), np.int64)
        for level in range(self.depth):
            node = self.child(level, node, codes[:, level])
        return node

    def contains(self, codes: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each ID of `codes` `[n, D]` is legal, `[n]`."""
        return self.find(codes) >= 0

    def codes_of(self, leaves: IntArray) -> npt.NDArray[np.int32]:
        """IDs of `leaves` `[n]` as codes `[n, D]`; the inverse of `find` on legal IDs."""
        node = np.asarray(leaves, np.int64)
        codes = np.empty((len(node), self.depth), np.int32)
        for level in reversed(range(self.depth)):
            node, codes[:, level] = np.divmod(self.edges[level][node], self.code_counts[level])
        return codes


def _check(codes: npt.NDArray[Any], code_counts: Sequence[int]) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(code_counts):
        raise InputError(
            f"semantic IDs have shape {codes.shape}; {len(code_counts)} levels need [n, {len(code_counts)}]"
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"semantic IDs have type {codes.dtype}; codes must be integers")
    if len(codes) == 0:
        raise InputError("the catalogue holds no semantic IDs; encode the items first")
    outside = (codes < 0) | (codes >= np.asarray(code_counts))
    if outside.any():
        row, level = (int(i) for i in np.argwhere(outside)[0])
        raise InputError(
            f"semantic ID row {row}: code {codes[row, level]} of level {level} is outside"
            f" 0..{code_counts[level] - 1}; was it made by another codebook?"
        )
