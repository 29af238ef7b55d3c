"""The job context: all that a stage reads and writes goes through it.

A `Warehouse` is opened once per command; a `JobContext` is one stage on one day. The Spark session
starts at its first use, so that a command with nothing to do never starts it.
"""

import datetime as dt
import functools
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import negrec_core
from jobs.objects import read_objects, write_objects
from jobs.spark import open_session
from negrec_core.config import Config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import InputError
from negrec_core.progress import Progress, silent
from negrec_core.resources import resource
from negrec_core.schemas import TABLES
from negrec_core.storage import ObjectPath, Place, delete_folder

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import StructType

log = logging.getLogger("negrec")


class Warehouse:
    """Tables, models and configuration of one site, and the Spark session that works on them."""

    def __init__(self, root: Place | str, config: Config) -> None:
        self.store = DeltaStore(root)
        self.root = self.store.root
        self.models = self.root / "models"
        # Pictures are files.
        self.media = (self.root if isinstance(self.root, Path) else Path()) / config.media_root
        self.config = config

    @functools.cached_property
    def spark(self) -> "SparkSession":
        session = open_session(self.config.spark, self.config.timezone, sys.stderr.isatty())
        if isinstance(self.root, ObjectPath):
            # Spark takes what Python reads for a few bytes, and would send any table whole to every
            # executor. After a shuffle it knows better.
            session.conf.set("spark.sql.autoBroadcastJoinThreshold", "-1")
            session.conf.set("spark.sql.adaptive.autoBroadcastJoinThreshold", "10m")
        return session


