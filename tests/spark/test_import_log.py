"""Every row of a source ends in a table, in quarantine with its reason, or is left out on purpose."""

import datetime as dt
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from jobs.context import Warehouse
from jobs.import_log import ImportSummary, import_log
from negrec_core.config import load_config
from negrec_core.errors import ConfigError, InputError, MissingError
from negrec_core.mapping import LogMapping, load_mapping
from negrec_core.resources import resource

IMPORTED = ("behavior_log", "item", "user_profile", "quarantine")
T0 = 1_700_000_000  # 2023-11-14T22:13:20Z
COLUMNS = {"user_id": "user", "item_id": "item", "event_time": "time", "reason": "why"}
COLUMNS |= {"play_ms": "played", "duration_ms": "length", "position": "rank"}
HEADER = ["user", "item", "time", "event", "why", "played", "length", "rank"]
CSV: dict[str, Any] = {
    "files": "events.csv",
    "format": "csv",
    "columns": COLUMNS,
    "time_unit": "s",
    "action_column": "event",
    "action_names": {"show": "exposure", "ok": "like", "no": "dislike"},
}
ITEMS: dict[str, Any] = {"files": "items.csv", "format": "csv", "columns": {"item_id": "id", "title": "name"}}


class Site:
    """A folder of a site's files and a warehouse to import them into."""

    def __init__(self, folder: Path, spark: SparkSession, *settings: str) -> None:
        self.folder = folder / "site"
        self.folder.mkdir(parents=True)
        self.warehouse = Warehouse(folder / "warehouse", load_config([], settings, {}))
        self.warehouse.spark = spark  # type: ignore[misc]  # the one of all tests
        self.warehouse.store.create_tables()

    def write(self, name: str, content: str | bytes | list[list[object]] | pa.Table) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, list):
            path.write_text("".join(",".join(map(str, row)) + "\n" for row in content))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def run(
        self, events: dict[str, Any], days: tuple[str | None, str | None] = (None, None), **more: Any
    ) -> ImportSummary:
        entities = {"events": events} | {k: more.pop(k) for k in ("items", "users") if k in more}
        mapping = LogMapping.model_validate({"about": "a test", "variants": [entities]} | more)
        start, end = (None if day is None else dt.date.fromisoformat(day) for day in days)
        return import_log(self.warehouse, self.folder, mapping, start, end)

    def shipped(self, name: str) -> ImportSummary:
        return import_log(
            self.warehouse, self.folder, load_mapping(resource("conf", "datasets", f"{name}.yaml"))
        )

    def rows(self, table: str, *columns: str, ds: str | None = None) -> list[Any]:
        """Rows as sorted tuples, or as sorted values where there is one column."""
        found = self.warehouse.store.read(table, columns, days=None if ds is None else [ds])
        values = [tuple(row.values()) for row in found.to_pylist()]
        return sorted([v[0] for v in values] if len(columns) == 1 else values, key=str)

    def versions(self) -> dict[str, int]:
        return {table: self.warehouse.store.version(table) for table in IMPORTED}

    def problems(self) -> dict[int, str]:
        return dict(self.rows("quarantine", "row", "problem"))


@pytest.fixture
def site(tmp_path: Path, spark: SparkSession) -> Iterator[Site]:
    yield Site(tmp_path, spark, "imports.max_quarantined=1.0")
    assert spark.sparkContext._jsc.getPersistentRDDs().size() == 0  # type: ignore[attr-defined]


