"""Delta rules (DESIGN section 9): faults are really injected, and what was there survives them.

The rules, the fault that each guards against, and its tests, here and elsewhere:

1. One Delta implementation, and one transaction with statistics: readers that disagree, lists that are
   seen in part, rows that a filter loses. test_every_table_is_read_by_duckdb_as_it_was_written,
   test_every_table_is_in_its_log_as_it_was_written, test_others_read_every_table_as_delta_rs_does,
   test_a_commit_of_many_days_is_one_version,
   test_no_filter_loses_rows, test_files_are_as_declared
2. Whole days are replaced: rows that are there twice, rows of yesterday's run under an empty one.
   test_any_replacements_equal_a_dict, test_empty_output_replaces_and_counts_as_committed
3. Revisions: a run that is repeated, or that began before another ended.
   test_a_revision_that_does_not_rise_is_refused, test_a_stale_handle_loses_the_same_partition,
   test_a_second_run_does_nothing_and_starts_no_spark, test_force_makes_a_second_revision_of_the_same_rows
4. Checks before a commit: files that are cut, empty, gone, of another schema or day, keys that repeat.
   test_a_bad_file_is_refused_and_the_old_rows_stay, test_a_bucket_that_is_no_whole_number_is_refused,
   test_a_run_directory_that_is_not_there_is_no_empty_output,
   test_a_key_that_is_null_or_there_twice_is_found_in_any_order,
   test_marks_and_failed_attempts_of_spark_are_no_data
5. Creation by one writer: processes that start at once, a mistyped path.
   test_processes_that_create_at_once_make_each_table_once, test_a_table_that_was_never_made_is_one_clear_line
6. Conflicts: writers at once. test_a_stale_handle_is_retried_for_another_partition,
   test_of_processes_on_one_partition_exactly_one_wins, test_processes_on_different_partitions_all_commit,
   test_eight_backfills_at_once_commit_each_day_once
7. No deletion vectors, dates and integers alone: other readers, two spellings of a day.
   test_protocol_and_partition_values, test_a_day_that_is_no_iso_date_is_refused
8. Provenance: late data that nobody notices, logs that are cleaned.
   test_provenance_is_recorded_and_read_back, test_a_commit_says_what_it_was_made_from,
   test_stale_is_what_read_another_revision_than_there_is,
   test_old_provenance_and_versions_outlive_a_checkpoint
9. Shards: a driver that dies. test_generation_goes_on_with_the_shards_that_are_left,
   test_a_shard_made_anew_from_other_inputs_is_no_longer_done,
   test_drivers_killed_again_and_again_make_the_day_as_if_undisturbed
"""

import datetime as dt
import json
import logging
import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake
from disks import SmallDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from other_readers import plain_rows, read_by_duckdb, read_by_log

from negrec_core import delta_files, schemas
from negrec_core.delta import Commit, DeltaStore, Provenance, day_range
from negrec_core.errors import ConfigError, ConflictError, InputError, MissingError, NegrecError
from negrec_core.schemas import TABLES, Table

D1, D2, D3 = "2026-03-01", "2026-03-02", "2026-03-03"
NOTHING = Provenance()
DAY, SET = "user_profile", "negative_item_set_shard"  # by ds; by ds and bucket
WRITERS = 4
# Forked from one that has imported what they need, which takes longer than most of them live.
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["negrec_core.delta", "hypothesis", "pytest"])

Model = dict[str, list[str]]


def profiles(ds: str, *users: str) -> pa.Table:
    rows = [{"user_id": user, "ds": ds} for user in users]
    return pa.Table.from_pylist(rows, schema=TABLES[DAY].schema)


def predictions(ds: str, bucket: int, *users: str) -> pa.Table:
    rows = [
        {"user_id": u, "rank": 1, "codes": [1, 2], "log_prob": -0.5, "ds": ds, "bucket": bucket}
        for u in users
    ]
    return pa.Table.from_pylist(rows, schema=TABLES[SET].schema)


def spread(store: DeltaStore, table: str, rows: pa.Table) -> Path:
    """Write rows into a new run directory, as Spark does, and leave the commit to the test."""
    run = store.new_run(table)
    run.mkdir()
    partitioning = pads.partitioning(
        pa.schema([TABLES[table].schema.field(n) for n in TABLES[table].partition_by]),
        flavor="hive",
    )
    pads.write_dataset(rows, run, format="parquet", partitioning=partitioning)
    return run


def users(store: DeltaStore, table: str = DAY, version: int | None = None) -> Model:
    """What a table holds: ds -> user ids in order."""
    rows = store.read(table, ["ds", "user_id"], version=version)
    held: Model = {}
    for row in rows.sort_by([("ds", "ascending"), ("user_id", "ascending")]).to_pylist():
        held.setdefault(row["ds"], []).append(row["user_id"])
    return held


def runs(store: DeltaStore, table: str = DAY) -> set[str]:
    return {path.name for path in store.path(table).glob("run=*")}


def log_actions(store: DeltaStore, table: str) -> list[dict[str, Any]]:
    log = sorted((store.path(table) / "_delta_log").glob("*.json"))
    return [json.loads(line) for file in log for line in file.read_text().splitlines()]


def test_the_tests_of_every_rule_are_there() -> None:
    folder = Path(__file__).resolve().parents[1]
    code = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("test_*.py"))
    named = re.findall(r"test_\w+", __doc__ or "")
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in code] == []


# --- reading and writing ------------------------------------------------------


def test_tables_are_made_as_declared(store: DeltaStore) -> None:
    for name, table in TABLES.items():
        handle = store.handle(name)
        found = pa.schema(handle.schema().to_arrow())
        assert found.names == table.schema.names
        assert [f.type for f in found] == [f.type for f in table.schema]
        assert [f.metadata for f in found] == [f.metadata for f in table.schema]
        assert handle.metadata().partition_columns == list(table.partition_by)
        assert store.read(name).num_rows == 0
        assert store.days(name) == []
        assert store.files(name) == []
        assert store.version(name) == 0


