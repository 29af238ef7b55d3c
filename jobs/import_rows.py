"""Rows of a site's files in the columns of our tables, each good, left out or with its problem.

Three steps, each a frame of one row per source row: `read_raw`, `typed_rows`, `without_repeats`.
"""

import contextlib
import datetime as dt
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.context import spark_schema
from negrec_core.errors import InputError
from negrec_core.mapping import ActionRule, Condition, Derived, EventSource, Source, find_files
from negrec_core.schemas import TABLES

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_EARLIEST = dt.datetime(1990, 1, 1, tzinfo=dt.UTC)
_CONTENT_LIMIT = 2000
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}  # microseconds


def read_raw(spark: "SparkSession", folder: Path, source: Source) -> "DataFrame":
    """All rows of a source, with the columns that the mapping reads as text.

    Returns:
        A frame of `source` (path below the folder), `block` (where the split starts in the file),
        `offset` (ascending without gaps within the split), `raw` (struct of the mapped columns, all
        strings) and `unreadable` (the line, where it could not be taken apart).

    Raises:
        InputError: a column that the mapping names is not in the file, or a file cannot be read.
    """
    from pyspark.sql import functions as F

    files = find_files(folder, source)
    names = sorted(source.source_columns())
    with reading(folder / source.files):
        # Spark takes [ ] { } * ? in a path for a pattern; these are files that exist.
        frame = _open(spark, [re.sub(r"([\[\]{}*?\\])", r"\\\1", str(f)) for f in files], source)
        absent = sorted(set(names) - set(frame.columns))
        if absent:
            raise InputError(
                f"{files[0]}: no column {', '.join(absent)}; it has"
                f" {', '.join(c for c in frame.columns if c != '_unreadable')}"
            )
        depth = max(len(file.relative_to(folder).parts) for file in files)
        uri = F.substring_index(F.input_file_name(), "/", -depth)
        return frame.select(
            F.url_decode(F.replace(uri, F.lit("+"), F.lit("%2B"))).alias("source"),
            F.input_file_block_start().alias("block"),
            F.monotonically_increasing_id().alias("offset"),
            F.struct(*[_as_text(frame, name, source).alias(name) for name in names]).alias("raw"),
            F.col("_unreadable").alias("unreadable"),
        )


