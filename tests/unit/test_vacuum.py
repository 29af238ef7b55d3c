"""Vacuum: what no recent version needs goes, what a killed writer left too, and nothing else."""

import datetime as dt
import multiprocessing as mp
import os
import shutil
import signal
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warehouses import DS, Context, Entry, publish, save_codebook, small_codebook, write_rows

from negrec_core.blocklist import BlockList
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ConfigError
from negrec_core.schemas import TABLES
from negrec_core.vacuum import vacuum

D1, D2 = "2026-03-01", "2026-03-02"
TABLE, SHARDS, SETS = "user_profile", "negative_item_set_shard", "negative_item_set"
NOW = dt.datetime.now(dt.UTC)


def later(days: float) -> dt.datetime:
    """So many days from now: everything there is is that much older."""
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


def users(store: DeltaStore, version: int | None = None) -> list[tuple[str, str]]:
    rows = store.read(TABLE, ["ds", "user_id"], version=version).to_pylist()
    return sorted((row["ds"], row["user_id"]) for row in rows)


def write(store: DeltaStore, ds: str, *names: str) -> int:
    rows = [{"user_id": name} for name in names]
    return write_rows(store, TABLE, rows, ds, store.revision(TABLE, ds) + 1)


def files_below(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def test_replaced_files_go_after_the_retention_and_only_then(store: DeltaStore) -> None:
    old = write(store, D1, "a")
    write(store, D2, "b")
    write(store, D1, "c")
    before = files_below(store.root)
    assert vacuum(store, 10, delete=True, now=later(9.9)) == []
    assert files_below(store.root) == before
    assert users(store, old) == [(D1, "a")]
    (found,) = vacuum(store, 10, delete=False, now=later(10.1))
    assert (found.table, found.orphans, found.replaced) == (TABLE, 0, 1)
    assert files_below(store.root) == before
    assert vacuum(store, 10, delete=True, now=later(10.1)) == [found]
    gone = before - files_below(store.root)
    assert sum(path.suffix == ".parquet" for path in gone) == 1
    assert not any("_delta_log" in path.parts for path in gone)
    assert users(store) == [(D1, "c"), (D2, "b")]
    assert vacuum(store, 10, delete=True, now=later(10.1)) == []


def test_a_version_that_was_current_within_the_retention_stays_readable(store: DeltaStore) -> None:
    """Its files are older than the retention, but they were replaced within it."""
    old = write(store, D1, "a")
    for file in store.path(TABLE).rglob("*.parquet"):
        os.utime(file, (0, 0))
    write(store, D1, "b")
    assert vacuum(store, 1, delete=True, now=later(0.9)) == []
    assert users(store, old) == [(D1, "a")]
    assert [one.replaced for one in vacuum(store, 1, delete=True, now=later(1.1))] == [1]


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_and_die(root: Path) -> None:
    DeltaStore.commit = _die  # type: ignore[method-assign]
    write(DeltaStore(root), D1, "new")


def test_what_a_killed_writer_left_goes(store: DeltaStore) -> None:
    write(store, D1, "old")
    kept = files_below(store.path(TABLE))
    child = mp.get_context("spawn").Process(target=_write_and_die, args=(store.root,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    orphan = files_below(store.path(TABLE)) - kept
    assert orphan
    # As Spark leaves them: marks, checksums, attempts that were given up.
    run = next(iter(orphan)).parents[1]
    for name in ("_SUCCESS", "_temporary/0/part-0.parquet"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    assert vacuum(store, 7, delete=True, now=later(6.9)) == []
    assert files_below(store.path(TABLE)) > kept
    (found,) = vacuum(store, 7, delete=True, now=later(7.1))
    assert (found.table, found.replaced) == (TABLE, 0)
    assert found.orphans == 2
    assert files_below(store.path(TABLE)) == kept
    assert not run.exists()
    assert users(store) == [(D1, "old")]


def test_a_writer_at_work_loses_nothing(store: DeltaStore) -> None:
    """It wrote its first file long ago and its last just now; then it commits."""
    run = store.new_run(TABLE)
    for ds, age in ((D1, 90), (D2, 0)):
        folder = run / f"ds={ds}"
        folder.mkdir(parents=True)
        rows = pa.Table.from_pylist([{"user_id": ds}], TABLES[TABLE].body)
        pq.write_table(rows, folder / "part-0.parquet")
        when = NOW.timestamp() - age * 86_400
        os.utime(folder / "part-0.parquet", (when, when))
    assert vacuum(store, 30, delete=True) == []
    store.commit(TABLE, run, {D1: 1, D2: 1}, Provenance())
    assert vacuum(store, 30, delete=True, now=later(365)) == []
    assert users(store) == [(D1, D1), (D2, D2)]


def test_writers_go_on_while_files_are_deleted(store: DeltaStore) -> None:
    stop = threading.Event()
    failures: list[Exception] = []

    def clean() -> None:
        while not stop.is_set():
            try:
                vacuum(store, 1, delete=True)
            except Exception as error:
                failures.append(error)

    for name in "abc":
        write(store, D1, name)
    for file in files_below(store.path(TABLE)):
        if file.suffix == ".parquet":
            os.utime(file, (0, 0))
    thread = threading.Thread(target=clean)
    thread.start()
    for n in range(15):
        write(store, D2, f"user {n}")
        assert users(store) == [(D1, "c"), (D2, f"user {n}")]
    stop.set()
    thread.join()
    assert not failures


def test_what_a_published_list_was_made_from_stays(tmp_path: Path) -> None:
    """Its rates were replaced long ago; the list still reads those that it was published with."""
    codebook = small_codebook()
    version = save_codebook(tmp_path, codebook).version
    items = {"i": (0, 1, 2), "j": (1, 1, 1)}
    entries = {"ann": [Entry((0, 1, 2))]}
    contexts = {"ann": Context(["j"], [], 1, 0)}
    store = publish(tmp_path, version, items, entries, rates={"i": 1.0}, contexts=contexts)
    today = dt.date.fromisoformat(DS)
    scores = BlockList.open(tmp_path, today=today).scores("ann", list(items)).tolist()
    for revision in (2, 3):
        write_rows(store, "item_rate", [{"item_id": "i", "log_odds": 9.0}], DS, revision)
        write_rows(store, "user_context", [{"user_id": "ann", "n_negatives": 9}], DS, revision)
    found = vacuum(store, 1, delete=True, now=later(400))
    assert {one.table: one.replaced for one in found} == {"item_rate": 1, "user_context": 1}
    assert BlockList.open(tmp_path, today=today).scores("ann", list(items)).tolist() == scores
    publish(tmp_path, version, items, entries, rates={"i": 1.0}, contexts=contexts, revision=4)
    assert vacuum(store, 1, delete=True, now=later(400))
    assert BlockList.open(tmp_path, today=today).scores("ann", list(items)).tolist() == scores


def shard(store: DeltaStore, ds: str, bucket: int, digest: str) -> None:
    run = store.new_run(SHARDS)
    folder = run / f"ds={ds}" / f"bucket={bucket}"
    folder.mkdir(parents=True)
    row = {"user_id": f"u{bucket}", "rank": 1, "codes": [1], "log_prob": -1.0}
    pq.write_table(pa.Table.from_pylist([row], TABLES[SHARDS].body), folder / "part-0.parquet")
    store.commit_shard(SHARDS, run, ds, bucket, digest)


def test_staging_of_finished_days_goes_and_counts_as_not_done(store: DeltaStore) -> None:
    for ds in (D1, D2):
        for bucket in (0, 1):
            shard(store, ds, bucket, "x")
    write_rows(store, SETS, [], D1, 1)
    assert vacuum(store, 5, delete=True, now=later(4)) == []
    (looked,) = vacuum(store, 5, delete=False, now=later(6))
    assert (looked.table, looked.staging) == (SHARDS, [D1])
    assert store.days(SHARDS) == [D1, D2]
    assert [one.staging for one in vacuum(store, 5, delete=True, now=later(6))] == [[D1]]
    assert store.days(SHARDS) == [D2]
    # A run that was killed and goes on must make them again, not find them done and empty.
    assert not store.shard_done(SHARDS, D1, 0, "x")
    assert store.shard_done(SHARDS, D2, 0, "x")
    shard(store, D1, 0, "x")
    assert store.shard_done(SHARDS, D1, 0, "x")
    assert store.days(SHARDS) == [D1, D2]


def test_temporary_directories_of_killed_stages_go(store: DeltaStore) -> None:
    left = store.root / ".swing-abc" / "pairs"
    left.mkdir(parents=True)
    (left / "part-0").write_text("x")
    assert vacuum(store, 2, delete=True) == []
    assert [(one.table, one.orphans) for one in vacuum(store, 2, delete=True, now=later(3))] == [("", 1)]
    assert not left.parent.exists()


@pytest.mark.parametrize("days", [0, -1])
def test_a_retention_under_a_day_is_refused(store: DeltaStore, days: int) -> None:
    with pytest.raises(ConfigError, match="give at least 1"):
        vacuum(store, days, delete=True)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.sampled_from([D1, D2]), st.sets(st.sampled_from("abc"))), min_size=1, max_size=6)
)
def test_the_newest_version_never_changes(fresh: Path, tmp_path_factory, writes) -> None:
    root = tmp_path_factory.mktemp("any") / "warehouse"
    shutil.copytree(fresh, root)
    store = DeltaStore(root)
    held: dict[str, set[str]] = {}
    for ds, names in writes:
        write(store, ds, *names)
        held[ds] = names
    vacuum(store, 1, delete=True, now=later(30))
    assert users(store) == sorted((ds, name) for ds, names in held.items() for name in names)
    data = [path for path in files_below(store.path(TABLE)) if path.suffix == ".parquet"]
    assert sorted(map(str, data)) == sorted(
        [*store.files(TABLE), *map(str, (store.path(TABLE) / "_delta_log").glob("*.parquet"))]
    )
    assert vacuum(store, 1, delete=True, now=later(30)) == []