def test_create_tables_leaves_what_is_there(store: DeltaStore) -> None:
    store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    store.create_tables()
    assert users(store) == {D1: ["a"]}


def test_a_table_that_was_never_made_is_one_clear_line(tmp_path: Path) -> None:
    empty = DeltaStore(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"^table item: not found under .*--warehouse"):
        empty.read("item")
    assert not empty.root.exists()


def test_read_and_files_choose_days_columns_and_version(store: DeltaStore) -> None:
    first = store.write_arrow(DAY, profiles(D1, "a", "b"), {D1: 1}, NOTHING)
    store.write_arrow(DAY, profiles(D2, "c"), {D2: 1}, NOTHING)
    store.write_arrow(DAY, profiles(D1, "d"), {D1: 2}, NOTHING)
    assert users(store) == {D1: ["d"], D2: ["c"]}
    assert users(store, version=first) == {D1: ["a", "b"]}
    assert store.days(DAY) == [D1, D2]
    assert store.read(DAY, ["user_id"], days=[D2]).to_pydict() == {"user_id": ["c"]}
    assert store.read(DAY, days=[]).schema.equals(TABLES[DAY].schema)
    assert store.read(DAY, days=[D3]).num_rows == 0
    assert store.read(DAY).schema.equals(TABLES[DAY].schema)
    (file,) = store.files(DAY, [D2])
    assert pq.ParquetFile(file).read(["user_id"]).to_pydict() == {"user_id": ["c"]}
    assert len(store.files(DAY)) == 2
    assert store.files(DAY, []) == []
    (old,) = store.files(DAY, version=first)
    assert pq.ParquetFile(old).read(["user_id"]).num_rows == 2
    with pytest.raises(MissingError, match="no version 99 yet"):
        store.read(DAY, version=99)


def test_rows_are_sorted_by_key_inside_a_file(store: DeltaStore) -> None:
    ids = [f"u{n * 7919 % 300_000:06}" for n in range(300_000)]
    store.write_arrow(DAY, profiles(D1, *ids), {D1: 1}, NOTHING)
    stored = [pq.ParquetFile(f).read(["user_id"])["user_id"].to_pylist() for f in store.files(DAY)]
    assert sum(map(len, stored)) == 300_000
    assert all(part == sorted(part) for part in stored)