def at(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def test_every_kind_of_malformed_row_goes_to_quarantine_with_its_reason(site: Site) -> None:
    future = int(dt.datetime.now(dt.UTC).timestamp()) + 3 * 86400
    cases = [
        ("u1,i1,1700000000,no,bad price,10,20,0", None),
        (",i1,1700000001,no,,,,", "missing user_id"),
        ("u1,  ,1700000002,no,,,,", "missing item_id"),
        ("u1,i1,,no,,,,", "missing event_time"),
        ("u1,i1,yesterday,no,,,,", "bad time in event_time"),
        ("u1,i1,12d,no,,,,", "bad time in event_time"),
        ("u1,i1,17,no,,,,", "bad time in event_time"),
        ("u1,i1,1e30,no,,,,", "bad time in event_time"),
        (f"u1,i1,{future},no,,,,", "bad time in event_time"),
        ("u1,i1,1700000003,wink,,,,", "unknown action"),
        ("u1,i1,1700000004,,,,,", "unknown action"),
        ("u1,i1,1700000005,no,,-1,,", "negative play_ms"),
        ("u1,i1,1700000006,no,,1,-20,", "negative duration_ms"),
        ("u1,i1,1700000007,no,,ten,,", "wrong type in play_ms"),
        ("u1,i1,1700000008,no,,,,3000000000", "wrong type in position"),
        ("u1,i1,1700000009,no,,NaN,infinity,", "wrong type in duration_ms"),
        ("u1,i\xff1,1700000010,no,,,,", "broken UTF-8"),
        ("u1,i1,1700000011,no,\xe9,,,", "broken UTF-8"),
        ("u1,i1,1700000012", "unreadable row"),
        ("u1,i1,1700000013,no,,,,,one too many", "unreadable row"),
        ("u1,i1,1700000000,no,another reason,,,", "duplicated event"),
        ("u1,i1,1700000000,ok,,,,", None),
        (" u2 ,i2,1700000014.25,show,NaN,1.0,2e3,\\N", None),
    ]
    lines = [",".join(HEADER), *(line for line, _ in cases)]
    site.write("events.csv", "\r\n".join(lines).encode("latin-1"))

    summary = site.run(CSV)

    wanted = {row: problem for row, (_, problem) in enumerate(cases) if problem}
    assert site.problems() == wanted
    assert summary.quarantined == {"events": Counter(wanted.values())}
    assert summary.rows == {"events": 3}
    assert summary.left_out == {"events": 0}
    columns = ("user_id", "item_id", "event_time", "action", "reason", "play_ms", "duration_ms", "position")
    assert site.rows("behavior_log", *columns) == [
        ("u1", "i1", at(T0), "dislike", "bad price", 10, 20, 0),
        ("u1", "i1", at(T0), "like", None, None, None, None),
        ("u2", "i2", at(T0 + 14) + dt.timedelta(milliseconds=250), "exposure", None, 1, 2000, None),
    ]
    found = {
        row: (source, entity, content)
        for source, row, entity, content in site.rows("quarantine", "source", "row", "entity", "content")
    }
    assert {(source, entity) for source, entity, _ in found.values()} == {("events.csv", "events")}
    assert json.loads(found[9][2])["event"] == "wink"
    assert "1700000012" in found[18][2]
    assert json.loads(found[20][2])["item_id"] == "i1"


def test_over_the_share_nothing_is_changed(site: Site) -> None:
    site.write("events.csv", [HEADER, ["u1", "i1", T0, "no", "", "", "", ""]])
    site.write("items.csv", [["id", "name"], ["i1", "One"]])
    site.run(CSV, items=ITEMS)
    before = site.versions(), site.rows("behavior_log", "user_id"), site.rows("item", "title")
    good = [[f"u{n}", "i1", T0 + n, "ok", "", "", "", ""] for n in range(17)]
    bad = [
        ["", "i1", T0, "ok", "", "", "", ""],
        ["u1", "i1", "?", "ok", "", "", "", ""],
        ["", "i2", T0, "ok", "", "", "", ""],
    ]
    site.write("events.csv", [HEADER, *good, *bad])
    strict = Site(site.folder.parent / "strict", site.warehouse.spark, "imports.max_quarantined=0.149")
    site.warehouse.config = strict.warehouse.config

    with pytest.raises(
        InputError, match=r"3 of 20 rows of events are malformed \(15\.0%, allowed 14\.9%\)"
    ) as caught:
        site.run(CSV, items=ITEMS)

    assert "most often: missing user_id (2, first: events.csv row 17)" in str(caught.value)
    print(caught.value)
    assert "\n" not in str(caught.value)
    assert (site.versions(), site.rows("behavior_log", "user_id"), site.rows("item", "title")) == before
    assert not site.rows("quarantine", "row")
    # What a site is known to deliver is allowed on top; and each entity has its own share.
    site.write("items.csv", [["id", "name"], ["i1", "One"], ["", "Two"]])
    with pytest.raises(InputError, match="1 of 2 rows of items are malformed"):
        site.run(CSV, items=ITEMS, known_malformed=0.2)
    assert site.versions() == before[0]
    site.write("items.csv", [["id", "name"], ["i1", "One"]])
    assert site.run(CSV, items=ITEMS, known_malformed=0.2).events == 17


def day_rows(*days: int, user: str) -> list[list[object]]:
    return [HEADER, *([user, f"i{day}", T0 + day * 86400, "no", "", "", "", ""] for day in days)]


def test_importing_a_day_again_replaces_that_day_only(site: Site) -> None:
    site.write("events.csv", [*day_rows(0, 1, 3, user="old"), ["", "x", T0 + 86400, "no", "", "", "", ""]])
    first = site.run(CSV)
    assert first.days == ["2023-11-14", "2023-11-15", "2023-11-16", "2023-11-17"]
    # A malformed row belongs to its day, and an empty day in between counts as imported.
    assert site.rows("quarantine", "problem", ds="2023-11-15") == ["missing user_id"]
    site.warehouse.store.require("behavior_log", first.days, "")
    assert site.rows("behavior_log", "user_id", ds="2023-11-16") == []

    site.write("events.csv", day_rows(1, user="new"))
    assert site.run(CSV).days == ["2023-11-15"]

    assert site.rows("behavior_log", "ds", "user_id") == [
        ("2023-11-14", "old"),
        ("2023-11-15", "new"),
        ("2023-11-17", "old"),
    ]
    assert site.rows("quarantine", "row") == []
    revisions = [site.warehouse.store.revision("behavior_log", day) for day in first.days]
    assert revisions == [1, 2, 1, 1]


def test_start_and_end_leave_other_days_alone(site: Site) -> None:
    site.write("events.csv", day_rows(0, 1, 2, 3, user="old"))
    site.run(CSV)
    bad = [["", "x", T0 + day * 86400, "no", "", "", "", ""] for day in (0, 1)]
    site.write("events.csv", [*day_rows(0, 1, 3, user="new"), *bad, ["u", "i", "?", "no", "", "", "", ""]])

    summary = site.run(CSV, days=("2023-11-15", "2023-11-16"))

    assert summary.days == ["2023-11-15", "2023-11-16"]
    assert summary.rows == {"events": 1}
    assert summary.left_out == {"events": 3}  # two good rows and a malformed one of other days
    assert summary.quarantined == {"events": {"missing user_id": 1, "bad time in event_time": 1}}
    assert site.rows("behavior_log", "ds", "user_id") == [
        ("2023-11-14", "old"),
        ("2023-11-15", "new"),
        ("2023-11-17", "old"),
    ]
    assert site.run(CSV, days=("2023-11-17", None)).days == ["2023-11-17"]
    with pytest.raises(InputError, match="no usable event"):
        site.run(CSV, days=(None, "2023-01-01"))
    with pytest.raises(ConfigError, match="end before it"):
        site.run(CSV, days=("2023-11-16", "2023-11-15"))


def test_an_archive_is_one_partition(site: Site) -> None:
    site.write("events.csv", day_rows(0, 5, 900, user="u"))
    site.write("items.csv", [["id", "name"], ["i0", "Zero"]])

    summary = site.run(CSV, items=ITEMS, archive=True)

    assert summary.days == ["2026-05-02"]
    assert site.rows("behavior_log", "ds", "item_id") == [(summary.days[0], f"i{day}") for day in (0, 5, 900)]
    assert site.rows("item", "ds") == summary.days


def test_the_log_date_follows_the_time_zone(tmp_path: Path, spark: SparkSession) -> None:
    site = Site(tmp_path, spark)
    site.write("events.csv", "user,item,time\nu,i,2023-11-05T23:30:00Z\nu,i,2023-11-05 23:30:00\n")
    # 01:30 happens twice in this night; a Parquet timestamp says which one.
    instants = [dt.datetime(2023, 11, 5, hour, 30, tzinfo=dt.UTC) for hour in (5, 6)]
    site.write(
        "more.parquet",
        pa.table(
            {"user": ["v", "v"], "item": ["i", "i"], "time": pa.array(instants, pa.timestamp("us", "UTC"))}
        ),
    )
    events = {"columns": {name: COLUMNS[name] for name in ("user_id", "item_id", "event_time")}}
    events |= {"action_rules": [{"action": "exposure"}]}
    spark.conf.set("spark.sql.session.timeZone", "America/New_York")
    try:
        site.run(events | {"files": "events.csv", "format": "csv"})
        from_csv = site.rows("behavior_log", "event_time", "ds")
        site.run(events | {"files": "more.parquet", "format": "parquet"})
        from_parquet = site.rows("behavior_log", "event_time")
    finally:
        spark.conf.set("spark.sql.session.timeZone", "UTC")

    assert from_csv == [
        (dt.datetime(2023, 11, 5, 23, 30, tzinfo=dt.UTC), "2023-11-05"),
        (dt.datetime(2023, 11, 6, 4, 30, tzinfo=dt.UTC), "2023-11-05"),
    ]
    assert from_parquet == instants


@pytest.mark.parametrize("form", ["header", "no header", "tab", "colons", "jsonl", "jsonl.gz", "parquet"])
def test_formats_give_the_same_rows(site: Site, form: str) -> None:
    table = [["Zoë", "1", str(T0), "no", 'ugly, "loud"'], ["Max", "2", str(T0 + 60), "ok", ""]]
    names = HEADER[:5]
    events = CSV | {
        "columns": {k: v for k, v in COLUMNS.items() if v in names},
        "files": f"events.{form[:4]}",
    }
    match form:
        case "header":
            # The byte order mark of some spreadsheets is no part of the first name.
            lines = (
                "\ufeff"
                + ",".join(names)
                + "\n"
                + 'Zoë,1,1700000000,no,"ugly, ""loud"""\nMax,2,1700000060,ok,\n'
            )
            site.write(events["files"], lines)
        case "no header":
            events["names"] = names
            site.write(events["files"], 'Zoë,1,1700000000,no,"ugly, ""loud"""\nMax,2,1700000060,ok,""\n')
        case "tab":
            events |= {"names": names, "separator": "\t", "quote": ""}
            site.write(events["files"], "".join("\t".join(row) + "\n" for row in table))
        case "colons":
            events |= {"names": names, "separator": "::", "quote": "", "encoding": "ISO-8859-1"}
            site.write(events["files"], "".join("::".join(row) + "\n" for row in table).encode("latin-1"))
        case "jsonl" | "jsonl.gz":
            events |= {"format": "jsonl", "files": f"events.{form}"}
            lines = "".join(
                json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in table
            )
            site.write(events["files"], gzip.compress(lines.encode()) if form == "jsonl.gz" else lines)
        case "parquet":
            events |= {"format": "parquet"}
            site.write(
                events["files"], pa.table({name: [row[n] for row in table] for n, name in enumerate(names)})
            )

    summary = site.run(events)

    assert summary.quarantined == {"events": {}}
    assert site.rows("behavior_log", "user_id", "item_id", "event_time", "action", "reason") == [
        ("Max", "2", at(T0 + 60), "like", None),
        ("Zoë", "1", at(T0), "dislike", 'ugly, "loud"'),
    ]


def test_json_lines_with_nan_lists_and_broken_lines(site: Site) -> None:
    lines = [
        '{"user": "u1", "item": 7, "time": "2023-11-14T22:13:20Z", "event": "no", "why": NaN, "played": 2e3}',
        '{"user": "u2", "item": "8", "time": "2023-11-14 22:13:21+00:00", "event": "no", "more": {"a": [1]}}',
        '{"user": NaN, "item": "8", "time": "2023-11-14", "event": "no"}',
        '{"user": "u4", "item": "9", "time": "2023-1',
        '{"user": "u5", "item": "9", "time": "12:30", "event": "no"}',
        '{"user": "u6", "item": "9", "time": "2023", "event": "no"}',
        "",
        '{"user": "u7", "item": "9", "time": "2023-11-14", "event": ["no", "ok"]}',
        '"text"',
    ]
    site.write("log/a/events.jsonl", "\n".join(lines))
    items = [
        '{"id": 7, "name": NaN, "tags": ["Red", "Blue, dark"], "kind": []}',
        '{"id": "8", "name": "[sic]", "tags": NaN, "kind": ["A", "B"]}',
        '{"id": NaN, "name": NaN, "tags": NaN, "kind": NaN}',
        '{"id": "9", "name": " Nine ", "tags": "Green", "kind": null}',
    ]
    site.write("items.jsonl.gz", gzip.compress("\n".join(items).encode()))
    events = CSV | {"files": "log/*/*.jsonl", "format": "jsonl", "time_unit": "iso"}

    summary = site.run(
        events,
        items={
            "files": "items.jsonl.gz",
            "format": "jsonl",
            "columns": {
                "item_id": "id",
                "title": "name",
                "description": {"template": "{tags} / {kind}"},
                "category": "kind",
            },
            "replace": {"category": {", ": "/"}},
            "keep_when": [{"column": "id"}],
        },
    )

    assert summary.quarantined["events"] == {
        "missing user_id": 1,
        "unreadable row": 2,
        "bad time in event_time": 2,
        "unknown action": 1,
    }
    assert site.rows("behavior_log", "user_id", "item_id", "event_time", "reason", "play_ms") == [
        ("u1", "7", at(T0), None, 2000),
        ("u2", "8", at(T0 + 1), None, None),
    ]
    assert set(site.rows("quarantine", "source")) == {"log/a/events.jsonl"}
    assert summary.left_out == {"events": 0, "items": 1}
    assert site.rows("item", "item_id", "title", "description", "category") == [
        ("7", None, "Red, Blue, dark / ", None),
        ("8", "[sic]", " / A, B", "A/B"),
        ("9", "Nine", "Green / ", None),
    ]


def test_parquet_with_the_wrong_types(site: Site) -> None:
    table = pa.table(
        {
            "user": [b"u1", b"u\xff", b"u3", b"u4", b"u5"],
            "item": [7.0, 8.0, float("nan"), 10.5, None],
            "time": [1.7e9, 1.7e9, 1.7e9, 1.7e9 + 0.5, 1.7e9],
            "event": ["no"] * 5,
            "why": [["a", "b"], [], None, [], []],
            "played": ["12", "12", "12", "twelve", "12"],
            "length": pa.array([20, 20, 20, 20, 20], pa.int8()),
            "rank": [True, False, True, None, None],
        }
    )
    site.write("events.parquet", table)
    events = CSV | {"files": "*.parquet", "format": "parquet"}
    events["columns"] = {k: v for k, v in COLUMNS.items() if v != "rank"}

    summary = site.run(events)

    assert site.problems() == {
        1: "broken UTF-8",
        2: "missing item_id",
        3: "wrong type in play_ms",
        4: "missing item_id",
    }
    assert summary.rows == {"events": 1}
    assert site.rows(
        "behavior_log", "user_id", "item_id", "event_time", "reason", "play_ms", "duration_ms"
    ) == [("u1", "7", at(T0), "a, b", 12, 20)]
    # A column that came later is absent from older files; a time may be a date.
    later = table.slice(0, 1).drop_columns(["why"]).set_column(2, "time", pa.array([dt.date(2023, 11, 14)]))
    site.write("events.parquet", later)
    site.write("older.parquet", later.append_column("why", pa.array(["new"])))
    site.run(events | {"time_unit": "iso"})
    assert site.rows("behavior_log", "event_time", "reason") == [
        (dt.datetime(2023, 11, 14, tzinfo=dt.UTC), None)
    ]
    strict = Site(site.folder.parent / "strict", site.warehouse.spark)
    strict.write("events.parquet", table.slice(0, 1))
    with pytest.raises(InputError, match=r"wrong type in position"):
        strict.run(events | {"columns": COLUMNS})


def test_rules_make_the_events_of_a_row(site: Site) -> None:
    site.write(
        "events.csv",
        "user,item,time,stars,bought,note\n"
        "u1,i1,2023-11-14,5,1,fine\n"
        "u2,i1,2023-11-14,1.5,0,not for me\n"
        "u3,i1,2023-11-14,3,,\n"
        "u4,i1,2023-11-14,nan,0,\n"
        "u5,i1,2023-11-14,four,0,\n"
        "u6,i1,2023-11-14,,1,\n"
        "u7,i1,2023-11-14,2,0,test\n",
    )
    events = {
        "files": "events.csv",
        "format": "csv",
        "columns": {"user_id": "user", "item_id": "item", "event_time": "time", "reason": "note"},
        "keep_when": [{"column": "user"}, {"column": "bought", "one_of": ["0", "1"]}],
        "action_rules": [
            {"action": "dislike", "column": "stars", "at_most": 2},
            {"action": "dislike", "column": "note", "equals": "not for me"},
            {"action": "like", "column": "stars", "at_least": 4},
            {"action": "purchase", "column": "bought", "equals": True},
            {"action": "purchase", "column": "bought", "equals": 1},
        ],
    }

    summary = site.run(events)

    assert site.rows("behavior_log", "user_id", "action", "reason") == [
        ("u1", "like", "fine"),
        ("u1", "purchase", "fine"),
        ("u2", "dislike", "not for me"),
        ("u6", "purchase", None),
        ("u7", "dislike", "test"),
    ]
    assert summary == ImportSummary(
        ["2023-11-14"], {"events": 4}, 5, {"events": 1}, {"events": {"unknown action": 2}}
    )
    with pytest.raises(ConfigError, match="makes the action juggle"):
        site.run(events | {"action_rules": [{"action": "juggle"}]})


def test_a_row_that_adds_an_event_is_kept_for_it(site: Site) -> None:
    site.write("a b+c [1]*/a.csv", "user,item,time,hit\nu,i,2023-11-14,0\nu,i,2023-11-14,0\n")
    site.write(
        "a b+c [1]*/b.csv",
        "user,item,time,hit\nu,i,2023-11-14,1\nu,i,2023-11-14,1\n,i,2023-11-14,1\n,i,2023-11-14,1\n",
    )

    summary = site.run(
        {
            "files": "*/?.csv",
            "format": "csv",
            "columns": {"user_id": "user", "item_id": "item", "event_time": "time"},
            "action_rules": [{"action": "exposure"}, {"action": "like", "column": "hit", "equals": 1}],
        }
    )

    assert site.rows("behavior_log", "action") == ["exposure", "like"]
    assert summary.rows == {"events": 2}
    assert site.rows("quarantine", "source", "row", "problem") == [
        ("a b+c [1]*/a.csv", 1, "duplicated event"),
        ("a b+c [1]*/b.csv", 1, "duplicated event"),
        ("a b+c [1]*/b.csv", 2, "missing user_id"),
        ("a b+c [1]*/b.csv", 3, "missing user_id"),
    ]


def test_items_and_users(site: Site) -> None:
    site.write("events.csv", day_rows(0, 2, user="u"))
    site.write(
        "items.csv",
        'id,name,made\ni1,One,2020-01-01\ni2,"Two\nlines",2023-11-15T10:00:00Z\ni3,Three,2099-01-01\ni4,Four,\n'
        "i1,Again,\n,None,\ni5,Five,soon\n",
    )
    site.write("users.csv", "id|f|m|city\nu1|1|0|Rome\nu2|0|1|\nu1|0|0|Oslo\nu3|0|0|\n")

    summary = site.run(
        CSV,
        items={
            "files": "items.csv",
            "format": "csv",
            "multiline": True,
            "columns": {"item_id": "id", "title": "name", "created_at": "made"},
        },
        users={
            "files": "users.csv",
            "format": "csv",
            "separator": "|",
            "columns": {
                "user_id": "id",
                "gender": {"flags": ["f", "m"]},
                "tags": {"template": "lives in {city}"},
            },
        },
    )

    assert site.rows("item", "item_id", "title", "ds") == [
        ("i1", "One", "2023-11-14"),
        ("i2", "Two\nlines", "2023-11-15"),
        ("i3", "Three", "2023-11-16"),
        ("i4", "Four", "2023-11-14"),
    ]
    assert site.rows("user_profile", "user_id", "gender", "tags", "ds") == [
        ("u1", "f", "lives in Rome", "2023-11-14"),
        ("u2", "m", None, "2023-11-14"),
        ("u3", None, None, "2023-11-14"),
    ]
    assert summary.rows == {"events": 2, "items": 4, "users": 3}
    assert site.rows("quarantine", "entity", "row", "problem", "ds") == [
        ("items", 4, "duplicated item_id", "2023-11-16"),
        ("items", 5, "missing item_id", "2023-11-16"),
        ("items", 6, "bad time in created_at", "2023-11-16"),
        ("users", 2, "duplicated user_id", "2023-11-16"),
    ]


def test_row_numbers_hold_where_files_are_split(site: Site) -> None:
    rows = [[f"u{n}", "i", T0 + n, "no", "", "", "", ""] for n in range(400)]
    for n in (0, 123, 124, 250, 399):
        rows[n][0] = ""
    site.write("x/events.csv", [HEADER, *rows])
    site.write("y/events.csv", [HEADER, *rows[:130]])
    spark = site.warehouse.spark
    spark.conf.set("spark.sql.files.maxPartitionBytes", "1000")
    spark.conf.set("spark.sql.files.openCostInBytes", "0")
    try:
        summary = site.run(CSV | {"files": "*/events.csv"})
    finally:
        spark.conf.unset("spark.sql.files.maxPartitionBytes")
        spark.conf.unset("spark.sql.files.openCostInBytes")

    assert summary.rows == {"events": 395}
    bad = [
        (s, r) for s, r, p in site.rows("quarantine", "source", "row", "problem") if p == "missing user_id"
    ]
    assert sorted(bad) == [("x/events.csv", n) for n in (0, 123, 124, 250, 399)] + [
        ("y/events.csv", n) for n in (0, 123, 124)
    ]


def test_files_that_cannot_be_used_are_one_line(site: Site) -> None:
    before = site.versions()
    site.write("events.csv", "user,item,when\nu,i,1\n")
    with pytest.raises(
        InputError, match=r"events\.csv: no column event, length, .*; it has user, item, when"
    ):
        site.run(CSV)
    site.write("events.parquet", b"PAR1 this is no Parquet file PAR1")
    with pytest.raises(InputError, match="cannot be read") as caught:
        site.run(CSV | {"files": "events.parquet", "format": "parquet"})
    print(caught.value)
    assert "\n" not in str(caught.value)
    site.write("events.jsonl.gz", gzip.compress(b'{"user": "u"}\n' * 100)[:-20])
    with pytest.raises(InputError, match="cannot be read") as caught:
        site.run(CSV | {"files": "events.jsonl.gz", "format": "jsonl"})
    print(caught.value)
    assert "\n" not in str(caught.value)
    # The columns of another file are in another order: read by place they would be swapped.
    site.write("one.csv", [HEADER, ["u", "i", T0, "no", "", "", "", ""]])
    site.write("two.csv", [[HEADER[1], HEADER[0], *HEADER[2:]], ["i", "u", T0, "no", "", "", "", ""]])
    with pytest.raises(InputError, match="cannot be read") as caught:
        site.run(CSV | {"files": "???.csv"})
    print(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingError, match=r"no event files other\.csv"):
        site.run(CSV | {"files": "other.csv"})
    assert site.versions() == before


FAULTS: dict[str, tuple[int, str]] = {
    "missing user_id": (0, ""),
    "missing item_id": (1, "NaN"),
    "missing event_time": (2, ""),
    "bad time in event_time": (2, "2023-11-14"),
    "unknown action": (3, "wave"),
    "negative play_ms": (5, "-3"),
    "wrong type in duration_ms": (6, "long"),
    "broken UTF-8": (4, "\udcff"),
}


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 3),
            st.sampled_from(["show", "ok"]),
            st.booleans(),
            st.none() | st.sampled_from(sorted(FAULTS)),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    spark: SparkSession,
    rows: list[tuple[str, int, str, bool, str | None]],
) -> None:
    site = Site(tmp_path_factory.mktemp("any"), spark, "imports.max_quarantined=1.0")
    lines, wanted, left_out, kept = [",".join(HEADER)], {}, 0, []
    for number, (user, second, action, keep, fault) in enumerate(rows):
        cells = [user, "i", str(T0 + second), action, "", "1", "1", "1" if keep else "0"]
        if fault:
            place, text = FAULTS[fault]
            cells[place] = text
        lines.append(",".join(cells))
        event = (user, "i", at(T0 + second), "like" if action == "ok" else "exposure")
        if not keep:
            left_out += 1
        elif fault:
            wanted[number] = fault
        elif event in kept:
            wanted[number] = "duplicated event"
        else:
            kept.append(event)
    site.write("events.csv", "\n".join(lines).encode(errors="surrogateescape"))
    events = CSV | {"keep_when": [{"column": "rank", "equals": 1}]}
    if not kept:
        with pytest.raises(InputError, match="no usable event"):
            site.run(events)
        return

    summary = site.run(events)

    assert site.rows("behavior_log", "user_id", "item_id", "event_time", "action") == sorted(kept, key=str)
    assert site.problems() == wanted
    assert summary.rows["events"] + summary.left_out["events"] + len(wanted) == len(rows)
    assert summary.left_out["events"] == left_out


