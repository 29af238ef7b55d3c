"""`negrec import`: a site's files into `behavior_log`, `item`, `user_profile` and `quarantine`.

A row that cannot be used goes to `quarantine` with its problem; none is dropped in silence. The
import replaces whole days; `behavior_log` is committed last, so its partition means that the import
is whole.
"""

import datetime as dt
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import negrec_core
from jobs.context import Warehouse, with_partitions, write_files
from jobs.import_rows import read_raw, reading, typed_rows, without_repeats
from negrec_core.delta import Provenance, day_range
from negrec_core.errors import ConfigError, InputError
from negrec_core.mapping import ENTITY_TABLES, LogMapping, choose_variant
from negrec_core.schemas import TABLES

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row, SparkSession


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
    """Counts of one entity's rows.

    Attributes:
        rows: good rows.
        events: events that they hold.
        left_out: rows left out on purpose.
        problems: problem -> rows.
        examples: problem -> "file row N" of the first such row.
        days: first and last day of the good events, ISO; empty where there is none.
        shifts: (file, start of split) -> what to add to `offset` for the row number in the file.
    """

    rows: int
    events: int
    left_out: int
    problems: dict[str, int]
    examples: dict[str, str]
    days: list[str]
    shifts: dict[tuple[str, int], int]


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
        ConfigError: the mapping makes an action that the configuration does not name, or the days
            end before they start.
        InputError: a mapped column is absent, a file cannot be read, no event is usable, or more
            rows are malformed than allowed. Nothing is published then.
    """
    if start and end and end < start:
        raise ConfigError(f"the days to import start on {start} and end before it, on {end}")
    variant = choose_variant(mapping, folder)
    nameless = variant.events.actions() - warehouse.config.feedback.polarity.keys()
    if nameless:
        raise ConfigError(
            f"the mapping makes the action {', '.join(sorted(nameless))}, which feedback.polarity"
            " does not name; give it -1, 0 or 1 there"
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
        days = _days_replaced(tallies["events"].days, mapping.archive, start, end, folder)
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


def _tally(parsed: "Mapping[str, DataFrame]", folder: Path) -> dict[str, Tally]:
    """Count the rows of every entity, in one pass over all."""
    from pyspark.sql import functions as F

    good = F.col("problem").isNull() & ~F.col("left_out")
    parts = []
    for entity, frame in parsed.items():
        events = entity == "events"
        parts.append(
            frame.select(
                F.lit(entity).alias("entity"),
                *("source", "block", "offset", "left_out", "problem"),
                F.when(good, F.size("actions") if events else F.lit(0)).alias("events"),
                F.when(good, F.col("ds") if events else F.lit(None)).cast("string").alias("ds"),
            )
        )
    with reading(folder):
        groups = (
            functools.reduce(lambda a, b: a.unionByName(b), parts)
            .groupBy("entity", "source", "block", "left_out", "problem")
            .agg(
                F.count("*").alias("rows"),
                F.min("offset").alias("start"),
                F.sum("events").alias("events"),
                F.min("ds").alias("first"),
                F.max("ds").alias("last"),
            )
            .collect()
        )
    return {entity: _tally_one([g for g in groups if g["entity"] == entity]) for entity in parsed}


def _tally_one(groups: "Sequence[Row]") -> Tally:
    """Counts of one entity, from its groups of equal file, split, `left_out` and `problem`."""
    shifts = _row_shifts(groups)
    problems: dict[str, int] = {}
    found: dict[str, tuple[str, int]] = {}
    for group in groups:
        name = group["problem"]
        if name is not None:
            at = (group["source"], group["start"] + shifts[group["source"], group["block"]])
            problems[name] = problems.get(name, 0) + group["rows"]
            found[name] = min(at, found.get(name, at))
    good = [group for group in groups if group["problem"] is None and not group["left_out"]]
    days = sorted(group[end] for group in good for end in ("first", "last") if group[end])
    return Tally(
        rows=sum(group["rows"] for group in good),
        events=sum(group["events"] for group in good),
        left_out=sum(group["rows"] for group in groups if group["left_out"]),
        problems=problems,
        examples={name: f"{file} row {row}" for name, (file, row) in found.items()},
        days=[days[0], days[-1]] if days else [],
        shifts=shifts,
    )


def _row_shifts(groups: "Sequence[Row]") -> dict[tuple[str, int], int]:
    """(file, start of split) -> what to add to `offset` for the row number within the file."""
    rows: dict[tuple[str, int], int] = {}
    starts: dict[tuple[str, int], int] = {}
    for group in groups:
        split = (group["source"], group["block"])
        rows[split] = rows.get(split, 0) + group["rows"]
        starts[split] = min(group["start"], starts.get(split, group["start"]))
    shifts: dict[tuple[str, int], int] = {}
    before: dict[str, int] = {}
    for split in sorted(rows):
        shifts[split] = before.get(split[0], 0) - starts[split]
        before[split[0]] = before.get(split[0], 0) + rows[split]
    return shifts


def _check_share(tallies: Mapping[str, Tally], limit: float, folder: Path) -> None:
    for entity, tally in tallies.items():
        bad = sum(tally.problems.values())
        total = tally.rows + bad
        if bad > limit * total:
            worst = max(sorted(tally.problems), key=lambda name: tally.problems[name])
            raise InputError(
                f"{folder}: {bad} of {total} rows of {entity} are malformed ({bad / total:.1%},"
                f" allowed {limit:.1%}), most often: {worst} ({tally.problems[worst]}, first:"
                f" {tally.examples[worst]}); nothing was imported. Mend the source or raise"
                " imports.max_quarantined"
            )


def _days_replaced(
    found: Sequence[str], archive: bool, start: dt.date | None, end: dt.date | None, folder: Path
) -> list[str]:
    """The partitions that the import replaces; those between the first and the last all count."""
    if not found:
        raise InputError(f"{folder}: no usable event; nothing was imported")
    first, last = (dt.date.fromisoformat(day) for day in found)
    return [last.isoformat()] if archive else day_range(start or first, end or last)


def _published(
    spark: "SparkSession",
    parsed: "Mapping[str, DataFrame]",
    tallies: Mapping[str, Tally],
    days: Sequence[str],
) -> "dict[str, DataFrame | None]":
    """What each table gets, `behavior_log` last; None where that is no row."""
    from pyspark.sql import functions as F

    def within(day: "Column", unknown: str) -> "Column":
        """The day, or the nearest that this import replaces."""
        day = F.coalesce(day.cast("string"), F.lit(unknown))
        return F.least(F.greatest(day, F.lit(days[0])), F.lit(days[-1]))

    bad = [
        _quarantined(spark, parsed[entity], entity, tally)
        for entity, tally in tallies.items()
        if tally.problems
    ]
    frames: dict[str, DataFrame | None] = {"quarantine": None}
    if bad:
        all_bad = functools.reduce(lambda a, b: a.unionByName(b), bad)
        frames["quarantine"] = all_bad.withColumn("ds", within(F.col("ds"), days[-1]))
    # A user has no date. An item belongs to the day it was created; an archive's events to its end.
    dates = {"users": F.lit(None), "items": F.to_date("created_at"), "events": F.col("ds")}
    for entity, day in dates.items():
        if entity in parsed:
            table = ENTITY_TABLES[entity]
            good = parsed[entity].where(F.col("problem").isNull() & ~F.col("left_out"))
            good = good.withColumn("ds", within(day, days[0]))
            if entity == "events":
                good = good.withColumn("action", F.explode("actions"))
            frames[table] = good.select(*TABLES[table].body.names, "ds")
    return frames


def _quarantined(spark: "SparkSession", rows: "DataFrame", entity: str, tally: Tally) -> "DataFrame":
    """Rows of `quarantine`; `ds` is null where the row's log date is unknown."""
    from pyspark.sql import functions as F

    shifts = spark.createDataFrame(
        [(source, block, shift) for (source, block), shift in tally.shifts.items()],
        "source string, block bigint, shift bigint",
    )
    return (
        rows.where(F.col("problem").isNotNull())
        .join(F.broadcast(shifts), ["source", "block"])
        .select(
            "source",
            (F.col("offset") + F.col("shift")).alias("row"),
            F.lit(entity).alias("entity"),
            "problem",
            "content",
            (F.col("ds") if entity == "events" else F.lit(None)).cast("string").alias("ds"),
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