@pytest.mark.parametrize("name", ["with space", "é=ü", "a#b", "a:b", "a'b", "ds=2020-01-01"])
def test_odd_paths_of_warehouse_and_files(fresh: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    shutil.copytree(fresh, root)
    store = DeltaStore(root)
    run = spread(store, DAY, profiles(D1, "a"))
    (file,) = run.rglob("*.parquet")
    file = file.rename(file.with_name("part 0%20é#?+.parquet"))
    store.commit(DAY, run, {D1: 1}, NOTHING)
    assert store.files(DAY) == [str(file)]
    assert users(store) == {D1: ["a"]}


@pytest.mark.parametrize("name", ["a%20b", "a[b]", "a*", "a?", "{a}", "a\\b"])
def test_a_warehouse_path_that_spark_or_delta_misreads_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        DeltaStore(tmp_path / name)


def test_day_range() -> None:
    assert day_range(dt.date(2026, 2, 27), dt.date(2026, 3, 1)) == ["2026-02-27", "2026-02-28", D1]
    assert day_range(dt.date(2026, 3, 2), dt.date(2026, 3, 1)) == []


# --- replacing partitions, revisions, provenance ------------------------------


def test_empty_output_replaces_and_counts_as_committed(store: DeltaStore) -> None:
    store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    store.write_arrow(DAY, profiles(D1), {D1: 2}, NOTHING)
    assert users(store) == {}
    assert store.days(DAY) == []
    assert store.revision(DAY, D1) == 2
    store.require(DAY, [D1], "not needed")
    with pytest.raises(MissingError, match=rf"table {DAY}: no partition ds={D2}; import it"):
        store.require(DAY, [D1, D2], "import it")


def test_a_commit_of_many_days_is_one_version(store: DeltaStore) -> None:
    store.write_arrow(DAY, profiles(D2, "old"), {D2: 1}, NOTHING)
    before = store.version(DAY)
    rows = pa.concat_tables([profiles(D1, "a"), profiles(D3, "c")])
    version = store.write_arrow(DAY, rows, {D1: 1, D2: 2, D3: 1}, NOTHING)
    assert version == before + 1 == store.version(DAY)
    assert users(store) == {D1: ["a"], D3: ["c"]}
    assert [store.revision(DAY, day) for day in (D1, D2, D3)] == [1, 2, 1]
    # One of the days is not new: none is replaced.
    with pytest.raises(ConflictError, match=f"{D3} is already at revision 1"):
        store.write_arrow(DAY, profiles(D1, "x"), {D1: 2, D2: 3, D3: 1}, NOTHING)
    assert users(store) == {D1: ["a"], D3: ["c"]}
    assert store.revision(DAY, D1) == 1


@pytest.mark.parametrize("revision", [1, 2])
def test_a_revision_that_does_not_rise_is_refused(store: DeltaStore, revision: int) -> None:
    store.write_arrow(DAY, profiles(D1, "a"), {D1: 2}, NOTHING)
    kept = runs(store)
    with pytest.raises(ConflictError, match=r"2026-03-01 is already at revision 2.*negrec status"):
        store.write_arrow(DAY, profiles(D1, "b"), {D1: revision}, NOTHING)
    assert users(store) == {D1: ["a"]}
    assert runs(store) == kept


def test_committing_a_run_twice_is_refused_and_its_files_stay(store: DeltaStore) -> None:
    run = spread(store, DAY, profiles(D1, "a"))
    store.commit(DAY, run, {D1: 1}, NOTHING)
    with pytest.raises(ConflictError):
        store.commit(DAY, run, {D1: 1}, NOTHING)
    with pytest.raises(InputError):
        store.commit(DAY, run, {D2: 1}, NOTHING)
    assert users(store) == {D1: ["a"]}


def test_provenance_is_recorded_and_read_back(store: DeltaStore) -> None:
    first = Provenance({"item": 3, "feedback": 7}, {"generator": "v1"}, "c0ffee", "1.2.3")
    second = Provenance({"item": 4}, {}, "beef", "1.2.4")
    v1 = store.write_arrow(DAY, profiles(D1, "a"), {D1: 1, D2: 1}, first)
    v2 = store.write_arrow(DAY, profiles(D2, "b"), {D2: 2}, second)
    assert store.commits(DAY) == [Commit(v2, {D2: 2}, second), Commit(v1, {D1: 1, D2: 1}, first)]
    assert store.commits(DAY, limit=1) == [Commit(v2, {D2: 2}, second)]
    assert store.commit_of(DAY, D1).provenance == first
    assert store.commit_of(DAY, D2).provenance == second
    assert store.commit_of(DAY, D2, version=v1).provenance == first
    with pytest.raises(MissingError, match=f"no partition ds={D3}"):
        store.commit_of(DAY, D3)


def test_protocol_and_partition_values(store: DeltaStore) -> None:
    for revision in (1, 2):
        rows = pa.concat_tables([predictions(D1, 0, "a"), predictions(D1, 11, "b")])
        store.write_arrow(SET, rows, {D1: revision}, NOTHING)
    protocol = store.handle(SET).protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    actions = log_actions(store, SET)
    adds = [action["add"] for action in actions if "add" in action]
    removes = [action["remove"] for action in actions if "remove" in action]
    assert [add["partitionValues"] for add in adds] == [
        {"ds": D1, "bucket": bucket} for bucket in ("0", "11")
    ] * 2
    assert {remove["path"] for remove in removes} == {add["path"] for add in adds[:2]}
    assert not any("deletionVector" in action for action in adds + removes)
    # The schema and the settings of the table are written once, at creation.
    assert sum("metaData" in action for action in actions) == 1


@pytest.mark.parametrize("ds", ["20260301", "2026-3-1", "yesterday", "2026-02-30", ""])
def test_a_day_that_is_no_iso_date_is_refused(store: DeltaStore, ds: str) -> None:
    with pytest.raises(InputError, match="not a date such as"):
        store.write_arrow(DAY, profiles(ds, "a"), {ds: 1}, NOTHING)
    with pytest.raises(InputError, match="not a date such as"):
        store.commit_shard(SET, store.new_run(SET), ds, 0, "x")
    assert store.version(DAY) == 0


def test_a_commit_of_no_day_is_refused(store: DeltaStore) -> None:
    with pytest.raises(ValueError, match="at least one ds"):
        store.write_arrow(DAY, profiles(D1), {}, NOTHING)


# --- what is wrong with files -------------------------------------------------


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_in_the_middle(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + whole[40:])


def make_empty(file: Path) -> None:
    file.write_bytes(b"")


def lose(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to(file.with_name("gone"))


def rewrite(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda file: pq.write_table(change(pq.ParquetFile(file).read()), file)


def move(partition: str) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        target = file.parents[1] / partition
        target.mkdir(parents=True, exist_ok=True)
        file.rename(target / file.name)

    return spoil


def copy(file: Path) -> None:
    shutil.copy(file, file.with_name("again.parquet"))


def double(rows: pa.Table) -> pa.Table:
    return pa.concat_tables([rows, rows.slice(1, 1)])


def drop_key(rows: pa.Table) -> pa.Table:
    return rows.set_column(0, "user_id", pa.array(["a", None], pa.string()))


def retype(rows: pa.Table) -> pa.Table:
    return rows.set_column(1, "age", pa.array([31, 32], pa.int32()))


SPOILERS = {
    "cut": (cut_in_half, "is not a whole Parquet file"),
    "cut in the middle": (cut_in_the_middle, "is not a whole Parquet file"),
    "empty": (make_empty, "is not a whole Parquet file"),
    "missing": (lose, "is not a whole Parquet file"),
    "column absent": (
        rewrite(lambda t: t.drop_columns("tags")),
        "tags is absent where string is declared",
    ),
    "column of another type": (rewrite(retype), "age is int32 where string is declared"),
    "column unknown": (
        rewrite(lambda t: t.append_column("mood", pa.array(["", ""]))),
        "mood is string where no column is declared",
    ),
    "columns in another order": (
        rewrite(lambda t: t.select(t.column_names[::-1])),
        "its columns are tags, occupation",
    ),
    "another day": (move(f"ds={D2}"), f"holds ds={D2}, which this write does not replace"),
    "no day": (move("."), "is not partitioned by ds"),
    "another partition column": (move("day=1"), "is not partitioned by ds"),
    "null day": (move("ds=__HIVE_DEFAULT_PARTITION__"), "__HIVE_DEFAULT_PARTITION__, which"),
    "duplicate key": (rewrite(double), "example user_id=b is there 2 times"),
    "duplicate key across files": (copy, "2 rows of ds=2026-03-01 repeat a key"),
    "null key": (rewrite(drop_key), "1 rows of ds=2026-03-01 have no user_id"),
}


@pytest.mark.parametrize("fault", SPOILERS)
def test_a_bad_file_is_refused_and_the_old_rows_stay(store: DeltaStore, fault: str) -> None:
    spoil, message = SPOILERS[fault]
    store.write_arrow(DAY, profiles(D1, "old"), {D1: 1}, NOTHING)
    kept, version = runs(store), store.version(DAY)
    run = spread(store, DAY, profiles(D1, "a", "b"))
    spoil(next(run.rglob("*.parquet")))
    with pytest.raises(InputError, match=message) as caught:
        store.commit(DAY, run, {D1: 2}, NOTHING)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"table {DAY}: ")
    assert users(store) == {D1: ["old"]}
    assert store.version(DAY) == version
    assert runs(store) == kept
    store.write_arrow(DAY, profiles(D1, "a", "b"), {D1: 2}, NOTHING)
    assert users(store) == {D1: ["a", "b"]}


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["", "a", "ab", "b", "ü", "\U0001f600", None]), st.integers(0, 2))
    ),
    ordered=st.booleans(),
    at_once=st.integers(1, 4),
)
def test_a_key_that_is_null_or_there_twice_is_found_in_any_order(rows, ordered, at_once) -> None:
    if ordered:
        rows = sorted(rows, key=lambda row: (row[0] is None, row))
    columns = {"user_id": [user for user, _ in rows], "rank": [rank for _, rank in rows]}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(delta_files, "_KEYS_AT_ONCE", at_once):
        file = Path(folder) / "part.parquet"
        schema = pa.schema([("user_id", pa.string()), ("rank", pa.int32())])
        pq.write_table(pa.table(columns, schema), file, row_group_size=3)
        good = len(set(rows)) == len(rows) and None not in columns["user_id"]
        with nullcontext() if good else pytest.raises(InputError, match=r"repeat a key|have no user_id"):
            delta_files._check_keys(TABLES[SET], "ds=2026-03-01", [file])


