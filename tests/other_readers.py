"""Delta tables as others than delta-rs read them.

DuckDB has an environment of its own. It and delta-rs both read the log by delta-kernel-rs; `read_by_log`
is the protocol in a few lines, and nobody else's.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

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


def read_by_log(store: DeltaStore, table: str) -> pa.Table:
    """All rows of a table: the entries of its log replayed one after another, without checkpoints."""
    root = store.path(table)
    live: dict[str, dict[str, Any]] = {}
    for entry in sorted((root / "_delta_log").glob("*.json")):
        for line in entry.read_text(encoding="utf-8").splitlines():
            action = json.loads(line)
            if "remove" in action:
                del live[action["remove"]["path"]]
            if "add" in action:
                live[action["add"]["path"]] = action["add"]
    declared = TABLES[table]
    parts = [declared.schema.empty_table()]
    for add in live.values():
        file = root / unquote(add["path"])
        assert file.stat().st_size == add["size"]
        rows = pq.ParquetFile(file).read()
        assert rows.num_rows == json.loads(add["stats"])["numRecords"]
        for name in declared.partition_by:
            value = pa.scalar(add["partitionValues"][name]).cast(declared.schema.field(name).type)
            rows = rows.append_column(name, pa.repeat(value, len(rows)))
        parts.append(rows.cast(declared.schema))
    return pa.concat_tables(parts)


def plain_rows(table: pa.Table, names: list[str]) -> list[str]:
    """Rows in a comparable form and order."""
    return sorted(map(repr, table.select(names).to_pylist()))
