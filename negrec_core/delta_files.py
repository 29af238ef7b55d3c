"""What is checked of data files before a commit adds them to a table.

delta-rs adds whatever path it is told: it looks neither at the file nor at its schema, partition or
keys (DESIGN section 9, rule 4).
"""

import json
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
from deltalake.transaction import AddAction

from negrec_core.errors import InputError
from negrec_core.schemas import Table
from negrec_core.storage import Place, below, data_files, parquet_file, size_and_time

MEND_FILE = "restore the file, or make that day again with --force"
_KEYS_AT_ONCE = 1 << 16


def checked_files(declared: Table, run: Place, days: Collection[str]) -> list[AddAction]:
    """Add actions of all data files of a run directory, with their numbers of rows.

    Args:
        declared: the table.
        run: directory below that of the table.
        days: the `ds` values that the files may have.

    Raises:
        InputError: no such directory; a file is cut, has another schema or another partition; a key
            is null or occurs twice in a partition.
    """
    files = data_files(declared.name, run)
    with ThreadPoolExecutor(8) as pool:
        adds = list(pool.map(lambda file: _add_action(declared, run, file, days), files))
    by_partition: dict[str, list[Place]] = {}
    for file in files:
        by_partition.setdefault(str(below(file, run).parent), []).append(file)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda part: _check_keys(declared, *part), by_partition.items()))
    return adds


def check_schema(table: str, where: str, found: pa.Schema, declared: pa.Schema) -> None:
    """Raise InputError, naming each difference, unless names, types and their order are equal.

    Names inside lists, nullability and the width of string offsets are a writer's own business.
    """
    have = {field.name: _type_name(field.type) for field in found}
    want = {field.name: _type_name(field.type) for field in declared}
    different = [
        f"{name} is {have.get(name, 'absent')} where {want.get(name, 'no column')} is declared"
        for name in {**want, **have}
        if have.get(name) != want.get(name)
    ]
    if not different and found.names != declared.names:
        different = [f"its columns are {', '.join(found.names)}, not {', '.join(want)}"]
    if different:
        raise InputError(f"table {table}: {where}: {'; '.join(different)}")


def _add_action(declared: Table, run: Place, file: Place, days: Collection[str]) -> AddAction:
    relative = PurePosixPath(run.name) / below(file, run)
    values = _partition_values(declared, relative, days)
    try:
        footer = parquet_file(file).metadata
        size, modified = size_and_time(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(declared, relative, error) from None
    check_schema(
        declared.name, f"nothing was committed: {relative}", footer.schema.to_arrow_schema(), declared.body
    )
    # No bounds of columns: where one column has them and another has not (floating point cannot,
    # for NaN), deltalake's pyarrow reader silently loses rows by a filter on the other. Buckets are
    # hashes, so bounds would seldom skip a file, and row groups have theirs in the file.
    statistics = json.dumps({"numRecords": footer.num_rows})
    # The path is given as it is: delta-rs percent-encodes it for the log.
    return AddAction(str(relative), size, values, modified, True, statistics)


def _partition_values(declared: Table, file: PurePosixPath, days: Collection[str]) -> dict[str, str | None]:
    """ISO days and integers from a path `run=<id>/<column>=<value>/.../<file>`."""
    parts = [part.partition("=") for part in file.parts[1:-1]]
    if tuple(name for name, _, _ in parts) != declared.partition_by:
        raise InputError(
            f"table {declared.name}: {file} is not partitioned by"
            f" {', '.join(declared.partition_by)}; nothing was committed"
        )
    for name, _, value in parts:
        if name == "ds" and value not in days:
            raise InputError(
                f"table {declared.name}: {file} holds ds={value}, which this write does not replace"
                f" ({', '.join(sorted(days))}); nothing was committed"
            )
        if name != "ds" and not (value.isascii() and value.isdigit() and str(int(value)) == value):
            raise InputError(
                f"table {declared.name}: {file}: {name}={value} is not a whole number; nothing was committed"
            )
    return {name: value for name, _, value in parts}


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_type_name(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{f.name}: {_type_name(f.type)}' for f in kind)}>"
    if pa.types.is_large_string(kind):
        return "string"
    return str(kind)


def _check_keys(declared: Table, partition: str, files: list[Place]) -> None:
    """Check one partition: where there are buckets the key names the user, so they are disjoint."""
    if not declared.key or (len(files) == 1 and _ascend(files[0], list(declared.key))):
        return
    tables = []
    for file in files:
        try:
            tables.append(parquet_file(file).read(columns=list(declared.key)))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(declared, file, error) from None
    keys = pa.concat_tables(tables, promote_options="permissive")
    for name in declared.key:
        if keys[name].null_count:
            raise InputError(
                f"table {declared.name}: {keys[name].null_count} rows of {partition} have no"
                f" {name}; nothing was committed"
            )
    counts = keys.group_by(list(declared.key)).aggregate([([], "count_all")])
    if counts.num_rows < keys.num_rows:
        repeated = counts.filter(pc.greater(counts["count_all"], 1)).slice(0, 1).to_pylist()[0]
        times = repeated.pop("count_all")
        example = ", ".join(f"{name}={value}" for name, value in repeated.items())
        raise InputError(
            f"table {declared.name}: {keys.num_rows - counts.num_rows} rows of {partition} repeat a"
            f" key, for example {example} is there {times} times; nothing was committed"
        )


def _ascend(file: Place, names: list[str]) -> bool:
    """Whether the rows are in the order of their keys and each key is whole and there once.

    Files are written in that order, so that the keys of a partition need not all be in memory.
    """
    last: list[pa.RecordBatch] = []
    try:
        for batch in parquet_file(file).iter_batches(_KEYS_AT_ONCE, columns=names):
            keys = pa.Table.from_batches([*last, batch]).combine_chunks()
            if any(keys[name].null_count for name in names):
                return False
            before, after = keys.slice(0, len(keys) - 1), keys.slice(1)
            above: pa.ChunkedArray | bool = False
            for name in reversed(names):
                equal = pc.equal(before[name], after[name])
                above = pc.or_(pc.less(before[name], after[name]), pc.and_(equal, above))
            if not pc.all(above, min_count=0).as_py():
                return False
            last = [batch.slice(len(batch) - 1)]
    except (pa.ArrowException, OSError):
        return False  # which it is is said by who reads it whole
    return True


def _unreadable(declared: Table, file: Place | PurePosixPath, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(
        f"table {declared.name}: {file} is not a whole Parquet file ({reason}); nothing was"
        " committed, run it again"
    )