@pytest.mark.parametrize("bucket", ["-1", "01", "x", "__HIVE_DEFAULT_PARTITION__", "1.0"])
def test_a_bucket_that_is_no_whole_number_is_refused(store: DeltaStore, bucket: str) -> None:
    run = spread(store, SET, predictions(D1, 1, "a"))
    move(f"bucket={bucket}")(next(run.rglob("*.parquet")))
    with pytest.raises(InputError, match=f"bucket={bucket} is not a whole number"):
        store.commit(SET, run, {D1: 1}, NOTHING)


def test_a_run_directory_that_is_not_there_is_no_empty_output(store: DeltaStore) -> None:
    store.write_arrow(DAY, profiles(D1, "old"), {D1: 1}, NOTHING)
    with pytest.raises(InputError, match="was never written"):
        store.commit(DAY, store.new_run(DAY), {D1: 2}, NOTHING)
    assert users(store) == {D1: ["old"]}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), r"has [\d,]+ bytes, not [\d,]+"),
        (lambda file: file.write_bytes(b""), r"has 0 bytes, not [\d,]+"),
        (lambda file: file.unlink(), "is gone"),
    ],
    ids=["cut", "empty", "lost"],
)
def test_a_file_that_is_not_as_committed_is_one_clear_line(
    store: DeltaStore, damage: Callable[[Path], object], said: str
) -> None:
    for day in (D1, D2):
        store.write_arrow(DAY, profiles(day, "a"), {day: 1}, NOTHING)
    (file,) = store.files(DAY, [D1], check=True)
    damage(Path(file))
    with pytest.raises(InputError, match=rf"table {DAY}: run=.*parquet of ds={D1} {said}; restore") as raised:
        store.files(DAY, check=True)
    assert str(raised.value).isprintable()
    with pytest.raises(InputError, match=rf"table {DAY}: .* of ds={D1} {said}; restore"):
        store.read(DAY)
    assert store.files(DAY, [D2], check=True)
    assert file in store.files(DAY)
    assert store.read(DAY, days=[D2]).num_rows == 1


def test_a_file_that_is_spoilt_but_as_long_as_before_is_one_clear_line(store: DeltaStore) -> None:
    store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    (file,) = map(Path, store.files(DAY))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(InputError, match=rf"table {DAY}: a data file cannot be read .*; restore") as raised:
        store.read(DAY)
    assert str(raised.value).isprintable()


def log_entry(store: DeltaStore) -> Path:
    return store.path(DAY) / "_delta_log" / f"{1:020}.json"


def cut_checkpoint(store: DeltaStore) -> None:
    store.handle(DAY).create_checkpoint()
    (file,) = store.path(DAY).glob("_delta_log/*.checkpoint.parquet")
    cut_in_half(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda store: cut_in_half(log_entry(store)),
        lambda store: log_entry(store).write_bytes(bytes(100)),
        lambda store: log_entry(store).unlink(),
        cut_checkpoint,
    ],
    ids=["cut entry", "zeroes", "lost entry", "cut checkpoint"],
)
def test_a_damaged_log_is_one_clear_line(store: DeltaStore, damage: Callable[[DeltaStore], None]) -> None:
    for revision in (1, 2):
        store.write_arrow(DAY, profiles(D1, "a"), {D1: revision}, NOTHING)
    damage(store)
    for use in (
        lambda: store.read(DAY),
        lambda: store.revision(DAY, D1),
        lambda: store.write_arrow(DAY, profiles(D1, "b"), {D1: 3}, NOTHING),
    ):
        with pytest.raises(InputError, match=rf"^table {DAY}: its log cannot be read .*; restore ") as raised:
            use()
        assert str(raised.value).isprintable()


def test_an_old_entry_that_is_damaged_is_one_clear_line(store: DeltaStore) -> None:
    """Rows are read from the checkpoint; where they came from is told by the entry alone."""
    store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    store.handle(DAY).create_checkpoint()
    cut_in_half(log_entry(store))
    assert users(store) == {D1: ["a"]}
    with pytest.raises(InputError, match=rf"^table {DAY}: its log cannot be read .*; restore "):
        store.commits(DAY)


def test_marks_and_failed_attempts_of_spark_are_no_data(store: DeltaStore) -> None:
    run = spread(store, DAY, profiles(D1, "a"))
    (file,) = run.rglob("*.parquet")
    (run / "_SUCCESS").touch()
    (file.parent / f".{file.name}.crc").write_bytes(b"crc")
    shutil.copy(file, file.parent / "_part-0.parquet")
    shutil.copy(file, file.parent / ".part-0.parquet")
    attempt = run / "_temporary" / "0" / "_temporary" / "attempt_1" / f"ds={D1}"
    attempt.mkdir(parents=True)
    shutil.copy(file, attempt / "part-0.parquet")
    (attempt / "part-1.parquet").write_bytes(b"half a file")
    store.commit(DAY, run, {D1: 1}, NOTHING)
    assert store.files(DAY) == [str(file)]
    assert users(store) == {D1: ["a"]}


def test_files_may_differ_in_the_width_of_strings(store: DeltaStore) -> None:
    run = spread(store, DAY, profiles(D1, "a"))
    (file,) = run.rglob("*.parquet")
    rows = profiles(D1, "b").select(TABLES[DAY].body.names)
    wide = pa.schema([pa.field(f.name, pa.large_string()) for f in rows.schema])
    pq.write_table(rows.cast(wide), file.with_name("wide.parquet"))
    store.commit(DAY, run, {D1: 1}, NOTHING)
    assert users(store) == {D1: ["a", "b"]}