@contextlib.contextmanager
def reading(what: Path) -> Iterator[None]:
    """Turn Spark's complaint about a file into an InputError of one line."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import AnalysisException, PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        java = error.java_exception if isinstance(error, Py4JJavaError) else getattr(error, "_origin", None)
        said = [str(error)] if java is None else []
        while java is not None:
            said.append(str(java.getMessage()))
            java = java.getCause()
        if "FAILED_READ_FILE" not in said[0] and not isinstance(error, AnalysisException):
            raise
        lines = [" ".join(text.split())[:200] for text in dict.fromkeys([said[0], said[-1]])]
        raise InputError(f"{what}: cannot be read: {'; '.join(lines)}") from None


def typed_rows(raw: "DataFrame", source: Source, table: str, between: tuple[str, str]) -> "DataFrame":
    """The rows of `read_raw` in our columns.

    Args:
        raw: what `read_raw` returns.
        source: the mapping.
        table: `behavior_log`, `item` or `user_profile`; gives the types.
        between: first and last log date, ISO; events of other days are left out.

    Returns:
        A frame of `source`, `block`, `offset`; the table's columns, for events with the array
        `actions` in the place of `action` and with `ds`, the log date; `left_out`; `problem`, the
        first thing wrong with a row that is not left out; and that row's `content` as JSON.
    """
    from pyspark.sql import functions as F

    texts = {ours: _value(spec) for ours, spec in source.columns.items()}
    for ours, pairs in source.replace.items():
        for old, new in pairs.items():
            texts[ours] = F.replace(texts[ours], F.lit(old), F.lit(new))
    typed = {}
    problems = [
        (F.col("unreadable").isNotNull(), "unreadable row"),
        (_broken_utf8([_text(ours) for ours in texts], source), "broken UTF-8"),
    ]
    for field in spark_schema(table, body_only=True):
        name, kind = field.name, field.dataType.simpleString()
        if name == "action":
            continue
        if name not in texts:
            typed[name] = F.lit(None).cast(kind)
            continue
        if name in TABLES[table].key:
            problems.append((_text(name).isNull(), f"missing {name}"))
        lost = _text(name).isNotNull() & F.col(name).isNull()
        if kind == "string":
            typed[name] = _text(name)
        elif kind == "timestamp":
            typed[name] = _time(_text(name), source.time_unit)
            problems.append((lost, f"bad time in {name}"))
        else:
            typed[name] = _number(_text(name)).try_cast(kind)
            problems.append((lost, f"wrong type in {name}"))
            problems.append((F.col(name) < 0, f"negative {name}"))
    kept = [_holds(condition) for condition in source.keep_when]
    steps = [{f"text_{ours}": text for ours, text in texts.items()}, typed]
    if isinstance(source, EventSource):
        tomorrow = F.current_timestamp() + F.expr("INTERVAL 1 DAY")
        plausible = typed["event_time"].between(F.lit(_EARLIEST), tomorrow)
        typed["event_time"] = F.when(plausible, typed["event_time"])
        typed["actions"] = _actions(source)
        problems.append((F.size("actions") == 0, "unknown action"))
        steps.append({"ds": F.to_date("event_time").cast("string")})
        kept.append(F.coalesce(F.col("ds").between(*between), F.lit(True)))
    everything_kept = functools.reduce(operator.and_, kept, F.lit(True))
    steps.append({"left_out": F.col("unreadable").isNull() & ~everything_kept})
    problem = F.coalesce(*[F.when(wrong, F.lit(name)) for wrong, name in problems])
    steps.append({"problem": F.when(~F.col("left_out"), problem)})
    content = _json("raw.*", F.col("unreadable").alias("_unreadable"))
    steps.append({"content": F.when(F.col("problem").isNotNull(), content)})
    # In one step Spark would work out each column again for every use of it, in one method too long
    # for the JVM to compile.
    rows = functools.reduce(lambda frame, columns: frame.withColumns(columns), steps, raw)
    return rows.drop("raw", "unreadable", *steps[0])


def without_repeats(rows: "DataFrame", table: str) -> "DataFrame":
    """Give rows that tell nothing new a problem: an id again, or only events of earlier rows.

    The first row, by file and place in it, is the one that counts. A row that repeats some of its
    events and adds others keeps those that it adds.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    key = [name for name in TABLES[table].key if name != "action"]
    counts = ~F.col("left_out") & F.col("problem").isNull()
    # Rows that do not count are alone in their window, where they hide nothing.
    same = Window.partitionBy(*key, F.when(~counts, F.col("offset"))).orderBy("source", "offset")
    if table == "behavior_log":
        earlier = same.rowsBetween(Window.unboundedPreceding, -1)
        seen = F.flatten(F.collect_set("actions").over(earlier))
        rows = rows.withColumn("actions", F.array_except("actions", seen))
        repeated, name = counts & (F.size("actions") == 0), "duplicated event"
    else:
        repeated, name = counts & (F.row_number().over(same) > 1), f"duplicated {key[0]}"
    rows = rows.withColumn("problem", F.coalesce("problem", F.when(repeated, F.lit(name))))
    again = F.when(F.col("problem") == name, _json(*key))
    return rows.withColumn("content", F.coalesce("content", again))


def _open(spark: "SparkSession", files: list[str], source: Source) -> "DataFrame":
    """The files as Spark reads them, and the column `_unreadable`; all but Parquet as strings."""
    from pyspark.sql import functions as F
    from pyspark.sql import types as T

    if source.format == "parquet":
        # Columns that came later are absent from older files.
        frame = spark.read.option("mergeSchema", str(len(files) > 1).lower()).parquet(*files)
        return frame.withColumn("_unreadable", F.lit(None).cast("string"))
    reader = spark.read.option("encoding", source.encoding)
    names = source.names
    if source.format == "csv":
        # A quote within quotes is written twice: it escapes itself.
        reader = reader.options(
            sep=source.separator, quote=source.quote, escape=source.quote, multiLine=source.multiline
        )
        if names is None:
            reader = reader.options(header=True, enforceSchema=False)
            names = reader.csv(files[0]).columns
    # Keys that no record of the day holds are no error in JSON: its writers omit empty values.
    names = names or sorted(source.source_columns())
    strings = [T.StructField(name, T.StringType()) for name in [*names, "_unreadable"]]
    reader = reader.schema(T.StructType(strings)).options(
        mode="PERMISSIVE", columnNameOfCorruptRecord="_unreadable"
    )
    return reader.csv(files) if source.format == "csv" else reader.json(files)


