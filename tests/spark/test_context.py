"""Spark writes, delta-rs commits, Spark and pyarrow read: the same rows; and what is refused."""

import datetime as dt
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs.user_context
from jobs.context import (
    JobContext,
    Warehouse,
    bucket_of,
    read_files,
    spark_schema,
    with_partitions,
    write_files,
)
from jobs.pipeline import run_day
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ConflictError, InputError, MissingError, NegrecError
from negrec_core.schemas import TABLES

Frame = Callable[..., DataFrame]
TABLE = "user_context"
D1, D2, D3 = "2026-03-01", "2026-03-02", "2026-03-03"
NOTHING = Provenance()


def at(*parts: int) -> dt.datetime:
    return dt.datetime(*parts, tzinfo=dt.UTC)


def event(item: str | None, when: dt.datetime | None, reason: str | None = None) -> dict[str, Any]:
    return {"item_id": item, "event_time": when, "reason_class": reason}


# Nulls and empties at every depth, microseconds, a time before 1970, odd strings.
CONTEXTS: list[dict[str, Any]] = [
    {
        "user_id": "ü/%20 =,'\"",
        "anchor_time": at(2026, 3, 1, 23, 59, 59, 999999),
        "negatives": [
            event("i1", at(2026, 2, 28, 1, 2, 3, 456789), "category"),
            event("i2", at(1969, 12, 31, 23, 59, 59, 1)),
            event(None, None),
            None,
        ],
        "positives": [],
        "n_negatives": 4,
        "n_positives": 0,
        "categories": [{"category": "Ä/b", "n_negatives": 4, "n_positives": None}, None],
    },
    {
        "user_id": "u2",
        "anchor_time": None,
        "negatives": None,
        "positives": [event("", at(2026, 3, 1))],
        "n_negatives": None,
        "n_positives": -(2**31),
        "categories": [],
    },
    {
        "user_id": "",
        "anchor_time": at(9999, 12, 31),
        "negatives": [],
        "positives": None,
        "n_negatives": 2**31 - 1,
        "n_positives": 1,
        "categories": None,
    },
]


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: (row["ds"], row["user_id"]))


def write(store: DeltaStore, frame: DataFrame, ds: str, revision: int = 1, buckets: int = 4) -> Path:
    run = store.new_run(TABLE)
    write_files(with_partitions(frame, TABLE, ds, buckets), TABLE, run)
    store.commit(TABLE, run, {ds: revision}, NOTHING)
    return run


def test_round_trip(spark: SparkSession, frame: Frame, store: DeltaStore) -> None:
    made = frame(TABLE, CONTEXTS).drop("ds", "bucket")
    run = write(store, made, D1)
    write(store, made.where("user_id = 'u2'"), D2)
    assert (run / "_SUCCESS").exists()

    by_spark = read_files(spark, store, TABLE, store.files(TABLE))
    assert by_spark.schema == spark_schema(TABLE)
    by_pyarrow = store.read(TABLE)
    assert by_pyarrow.schema.equals(TABLES[TABLE].schema)
    found = rows_of(by_pyarrow)
    assert rows_of(by_spark.toArrow()) == found
    assert [(row["ds"], row["user_id"]) for row in found] == [
        *((D1, user) for user in sorted(row["user_id"] for row in CONTEXTS)),
        (D2, "u2"),
    ]
    body = [{k: v for k, v in row.items() if k not in ("ds", "bucket")} for row in found]
    assert body[:3] == sorted(CONTEXTS, key=lambda row: row["user_id"])
    assert body[3] == CONTEXTS[1]

    one_day = read_files(spark, store, TABLE, store.files(TABLE, [D2]))
    assert rows_of(one_day.toArrow()) == rows_of(store.read(TABLE, days=[D2]))
    assert read_files(spark, store, TABLE, []).schema == spark_schema(TABLE)


def test_a_run_named_like_a_huge_number_is_read_like_any_other(
    spark: SparkSession, frame: Frame, store: DeltaStore
) -> None:
    """About one name in four thousand is: Spark would work for minutes to write this one out."""
    run = store.path(TABLE) / "run=7775403e75384921"
    write_files(with_partitions(frame(TABLE, CONTEXTS).drop("ds", "bucket"), TABLE, D1, 4), TABLE, run)
    store.commit(TABLE, run, {D1: 1}, NOTHING)
    found = read_files(spark, store, TABLE, store.files(TABLE))
    assert rows_of(found.toArrow()) == rows_of(store.read(TABLE))


