"""Delta tables as DuckDB reads them: another implementation than delta-rs, in an environment of its own."""

import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from negrec_core.delta import DeltaStore
from negrec_core.schemas import TABLES

PYTHON = Path(__file__).resolve().parents[1] / ".venv-duckdb" / "bin" / "python"
SCRIPT = """
import sys
import duckdb, duckdb_extensions

connection = duckdb.connect()
duckdb_extensions.import_extension("delta", con=connection)
out, *tables = sys.argv[1:]
for path in tables:
    name = path.rsplit("/", 1)[1]
    connection.execute(f"COPY (SELECT * FROM delta_scan('{path}')) TO '{out}/{name}.parquet'")
"""


def read_by_duckdb(store: DeltaStore, tables: Iterable[str] = TABLES) -> dict[str, pa.Table]:
    """All rows of tables; the test is skipped where `make duckdb` has not made the environment."""
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: `make duckdb` makes it, from a package index")
    names = list(tables)
    with tempfile.TemporaryDirectory() as out:
        command = [str(PYTHON), "-c", SCRIPT, out, *(str(store.path(name)) for name in names)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {name: pq.ParquetFile(f"{out}/{name}.parquet").read() for name in names}


def plain_rows(table: pa.Table, names: list[str]) -> list[str]:
    """Rows in a comparable form and order."""
    return sorted(map(repr, table.select(names).to_pylist()))
