"""The daily pipeline: its stages in order, and running them for one day or many."""

import datetime as dt
import functools
import importlib
import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import negrec_core.errors as errors
from jobs import feedback, item_semantic_id
from jobs.context import JobContext, Warehouse, log
from jobs.gates import check_acceptable
from jobs.spark import gpu_profile
from jobs.staleness import Stale, stale_partitions
from negrec_core.delta_files import MEND_FILE
from negrec_core.errors import ConfigError, ConflictError, InputError, MissingError, NegrecError
from negrec_core.progress import Progress, silent
from negrec_core.storage import store_problem

# Every stage is the module jobs.<name> and writes the table <name>.
DATA_STAGES = ("feedback", "item_rate", "item_graph", "user_context", "future_feedback")
MODEL_STAGES = (
    "item_semantic_id",
    "item_taste",
    "user_taste",
    "block_score",
    "negative_item_set",
    "block_list",
)
DAILY_STAGES = DATA_STAGES + MODEL_STAGES
# Made on demand: samples when a generator is trained, anchors for logs whose users come in bursts.
TRAINING_STAGES = ("training_translation", "training_alignment", "training_next_negative", "training_grpo")
EXTRA_STAGES = (*TRAINING_STAGES, "anchor")
# Each after those that it reads.
_BY_INPUT = ("feedback", "anchor", *DATA_STAGES[1:], *MODEL_STAGES, *TRAINING_STAGES)


class Reporter(Protocol):
    """Shows how a pipeline goes on; `jobs.console` has the real ones."""

    def stage(self, name: str, ds: str) -> Progress:
        """A stage starts; returns what it reports its parts to."""
        ...


class Quiet:
    """Shows nothing."""

    def stage(self, name: str, ds: str) -> Progress:
        return silent


@dataclass(frozen=True)
class StageResult:
    """What became of one stage on one day: the revision it has now, and whether it ran."""

    stage: str
    ds: str
    revision: int
    ran: bool
    seconds: float


def parse_day(text: str) -> dt.date:
    """A log date that somebody wrote; ConfigError says how to write it."""
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{text}: not a day, write it as 2026-01-31") from None


def run_day(
    warehouse: Warehouse,
    ds: str,
    stages: Sequence[str] = DAILY_STAGES,
    force: bool = False,
    reporter: Reporter | None = None,
    accept: Sequence[str] = (),
) -> list[StageResult]:
    """Run stages for one log date, in pipeline order; those already committed are not run again.

    A stage that another run commits meanwhile counts as committed, unless it is forced.

    Args:
        warehouse: where to run.
        ds: log date, ISO.
        stages: names of stages.
        force: run them all, each as a new revision.
        reporter: told about every stage that runs.
        accept: gates that may fail.

    Raises:
        ConfigError: an unknown stage or gate.
        NegrecError: a stage failed; those before it stay committed.
    """
    check_acceptable(accept)
    store = warehouse.store
    ordered = _in_order(stages)
    generation = warehouse.config.generation
    generates = "negative_item_set" in ordered
    if generates and generation.gpus.per_engine and (force or not store.revision("negative_item_set", ds)):
        # What generation will lack is said before the time that the other stages take.
        gpu_profile(warehouse.spark.sparkContext, generation.gpus, generation.parallelism)
    results = []
    for name in ordered:
        revision = store.revision(name, ds)
        if revision and not force:
            results.append(StageResult(name, ds, revision, False, 0.0))
            continue
        begin = time.monotonic()
        progress = (reporter or Quiet()).stage(name, ds)
        try:
            run_stage(name, JobContext(warehouse, ds, revision + 1, progress, accept))
        except ConflictError:
            if force or not _overtaken(warehouse, name, [ds], revision + 1):
                raise
            results.append(StageResult(name, ds, revision + 1, False, time.monotonic() - begin))
            continue
        seconds = time.monotonic() - begin
        log.info("%s ds=%s: revision %d in %.1f s", name, ds, revision + 1, seconds)
        results.append(StageResult(name, ds, revision + 1, True, seconds))
    return results


def run_range(
    warehouse: Warehouse,
    days: Sequence[str],
    stages: Sequence[str] = DATA_STAGES,
    force: bool = False,
    reporter: Reporter | None = None,
) -> list[StageResult]:
    """Run stages for several log dates, oldest first; `feedback` is made for all of them at once.

    Arguments and errors are those of `run_day`.
    """
    shown = reporter or Quiet()
    results = []
    rest = _in_order(stages)
    if "feedback" in rest:
        rest.remove("feedback")
        by_revision: dict[int, list[str]] = {}
        for day in days:
            revision = warehouse.store.revision("feedback", day)
            if revision and not force:
                results.append(StageResult("feedback", day, revision, False, 0.0))
            else:
                by_revision.setdefault(revision + 1, []).append(day)
        for revision, missing in by_revision.items():
            begin = time.monotonic()
            progress = shown.stage("feedback", f"{missing[0]}..{missing[-1]}")
            ctx = JobContext(warehouse, missing[-1], revision, progress)
            try:
                _guarded(
                    functools.partial(feedback.run_days, ctx, missing),
                    f"feedback ds={missing[0]}..{missing[-1]}",
                )
            except ConflictError:
                if force or not _overtaken(warehouse, "feedback", missing, revision):
                    raise
                # The days that are left, of which there are fewer.
                results += run_range(warehouse, missing, ["feedback"], reporter=reporter)
                continue
            seconds = time.monotonic() - begin
            log.info("feedback: %d days in %.1f s", len(missing), seconds)
            each = seconds / len(missing)
            results += [StageResult("feedback", day, revision, True, each) for day in missing]
    for day in days if rest else []:
        results += run_day(warehouse, day, rest, force, reporter)
    return results


