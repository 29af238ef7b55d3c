"""One Spark session for all tests of the folder, and frames made by hand."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from java_classes import java_options
from pyspark.sql import DataFrame, SparkSession

from jobs.context import spark_schema
from jobs.spark import open_session
from negrec_core.config import load_config
from negrec_core.schemas import TABLES


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    # On a handful of rows, compiling a plan or planning it again takes longer than running it; both are on
    # where test_pipeline.py submits a day. Without coalescing, four partitions are four.
    plain_plans = {
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.adaptive.enabled": "false",
    }
    plain = load_config().spark
    update = {"driver_memory": "1g", "driver_java_options": java_options(), "conf": plain_plans}
    settings = plain.model_copy(update=update)
    session = open_session(settings, "UTC", progress=False)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def frame(spark: SparkSession) -> Callable[[str, Sequence[dict[str, Any]]], DataFrame]:
    """`frame(table, rows)` holds rows of a declared table; a column that a row lacks is null."""

    def make(table: str, rows: Sequence[dict[str, Any]]) -> DataFrame:
        schema = TABLES[table].schema
        unknown = {name for row in rows for name in row} - set(schema.names)
        if unknown:
            raise KeyError(f"table {table} has no {sorted(unknown)}")
        arrow = pa.Table.from_pylist(list(rows), schema=schema)
        return spark.createDataFrame(arrow, schema=spark_schema(table))

    return make