def test_the_formats_of_movielens_agree(tmp_path: Path, spark: SparkSession) -> None:
    ratings = [(1, 10, 5, T0), (1, 11, 3, T0 + 1), (2, 10, 1, T0 + 2), (2, 12, 2, T0 + 3), (3, 12, 4, T0 + 4)]
    films = [
        (10, 'Amélie "Poulain"', "Comedy|Romance"),
        (11, "Alien, The (1979)", "Horror"),
        (12, "Heat (1995)", "Crime"),
    ]
    found = {}
    for form in ("latest", "1m", "1m parquet", "100k"):
        site = Site(tmp_path / form, spark)
        if form == "latest":
            site.write(
                "ratings.csv",
                [
                    ["userId", "movieId", "rating", "timestamp"],
                    *([u, i, float(r), t] for u, i, r, t in ratings),
                ],
            )
            site.write(
                "movies.csv",
                "movieId,title,genres\n"
                + "".join(
                    f'{i},"{title.replace(chr(34), chr(34) * 2)}",{genres}\n' for i, title, genres in films
                ),
            )
        elif form == "100k":
            site.write("u.data", "".join("\t".join(map(str, row)) + "\n" for row in ratings))
            genres = [
                "unknown",
                "Action",
                "Adventure",
                "Animation",
                "Children",
                "Comedy",
                "Crime",
                "Documentary",
                "Drama",
                "Fantasy",
                "FilmNoir",
                "Horror",
                "Musical",
                "Mystery",
                "Romance",
                "SciFi",
                "Thriller",
                "War",
                "Western",
            ]
            flags = ["|".join(str(int(g in film[2].split("|"))) for g in genres) for film in films]
            site.write(
                "u.item",
                "".join(
                    f"{i}|{title}|01-Jan-1995||url|{f}\n"
                    for (i, title, _), f in zip(films, flags, strict=True)
                ).encode("latin-1"),
            )
            site.write("u.user", "1|24|M|artist|1\n2|25|F|writer|2\n3|26|M|other|3\n")
        else:
            if form == "1m":
                site.write("ratings.dat", "".join("::".join(map(str, row)) + "\n" for row in ratings))
            else:
                site.write(
                    "ratings.parquet",
                    pa.table(
                        dict(
                            zip(
                                ["user_id", "movie_id", "rating", "timestamp"],
                                map(list, zip(*ratings, strict=True)),
                                strict=True,
                            )
                        )
                    ),
                )
            site.write(
                "movies.dat", "".join("::".join(map(str, film)) + "\n" for film in films).encode("latin-1")
            )
            site.write("users.dat", "1::M::24::4::1\n2::F::25::5::2\n3::M::26::6::3\n")
        summary = site.shipped("movielens")
        assert summary.rows["events"] == len(ratings)
        found[form] = (
            summary.days,
            site.rows("behavior_log", "user_id", "item_id", "event_time", "action"),
            site.rows("item", "item_id", "title", "description", "category"),
        )
        # 100K numbers its films otherwise than the posters.
        posters = [None if form == "100k" else f"posters/{i}.jpg" for i in (10, 11, 12)]
        assert [uri for _, uri in site.rows("item", "item_id", "media_uri")] == posters

    days, events, items = found["latest"]
    assert days == ["2023-11-14"]
    assert events == [
        ("1", "10", at(T0), "like"),
        ("1", "11", at(T0 + 1), "exposure"),
        ("2", "10", at(T0 + 2), "dislike"),
        ("2", "12", at(T0 + 3), "dislike"),
        ("3", "12", at(T0 + 4), "like"),
    ]
    assert items[0] == ("10", 'Amélie "Poulain"', "Comedy, Romance", "Comedy/Romance")
    assert all(other == found["latest"] for other in found.values())


