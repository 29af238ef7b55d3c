"""Spark frames from and to Parquet files of an object store, without a Hadoop connector.

Spark's Python workers read and write the objects by delta-rs, with the environment's credentials. All
columns are read, and a filter skips no file: what to read is chosen by the log.
"""

import itertools
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negrec_core.storage import ObjectPath, finish_run, located, parquet_file

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def read_objects(spark: "SparkSession", files: Sequence[str], schema: pa.Schema) -> "DataFrame":
    """Rows of Parquet files; columns that a file lacks are in its path, as <column>=<value>.

    Args:
        spark: the session.
        files: URLs.
        schema: of the rows.
    """
    from pyspark.sql.pandas.types import from_arrow_schema

    if not files:
        return spark.createDataFrame([], from_arrow_schema(schema))

    def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for which in batch["id"].to_pylist():
                opened, values = parquet_file(files[which]), _values_in(files[which])
                for part in opened.iter_batches():
                    columns = [
                        part[field.name].cast(field.type)
                        if field.name in part.schema.names
                        else pa.repeat(values[field.name], len(part)).cast(field.type)
                        for field in schema
                    ]
                    yield pa.RecordBatch.from_arrays(columns, schema=schema)

    parts = min(len(files), 2 * spark.sparkContext.defaultParallelism)
    numbers = spark.range(0, len(files), numPartitions=parts)
    return numbers.mapInArrow(rows, from_arrow_schema(schema))


def _values_in(file: str) -> dict[str, str]:
    """Partition values in the path of a file."""
    parts = [part.partition("=") for part in file.split("/")[:-1]]
    return {name: unquote(value) for name, equals, value in parts if equals}


def write_objects(
    frame: "DataFrame", run: ObjectPath, schema: pa.Schema, partition_by: Sequence[str] = ()
) -> None:
    """Write a frame as Parquet files below `run`, and end it: `finish_run`.

    Every attempt of a task has names of its own, and what counts are those of the attempts that Spark
    takes for done.

    Args:
        frame: rows of each task sorted by the partition columns.
        run: a new directory.
        schema: of the rows.
        partition_by: columns that are in the path alone.
    """

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        body = pa.schema([field for field in schema if field.name not in partition_by])
        writer, directory, names = None, None, []
        for batch in batches:
            for start, stop in _spans(batch, partition_by):
                values = [(name, batch[name][start].as_py()) for name in partition_by]
                there = "/".join(f"{name}={value}" for name, value in values)
                if writer is None or there != directory:
                    if writer is not None:
                        writer.close()
                    directory = there
                    names.append(f"{there}/part-{uuid.uuid4().hex}.parquet".lstrip("/"))
                    files, key = located(run / names[-1])
                    writer = pq.ParquetWriter(key, body, filesystem=files, compression="zstd")
                part = batch.slice(start, stop - start)
                writer.write_batch(
                    pa.RecordBatch.from_arrays([part[f.name].cast(f.type) for f in body], schema=body)
                )
        if writer is not None:
            writer.close()
        yield pa.RecordBatch.from_pydict({"name": pa.array(names, pa.string())})

    finish_run(run, [row["name"] for row in frame.mapInArrow(write, "name string").collect()])


def _spans(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of each stretch of equal values."""
    if not batch.num_rows:
        return
    change = np.zeros(batch.num_rows - 1, bool)
    for name in columns:
        codes = batch[name].dictionary_encode().indices.to_numpy(zero_copy_only=False)
        change |= np.diff(codes) != 0
    yield from itertools.pairwise([0, *(np.flatnonzero(change) + 1).tolist(), batch.num_rows])
