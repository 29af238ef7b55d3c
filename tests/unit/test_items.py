import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from warehouses import write_rows

from negrec_core.delta import DeltaStore
from negrec_core.errors import InputError
from negrec_core.items import item_text, load_categories, load_items
from negrec_core.schemas import ITEM
from negrec_core.semantic_ids import load_semantic_ids

DAYS = ["2026-03-08", "2026-03-09", "2026-03-10", "2026-03-11"]
CATALOGUE = {
    "2026-03-08": {"b": "b old", "a": "a old", "é": "accent"},
    "2026-03-09": {},
    "2026-03-10": {"b": "b new", "c": "c"},
    "2026-03-11": {"a": "a later", "z": "z"},
}
IDS = {
    "2026-03-08": [("one", "b", (0, 1, 2)), ("one", "a", (3, 0, 0)), ("two", "a", (7, 7))],
    "2026-03-10": [("one", "c", (1, 1, 1)), ("two", "b", (5, 6))],
    # A second ID for an item that has one does not count.
    "2026-03-11": [("one", "z", (2, 2, 2)), ("one", "a", (0, 0, 0))],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = DeltaStore(tmp_path_factory.mktemp("warehouse"))
    store.create_tables()
    for day, titles in CATALOGUE.items():
        rows = [{"item_id": item, "title": title} for item, title in titles.items()]
        write_rows(store, "item", rows, day)
    for day, ids in IDS.items():
        rows = [dict(zip(("codebook_version", "item_id", "codes"), r, strict=True)) for r in ids]
        write_rows(store, "item_semantic_id", rows, day)
    return store


def titles(table):
    return dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))


@given(st.sampled_from([*DAYS, "2026-03-07", "2026-04-01"]))
def test_the_catalogue_is_the_newest_version_of_each_item_as_of_the_day(store, ds):
    expected = {}
    for day in DAYS:
        if day <= ds:
            expected |= CATALOGUE[day]
    found = load_items(store, ds)
    assert titles(found) == expected
    assert found["item_id"].to_pylist() == sorted(expected)
    assert found.schema.names == ITEM.schema.names


def test_categories_are_numbered_whole_and_by_their_first_part(tmp_path):
    store = DeltaStore(tmp_path)
    store.create_tables()
    paths = {"a": "Toys/Games", "b": "Toys/Dolls", "c": "Toys/Games", "d": "Games", "e": None, "f": ""}
    rows = [{"item_id": item, "category": path} for item, path in paths.items()]
    before = write_rows(store, "item", rows, DAYS[0])
    write_rows(store, "item", [{"item_id": "a", "category": "Games"}], DAYS[1])
    asked = [*paths, "not there"]
    whole, top = load_categories(store, DAYS[2], asked, before).of_items.T.tolist()
    assert whole == [5, 4, 5, 3, 0, 0, 0]
    assert top == [2, 2, 2, 1, 0, 0, 0]
    newest = load_categories(store, DAYS[2], asked).of_items
    assert newest[0, 0] == newest[3, 0]
    assert newest[0, 1] == newest[3, 1]


def test_the_catalogue_of_an_earlier_table_version(tmp_path):
    store = DeltaStore(tmp_path)
    store.create_tables()
    before = write_rows(store, "item", [{"item_id": "a", "title": "first"}], DAYS[0])
    write_rows(store, "item", [], DAYS[0], revision=2)
    write_rows(store, "item", [{"item_id": "a", "title": "second"}], DAYS[1])
    assert titles(load_items(store, DAYS[2], before)) == {"a": "first"}
    assert titles(load_items(store, DAYS[2])) == {"a": "second"}


@given(st.sampled_from(["one", "two", "three"]), st.sampled_from([*DAYS, "2026-03-07"]))
def test_ids_are_those_known_on_the_day_and_aligned(store, codebook, ds):
    expected = {}
    for day in DAYS:
        for version, item, codes in IDS.get(day, []):
            if day <= ds and version == codebook:
                expected.setdefault(item, codes)
    ids = load_semantic_ids(store, codebook, ds)
    assert ids.items == sorted(expected)
    assert ids.codes.dtype == np.int32
    assert len(ids.codes) == len(ids.items)
    assert ids.index == {item: row for row, item in enumerate(ids.items)}
    for item, codes in expected.items():
        assert tuple(ids.codes[ids.index[item]]) == codes


def test_ids_of_an_earlier_table_version(tmp_path):
    store = DeltaStore(tmp_path)
    store.create_tables()
    row = {"codebook_version": "one", "item_id": "a", "codes": (1, 2)}
    before = write_rows(store, "item_semantic_id", [row], DAYS[0])
    write_rows(store, "item_semantic_id", [], DAYS[0], revision=2)
    assert load_semantic_ids(store, "one", DAYS[0], before).items == ["a"]
    assert load_semantic_ids(store, "one", DAYS[0]).items == []


def test_ids_of_different_lengths_are_refused(tmp_path):
    store = DeltaStore(tmp_path)
    store.create_tables()
    # As many codes in all as two IDs of three.
    rows = [
        {"codebook_version": "one", "item_id": "a", "codes": (1, 2)},
        {"codebook_version": "one", "item_id": "b", "codes": (1, 2, 3, 4)},
    ]
    write_rows(store, "item_semantic_id", rows, DAYS[0])
    with pytest.raises(InputError, match=r"IDs of \[2, 4\] codes under codebook one"):
        load_semantic_ids(store, "one", DAYS[0])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"title": "Wok", "category": "Home/Pans", "seller": "Acme", "description": "Big."},
            "Wok. Home, Pans. by Acme. Big.",
        ),
        ({"title": "Heat", "category": "Crime, Drama", "description": "Crime, Drama"}, None),
        ({"title": None, "category": "Home"}, "Home"),
        ({"title": "", "seller": ""}, "unknown item"),
        ({}, "unknown item"),
    ],
)
def test_the_text_of_an_item_is_what_is_known_of_it(row, text):
    assert item_text(row) == (text or "Heat. Crime, Drama")
    # Rows come from Arrow with a null for each absent column.
    whole = pa.Table.from_pylist([row], ITEM.schema).to_pylist()[0]
    assert item_text(whole) == item_text(row)