def test_kuairand_as_published(tmp_path: Path, spark: SparkSession) -> None:
    site = Site(tmp_path, spark)
    site.write(
        "log_standard_4_08_to_4_21_pure.csv",
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
        "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
        "0,5,20231114,2200,1700000000123,1,1,0,0,1,0,1,9000,10000,0,0,0,0,1\n"
        "0,6,20231114,2200,1700000001000,0,0,0,0,0,1,0,900,0,0,0,0,0,4\n",
    )
    site.write(
        "user_features_pure.csv",
        'user_id,user_active_degree,follow_user_num_range,fans_user_num_range,register_days_range\n0,full_active,500+,"[10,100)",730+\n',
    )
    site.write(
        "video_features_basic_pure.csv",
        'video_id,author_id,video_type,upload_dt,upload_type,music_id,tag\n5,77,NORMAL,2022-04-10,Kmovie,3,"39,2"\n6,78,AD,,Kmovie,3,\n',
    )

    summary = site.shipped("kuairand")

    assert summary.events == 7
    moment = at(T0) + dt.timedelta(milliseconds=123)
    assert site.rows(
        "behavior_log", "item_id", "action", "event_time", "surface", "play_ms", "duration_ms"
    ) == [
        *(
            ("5", action, moment, "1", 9000, 10000)
            for action in ("click", "exposure", "forward", "like", "long_view")
        ),
        *(("6", action, at(T0 + 1), "4", 900, 0) for action in ("dislike", "exposure")),
    ]
    assert site.rows("item", "item_id", "category", "seller", "created_at") == [
        ("5", "39,2", "77", dt.datetime(2022, 4, 10, tzinfo=dt.UTC)),
        ("6", None, "78", None),
    ]
    assert site.rows("user_profile", "tags") == ["full_active|follows 500+|fans [10,100)|730+ days"]