def stale(warehouse: Warehouse) -> list[Stale]:
    """Partitions that were made from an older revision than there is now, in the order to make them."""
    return stale_partitions(warehouse.store, _BY_INPUT)


def run_stale(
    warehouse: Warehouse,
    days: Collection[str],
    stages: Collection[str] | None = None,
    reporter: Reporter | None = None,
) -> list[StageResult]:
    """Make the stale partitions of some days and stages (default: all) again, each as a new revision.

    Stopped and started again it goes on with those that are left.

    Raises:
        ConfigError, NegrecError: as `run_day`.
    """
    wanted = set(_in_order(_BY_INPUT if stages is None else list(stages)))
    chosen = [(one.table, one.ds) for one in stale(warehouse) if one.ds in days and one.table in wanted]
    # From the log alone, so that all its days can be made at once.
    at_once = [ds for table, ds in chosen if table == "feedback"]
    results = run_range(warehouse, at_once, ["feedback"], True, reporter)
    for table, ds in chosen:
        if table != "feedback":
            results += run_day(warehouse, ds, [table], True, reporter)
    return results


def _overtaken(warehouse: Warehouse, stage: str, days: Sequence[str], revision: int) -> bool:
    """Whether another run has committed one of the days at this revision."""
    done = [day for day in days if warehouse.store.revision(stage, day) >= revision]
    if done:
        log.info("%s ds=%s: another run committed it meanwhile", stage, ", ".join(done))
    return bool(done)


def _in_order(stages: Sequence[str]) -> list[str]:
    known = [*DAILY_STAGES, *EXTRA_STAGES]
    unknown = sorted(set(stages) - set(known))
    if unknown:
        raise ConfigError(f"stage {', '.join(unknown)}: unknown; there are {', '.join(known)}")
    return sorted(set(stages), key=known.index)


def run_stage(name: str, ctx: JobContext) -> None:
    """Run one stage; NegrecError for what `expected` knows."""
    run: Callable[[JobContext], None] = importlib.import_module(_module(name)).run
    _guarded(functools.partial(run, ctx), f"{name} ds={ctx.ds}")


def run_training_stages(
    warehouse: Warehouse, ds: str, tables: Sequence[str], reporter: Reporter | None = None
) -> None:
    """Make the samples `tables` (of `TRAINING_STAGES`) of one log date anew, and before them the IDs.

    Raises:
        NegrecError: as `run_day`.
    """
    shown = reporter or Quiet()

    def context(table: str) -> JobContext:
        revision = warehouse.store.revision(table, ds) + 1
        return JobContext(warehouse, ds, revision, shown.stage(table, ds))

    name_items = functools.partial(item_semantic_id.run_for_training, context("item_semantic_id"))
    _guarded(name_items, f"item_semantic_id ds={ds}")
    for table in tables:
        run_stage(table, context(table))


def _guarded(work: Callable[[], None], doing: str) -> None:
    try:
        work()
    except Exception as error:
        known = expected(error, doing)
        if known is None or known is error:
            raise
        raise known from None


def expected(error: Exception, doing: str = "") -> NegrecError | None:
    """The NegrecError that an error is, or is at heart; None: it is a bug.

    Spark wraps what an executor raised. A full disk is an error of its own in every library that writes. A
    data file that is spoilt, and a worker that was killed, are no bugs of ours either.

    Args:
        error: what was caught.
        doing: what went on, for an error that does not say.
    """
    if isinstance(error, NegrecError):
        return error
    problem = store_problem(error)
    if problem:
        return problem
    found = re.search(r"negrec_core\.errors\.(\w+): (.+)", str(error))
    kind = getattr(errors, found.group(1), None) if found else None
    if found and kind:
        return kind(found.group(2))
    unreadable = re.search(r"FAILED_READ_FILE\S* .*?file:/*(/\S+?)\.?\s", str(error))
    if unreadable:
        file = urllib.parse.unquote(unreadable.group(1))
        return InputError(f"{doing or 'stopped'}: {file} cannot be read; {MEND_FILE}")
    full = re.search(r"No space left on device|Disk quota exceeded", str(error))
    if full:
        return MissingError(
            f"{doing or 'stopped'}: {full.group()}, of the warehouse or of Spark's temporary files"
            " (SPARK_LOCAL_DIRS); what was being written was not committed; make room (`negrec vacuum` says"
            " what could go) and run it again"
        )
    if "Python worker exited unexpectedly" in str(error):
        return NegrecError(
            f"{doing or 'stopped'}: a worker process of Spark died, most often for want of memory; what was"
            " being written was not committed; give it memory (less for spark.driver_memory, or fewer cores"
            " for spark.master) and run it again"
        )
    return None


def _module(stage: str) -> str:
    return "jobs.anchors" if stage == "anchor" else f"jobs.{stage}"
