"""Names in arrays, against a dict."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core import string_index
from negrec_core.string_index import StringIndex

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


def test_names_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(string_index, "_ODD", 0)
    index = StringIndex(pa.array(["ann", "bob", "eve"]))
    assert [index[name] for name in ("ann", "bob", "eve")] == [0, 1, 2]
    with pytest.raises(KeyError, match="tom"):
        index["tom"]


def test_a_string_that_is_no_text_is_not_found():
    assert StringIndex(pa.array(["ann"])).get("\ud800", -1) == -1