def test_files_are_as_declared(spark: SparkSession, frame: Frame, store: DeltaStore) -> None:
    """One sorted file per bucket, whose path says the bucket; times in microseconds, not INT96."""
    # Made by an expression: where a plan knows that a column is constant it may lose the order.
    numbers = spark.range(200).select(F.format_string("user-%03d", F.expr("id * 37 % 200")).alias("user_id"))
    one = frame(TABLE, [{"anchor_time": at(2026, 3, 1)}]).drop("ds", "bucket", "user_id")
    write(store, numbers.crossJoin(one), D1)
    files = [Path(file) for file in store.files(TABLE)]
    assert sorted(file.parent.name for file in files) == [f"bucket={n}" for n in range(4)]
    assert {file.parents[1].name for file in files} == {f"ds={D1}"}
    for file in files:
        stored = pq.ParquetFile(file)
        assert stored.schema.column(1).physical_type == "INT64"
        users = stored.read(["user_id"])["user_id"].to_pylist()
        assert len(users) > 1
        assert users == sorted(users)


def test_the_names_of_many_items_stay_in_a_dictionary(spark: SparkSession, tmp_path: Path) -> None:
    """Of Parquet: otherwise the block list's reader would hash each name again."""
    names = F.format_string("an item with a name of its own %d", F.expr("id div 4"))
    spark.range(0, 200_000, 1, 1).select(names.alias("item_id")).write.parquet(str(tmp_path / "names"))
    [file] = (tmp_path / "names").glob("*.parquet")
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    assert "PLAIN_DICTIONARY" in column.encodings
    assert "PLAIN" not in column.encodings


def test_an_empty_frame_replaces(spark: SparkSession, frame: Frame, store: DeltaStore) -> None:
    made = frame(TABLE, CONTEXTS).drop("ds", "bucket")
    write(store, made, D1)
    run = write(store, made.where("false"), D1, revision=2)
    assert run.is_dir()
    assert store.files(TABLE) == []
    assert store.revision(TABLE, D1) == 2
    assert read_files(spark, store, TABLE, store.files(TABLE)).count() == 0


def test_duplicate_users_of_a_frame_are_refused(frame: Frame, store: DeltaStore) -> None:
    twice = frame(TABLE, CONTEXTS).drop("ds", "bucket")
    write(store, twice, D1)
    run = store.new_run(TABLE)
    write_files(with_partitions(twice.union(twice), TABLE, D1, 4), TABLE, run)
    with pytest.raises(InputError, match=r"repeat a key, for example user_id="):
        store.commit(TABLE, run, {D1: 2}, NOTHING)
    assert not run.exists()
    assert store.read(TABLE).num_rows == 3


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (lambda f: f.drop("negatives"), ["negatives is absent where array<struct<"]),
        (lambda f: f.withColumn("mood", F.lit(1)), ["mood is int where no column is declared"]),
        (
            lambda f: f.withColumn("n_negatives", F.lit(1).cast("bigint")),
            ["n_negatives is bigint where int is declared"],
        ),
        (
            lambda f: f.drop("user_id").withColumn("ds", F.lit(20260301)).withColumn("x", F.lit("")),
            [
                "user_id is absent where string is declared",
                "ds is int where string is declared",
                "x is string where no column is declared",
            ],
        ),
    ],
    ids=["missing", "extra", "wrong type", "all at once"],
)
def test_with_partitions_names_what_is_wrong(frame: Frame, change, complaints: list[str]) -> None:
    made = change(frame(TABLE, CONTEXTS))
    with pytest.raises(InputError) as caught:
        with_partitions(made, TABLE, D1, 4)
    line = str(caught.value)
    assert line.startswith(f"table {TABLE}: ")
    assert line.endswith("nothing was written")
    assert "\n" not in line
    assert line.count(" is declared") == len(complaints)
    for complaint in complaints:
        assert complaint in line


def test_with_partitions_orders_columns_and_adds_what_is_absent(frame: Frame) -> None:
    made = frame(TABLE, CONTEXTS).drop("ds", "bucket")
    shuffled = made.select(*reversed(made.columns))
    done = with_partitions(shuffled, TABLE, D1, 4)
    assert done.columns == TABLES[TABLE].schema.names
    rows = done.collect()
    assert {row.ds for row in rows} == {D1}
    expected = made.select("user_id", bucket_of(F.col("user_id"), 4)).collect()
    assert {row.user_id: row.bucket for row in rows} == dict(expected)
    # What a frame has itself is kept.
    own = made.withColumn("ds", F.lit(D2)).withColumn("bucket", F.lit(3))
    kept = with_partitions(own, TABLE, D1, 4).select("ds", "bucket").distinct().collect()
    assert [tuple(row) for row in kept] == [(D2, 3)]


