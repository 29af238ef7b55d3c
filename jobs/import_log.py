"""`negrec import`: a site's files into `behavior_log`, `item`, `user_profile` and `quarantine`.

A row that cannot be used goes to `quarantine` with its problem; none is dropped in silence. The import
replaces whole days; `behavior_log` is committed last, so its partition means that the import is whole.
"""

import datetime as dt
import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import negrec_core
from jobs.context import Warehouse, spark_schema, with_partitions, write_files
from negrec_core.delta import Provenance, day_range
from negrec_core.errors import ConfigError, InputError
from negrec_core.mapping import (
    ENTITY_TABLES,
    ActionRule,
    Condition,
    Derived,
    EventSource,
    LogMapping,
    Source,
    choose_variant,
    find_files,
)
from negrec_core.schemas import TABLES

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession

_EARLIEST = dt.datetime(1990, 1, 1, tzinfo=dt.UTC)
_CONTENT_LIMIT = 2000
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
_PER_SECOND = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True)
class ImportSummary:
    """What an import did. Every row of the source is in one of `rows`, `left_out`, `quarantined`.

    Attributes:
        days: `ds` partitions replaced.
        rows: entity -> rows imported.
        events: rows written to `behavior_log`; a source row can hold several.
        left_out: entity -> rows that the mapping or the day range leaves out on purpose.
        quarantined: entity -> problem -> rows.
    """

    days: list[str]
    rows: dict[str, int]
    events: int
    left_out: dict[str, int]
    quarantined: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Tally:
    """Counts of one entity's parsed rows.

    Attributes:
        rows: good rows.
        events: events that they hold.
        left_out: rows left out on purpose.
        problems: problem -> rows.
        examples: problem -> "file row N" of the first such row.
        first: day of the first good event, ISO; None where there is none.
        last: day of the last.
        shifts: (file, start of split, number to add to `offset` for the row number in the file).
    """

    rows: int
    events: int
    left_out: int
    problems: dict[str, int]
    examples: dict[str, str]
    first: str | None
    last: str | None
    shifts: list[tuple[str, int, int]]


def import_log(
    warehouse: Warehouse,
    folder: Path,
    mapping: LogMapping,
    start: dt.date | None = None,
    end: dt.date | None = None,
) -> ImportSummary:
    """Import a folder by a mapping and replace all days from the first to the last event.

    With `start` or `end` only events of these log dates are imported, and these dates replaced.

    Raises:
        MissingError: the folder lacks files that the mapping reads.
        ConfigError: the mapping makes an action that the configuration does not name, or the range
            is empty.
        InputError: a mapped column is absent, a file cannot be read, no event is usable, or more rows
            are malformed than `imports.max_quarantined` allows. Nothing is published then.
    """
    if start and end and start > end:
        raise ConfigError(f"the import would start on {start} and end before it, on {end}")
    variant = choose_variant(mapping, folder)
    nameless = variant.events.actions() - warehouse.config.feedback.polarity.keys()
    if nameless:
        raise ConfigError(
            f"the mapping makes the action {', '.join(sorted(nameless))}, which feedback.polarity does"
            " not name; give it a polarity of -1, 0 or 1"
        )
    between = (start.isoformat() if start else "", end.isoformat() if end else "9999")
    parsed: dict[str, DataFrame] = {}
    try:
        for entity, source in variant.sources().items():
            raw = read_raw(warehouse.spark, folder, source)
            rows = typed_rows(raw, source, ENTITY_TABLES[entity], between)
            parsed[entity] = without_repeats(rows, ENTITY_TABLES[entity]).persist()
        tallies = _tally(parsed, folder)
        limit = max(warehouse.config.imports.max_quarantined, mapping.known_malformed)
        _check_share(tallies, limit, folder)
        first, last = tallies["events"].first, tallies["events"].last
        if first is None or last is None:
            raise InputError(f"{folder}: no usable event; nothing was imported")
        days = (
            [last]
            if mapping.archive
            else day_range(start or dt.date.fromisoformat(first), end or dt.date.fromisoformat(last))
        )
        for table, frame in _published(warehouse.spark, parsed, tallies, days).items():
            _replace_days(warehouse, table, frame, days)
    finally:
        for frame in parsed.values():
            frame.unpersist()
    return ImportSummary(
        days,
        {entity: tally.rows for entity, tally in tallies.items()},
        tallies["events"].events,
        {entity: tally.left_out for entity, tally in tallies.items()},
        {entity: tally.problems for entity, tally in tallies.items()},
    )


