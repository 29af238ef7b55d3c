"""Names in arrays, against a dict."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core import string_index
from negrec_core.string_index import NameTable, StringIndex

# Few letters, so that some are the beginning of others; lengths on both sides of a word's.
names = st.text(st.sampled_from("ab\x00é\U0001f600"), max_size=20) | st.text(max_size=20)
sets = st.lists(names, unique=True, max_size=40)


@given(sets, names, st.integers(0, 5), st.integers(0, 3))
def test_an_index_is_a_dict_of_its_names(present, other, first, skipped):
    array = pa.array(["before"] * skipped + present, pa.string())[skipped:]
    index, expected = StringIndex(array, first), {name: n for n, name in enumerate(present, first)}
    assert dict(index) == expected
    assert len(index) == len(expected)
    assert index == expected
    for name in [other, *present, *(name + "\x00" for name in present), *(name[:-1] for name in present)]:
        assert index.get(name) == expected.get(name)
        assert (name in index) == (name in expected)
    assert 7 not in index


@given(sets, st.lists(st.lists(names, max_size=6), max_size=4), st.integers(0, 3), st.data())
def test_many_names_are_found_as_one_by_one(present, others, first, data):
    index = StringIndex(pa.array(present, pa.string()), first)
    start = data.draw(st.integers(0, len(present)))
    in_order = present[start : start + data.draw(st.integers(0, 8))]
    shuffled = data.draw(st.permutations(present))
    chunks = [*others, in_order, shuffled, in_order + [name + "x" for name in in_order]]
    asked = pa.chunked_array([pa.array(["skipped", *chunk], pa.string())[1:] for chunk in chunks])
    assert index.numbers_of(asked).tolist() == [index.get(name, -1) for name in asked.to_pylist()]


@given(sets, st.lists(names, max_size=20))
def test_a_table_is_a_dict_of_its_names(present, others):
    asked = [*others, *present, *present]
    number = {name: n for n, name in enumerate(present)}
    assert NameTable(present).rows(asked).tolist() == [number.get(name, -1) for name in asked]


def test_names_that_want_one_place_of_a_table_have_places_of_their_own(monkeypatch):
    # All hashes differ in their upper bits alone, which do not choose the first place.
    monkeypatch.setattr(
        string_index, "_keyed_hashes", lambda names: np.array([int(name) << 20 for name in names], np.int64)
    )
    present = [str(n) for n in range(1, 30)]
    table = NameTable(present)
    assert table.rows([*reversed(present), "77"]).tolist() == [*reversed(range(29)), -1]


def test_names_of_one_hash_are_taken_for_one_of_them(monkeypatch):
    """In a table, whose hashes have 64 bits; they must not keep it from being made."""
    monkeypatch.setattr(
        string_index, "_keyed_hashes", lambda names: np.array([int(name) // 4 for name in names], np.int64)
    )
    present = [str(n) for n in range(40)]
    rows = NameTable(present).rows([*present, "77"]).tolist()
    assert [row // 4 for row in rows[:-1]] == [n // 4 for n in range(40)]
    assert rows[-1] == -1


def test_names_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(string_index, "_ODD", 0)
    index = StringIndex(pa.array(["ann", "bob", "eve"]))
    assert [index[name] for name in ("ann", "bob", "eve")] == [0, 1, 2]
    asked = pa.chunked_array([pa.array(["eve", "tom", "ann", "joe", "bob"])])
    assert index.numbers_of(asked).tolist() == [2, -1, 0, -1, 1]
    with pytest.raises(KeyError, match="tom"):
        index["tom"]


def test_a_string_that_is_no_text_is_not_found():
    assert StringIndex(pa.array(["ann"])).get("\ud800", -1) == -1