def _as_text(frame: "DataFrame", name: str, source: Source) -> "Column":
    """A column as text without blanks around it; null where the text means no value."""
    from pyspark.sql import functions as F
    from pyspark.sql import types as T

    column = frame[f"`{name.replace('`', '``')}`"]
    kind = frame.schema[name].dataType
    if isinstance(kind, T.ArrayType):
        return F.array_join(column.cast("array<string>"), ", ")
    if isinstance(kind, T.TimestampType):
        # With its offset: local time alone is ambiguous in the hour that is repeated in autumn.
        return F.date_format(column, "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX")
    if isinstance(kind, T.FloatType | T.DoubleType):
        # Whole numbers with gaps are often stored as floats: 7.0 is the id 7.
        whole = column.try_cast("bigint")
        text = F.when(column == whole, whole.cast("string")).otherwise(column.cast("string"))
        return F.when(~F.isnan(column), text)
    if not isinstance(kind, T.StringType | T.BinaryType):
        return column.cast("string")
    text = column.cast("string")
    if source.format == "jsonl":
        listed = F.array_join(F.from_json(text, "array<string>"), ", ")
        text = F.when(text.startswith("["), F.coalesce(listed, text)).otherwise(text)
        # This is how a bare NaN, which many writers leave in JSON, comes out of Spark.
        text = F.when(text != '"NaN"', text)
    text = F.trim(text)
    return F.when(~text.isin(list(source.nulls)), text)


def _value(spec: str | Derived) -> "Column":
    """The text of one of our columns, from the columns of `raw`."""
    from pyspark.sql import functions as F

    raw = F.col("raw")
    if isinstance(spec, str):
        return raw[spec]
    if spec.flags is not None:
        held = [F.when(raw[name].isin("1", "true"), F.lit(name)) for name in spec.flags]
        text = F.concat_ws(", ", *held)
        return F.when(text != "", text)
    pieces = []
    for literal, name in spec.pieces():
        pieces.append(F.lit(literal))
        if name:
            pieces.append(F.coalesce(raw[name], F.lit("")))
    some = F.coalesce(*[raw[name] for name in spec.columns()]).isNotNull()
    return F.when(some, F.concat(*pieces))


def _text(ours: str) -> "Column":
    """One of our columns before it has its type."""
    from pyspark.sql import functions as F

    return F.col(f"text_{ours}")


def _number(text: "Column") -> "Column":
    """A plain decimal number; null for others, also for those that Java knows, such as 12d."""
    from pyspark.sql import functions as F

    return F.when(text.rlike(_NUMBER), text).try_cast("double")


def _time(text: "Column", unit: str) -> "Column":
    from pyspark.sql import functions as F

    if unit == "iso":
        # A date at least: Spark would also take a year alone, or an hour of today.
        return F.when(text.rlike(r"^\d{4}-\d{1,2}-\d{1,2}"), text).try_cast("timestamp")
    return F.timestamp_micros(F.rint(_number(text) * F.lit(_PER_UNIT[unit])).try_cast("bigint"))


def _broken_utf8(texts: "Sequence[Column]", source: Source) -> "Column":
    """Whether any was not valid UTF-8; readers of CSV and JSON leave U+FFFD where one was not."""
    from pyspark.sql import functions as F

    text = F.concat_ws(" ", *texts)
    replaced = F.contains(text, F.lit("\ufffd"))
    return replaced | ~F.is_valid_utf8(text) if source.format == "parquet" else replaced


def _holds(condition: Condition) -> "Column":
    """Whether a row meets a condition; never null. What is not a number meets no bound."""
    from pyspark.sql import functions as F

    column = F.col("raw")[condition.column]
    number = F.nanvl(column.try_cast("double"), F.lit(None))
    tests = [column.isNotNull()]
    if isinstance(condition.equals, bool):
        tests.append(F.lower(column) == F.lit(str(condition.equals).lower()))
    elif isinstance(condition.equals, str):
        tests.append(column == F.lit(condition.equals))
    elif condition.equals is not None:
        tests.append(number == F.lit(condition.equals))
    if condition.one_of is not None:
        tests.append(column.isin(condition.one_of))
    if condition.at_least is not None:
        tests.append(number >= F.lit(condition.at_least))
    if condition.at_most is not None:
        tests.append(number <= F.lit(condition.at_most))
    return F.coalesce(functools.reduce(operator.and_, tests), F.lit(False))


def _actions(source: EventSource) -> "Column":
    """Our actions of a row, each once; an empty array where it has none that we know."""
    from pyspark.sql import functions as F

    if source.action_column is None:
        found = [_action_of(rule) for rule in source.action_rules]
    else:
        site = F.col("raw")[source.action_column]
        found = [F.when(site == name, F.lit(ours)) for name, ours in source.action_names.items()]
    return F.array_distinct(F.array_compact(F.array(*found)))


def _action_of(rule: ActionRule) -> "Column":
    from pyspark.sql import functions as F

    return F.when(_holds(rule), F.lit(rule.action)) if rule.column else F.lit(rule.action)


def _json(*columns: "str | Column") -> "Column":
    """Columns as JSON, cut at the limit of `quarantine.content`."""
    from pyspark.sql import functions as F

    return F.substring(F.to_json(F.struct(*columns)), 1, _CONTENT_LIMIT)
