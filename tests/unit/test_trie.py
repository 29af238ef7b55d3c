"""The trie against a dictionary of prefixes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.errors import InputError
from negrec_core.trie import Trie


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    counts = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    one_id = st.tuples(*(st.integers(0, count - 1) for count in counts))
    return draw(st.lists(one_id, min_size=1, max_size=40)), counts


def prefixes(ids: list[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    """All distinct prefixes of one length in order: what the nodes of that depth must be."""
    return sorted({sid[:length] for sid in ids})


@given(catalogues())
def test_nodes_and_children_are_those_of_a_dictionary(catalogue):
    ids, counts = catalogue
    trie = Trie.build(np.array(ids), counts)
    assert trie.n_ids == len(set(ids))
    assert trie.depth == len(counts)
    for level in range(len(counts)):
        nodes, below = prefixes(ids, level), prefixes(ids, level + 1)
        assert trie.n_nodes(level) == len(nodes)
        codes, child, splits = trie.children(level, np.arange(len(nodes)))
        legal = [[p[-1] for p in below if p[:-1] == node] for node in nodes]
        assert [codes[a:b].tolist() for a, b in pairwise(splits)] == legal
        assert child.tolist() == list(range(len(below)))
        assert trie.max_children(level) == max(len(row) for row in legal)
    assert trie.n_nodes(trie.depth) == trie.n_ids


@given(catalogues(), st.data())
def test_children_of_any_choice_of_nodes(catalogue, data):
    ids, counts = catalogue
    trie = Trie.build(np.array(ids), counts)
    level = data.draw(st.integers(0, trie.depth - 1))
    chosen = data.draw(st.lists(st.integers(0, trie.n_nodes(level) - 1), max_size=8))
    nodes, below = prefixes(ids, level), prefixes(ids, level + 1)
    codes, child, splits = trie.children(level, np.array(chosen, int))
    assert len(splits) == len(chosen) + 1
    for i, node in enumerate(chosen):
        expected = [p for p in below if p[:-1] == nodes[node]]
        assert [below[c] for c in child[splits[i] : splits[i + 1]]] == expected
        assert codes[splits[i] : splits[i + 1]].tolist() == [p[-1] for p in expected]


@given(catalogues(), st.data())
def test_find_and_codes_of(catalogue, data):
    ids, counts = catalogue
    trie = Trie.build(np.array(ids), counts)
    leaves = sorted(set(ids))
    assert trie.codes_of(np.arange(trie.n_ids)).tolist() == [list(sid) for sid in leaves]
    # Codes just outside their level must not be taken for a neighbour's.
    any_id = st.tuples(*(st.integers(-2, count + 1) for count in counts))
    queries = data.draw(st.lists(any_id, min_size=1, max_size=30)) + ids
    expected = [leaves.index(sid) if sid in leaves else -1 for sid in queries]
    assert trie.find(np.array(queries)).tolist() == expected
    assert trie.contains(np.array(queries)).tolist() == [place >= 0 for place in expected]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_any_integer_type_gives_the_same_trie(dtype):
    codes = np.random.default_rng(0).integers(0, 200, (500, 3))
    trie, other = (
        Trie.build(codes, (200, 255, 200)),
        Trie.build(codes.astype(dtype), (200, 255, 200)),
    )
    for a, b in zip(trie.edges + trie.offsets, other.edges + other.offsets, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_dead_node_has_no_child():
    trie = Trie.build(np.array([[0, 1], [1, 0]]), (2, 2))
    assert trie.child(1, np.array([-1, 0]), np.array([1, 1])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 3), int), "no semantic IDs"),
        (np.zeros((2, 2), int), r"shape \(2, 2\)"),
        (np.zeros(3, int), r"shape \(3,\)"),
        (np.zeros((2, 3)), "float64"),
        (np.array([[0, 0, 0], [0, 4, 0]]), r"row 1: code 4 of level 1 is outside 0\.\.3"),
        (np.array([[0, 0, 0], [0, 0, 0], [-1, 9, 0]]), "row 2: code -1 of level 0"),
    ],
)
def test_bad_catalogues_are_refused(codes, message):
    with pytest.raises(InputError, match=message):
        Trie.build(codes, (4, 4, 4))


def test_looking_up_ids_of_another_depth_is_refused():
    trie = Trie.build(np.array([[0, 0]]), (2, 2))
    with pytest.raises(InputError, match=r"\[n, 2\]"):
        trie.find(np.zeros((1, 3), int))