def read_raw(spark: "SparkSession", folder: Path, source: Source) -> "DataFrame":
    """All rows of a source, with the columns that the mapping reads as text.

    Returns:
        A frame of `source` (path below the folder), `block` (where the split starts in the file),
        `offset` (ascending within the split), `raw` (struct of the mapped columns, all strings) and
        `unreadable` (the line, where it could not be taken apart).

    Raises:
        InputError: a column that the mapping names is not in the file, or a file cannot be read.
    """
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    files = find_files(folder, source)
    try:
        frame = _open(spark, [str(file) for file in files], source)
    except PySparkException as error:
        raise _cannot_be_read(folder / source.files, error) from None
    absent = sorted(source.source_columns() - set(frame.columns))
    if absent:
        raise InputError(
            f"{files[0]}: no column {', '.join(absent)}; it has"
            f" {', '.join(c for c in frame.columns if c != '_unreadable')}"
        )
    depth = max(len(file.relative_to(folder).parts) for file in files)
    values = [_as_text(frame, name, source).alias(name) for name in sorted(source.source_columns())]
    return frame.select(
        F.substring_index(F.input_file_name(), "/", -depth).alias("source"),
        F.input_file_block_start().alias("block"),
        F.monotonically_increasing_id().alias("offset"),
        F.struct(*values).alias("raw"),
        F.col("_unreadable").alias("unreadable"),
    )


def typed_rows(raw: "DataFrame", source: Source, table: str, between: tuple[str, str]) -> "DataFrame":
    """The rows of `read_raw` in our columns.

    Args:
        raw: what `read_raw` returns.
        source: the mapping.
        table: `behavior_log`, `item` or `user_profile`; gives the types.
        between: first and last log date, ISO; events of other days are left out.

    Returns:
        A frame of `source`, `block`, `offset`; the table's columns; `actions` in the place of
        `action` and `ds`, the log date, for events; `left_out`; `problem`, the first thing wrong with a
        row that is not left out; and `content`, the row as JSON.
    """
    from pyspark.sql import functions as F

    texts = {ours: _value(spec) for ours, spec in source.columns.items()}
    for ours, pairs in source.replace.items():
        for old, new in pairs.items():
            texts[ours] = F.replace(texts[ours], F.lit(old), F.lit(new))
    everything = F.concat_ws(" ", *[_text(ours) for ours in texts])
    problems = [
        (F.col("unreadable").isNotNull(), "unreadable row"),
        (_broken_utf8(everything, source), "broken UTF-8"),
    ]
    typed = {}
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
    left_out = functools.reduce(operator.or_, [~_holds(c) for c in source.keep_when], F.lit(False))
    if isinstance(source, EventSource):
        tomorrow = F.current_timestamp() + F.expr("INTERVAL 1 DAY")
        plausible = typed["event_time"].between(F.lit(_EARLIEST), tomorrow)
        typed["event_time"] = F.when(plausible, typed["event_time"])
        typed["actions"] = _actions(source)
        problems.append((F.size("actions") == 0, "unknown action"))
        left_out |= F.coalesce(~F.col("ds").between(*between), F.lit(False))
    # One step for each use of the columns before it: in a single one Spark would work them out again
    # for every use.
    rows = raw.withColumns({f"text_{ours}": text for ours, text in texts.items()})
    rows = rows.withColumns(typed)
    if isinstance(source, EventSource):
        rows = rows.withColumn("ds", F.to_date("event_time").cast("string"))
    rows = rows.withColumn("left_out", left_out & F.col("unreadable").isNull())
    problem = F.coalesce(*[F.when(wrong, F.lit(name)) for wrong, name in problems])
    rows = rows.withColumn("problem", F.when(~F.col("left_out"), problem))
    content = _json("raw.*", F.col("unreadable").alias("_unreadable"))
    return rows.select(
        *("source", "block", "offset", *typed, "left_out", "problem"),
        *(["ds"] if isinstance(source, EventSource) else []),
        F.when(F.col("problem").isNotNull(), content).alias("content"),
    )