class JobContext:
    """One stage on one log date: remembers what was read and records it in the commit.

    Attributes:
        warehouse: where tables and models are.
        ds: the log date, ISO.
        revision: revision of the partition that this run writes.
        progress: told (parts done, parts in all) by stages that take long.
        accept: gates that may fail.
    """

    def __init__(
        self,
        warehouse: Warehouse,
        ds: str,
        revision: int = 1,
        progress: Progress = silent,
        accept: Collection[str] = (),
    ) -> None:
        self.warehouse = warehouse
        self.config = warehouse.config
        self.store = warehouse.store
        self.ds = ds
        self.revision = revision
        self.progress = progress
        self.accept = accept
        self._accepted: list[str] = []
        self._inputs: dict[str, int] = {}
        self._models: dict[str, str] = {}
        # First and last day that was read; all from the start where the first is None.
        self._windows: dict[str, tuple[str | None, str]] = {}

    @property
    def spark(self) -> "SparkSession":
        return self.warehouse.spark

    @property
    def anchor(self) -> dt.datetime:
        """End of the log date: the anchor of a daily run."""
        return self.config.end_of_day(self.ds)

    def read(self, table: str, days: Sequence[str] | None = None) -> "DataFrame":
        """A table, or the given `ds` partitions of it, as a Spark frame with the declared schema."""
        version = self.store.version(table)
        self._inputs[table] = max(version, self._inputs.get(table, 0))
        if days:
            self._use_window(table, min(days), max(days))
        files = self.store.files(table, days, version, check=True)
        return read_files(self.spark, self.store, table, files)

    def read_window(self, table: str, start: dt.date | None = None) -> "DataFrame":
        """The partitions of a table from `start` (default: the feedback window) to `ds`.

        Raises:
            MissingError: a day between the table's first and `ds` was never committed.
        """
        end = dt.date.fromisoformat(self.ds)
        begin = start or end - dt.timedelta(days=self.config.window_days - 1)
        held = [day for day in self.store.days(table) if begin.isoformat() <= day <= self.ds]
        self.require(table, [self.ds])
        if self.config.anchors == "end_of_day" and held:
            first = dt.date.fromisoformat(held[0])
            span = [(first + dt.timedelta(days=n)).isoformat() for n in range((end - first).days)]
            self.require(table, span)
        self._use_window(table, begin.isoformat(), self.ds)
        return self.read(table, held)

    def read_until(self, table: str) -> "DataFrame":
        """All partitions of a table up to `ds`."""
        self._use_window(table, None, self.ds)
        return self.read(table, [day for day in self.store.days(table) if day <= self.ds])

    def each_day_reads(self, table: str, days_back: int) -> None:
        """Record, where several days are made at once, how far back each one of them has read."""
        first = dt.date.fromisoformat(self.ds) - dt.timedelta(days=days_back)
        self._windows[table] = (first.isoformat(), self.ds)

    def _use_window(self, table: str, first: str | None, last: str) -> None:
        known = self._windows.get(table, (first, last))
        earliest = None if first is None or known[0] is None else min(first, known[0])
        self._windows[table] = (earliest, max(last, known[1]))

    def read_items(self) -> "DataFrame":
        """The newest version of every item known on `ds`."""
        from pyspark.sql import Window
        from pyspark.sql import functions as F

        items = self.read_until("item")
        latest = Window.partitionBy("item_id").orderBy(F.desc("ds"))
        return items.withColumn("n", F.row_number().over(latest)).where("n = 1").drop("n")

    def require(self, table: str, days: Sequence[str]) -> None:
        """Raise MissingError, saying what to run, unless the partitions were committed."""
        hint = (
            "import the log of that day"
            if table == "behavior_log"
            else f"run `negrec backfill --start {days[0]} --end {days[-1]} --stages {table}`"
            if days
            else ""
        )
        self.store.require(table, days, hint)

    def at(self, ds: str) -> "JobContext":
        """The same run seen from another log date; reads through it are recorded here."""
        other = JobContext(self.warehouse, ds, self.revision)
        other._inputs, other._models, other._windows = self._inputs, self._models, self._windows
        return other

    def pin(self, *tables: str) -> dict[str, int]:
        """Newest versions of tables that executors will read themselves; recorded as inputs."""
        for table in tables:
            self._inputs[table] = self.store.version(table)
        return {table: self._inputs[table] for table in tables}

    def empty(self, table: str) -> "DataFrame":
        """No rows of a table."""
        return self.spark.createDataFrame([], spark_schema(table))

    def use_model(self, name: str, version: str) -> None:
        """Record that a model took part in this run."""
        self._models[name] = version

    def write(self, table: str, frame: "DataFrame", days: Sequence[str] | None = None) -> int:
        """Replace the partitions `days` (default: this run's) of a table by a frame, atomically.

        The frame may lack `ds` (this run's is added) and `bucket` (derived from user_id).
        """
        return self.commit(table, self.stage(table, frame), days)

    def use_accepted(self, gates: Sequence[str]) -> None:
        """Record that these gates failed and were accepted."""
        self._accepted += gates

    def stage(self, table: str, frame: "DataFrame") -> Place:
        """Write the files of a frame as `write` does, without committing them; their run directory."""
        run = self.store.new_run(table)
        write_files(with_partitions(frame, table, self.ds, self.config.buckets), table, run)
        return run

    def commit(self, table: str, run: Place, days: Sequence[str] | None = None) -> int:
        """Replace the partitions `days` (default: this run's) by what was staged, atomically."""
        revisions = dict.fromkeys(days or [self.ds], self.revision)
        return self.store.commit(table, run, revisions, self.provenance())

    def write_arrow(self, table: str, rows: "pa.Table") -> int:
        """Replace this run's partition of a small table by rows held in memory."""
        return self.store.write_arrow(table, rows, {self.ds: self.revision}, self.provenance())

    def provenance(self) -> Provenance:
        return Provenance(
            inputs=dict(self._inputs),
            models=dict(self._models),
            config_digest=self.config.digest(),
            code_version=negrec_core.__version__,
            windows={
                table: [None if first is None else self._days_after(first), self._days_after(last)]
                for table, (first, last) in self._windows.items()
            },
            accepted=list(self._accepted),
        )

    def _days_after(self, day: str) -> int:
        return (dt.date.fromisoformat(day) - dt.date.fromisoformat(self.ds)).days