@pytest.fixture
def compiled(spark: SparkSession) -> Iterator[SparkSession]:
    """The session with compiled queries, as these are not a handful of rows."""
    update = {"spark.sql.codegen.wholeStage": "true", "spark.sql.codegen.factoryMode": "FALLBACK"}
    before = {name: spark.conf.get(name) for name in update}
    for name, value in update.items():
        spark.conf.set(name, value)
    yield spark
    for name, value in before.items():
        spark.conf.set(name, value)


@pytest.mark.parametrize(
    ("name", "mapping", "rows", "actions", "left_out", "quarantined"),
    [
        ("ml-latest-small", "movielens", {"events": 100_836, "items": 9_742},
         {"dislike": 13_523, "exposure": 38_733, "like": 48_580}, {}, {}),
        ("ml-100k", "movielens", {"events": 100_000, "items": 1_682, "users": 943},
         {"dislike": 17_480, "exposure": 27_145, "like": 55_375}, {}, {}),
        ("ml-1m-533", "movielens", {"events": 80_496, "items": 3_883, "users": 6_040},
         {"dislike": 12_626, "exposure": 20_731, "like": 47_139}, {}, {}),
        ("steam-au", "steam", {"events": 38_909, "items": 32_132}, {"dislike": 3_981, "like": 34_928},
         {"events": 8_043, "items": 88_310},
         {"duplicated event": 565, "duplicated item_id": 1, "missing item_id": 2}),
        ("kuairand-pure", "kuairand", {"events": 222_446, "items": 7_583, "users": 27_285},
         {"exposure": 222_444, "click": 100_008, "long_view": 70_484, "like": 3_872, "comment": 574,
          "follow": 290, "forward": 194, "dislike": 187},
         {}, {"duplicated event": 5_883}),
    ],
)  # fmt: skip
def test_public_data_sets_import_whole(
    tmp_path: Path,
    compiled: SparkSession,
    public_data: Callable[[str], Path],
    name: str,
    mapping: str,
    rows: dict[str, int],
    actions: dict[str, int],
    left_out: dict[str, int],
    quarantined: dict[str, int],
) -> None:
    """Counts from a separate reading with pandas."""
    site = Site(tmp_path, compiled)
    site.folder = public_data(name)

    summary = site.shipped(mapping)

    assert summary.rows == rows
    found = site.warehouse.store.read("behavior_log", ["action"])["action"].value_counts()
    assert {row["values"]: row["counts"] for row in found.to_pylist()} == actions
    assert {k: n for k, n in summary.left_out.items() if n} == left_out
    assert {p: n for problems in summary.quarantined.values() for p, n in problems.items()} == quarantined
    assert Counter(site.rows("quarantine", "problem")) == quarantined
    assert len(site.rows("item", "item_id")) == rows["items"]
    assert summary.events == sum(actions.values())