def without_repeats(rows: "DataFrame", table: str) -> "DataFrame":
    """Give rows that tell nothing new a problem: an id again, or only events of earlier rows.

    The first row, by file and position, is the one that counts. A row that repeats some of its events
    and adds others keeps those that it adds.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    key = [name for name in TABLES[table].key if name != "action"]
    # Rows that do not count are alone in their window, where they hide nothing.
    alone = F.when(F.col("left_out") | F.col("problem").isNotNull(), F.col("offset"))
    same = Window.partitionBy(*key, alone).orderBy("source", "offset")
    if table == "behavior_log":
        earlier = same.rowsBetween(Window.unboundedPreceding, -1)
        seen = F.flatten(F.collect_set("actions").over(earlier))
        rows = rows.withColumn("actions", F.array_except("actions", seen))
        repeated, name = F.size("actions") == 0, "duplicated event"
    else:
        repeated, name = F.row_number().over(same) > 1, f"duplicated {key[0]}"
    return rows.withColumn("repeated", ~F.col("left_out") & F.col("problem").isNull() & repeated).select(
        *[c for c in rows.columns if c not in ("problem", "content")],
        F.coalesce("problem", F.when(F.col("repeated"), F.lit(name))).alias("problem"),
        F.coalesce("content", F.when(F.col("repeated"), _json(*key))).alias("content"),
    )


def _tally(parsed: Mapping[str, "DataFrame"], folder: Path) -> dict[str, Tally]:
    """Count the rows of every entity, in one pass over all."""
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    parts = [
        frame.select(
            F.lit(entity).alias("entity"),
            *("source", "block", "offset", "left_out", "problem"),
            (F.size("actions") if entity == "events" else F.lit(0)).alias("events"),
            (F.col("ds") if entity == "events" else F.lit(None).cast("string")).alias("ds"),
        )
        for entity, frame in parsed.items()
    ]
    good = F.col("problem").isNull() & ~F.col("left_out")
    try:
        groups = (
            functools.reduce(lambda a, b: a.unionByName(b), parts)
            .groupBy("entity", "source", "block", "left_out", "problem")
            .agg(
                F.count("*").alias("n"),
                F.min("offset").alias("start"),
                F.sum(F.when(good, F.col("events"))).alias("events"),
                F.min(F.when(good, F.col("ds"))).alias("first"),
                F.max(F.when(good, F.col("ds"))).alias("last"),
            )
            .collect()
        )
    except PySparkException as error:
        raise _cannot_be_read(folder, error) from None
    return {entity: _tally_one([g for g in groups if g.entity == entity]) for entity in parsed}


def _tally_one(groups: "Sequence[Row]") -> Tally:
    shifts = _row_shifts(groups)
    problems: dict[str, int] = {}
    found: dict[str, tuple[str, int]] = {}
    for group in groups:
        if group.problem is not None:
            problems[group.problem] = problems.get(group.problem, 0) + group.n
            at = (group.source, group.start + shifts[group.source, group.block])
            found[group.problem] = min(at, found.get(group.problem, at))
    good = [group for group in groups if group.problem is None and not group.left_out]
    days = [day for group in good for day in (group["first"], group["last"]) if day is not None]
    return Tally(
        rows=sum(group.n for group in good),
        events=sum(group.events for group in good),
        left_out=sum(group.n for group in groups if group.left_out),
        problems=problems,
        examples={problem: f"{file} row {row}" for problem, (file, row) in found.items()},
        first=min(days, default=None),
        last=max(days, default=None),
        shifts=[(source, block, shift) for (source, block), shift in shifts.items()],
    )


def _row_shifts(groups: "Sequence[Row]") -> dict[tuple[str, int], int]:
    """(file, start of split) -> what to add to a position for the row number within the file.

    Positions ascend without gaps inside a split, but start anywhere.
    """
    counts: dict[tuple[str, int], int] = {}
    starts: dict[tuple[str, int], int] = {}
    for group in groups:
        split = (group.source, group.block)
        counts[split] = counts.get(split, 0) + group.n
        starts[split] = min(group.start, starts.get(split, group.start))
    shifts, file, before = {}, "", 0
    for split in sorted(counts):
        if split[0] != file:
            file, before = split[0], 0
        shifts[split] = before - starts[split]
        before += counts[split]
    return shifts


def _check_share(tallies: Mapping[str, Tally], limit: float, folder: Path) -> None:
    for entity, tally in tallies.items():
        bad = sum(tally.problems.values())
        total = tally.rows + bad
        if bad > limit * total:
            worst = max(tally.problems, key=lambda problem: tally.problems[problem])
            raise InputError(
                f"{folder}: {bad} of {total} rows of {entity} are malformed ({bad / total:.1%}, allowed"
                f" {limit:.1%}), most often: {worst} ({tally.problems[worst]}, first in"
                f" {tally.examples[worst]}); nothing was imported. Mend the source or raise"
                " imports.max_quarantined"
            )


def _published(
    spark: "SparkSession",
    parsed: "Mapping[str, DataFrame]",
    tallies: Mapping[str, Tally],
    days: Sequence[str],
) -> "dict[str, DataFrame | None]":
    """What each table gets, `behavior_log` last; None where that is no row."""
    from pyspark.sql import functions as F

    bad = [
        _quarantined(spark, parsed[entity], entity, tally)
        for entity, tally in tallies.items()
        if tally.problems
    ]
    frames: dict[str, DataFrame | None] = {"quarantine": None}
    if bad:
        frames["quarantine"] = functools.reduce(lambda a, b: a.unionByName(b), bad)
    for entity in ("items", "users", "events"):
        if entity not in parsed:
            continue
        good = parsed[entity].where(F.col("problem").isNull() & ~F.col("left_out"))
        if entity == "items":
            # An item belongs to the day it was created, within the days that this import replaces.
            created = F.coalesce(F.to_date("created_at").cast("string"), F.lit(days[0]))
            good = good.withColumn("ds", F.least(F.greatest(created, F.lit(days[0])), F.lit(days[-1])))
        elif entity == "users":
            good = good.withColumn("ds", F.lit(days[0]))
        else:
            # Days may be fewer than the events': an archive is one partition.
            good = good.withColumn("ds", F.least("ds", F.lit(days[-1])))
            good = good.withColumn("ds", F.greatest("ds", F.lit(days[0])))
            good = good.withColumn("action", F.explode("actions"))
        table = ENTITY_TABLES[entity]
        names = TABLES[table].body.names
        frames[table] = good.select(*names, "ds")
    return frames


def _quarantined(spark: "SparkSession", rows: "DataFrame", entity: str, tally: Tally) -> "DataFrame":
    from pyspark.sql import functions as F

    shifts = spark.createDataFrame(tally.shifts, "source string, block bigint, shift bigint")
    return (
        rows.where(F.col("problem").isNotNull())
        .join(F.broadcast(shifts), ["source", "block"])
        .select(
            "source",
            (F.col("offset") + F.col("shift")).alias("row"),
            F.lit(entity).alias("entity"),
            "problem",
            "content",
        )
    )


def _replace_days(warehouse: Warehouse, table: str, frame: "DataFrame | None", days: Sequence[str]) -> None:
    """Replace several days of a table at once, each at its next revision."""
    store = warehouse.store
    revisions = {day: store.revision(table, day) + 1 for day in days}
    provenance = Provenance(config_digest=warehouse.config.digest(), code_version=negrec_core.__version__)
    if frame is None:
        store.write_arrow(table, TABLES[table].schema.empty_table(), revisions, provenance)
        return
    run = store.new_run(table)
    write_files(with_partitions(frame, table, days[-1], warehouse.config.buckets), table, run)
    store.commit(table, run, revisions, provenance)


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
        header = {"header": "true", "enforceSchema": "false"} if names is None else {}
        reader = reader.options(
            sep=source.separator, quote='"', escape='"', multiLine=source.multiline, **header
        )
        names = names or reader.csv(files[0]).columns
    # Keys that no record of the day holds are no error in JSON: its writers omit empty values.
    names = names or sorted(source.source_columns())
    schema = T.StructType([T.StructField(name, T.StringType()) for name in [*names, "_unreadable"]])
    reader = reader.schema(schema).options(mode="PERMISSIVE", columnNameOfCorruptRecord="_unreadable")
    return reader.csv(files) if source.format == "csv" else reader.json(files)


def _cannot_be_read(what: Path, error: Exception) -> InputError:
    line = str(error).strip().splitlines()[0]
    return InputError(f"{what}: cannot be read: {line[:300]}")


def _as_text(frame: "DataFrame", name: str, source: Source) -> "Column":
    """A column as text without blanks around it; null where the text means no value."""
    from pyspark.sql import functions as F
    from pyspark.sql import types as T

    column = frame[_quoted(name)]
    kind = frame.schema[name].dataType
    if isinstance(kind, T.ArrayType):
        text = F.array_join(column.cast("array<string>"), ", ")
    elif isinstance(kind, T.TimestampType):
        # With its offset: local time alone is ambiguous in the hour that is repeated in autumn.
        text = F.date_format(column, "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX")
    elif isinstance(kind, T.FloatType | T.DoubleType):
        # Whole numbers with gaps are often stored as floats: 7.0 is the id 7, not 7.0.
        whole = column.try_cast("bigint")
        text = F.when(column == whole, whole.cast("string")).otherwise(column.cast("string"))
    else:
        text = column.cast("string")
    if source.format == "jsonl":
        listed = F.array_join(F.from_json(text, "array<string>"), ", ")
        text = F.when(text.startswith("["), F.coalesce(listed, text)).otherwise(text)
        # This is how a bare NaN, which many writers leave in JSON, comes out of Spark.
        text = F.when(text != '"NaN"', text)
    if isinstance(kind, T.StringType):
        text = F.trim(text)
    return F.when(~text.isin(list(source.nulls)), text)


def _broken_utf8(text: "Column", source: Source) -> "Column":
    """Whether the text was not valid UTF-8; readers of CSV and JSON leave U+FFFD where it was not."""
    from pyspark.sql import functions as F

    replaced = F.contains(text, F.lit("\ufffd"))
    return replaced | ~F.is_valid_utf8(text) if source.format == "parquet" else replaced


def _json(*columns: "str | Column") -> "Column":
    from pyspark.sql import functions as F

    return F.substring(F.to_json(F.struct(*columns)), 1, _CONTENT_LIMIT)


def _text(name: str) -> "Column":
    """Our column as text, before it gets its type."""
    from pyspark.sql import functions as F

    return F.col(f"text_{name}")


def _number(text: "Column") -> "Column":
    from pyspark.sql import functions as F

    return F.when(text.rlike(_NUMBER), text).try_cast("double")


def _time(text: "Column", unit: str) -> "Column":
    from pyspark.sql import functions as F

    if unit == "iso":
        # Spark would also take a year, or an hour of today.
        return F.when(text.rlike(r"^\d{4}-\d{1,2}-\d{1,2}"), text).try_cast("timestamp")
    return F.timestamp_micros(F.rint(_number(text) * F.lit(_PER_SECOND[unit])).try_cast("bigint"))


def _value(spec: str | Derived) -> "Column":
    from pyspark.sql import functions as F

    raw = F.col("raw")
    if isinstance(spec, str):
        return raw[spec]
    if spec.flags is not None:
        set_ = [F.when(raw[name].isin("1", "true"), F.lit(name)) for name in spec.flags]
        text = F.concat_ws(", ", *set_)
        return F.when(text != "", text)
    pieces = []
    for literal, name in spec.pieces():
        pieces.append(F.lit(literal))
        if name:
            pieces.append(F.coalesce(raw[name], F.lit("")))
    return F.when(F.coalesce(*[raw[name] for name in spec.columns()]).isNotNull(), F.concat(*pieces))


def _holds(condition: Condition) -> "Column":
    """Whether a row meets a condition; never null."""
    from pyspark.sql import functions as F

    column = F.col("raw")[condition.column]
    # A rule is no check of types: what is not a number meets no bound.
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
        found = [_rule_action(rule) for rule in source.action_rules]
    else:
        site = F.col("raw")[source.action_column]
        found = [F.when(site == name, F.lit(ours)) for name, ours in source.action_names.items()]
    return F.array_distinct(F.array_compact(F.array(*found)))


def _rule_action(rule: ActionRule) -> "Column":
    from pyspark.sql import functions as F

    return F.when(_holds(rule), F.lit(rule.action)) if rule.column else F.lit(rule.action)


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"
