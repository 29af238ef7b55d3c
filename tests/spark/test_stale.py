"""Late data: what was made from the older revision is shown, and made again, and nothing else is."""

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner
from warehouses import write_rows

from jobs.cli import app
from jobs.context import Warehouse
from jobs.pipeline import run_range, run_stale, stale
from negrec_core.config import load_config
from negrec_core.delta import day_range

START = dt.date(2026, 3, 1)
DAYS = day_range(START, START + dt.timedelta(days=3))
STAGES = ["feedback", "item_rate", "user_context"]
SETTINGS = ["window_days=2"]


def event(user: str, item: str, ds: str, action: str = "dislike") -> dict[str, Any]:
    when = dt.datetime.fromisoformat(ds).replace(hour=12, tzinfo=dt.UTC)
    return {"user_id": user, "item_id": item, "action": action, "event_time": when}


def site(root: Path, spark: SparkSession, late: bool) -> Warehouse:
    """Four days of log; that of the second may have a late row."""
    warehouse = Warehouse(root, load_config([], SETTINGS, {}))
    warehouse.spark = spark
    warehouse.store.create_tables()
    for n, ds in enumerate(DAYS):
        write_rows(warehouse.store, "behavior_log", log_of(n, ds, late), ds)
    return warehouse


def log_of(n: int, ds: str, late: bool) -> list[dict[str, Any]]:
    rows = [event("ann", f"item {n}", ds), event("bob", "item 0", ds, "like")]
    return [*rows, event("ann", "late", ds)] if late and n == 1 else rows


def rows_of(warehouse: Warehouse) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return {
        (table, ds): sorted(warehouse.store.read(table, days=[ds]).to_pylist(), key=repr)
        for table in STAGES
        for ds in DAYS
    }


def test_late_data_is_shown_and_mended(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Warehouse, "spark", spark)
    monkeypatch.setenv("COLUMNS", "200")
    right = site(tmp_path / "right", spark, late=True)
    run_range(right, DAYS, STAGES)
    mended = site(tmp_path / "mended", spark, late=False)
    run_range(mended, DAYS, STAGES)
    assert stale(mended) == []
    store = mended.store
    write_rows(store, "behavior_log", log_of(1, DAYS[1], True), DAYS[1], revision=2)
    # A window of two days: the late day reaches itself and the next, and no other day's feedback.
    expected = [("feedback", DAYS[1])] + [(table, ds) for ds in DAYS[1:3] for table in STAGES[1:]]
    assert [(one.table, one.ds) for one in stale(mended)] == expected

    def said(*arguments: str) -> str:
        command = ["--warehouse", str(mended.root), "--set", SETTINGS[0], *arguments]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.stdout.split())

    line = f"stale: feedback {DAYS[1]}, made before behavior_log {DAYS[1]} (now revision 2"
    assert line in said("status")
    assert f"negrec backfill --stale --start {DAYS[1]} --end {DAYS[2]}" in said("status")
    before = {(table, ds): store.revision(table, ds) for table in STAGES for ds in DAYS}
    assert "nothing of these days is stale" in said(
        "backfill", "--stale", "--start", DAYS[3], "--end", DAYS[3]
    )
    # Stopped after some of it, it goes on with the rest.
    done = run_stale(mended, DAYS[:2], ["feedback", "item_rate"])
    assert [(one.stage, one.ds) for one in done] == expected[:2]
    assert [(one.table, one.ds) for one in stale(mended)] == expected[2:]
    said("backfill", "--stale", "--start", DAYS[0], "--end", DAYS[3])
    assert stale(mended) == []
    assert "stale:" not in said("status")
    after = {(table, ds): store.revision(table, ds) for table in STAGES for ds in DAYS}
    assert {one for one in after if after[one] != before[one]} == set(expected)
    assert set(after.values()) == {1, 2}
    assert rows_of(mended) == rows_of(right)


def test_skips_that_are_judged_look_back_a_week(spark: SparkSession, tmp_path: Path) -> None:
    """Feedback of a day then reads how often an item was played on the days before."""
    config = load_config([], ["feedback.implicit.enabled=true"], {})
    warehouse = Warehouse(tmp_path, config)
    warehouse.spark = spark
    warehouse.store.create_tables()
    days = day_range(START, START + dt.timedelta(days=8))
    for ds in days:
        write_rows(warehouse.store, "behavior_log", [event("ann", "i", ds)], ds)
    run_range(warehouse, days, ["feedback"])
    assert stale(warehouse) == []
    write_rows(warehouse.store, "behavior_log", [], days[1], revision=2)
    assert [one.ds for one in stale(warehouse)] == days[1:8]