def test_a_table_of_another_release_is_one_clear_line(
    store: DeltaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    declared = TABLES[DAY]
    grown = declared.schema.insert(1, pa.field("mood", pa.string()))
    monkeypatch.setitem(TABLES, DAY, Table(DAY, "", grown, declared.key, declared.partition_by))
    rows = pa.Table.from_pylist([{"user_id": "b", "ds": D1}], schema=grown)
    for use in (
        lambda: store.read(DAY),
        lambda: store.files(DAY),
        lambda: store.write_arrow(DAY, rows, {D1: 2}, NOTHING),
    ):
        with pytest.raises(InputError, match=r"use that release, or import .* --warehouse .*mood is absent"):
            use()


# --- shards -------------------------------------------------------------------


def commit_shard(store: DeltaStore, bucket: int, digest: str, *ids: str) -> int:
    run = spread(store, SET, predictions(D1, bucket, *ids))
    return store.commit_shard(SET, run, D1, bucket, digest)


def test_a_shard_replaces_itself_alone(store: DeltaStore) -> None:
    assert not store.shard_done(SET, D1, 0, "x")
    commit_shard(store, 0, "x", "a")
    commit_shard(store, 10, "x", "b")
    commit_shard(store, 1, "x")  # no user
    assert users(store, SET) == {D1: ["a", "b"]}
    assert [store.shard_done(SET, D1, bucket, "x") for bucket in (0, 1, 2, 10)] == [
        True,
        True,
        False,
        True,
    ]
    assert not store.shard_done(SET, D2, 0, "x")
    commit_shard(store, 0, "y", "c")
    assert users(store, SET) == {D1: ["b", "c"]}
    assert store.shard_done(SET, D1, 0, "y")


def test_a_shard_made_anew_from_other_inputs_is_no_longer_done(store: DeltaStore) -> None:
    commit_shard(store, 0, "x", "a")
    commit_shard(store, 0, "y", "b")
    assert not store.shard_done(SET, D1, 0, "x")
    commit_shard(store, 0, "x", "c")
    assert store.shard_done(SET, D1, 0, "x")
    assert not store.shard_done(SET, D1, 0, "y")
    assert users(store, SET) == {D1: ["c"]}


def test_a_shard_with_rows_of_another_is_refused(store: DeltaStore) -> None:
    run = spread(store, SET, predictions(D1, 1, "a"))
    with pytest.raises(InputError, match="other buckets than 2"):
        store.commit_shard(SET, run, D1, 2, "x")
    assert not run.exists()
    assert not store.shard_done(SET, D1, 2, "x")
    assert store.version(SET) == 0


# --- concurrent writers -------------------------------------------------------


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], None]:
    """`meanwhile(act, times)`: act between the check and the commit of the next `times` commits."""
    original = DeltaTable.create_write_transaction

    def arrange(act: Callable[[], object], times: int) -> None:
        left = [times]

        def late(handle: DeltaTable, *args: Any, **kwargs: Any) -> None:
            if left[0]:
                left[0] -= 1
                with monkeypatch.context() as undone:
                    undone.setattr(DeltaTable, "create_write_transaction", original)
                    act()
            original(handle, *args, **kwargs)

        monkeypatch.setattr(DeltaTable, "create_write_transaction", late)

    return arrange


def test_a_stale_handle_is_retried_for_another_partition(store: DeltaStore, meanwhile) -> None:
    store.write_arrow(DAY, profiles(D1, "old"), {D1: 1}, NOTHING)
    meanwhile(lambda: store.write_arrow(DAY, profiles(D2, "b"), {D2: 1}, NOTHING), 1)
    version = store.write_arrow(DAY, profiles(D1, "a"), {D1: 2}, NOTHING)
    assert version == 3 == store.commit_of(DAY, D1).version
    assert users(store) == {D1: ["a"], D2: ["b"]}


def test_a_stale_handle_loses_the_same_partition(store: DeltaStore, meanwhile) -> None:
    store.write_arrow(DAY, profiles(D1, "old"), {D1: 1}, NOTHING)
    meanwhile(lambda: store.write_arrow(DAY, profiles(D1, "b"), {D1: 2}, NOTHING), 1)
    with pytest.raises(ConflictError, match="already at revision 2"):
        store.write_arrow(DAY, profiles(D1, "a"), {D1: 2}, NOTHING)
    assert users(store) == {D1: ["b"]}
    assert len(runs(store)) == 2  # of the two commits


def test_a_stale_handle_loses_the_same_shard(store: DeltaStore, meanwhile) -> None:
    meanwhile(lambda: commit_shard(store, 0, "x", "b"), 1)
    with pytest.raises(ConflictError, match=f"{D1}.0 is already at revision 1"):
        commit_shard(store, 0, "y", "a")
    assert users(store, SET) == {D1: ["b"]}
    assert store.shard_done(SET, D1, 0, "x")
    assert not store.shard_done(SET, D1, 0, "y")


