"""Staleness: exactly what was made from replaced rows, at first or second hand, in the order to mend it."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warehouses import write_rows

from jobs.staleness import stale_partitions
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.generator import CODEBOOK

DAYS = ["2026-03-01", "2026-03-02", "2026-03-03", "2026-03-04"]
# Table -> what it reads: (source, first day, last day), relative to its own.
READS = {
    "feedback": [("behavior_log", 0, 0)],
    "item_graph": [("feedback", None, 0)],
    "user_context": [("feedback", -1, 0)],
    "future_feedback": [("feedback", -2, 0), ("item_graph", -2, -2)],
    "block_list": [("user_context", 0, 0), ("item_graph", 0, 0)],
}
TABLES = ["behavior_log", *READS]
THREE_DAYS = [(table, day) for day in DAYS[:3] for table in TABLES]


def make(store: DeltaStore, table: str, *days: str) -> None:
    """Commit days of a table together, as if made from what there is now."""
    reads = READS.get(table, [])
    provenance = Provenance(
        inputs={source: store.version(source) for source, _, _ in reads},
        # A table that is read on the same day only need not be named.
        windows={source: [first, last] for source, first, last in reads if (first, last) != (0, 0)},
    )
    for day in days:
        write_rows(store, table, [], day, store.revision(table, day) + 1, provenance)


def seen_by(table: str, day: str) -> list[tuple[str, str]]:
    at = DAYS.index(day)
    return [
        (source, other)
        for source, first, last in READS.get(table, [])
        for n, other in enumerate(DAYS)
        if (first is None or at + first <= n) and n <= at + last
    ]


def found(store: DeltaStore) -> list[tuple[str, str]]:
    return [(one.table, one.ds) for one in stale_partitions(store, list(READS))]


@pytest.fixture(scope="module")
def three_days(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with all tables of three days, to be copied."""
    root = tmp_path_factory.mktemp("days") / "warehouse"
    shutil.copytree(fresh, root)
    store = DeltaStore(root)
    for one in THREE_DAYS:
        make(store, *one)
    return root


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(TABLES), st.sampled_from(DAYS)), max_size=14))
def test_stale_is_what_read_another_revision_than_there_is(three_days: Path, tmp_path_factory, steps) -> None:
    """Against a model that remembers every revision that every partition read."""
    root = tmp_path_factory.mktemp("any") / "warehouse"
    shutil.copytree(three_days, root)
    store = DeltaStore(root)
    revision: dict[tuple[str, str], int] = {}
    read: dict[tuple[str, str], dict[tuple[str, str], int]] = {}

    def remember(one: tuple[str, str]) -> None:
        revision[one] = revision.get(one, 0) + 1
        read[one] = {other: revision.get(other, 0) for other in seen_by(*one)}

    for one in THREE_DAYS:
        remember(one)
    for one in steps:
        make(store, *one)
        remember(one)

    def is_stale(one: tuple[str, str]) -> bool:
        return one in read and any(
            revision.get(other, 0) != then or is_stale(other) for other, then in read[one].items()
        )

    expected = {(table, day) for table in READS for day in DAYS if is_stale((table, day))}
    listed = found(store)
    assert set(listed) == expected
    assert len(listed) == len(expected)
    # In this order everything is made after what it reads; then nothing is stale.
    for table, day in listed:
        make(store, table, day)
    assert found(store) == []


def test_nothing_is_stale_after_days_in_order(store: DeltaStore) -> None:
    for day in DAYS:
        for table in TABLES:
            make(store, table, day)
    assert found(store) == []


def test_late_data_is_named_with_its_revision(store: DeltaStore) -> None:
    for day in DAYS[:2]:
        for table in TABLES:
            make(store, table, day)
    make(store, "behavior_log", DAYS[1])
    first, second, *_ = stale_partitions(store, list(READS))
    assert (first.table, first.ds, first.source, first.source_ds) == (
        "feedback",
        DAYS[1],
        "behavior_log",
        DAYS[1],
    )
    assert first.revision == 2
    assert (second.source, second.source_ds, second.revision) == ("feedback", DAYS[1], 1)
    assert {one.ds for one in stale_partitions(store, list(READS))} == {DAYS[1]}


def test_a_day_that_was_filled_in_late_makes_stale_what_looked_for_it(store: DeltaStore) -> None:
    for day in (DAYS[0], DAYS[2]):
        for table in TABLES:
            make(store, table, day)
    make(store, "behavior_log", DAYS[1])
    make(store, "feedback", DAYS[1])
    assert ("user_context", DAYS[2]) in found(store)
    assert ("user_context", DAYS[0]) not in found(store)


def test_a_withdrawn_list_is_not_stale(store: DeltaStore) -> None:
    for table in TABLES:
        make(store, table, DAYS[0])
    make(store, "user_context", DAYS[0])
    assert found(store) == [("block_list", DAYS[0])]
    write_rows(store, "block_list", [], DAYS[0], 2)
    assert found(store) == []


def test_ids_of_another_codebook_make_nothing_stale(store: DeltaStore) -> None:
    """The rows of the codebook that a list was made with are as they were."""

    def add_ids(day: str, codebook: str) -> None:
        revision = store.revision("item_semantic_id", day) + 1
        write_rows(store, "item_semantic_id", [], day, revision, Provenance(models={CODEBOOK: codebook}))

    def make_list(codebook: str) -> None:
        made = Provenance(
            {"item_semantic_id": store.version("item_semantic_id")},
            {CODEBOOK: codebook},
            windows={"item_semantic_id": [None, 0]},
        )
        write_rows(store, "block_list", [], DAYS[1], store.revision("block_list", DAYS[1]) + 1, made)

    add_ids(DAYS[0], "one")
    add_ids(DAYS[1], "one")
    make_list("one")
    add_ids(DAYS[1], "two")
    assert found(store) == []
    add_ids(DAYS[0], "one")
    assert found(store) == [("block_list", DAYS[1])]
    make_list("two")
    assert found(store) == []
    add_ids(DAYS[1], "two")
    assert found(store) == [("block_list", DAYS[1])]


def test_commits_of_earlier_releases_count_their_own_day(store: DeltaStore) -> None:
    """They name no windows; nor need every table exist that they name."""
    for day in DAYS[:2]:
        make(store, "feedback", day)
        inputs = {"feedback": store.version("feedback"), "gone": 3}
        write_rows(store, "user_context", [], day, 1, Provenance(inputs))
    make(store, "feedback", DAYS[0])
    assert found(store) == [("user_context", DAYS[0])]