def spark_schema(table: str, body_only: bool = False) -> "StructType":
    """Spark schema of a declared table."""
    from pyspark.sql.pandas.types import from_arrow_schema

    declared = TABLES[table]
    return from_arrow_schema(declared.body if body_only else declared.schema)


def read_files(spark: "SparkSession", store: DeltaStore, table: str, files: Sequence[str]) -> "DataFrame":
    """Read data files of a table; partition values come from their paths (run=/ds=/bucket=)."""
    from pyspark.sql.types import StringType, StructField, StructType

    schema = spark_schema(table)
    if not files:
        return spark.createDataFrame([], schema)
    root = store.path(table)
    if isinstance(root, ObjectPath):
        return read_objects(spark, files, TABLES[table].schema)
    # Else Spark guesses the type of `run`, and works for minutes on a name such as 7775403e75384921.
    declared = StructType([*schema.fields, StructField("run", StringType())])
    return spark.read.schema(declared).option("basePath", str(root)).parquet(*files).select(*schema.names)


def write_files(frame: "DataFrame", table: str, run: Place) -> None:
    """Write a frame as sorted Parquet files, partitioned as declared, into a new run directory.

    What a write that fails has written is deleted.
    """
    from pyspark.sql import functions as F

    declared = TABLES[table]
    # Spark takes a constant out of the order asked for, and before it writes it orders by the partition
    # columns anew, which loses the order by key. So `ds` must not look constant: it is padded to the
    # length it has.
    frame = frame.withColumn("ds", F.rpad("ds", 10, F.spark_partition_id().cast("string")))
    ordered = frame.repartition(*declared.partition_by).sortWithinPartitions(
        *declared.partition_by, *declared.key
    )
    try:
        if isinstance(run, ObjectPath):
            write_objects(ordered, run, declared.schema, declared.partition_by)
        else:
            ordered.write.mode("errorifexists").partitionBy(*declared.partition_by).parquet(str(run))
    except BaseException:
        delete_folder(run)
        raise


def with_partitions(frame: "DataFrame", table: str, ds: str, buckets: int) -> "DataFrame":
    """Add missing partition columns and check the frame against the declared schema.

    Raises:
        InputError: a column is missing, unknown or of another type.
    """
    from pyspark.sql import functions as F

    declared = TABLES[table]
    if "ds" not in frame.columns:
        frame = frame.withColumn("ds", F.lit(ds))
    if "bucket" in declared.partition_by and "bucket" not in frame.columns:
        frame = frame.withColumn("bucket", bucket_of(F.col("user_id"), buckets))
    want = {f.name: f.dataType.simpleString() for f in spark_schema(table)}
    have = {f.name: f.dataType.simpleString() for f in frame.schema}
    wrong = [
        f"{name} is {have.get(name, 'absent')} where {want.get(name, 'no column')} is declared"
        for name in [*want, *(have.keys() - want.keys())]
        if want.get(name) != have.get(name)
    ]
    if wrong:
        raise InputError(f"table {table}: {'; '.join(wrong)}; nothing was written")
    return frame.select(*want)


def bucket_of(user_id: "Column", buckets: int) -> "Column":
    """The bucket of a user: xxhash64 modulo the number of buckets."""
    from pyspark.sql import functions as F

    return F.pmod(F.xxhash64(user_id), F.lit(buckets)).cast("int")


def run_sql(
    spark: "SparkSession", table: str, frames: Mapping[str, "DataFrame"], **parameters: object
) -> "DataFrame":
    """Run `sql/<table>.sql`: `{name}` stands for a frame, `:name` for a parameter."""
    query = resource("sql", f"{table}.sql").read_text(encoding="utf-8")
    return spark.sql(query, args=parameters, **frames)