def test_a_commit_returns_its_own_version_though_another_follows(
    store: DeltaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DeltaTable.create_write_transaction

    def followed(handle: DeltaTable, *args: Any, **kwargs: Any) -> None:
        original(handle, *args, **kwargs)
        with monkeypatch.context() as undone:
            undone.setattr(DeltaTable, "create_write_transaction", original)
            store.write_arrow(DAY, profiles(D2, "b"), {D2: 1}, NOTHING)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", followed)
    version = store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    assert version == 1 == store.commit_of(DAY, D1).version
    assert store.version(DAY) == 2


def test_a_writer_that_always_loses_gives_up(
    store: DeltaStore, meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    other = iter(range(1, 100))
    meanwhile(lambda: store.write_arrow(DAY, profiles(D2), {D2: next(other)}, NOTHING), 99)
    with pytest.raises(ConflictError, match="10 commits in a row lost"):
        store.write_arrow(DAY, profiles(D1, "a"), {D1: 1}, NOTHING)
    assert users(store) == {}
    assert store.revision(DAY, D1) == 0


_barrier: Any = None


def _join(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _create(root: Path) -> None:
    _barrier.wait(60)
    DeltaStore(root).create_tables()


def _write(root: Path, days: list[str], user: str) -> str:
    """Replace one day after the other, all writers at once; the name of the error that came."""
    store = DeltaStore(root)
    _barrier.wait(60)
    try:
        for day in days:
            store.write_arrow(DAY, profiles(day, user), {day: 1}, Provenance(config_digest=user))
    except NegrecError as error:
        return type(error).__name__
    return ""


@pytest.fixture(scope="module")
def writers() -> Iterator[ProcessPoolExecutor]:
    """As many processes as `WRITERS`; a task waits until all of them have one."""
    with ProcessPoolExecutor(WRITERS, PROCESSES, _join, (PROCESSES.Barrier(WRITERS),)) as pool:
        yield pool


def test_processes_that_create_at_once_make_each_table_once(
    writers: ProcessPoolExecutor, tmp_path: Path
) -> None:
    list(writers.map(_create, [tmp_path / "new"] * WRITERS))
    store = DeltaStore(tmp_path / "new")
    for table in TABLES:
        assert sum("metaData" in action for action in log_actions(store, table)) == 1
        assert store.version(table) == 0


def test_processes_on_different_partitions_all_commit(
    writers: ProcessPoolExecutor, store: DeltaStore
) -> None:
    days = [day_range(dt.date(2026, m, 1), dt.date(2026, m, 3)) for m in range(1, WRITERS + 1)]
    names = [f"writer-{n}" for n in range(WRITERS)]
    assert list(writers.map(_write, [store.root] * WRITERS, days, names)) == [""] * WRITERS
    assert users(store) == {d: [n] for own, n in zip(days, names, strict=True) for d in own}
    assert store.version(DAY) == 3 * WRITERS
    for own, name in zip(days, names, strict=True):
        assert {store.commit_of(DAY, day).provenance.config_digest for day in own} == {name}


def test_of_processes_on_one_partition_exactly_one_wins(
    writers: ProcessPoolExecutor, store: DeltaStore
) -> None:
    names = [f"writer-{n}" for n in range(WRITERS)]
    outcomes = list(writers.map(_write, [store.root] * WRITERS, [[D1]] * WRITERS, names))
    assert sorted(outcomes) == [""] + ["ConflictError"] * (WRITERS - 1)
    winner = names[outcomes.index("")]
    assert users(store) == {D1: [winner]}
    assert store.commit_of(DAY, D1).provenance.config_digest == winner
    assert len(runs(store)) == 1


def _die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_and_die(root: Path, owner: type, method: str) -> None:
    setattr(owner, method, _die)
    DeltaStore(root).write_arrow(DAY, profiles(D1, "new"), {D1: 2}, NOTHING)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(DeltaStore, "commit"), (DeltaTable, "create_write_transaction")],
    ids=["before the checks", "after the checks"],
)
def test_a_writer_killed_before_its_commit_changes_nothing(
    store: DeltaStore, owner: type, method: str
) -> None:
    store.write_arrow(DAY, profiles(D1, "old"), {D1: 1}, NOTHING)
    child = PROCESSES.Process(target=_write_and_die, args=(store.root, owner, method))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert len(runs(store)) == 2  # the files of the killed writer lie there
    assert users(store) == {D1: ["old"]}
    assert store.revision(DAY, D1) == 1
    store.write_arrow(DAY, profiles(D1, "new"), {D1: 2}, NOTHING)
    assert users(store) == {D1: ["new"]}


def _write_on(root: Path) -> None:
    """Replace one day again and again; each row names the revision it came with."""
    store = DeltaStore(root)
    for revision in range(store.revision(DAY, D1) + 1, 1 << 20):
        store.write_arrow(DAY, profiles(D1, *of_revision(revision)), {D1: revision}, NOTHING)


def of_revision(revision: int) -> list[str]:
    return [f"{revision}-{n}" for n in range(3)]


def test_a_writer_killed_at_any_moment_leaves_whole_commits(store: DeltaStore, kills: int) -> None:
    moment = random.Random(kills)
    for _ in range(kills):
        before = store.revision(DAY, D1)
        child = PROCESSES.Process(target=_write_on, args=(store.root,))
        child.start()
        while store.revision(DAY, D1) == before and child.is_alive():
            time.sleep(0.01)
        time.sleep(0.1 * moment.random())
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        revision = store.revision(DAY, D1)
        assert revision > before
        assert users(store) == {D1: of_revision(revision)}
        assert [commit.days for commit in store.commits(DAY)] == [{D1: n} for n in range(revision, 0, -1)]
    store.write_arrow(DAY, profiles(D1, "last"), {D1: revision + 1}, NOTHING)
    assert users(store) == {D1: ["last"]}


# --- a full disk ----------------------------------------------------------------


@pytest.mark.parametrize("at", ["the files", "the commit"])
def test_on_a_full_disk_nothing_is_published_and_nothing_is_left(
    fresh: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    store = DeltaStore(shutil.copytree(fresh, small_disk.root / "warehouse"))
    store.write_arrow(DAY, profiles(D1, "old"), {D1: 1}, NOTHING)
    kept = runs(store)
    if at == "the files":
        small_disk.fill()
    else:
        commit = DeltaTable.create_write_transaction

        def filling(*args: Any, **kwargs: Any) -> None:
            small_disk.fill()
            commit(*args, **kwargs)

        monkeypatch.setattr(DeltaTable, "create_write_transaction", filling)
    with pytest.raises(OSError, match="No space left on device"):
        store.write_arrow(DAY, profiles(D1, *(f"new {n}" for n in range(1000))), {D1: 2}, NOTHING)
    monkeypatch.undo()
    assert users(store) == {D1: ["old"]}
    assert store.revision(DAY, D1) == 1
    assert runs(store) == kept
    small_disk.make_room()
    store.write_arrow(DAY, profiles(D1, "new"), {D1: 2}, NOTHING)
    assert users(store) == {D1: ["new"]}


# --- the log in the long run --------------------------------------------------


MANY = day_range(dt.date(2026, 1, 1), dt.date(2026, 4, 8))  # a checkpoint is due two commits later


@pytest.fixture(scope="module")
def many_days(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with one commit for each of `MANY` days, to be copied."""
    store = DeltaStore(shutil.copytree(fresh, tmp_path_factory.mktemp("many") / "warehouse"))
    for day in MANY:
        store.write_arrow(DAY, profiles(day, day), {day: 1}, Provenance(config_digest=day))
    return store.root


def test_old_provenance_and_versions_outlive_a_checkpoint(many_days: Path, tmp_path: Path) -> None:
    """delta-rs, left to itself, deletes month-old log entries whenever it writes a checkpoint."""
    store = DeltaStore(shutil.copytree(many_days, tmp_path / "warehouse"))
    log = store.path(DAY) / "_delta_log"
    long_ago = time.time() - 400 * 86_400
    for entry in log.iterdir():
        os.utime(entry, (long_ago, long_ago))
    # A foreign writer, with the defaults of delta-rs.
    write_deltalake(store.path(DAY), profiles("2027-01-01", "x"), mode="append")
    assert list(log.glob("*.checkpoint.parquet"))
    store.write_arrow(DAY, profiles("2027-01-02", "y"), {"2027-01-02": 1}, NOTHING)
    assert store.commit_of(DAY, MANY[0]).provenance.config_digest == MANY[0]
    assert [commit.version for commit in store.commits(DAY)] == [100, *range(98, 0, -1)]
    assert users(store, version=2) == {day: [day] for day in MANY[:2]}
    assert [store.revision(DAY, day) for day in MANY] == [1] * 98


def test_a_commit_stands_when_its_checkpoint_fails(
    many_days: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DeltaStore(shutil.copytree(many_days, tmp_path / "warehouse"))
    (store.path(DAY) / "_delta_log" / "_last_checkpoint" / "in the way").mkdir(parents=True)
    # delta-rs itself would write one with version 99, and fail the commit after it stands.
    assert store.write_arrow(DAY, profiles(D2, "x"), {D2: 2}, NOTHING) == 99
    with caplog.at_level(logging.WARNING, logger="negrec"):
        assert store.write_arrow(DAY, profiles(D1, "x"), {D1: 2}, NOTHING) == 100
    assert "no checkpoint was written" in caplog.text
    assert users(store)[D1] == ["x"]
    assert store.revision(DAY, D1) == 2


# --- statistics ---------------------------------------------------------------

PROBE = Table(
    "probe",
    "one value of each kind",
    pa.schema(
        [
            pa.field("s", pa.string()),
            pa.field("i", pa.int32()),
            pa.field("l", pa.int64()),
            pa.field("t", schemas.TIMESTAMP),
            pa.field("d", pa.date32()),
            pa.field("f", pa.float64()),
            pa.field("b", pa.bool_()),
            pa.field("many", pa.list_(pa.int32())),
            pa.field("pair", pa.struct([pa.field("s", pa.string())])),
            pa.field("ds", pa.string()),
        ]
    ),
    (),
    ("ds",),
)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "s": st.text("aé\U0010ffff", max_size=2) | st.just("x" * 40),
    "i": st.integers(-2, 2),
    "l": st.integers(-(2**63), 2**63 - 1),
    "t": st.datetimes(timezones=st.just(dt.UTC)),
    "d": st.dates(),
    "f": st.floats() | st.sampled_from([0.0, -0.0, 1.5]),
    "b": st.booleans(),
}
rows_of_probe = st.lists(
    st.fixed_dictionaries(
        {name: st.none() | values for name, values in VALUES.items()}
        | {
            "many": st.none() | st.lists(st.integers(0, 3), max_size=2),
            "pair": st.none() | st.fixed_dictionaries({"s": st.none() | st.text(max_size=2)}),
        }
    ),
    min_size=1,
    max_size=6,
)


def write_probe(store: DeltaStore, files: list[list[dict[str, Any]]], row_group: int) -> pa.Table:
    """Commit these files as one day; all rows."""
    run = store.new_run("probe")
    (run / f"ds={D1}").mkdir(parents=True)
    tables = [pa.Table.from_pylist(rows, schema=PROBE.body) for rows in files]
    for n, table in enumerate(tables):
        pq.write_table(table, run / f"ds={D1}" / f"{n}.parquet", row_group_size=row_group)
    store.commit("probe", run, {D1: 1}, NOTHING)
    return pa.concat_tables(tables)


@settings(max_examples=15)
@given(st.lists(rows_of_probe, min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_no_filter_loses_rows(tmp_path_factory, files, row_group, data) -> None:
    """deltalake turns statistics into guarantees about a file; a wrong one drops rows unseen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("negrec_core.delta.TABLES", {"probe": PROBE})
        store = DeltaStore(tmp_path_factory.mktemp("probe"))
        store.create_tables()
        rows = write_probe(store, files, row_group)
        found = store.handle("probe").to_pyarrow_dataset()
        # Not `rows` itself: pyarrow's own skipping of row groups misses NaN in `f != 0`.
        plain = pads.dataset(store.files("probe"), schema=PROBE.body)
    conditions = []
    for name, values in VALUES.items():
        column = pc.field(name)
        present = [value for value in rows[name].to_pylist() if value is not None]
        value = data.draw(st.sampled_from(present) if present else values)
        scalar = pa.scalar(value, PROBE.schema.field(name).type)
        conditions += [column == scalar, column != scalar, column < scalar, column >= scalar]
        conditions += [column.is_null(), column.is_valid()]
    conditions += [
        pc.field("pair").is_null(),
        pc.field("pair", "s") == "",
        pc.is_nan(pc.field("f")),
    ]
    for condition in conditions:
        assert found.count_rows(filter=condition) == plain.count_rows(filter=condition), condition


def test_readers_count_and_skip_files_by_the_log(store: DeltaStore) -> None:
    rows = pa.concat_tables([predictions(D1, 0, "a", "b"), predictions(D1, 1, "c")])
    store.write_arrow(SET, rows, {D1: 1}, NOTHING)
    store.write_arrow(SET, predictions(D2, 1, "d"), {D2: 1}, NOTHING)
    handle = store.handle(SET)
    assert handle.count() == 4
    one = (pc.field("ds") == D1) & (pc.field("bucket") == 1)
    dataset = handle.to_pyarrow_dataset()
    assert [fragment.count_rows() for fragment in dataset.get_fragments(one)] == [1]
    query = QueryBuilder().register("t", handle)
    counts = [
        pa.table(query.execute(f"select count(*) n from t where {where}").read_all())["n"][0].as_py()
        for where in ("user_id = 'c'", "bucket = 1", "model_version is null", "log_prob < 0")
    ]
    assert counts == [1, 2, 4, 4]


# --- another reader ------------------------------------------------------------


def value_of(kind: pa.DataType, n: int) -> Any:
    """Some value of a type; differs with n."""
    if pa.types.is_list(kind):
        return [value_of(kind.value_type, n + i) for i in range(n % 3)]
    if pa.types.is_struct(kind):
        return {field.name: value_of(field.type, n + i) for i, field in enumerate(kind)}
    if pa.types.is_timestamp(kind):
        return dt.datetime(2026, 2, 28, 23, 59, 59, 999_990 + n, tzinfo=dt.UTC)
    if pa.types.is_date(kind):
        return dt.date(2026, 2, 1 + n)
    if pa.types.is_boolean(kind):
        return n % 2 == 0
    if pa.types.is_floating(kind):
        return n / 8
    return n if pa.types.is_integer(kind) else f"é'\U0001f600 {n}"


def some_rows(table: Table, ds: str, first: int) -> pa.Table:
    """Rows with every column filled, but for the last row: that has the key alone."""
    partition = {"ds": ds, "bucket": first % 2}
    rows = [
        {f.name: value_of(f.type, first + n) for f in table.schema} | {"bucket": n % 2, "ds": ds}
        for n in range(4)
    ]
    last = {name: value_of(table.schema.field(name).type, first + 5) for name in table.key}
    return pa.Table.from_pylist([*rows, {**partition, **last}], schema=table.schema)


@pytest.fixture
def written(store: DeltaStore) -> dict[str, pa.Table]:
    """What every table holds after days that were replaced, emptied, or committed in shards."""
    expected = {}
    for name, table in TABLES.items():
        store.write_arrow(name, some_rows(table, D1, 0), {D1: 1}, NOTHING)
        store.write_arrow(name, some_rows(table, D2, 1), {D2: 1}, NOTHING)
        store.write_arrow(name, some_rows(table, D3, 2), {D3: 1}, NOTHING)
        store.write_arrow(name, some_rows(table, D1, 3), {D1: 2}, NOTHING)
        store.handle(name).create_checkpoint()
        store.write_arrow(name, table.schema.empty_table(), {D2: 2}, NOTHING)
        expected[name] = pa.concat_tables([some_rows(table, D1, 3), some_rows(table, D3, 2)])
    commit_shard(store, 7, "x", "a", "b")
    expected[SET] = pa.concat_tables([expected[SET], predictions(D1, 7, "a", "b")])
    return expected


def test_every_table_is_read_by_duckdb_as_it_was_written(
    store: DeltaStore, written: dict[str, pa.Table]
) -> None:
    for name, found in read_by_duckdb(store).items():
        names = TABLES[name].schema.names
        assert found.schema.names == names, name
        assert plain_rows(found, names) == plain_rows(written[name], names), name


def test_every_table_is_in_its_log_as_it_was_written(store: DeltaStore, written: dict[str, pa.Table]) -> None:
    for name, expected in written.items():
        names = TABLES[name].schema.names
        assert plain_rows(read_by_log(store, name), names) == plain_rows(expected, names), name


# --- the whole against a model ------------------------------------------------

DAYS = [D1, D2, D3]
day_writes = st.dictionaries(
    st.sampled_from(DAYS),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 12), max_size=4),
    min_size=1,
)
shard_writes = st.tuples(
    st.sampled_from(DAYS), st.integers(0, 12), st.sets(st.sampled_from("abcdef"), max_size=3)
)


@settings(max_examples=15)
@given(st.lists(day_writes | shard_writes, min_size=1, max_size=6))
def test_any_replacements_equal_a_dict(fresh: Path, tmp_path_factory, writes) -> None:
    """Days and shards replaced in any order; every version keeps what it held."""
    root = tmp_path_factory.mktemp("model") / "warehouse"
    shutil.copytree(fresh, root)
    store = DeltaStore(root)
    model: dict[tuple[str, int], set[str]] = {}
    held = {0: model}
    for write in writes:
        if isinstance(write, tuple):
            day, bucket, ids = write
            run = spread(store, SET, predictions(day, bucket, *ids))
            version = store.commit_shard(SET, run, day, bucket, "x")
            model = {**model, (day, bucket): ids}
        else:
            parts = [
                predictions(day, bucket, user)
                for day, placed in write.items()
                for user, bucket in placed.items()
            ]
            rows = pa.concat_tables([predictions(D1, 0), *parts])
            revisions = {day: store.revision(SET, day) + 1 for day in write}
            version = store.write_arrow(SET, rows, revisions, NOTHING)
            model = {key: ids for key, ids in model.items() if key[0] not in write}
            for day, placed in write.items():
                for user, bucket in placed.items():
                    model.setdefault((day, bucket), set()).add(user)
        held[version] = model
    for version, expected in held.items():
        rows = store.read(SET, ["ds", "bucket", "user_id"], version=version).to_pylist()
        found = [(row["ds"], row["bucket"], row["user_id"]) for row in rows]
        assert sorted(found) == sorted((*key, user) for key, ids in expected.items() for user in ids)
    assert store.days(SET) == sorted({day for (day, _), ids in model.items() if ids})
    assert len(store.files(SET)) == sum(bool(ids) for ids in model.values())