def test_bucket_of_is_stable(spark: SparkSession) -> None:
    """Values by the xxhash library: a bucket that moved would split a user's rows over two."""
    users = spark.createDataFrame([("",), ("1",), ("user-1",), ("ü",)], "user_id string")
    found = users.select("user_id", bucket_of(F.col("user_id"), 64).alias("b")).collect()
    assert {row.user_id: row.b for row in found} == {"": 4, "1": 16, "user-1": 35, "ü": 20}
    many = spark.range(5000).select(bucket_of(F.col("id").cast("string"), 7).alias("b"))
    counts = {row.b: row["count"] for row in many.groupBy("b").count().collect()}
    assert sorted(counts) == list(range(7))
    assert min(counts.values()) > 600


@pytest.fixture
def warehouse(spark: SparkSession, store: DeltaStore) -> Warehouse:
    opened = Warehouse(store.root, load_config(environment={}))
    opened.spark = spark
    return opened


def test_a_job_context_records_what_it_read(frame: Frame, warehouse: Warehouse) -> None:
    contexts = frame(TABLE, CONTEXTS).drop("ds", "bucket")
    assert JobContext(warehouse, D1).write(TABLE, contexts) == 1
    ctx = JobContext(warehouse, D2)
    ctx.use_model("generator", "v7")
    version = ctx.write(TABLE, ctx.read(TABLE, [D1]).where("user_id = 'u2'").drop("ds", "bucket"))
    commit = ctx.store.commit_of(TABLE, D2)
    assert (commit.version, commit.days) == (version, {D2: 1}) == (2, {D2: 1})
    assert commit.provenance.inputs == {TABLE: 1}
    assert commit.provenance.models == {"generator": "v7"}
    assert commit.provenance.config_digest == warehouse.config.digest()
    with pytest.raises(ConflictError):
        ctx.write(TABLE, contexts)
    with pytest.raises(MissingError, match=rf"{TABLE}: no partition ds={D3}; run `negrec backfill"):
        ctx.require(TABLE, [D3])


def test_a_window_with_a_day_missing_is_refused(frame: Frame, warehouse: Warehouse) -> None:
    row = {"user_id": "u", "item_id": "i", "event_time": at(2026, 3, 1), "action": "skip"}
    log = frame("behavior_log", [row]).drop("ds", "bucket")
    for day in (D1, D3):
        JobContext(warehouse, day).write("behavior_log", log)
    with pytest.raises(MissingError, match=rf"behavior_log: no partition ds={D2}; import the log"):
        JobContext(warehouse, D3).read_window("behavior_log")
    JobContext(warehouse, D2).write("behavior_log", log.where("false"))
    window = JobContext(warehouse, D3).read_window("behavior_log")
    assert sorted(row.ds for row in window.collect()) == [D1, D3]
    late = JobContext(warehouse, D3).read_window("behavior_log", dt.date(2026, 3, 2))
    assert [row.ds for row in late.collect()] == [D3]


def test_a_task_that_dies_after_its_rows_is_one_clear_line_and_leaves_nothing(
    frame: Frame, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the kernel's out-of-memory killer: the worker is gone when all of its rows were taken."""
    contexts = frame(TABLE, CONTEXTS).drop("ds", "bucket")
    dying = [True]

    def pass_on(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield from batches
        os.kill(os.getpid(), signal.SIGKILL)

    def run(ctx: JobContext) -> None:
        rows = contexts.mapInArrow(pass_on, contexts.schema) if dying else contexts
        ctx.write(TABLE, rows)

    monkeypatch.setattr(jobs.user_context, "run", run)
    with pytest.raises(NegrecError, match=rf"{TABLE} ds={D1}: a worker process of Spark died") as raised:
        run_day(warehouse, D1, [TABLE])
    assert str(raised.value).isprintable()
    assert warehouse.store.version(TABLE) == 0
    assert not list(warehouse.store.path(TABLE).glob("run=*"))
    dying.clear()
    run_day(warehouse, D1, [TABLE])
    assert warehouse.store.read(TABLE).num_rows == len(CONTEXTS)
