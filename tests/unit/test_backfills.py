"""Backfills at once: real processes run the pipeline over overlapping days, each day is committed once."""

import datetime as dt
import multiprocessing as mp
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import jobs.feedback
import jobs.item_rate
from jobs.context import JobContext, Warehouse
from jobs.pipeline import run_range
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, day_range
from negrec_core.errors import ConflictError
from negrec_core.schemas import TABLES

BACKFILLS = 8
START = dt.date(2026, 3, 1)
STAGES = ("feedback", "item_rate")

_barrier: Any = None


def _join(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


class Writer:
    """Stands in for the stages, whose Spark is too heavy for eight processes: writes a row that names it."""

    def __init__(self, name: str, delay: float = 0.0) -> None:
        self.name = name
        self.delay = delay
        self.rng = random.Random(name)

    def rows(self, table: str, days: list[str]) -> pa.Table:
        time.sleep(self.delay * self.rng.random())
        when = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
        key = {"user_id": self.name, "item_id": self.name, "event_time": when, "polarity": -1, "bucket": 0}
        rows = [{**{k: v for k, v in key.items() if k in TABLES[table].schema.names}, "ds": d} for d in days]
        return pa.Table.from_pylist(rows, TABLES[table].schema)

    def run_days(self, ctx: JobContext, days: list[str]) -> None:
        ctx.store.write_arrow(
            "feedback", self.rows("feedback", days), dict.fromkeys(days, ctx.revision), ctx.provenance()
        )

    def run(self, ctx: JobContext) -> None:
        ctx.write_arrow("item_rate", self.rows("item_rate", [ctx.ds]))


def _backfill(root: Path, name: str, days: list[str]) -> list[tuple[str, str]]:
    """What this process committed."""
    writer = Writer(name, delay=0.1)
    jobs.feedback.run_days = writer.run_days  # type: ignore[assignment]
    jobs.item_rate.run = writer.run  # type: ignore[assignment]
    warehouse = Warehouse(root, load_config())
    _barrier.wait(120)
    return [(r.stage, r.ds) for r in run_range(warehouse, days, STAGES) if r.ran]


def test_eight_backfills_at_once_commit_each_day_once(tmp_path: Path) -> None:
    store = DeltaStore(tmp_path)
    store.create_tables()
    # Of different lengths, each day in three to eight of them.
    spans = [day_range(START + dt.timedelta(days=n // 2), START + dt.timedelta(days=5 + n)) for n in range(8)]
    context = mp.get_context("spawn")
    with ProcessPoolExecutor(BACKFILLS, context, _join, (context.Barrier(BACKFILLS),)) as pool:
        names = [f"backfill {n}" for n in range(BACKFILLS)]
        made = list(pool.map(_backfill, [tmp_path] * BACKFILLS, names, spans))
    days = sorted({day for span in spans for day in span})
    assert Counter(one for own in made for one in own) == Counter((s, day) for s in STAGES for day in days)
    for stage, owner in (("feedback", "user_id"), ("item_rate", "item_id")):
        assert Counter(day for commit in store.commits(stage) for day in commit.days) == Counter(days)
        assert store.revisions(stage) == dict.fromkeys(days, 1)
        rows = store.read(stage).to_pylist()
        assert {(stage, row["ds"]): row[owner] for row in rows} == {
            (stage, ds): name for own, name in zip(made, names, strict=True) for s, ds in own if s == stage
        }
        assert len(rows) == len(days)


@pytest.mark.parametrize("stage", STAGES)
def test_who_forces_is_told_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Two revisions that were both asked for are not one."""
    warehouse = Warehouse(tmp_path, load_config())
    warehouse.store.create_tables()
    ds = START.isoformat()
    mine, other = Writer("mine"), Writer("other")

    def late(ctx: JobContext, days: list[str] | None = None) -> None:
        for writer in (other, mine):
            if stage == "feedback":
                writer.run_days(ctx, days or [])
            else:
                writer.run(ctx)

    monkeypatch.setattr(jobs.feedback, "run_days", late)
    monkeypatch.setattr(jobs.item_rate, "run", late)
    with pytest.raises(ConflictError, match="already at revision 1"):
        run_range(warehouse, [ds], [stage], force=True)
    assert [(r.revision, r.ran) for r in run_range(warehouse, [ds], [stage])] == [(1, False)]


def test_a_conflict_in_which_nobody_got_further_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse = Warehouse(tmp_path, load_config())
    warehouse.store.create_tables()

    def losing(*_: object) -> None:
        raise ConflictError("10 commits in a row lost")

    monkeypatch.setattr(jobs.feedback, "run_days", losing)
    monkeypatch.setattr(jobs.item_rate, "run", losing)
    for stage in STAGES:
        with pytest.raises(ConflictError, match="in a row lost"):
            run_range(warehouse, [START.isoformat()], [stage])
