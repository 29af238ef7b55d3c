"""Writing a Delta table (Spark files, checks, one delta-rs commit) beside writing plain Parquet by Spark.

    python tests/bench/bench_delta.py [--quick] [--rows 5000000 20000000] [--rounds 4]

Both write the same frame, sorted and partitioned alike; the table is `feedback`, in four buckets.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import Table, medians

from jobs.context import with_partitions, write_files
from jobs.spark import open_session
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DS = "2026-03-10"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--rows", type=int, nargs="+", default=[5_000_000, 20_000_000])
    arguments.add_argument("--rounds", type=int, default=4)
    options = arguments.parse_args()
    spark = open_session(load_config(environment={}).spark, "UTC", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        for rows in [200_000] if options.quick else options.rows:
            _compare(spark, Path(folder), rows, 1 if options.quick else options.rounds)
    spark.stop()


def _compare(spark: "SparkSession", folder: Path, rows: int, rounds: int) -> None:
    store = DeltaStore(folder / f"warehouse-{rows}")
    store.create_tables()
    frame = with_partitions(_rows(spark, rows), "feedback", DS, 4)
    commits = []
    number = itertools.count()

    def plain() -> None:
        write_files(frame, "feedback", folder / f"plain-{rows}-{next(number)}")

    def delta() -> None:
        run = store.new_run("feedback")
        write_files(frame, "feedback", run)
        begin = time.perf_counter()
        revision = store.revision("feedback", DS) + 1
        store.commit("feedback", run, {DS: revision}, Provenance())
        commits.append(time.perf_counter() - begin)

    seconds = medians({"plain": plain, "delta": delta}, rounds)
    table = Table("delta", f"{rows:,} rows of feedback")
    table.add("plain Parquet by Spark", f"{seconds['plain']:.1f} s")
    share = seconds["plain"] / seconds["delta"]
    checked = sorted(commits[1:])[len(commits[1:]) // 2]
    note = f"{share:.2f} of plain's speed; checks and commit {checked:.1f} s of it"
    table.add("Delta", f"{seconds['delta']:.1f} s", note)
    table.print()


def _rows(spark: "SparkSession", rows: int) -> "DataFrame":
    """Twenty events of each user."""
    from pyspark.sql import functions as F

    number = F.col("id")
    return spark.range(0, rows, numPartitions=4).select(
        F.format_string("user %09d", (number / 20).cast("long")).alias("user_id"),
        F.format_string("item %07d", F.pmod(F.xxhash64(number), F.lit(100_000))).alias("item_id"),
        (number % 86_400 + 1_770_000_000).cast("timestamp").alias("event_time"),
        F.when(number % 3 == 0, -1).otherwise(1).alias("polarity"),
        F.lit("explicit").alias("source"),
        F.when(number % 3 == 0, "product").alias("reason_class"),
        F.lit(1.0).alias("weight"),
    )


if __name__ == "__main__":
    main()
