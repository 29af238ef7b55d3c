"""What a report counts. Spark does all that is per event or per user; what comes back is small."""

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.block_list import BlockListTask, block_list_task, judged_exposures
from jobs.context import JobContext, read_files, run_sql
from jobs.gates import blocked_by_category, of_some_users
from negrec_core.delta import Commit
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK, open_codebook
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.sid_health import SidHealth, sid_health

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

SCORE_BINS = 40
_DRIFT_DAYS = 28


@dataclass(frozen=True)
class Log:
    """The feedback window up to `ds`.

    Attributes:
        first, last: its days that hold events.
        events, active: logged events, users who have one.
        dislikes, likes, judged: feedback by polarity, users who gave any.
        refused: rows in quarantine.
    """

    first: str
    last: str
    events: int
    active: int
    dislikes: int
    likes: int
    judged: int
    refused: int


def log_figures(ctx: JobContext) -> Log:
    """Counts of the log; raises MissingError where the window holds no feedback."""
    from pyspark.sql import functions as F

    days = window_days(ctx, "behavior_log")
    held = window_days(ctx, "feedback")
    if not days or not held:
        raise MissingError(
            f"table {'feedback' if days else 'behavior_log'}: nothing in the {ctx.config.window_days}"
            f" days up to ds={ctx.ds}"
        )
    users = F.countDistinct("user_id").alias("users")
    log = ctx.read("behavior_log", days).agg(F.count("*").alias("n"), users).collect()[0]
    given = (
        ctx.read("feedback", held)
        .agg(
            F.count_if(F.col("polarity") < 0).alias("dislikes"),
            F.count_if(F.col("polarity") > 0).alias("likes"),
            users,
        )
        .collect()[0]
    )
    refused = ctx.read("quarantine", days).count()
    counts = (log["n"], log["users"], given["dislikes"], given["likes"], given["users"])
    return Log(days[0], days[-1], *counts, refused)


def contexts(ctx: JobContext) -> tuple[int, int]:
    """Users with a context on `ds`, and those of them with a dislike in it."""
    from pyspark.sql import functions as F

    require(ctx, "user_context")
    row = (
        ctx.read("user_context", [ctx.ds])
        .agg(F.count("*").alias("n"), F.count_if(F.col("n_negatives") > 0).alias("disliked"))
        .collect()[0]
    )
    return row["n"], row["disliked"]


def window_days(ctx: JobContext, table: str) -> list[str]:
    """Days of a table within the feedback window of `ds`."""
    first = dt.date.fromisoformat(ctx.ds) - dt.timedelta(days=ctx.config.window_days - 1)
    return [day for day in ctx.store.days(table) if first.isoformat() <= day <= ctx.ds]


def entries_per_user(ctx: JobContext) -> dict[int, int]:
    """Entries in a user's list -> users with so many."""
    from pyspark.sql import functions as F

    require(ctx, "block_list")
    entries = ctx.read("block_list", [ctx.ds]).groupBy("user_id").agg(F.count("*").alias("n"))
    return {row["n"]: row["count"] for row in entries.groupBy("n").count().orderBy("n").collect()}


def score_counts(ctx: JobContext, ds: str) -> list[int]:
    """Entries of a day's list in `SCORE_BINS` equal parts of the scores 0 to 1."""
    from pyspark.sql import functions as F

    bins = F.least((F.col("score") * SCORE_BINS).cast("int"), F.lit(SCORE_BINS - 1)).alias("bin")
    found = {row["bin"]: row["count"] for row in ctx.read("block_list", [ds]).groupBy(bins).count().collect()}
    return [found.get(n, 0) for n in range(SCORE_BINS)]


def list_before(ctx: JobContext) -> str | None:
    """Day of the newest list before `ds`."""
    return max((day for day in ctx.store.days("block_list") if day < ctx.ds), default=None)


def gate_rows(ctx: JobContext) -> dict[str, list[dict[str, Any]]]:
    """The gates of the last days up to `ds`, of the newest revision judged on each.

    Raises:
        MissingError: none judged a list of `ds`.
    """
    days = _last_days(ctx, "gate")
    if ctx.ds not in days:
        raise MissingError(f"table gate: no list of ds={ctx.ds} was judged")
    rows = ctx.store.read("gate", days=days).to_pylist()
    newest = {day: max(row["revision"] for row in rows if row["ds"] == day) for day in days}
    return {day: [r for r in rows if r["ds"] == day and r["revision"] == newest[day]] for day in days}


def daily_log(ctx: JobContext) -> list[dict[str, Any]]:
    """Per day, at most 28 up to `ds`: day, events, dislikes, likes, users who gave feedback."""
    from pyspark.sql import functions as F

    days = _last_days(ctx, "feedback")
    if not days:
        raise MissingError(f"table feedback: nothing up to ds={ctx.ds}")
    events = {r["ds"]: r["count"] for r in ctx.read("behavior_log", days).groupBy("ds").count().collect()}
    given = ctx.read("feedback", days).groupBy("ds")
    rows = given.agg(
        F.count_if(F.col("polarity") < 0).alias("dislikes"),
        F.count_if(F.col("polarity") > 0).alias("likes"),
        F.countDistinct("user_id").alias("users"),
    )
    return [
        {
            "day": r["ds"],
            "events": events.get(r["ds"], 0),
            **{k: r[k] for k in ("dislikes", "likes", "users")},
        }
        for r in rows.orderBy("ds").collect()
    ]


def daily_lists(ctx: JobContext) -> list[dict[str, Any]]:
    """Per list of the last 28 days up to `ds`: day, users, mean score."""
    from pyspark.sql import functions as F

    lists = ctx.read("block_list", _last_days(ctx, "block_list")).groupBy("ds")
    # Every user has a first entry: counting those needs no shuffle of four weeks of lists.
    users = F.count_if(F.col("rank") == 1).alias("users")
    rows = lists.agg(users, F.avg("score").alias("score")).orderBy("ds").collect()
    return [{"day": row["ds"], "users": row["users"], "score": row["score"]} for row in rows]


def _last_days(ctx: JobContext, table: str) -> list[str]:
    first = (dt.date.fromisoformat(ctx.ds) - dt.timedelta(days=_DRIFT_DAYS - 1)).isoformat()
    return [day for day in ctx.store.days(table) if first <= day <= ctx.ds]


@dataclass(frozen=True)
class Codes:
    """How a codebook's codes are used by the items known on `ds`.

    Attributes:
        version: of the codebook.
        health: its figures.
        usage: per level, items per code, int64 [K_l].
        shared: items under one ID -> IDs.
    """

    version: str
    health: SidHealth
    usage: list[np.ndarray]
    shared: dict[int, int]


def code_figures(ctx: JobContext) -> Codes:
    """Use and collisions of the codebook that the list of `ds` is made of, or else the score of `ds`."""
    made = _made_with(ctx)
    codebook, manifest = open_codebook(ctx.warehouse.models, made.provenance.models[CODEBOOK])
    ids = load_semantic_ids(ctx.store, manifest.version, ctx.ds)
    if not ids.items:
        raise MissingError(f"table item_semantic_id: no item known on ds={ctx.ds} has an ID")
    sizes, n = np.unique(np.unique(ids.codes, axis=0, return_counts=True)[1], return_counts=True)
    return Codes(
        manifest.version,
        sid_health(ids.codes, codebook.code_counts),
        [np.bincount(ids.codes[:, level], minlength=k) for level, k in enumerate(codebook.code_counts)],
        dict(zip(sizes.tolist(), n.tolist(), strict=True)),
    )


def _made_with(ctx: JobContext) -> Commit:
    """The last commit of the day that names a codebook."""
    for table in ("block_list", "block_score", "negative_item_set", "item_semantic_id"):
        if ctx.store.revision(table, ctx.ds):
            commit = ctx.store.commit_of(table, ctx.ds)
            if CODEBOOK in commit.provenance.models:
                return commit
    raise MissingError(f"table item_semantic_id: no run of ds={ctx.ds} used a codebook")


def score_row(ctx: JobContext) -> dict[str, Any]:
    """The row of `block_score`."""
    require(ctx, "block_score")
    row: dict[str, Any] = ctx.store.read("block_score", days=[ctx.ds]).to_pylist()[0]
    return row


# The frames of sql/block_list.sql.
_FRAMES = {"predicted": "negative_item_set", "contexts": "user_context", "tastes": "user_taste"}


def made_from(ctx: JobContext) -> tuple[dict[str, "DataFrame"], BlockListTask]:
    """What the published list was made from: the frames of sql/block_list.sql, and the rest.

    At the versions that its commit names, so that what it blocks is what it blocked when it was published.
    """
    require(ctx, "block_list")
    inputs = ctx.store.commit_of("block_list", ctx.ds).provenance.inputs
    frames = {
        name: read_files(ctx.spark, ctx.store, table, ctx.store.files(table, [ctx.ds], inputs.get(table)))
        for name, table in _FRAMES.items()
    }
    return frames, block_list_task(ctx.warehouse, ctx.ds, inputs)


def judge_of_list(ctx: JobContext) -> Callable[["DataFrame"], "DataFrame"]:
    """(user_id, item_id, liked) -> (item_id, liked, blocked) by the published list."""
    frames, task = made_from(ctx)

    def judged(exposures: "DataFrame") -> "DataFrame":
        # Before the sets are gathered: the users judged are few where there are many.
        shown = exposures.select("user_id").distinct()
        of_shown = frames | {"predicted": frames["predicted"].join(shown, "user_id", "left_semi")}
        return judged_exposures(run_sql(ctx.spark, "block_list", of_shown), exposures, task)

    return judged


def category_figures(ctx: JobContext, n_users: int) -> list[dict[str, Any]]:
    """Per top category, most exposures first: category, n, blocked, likes, likes_blocked of `ds`.

    They are what the gates look at: the exposures and likes of about `gates.max_users` users.
    """
    counts = [row.asDict() for row in blocked_by_category(ctx, judge_of_list(ctx), n_users)]
    if not counts:
        raise MissingError(f"table behavior_log: nothing was shown on ds={ctx.ds}")
    return sorted(counts, key=lambda row: (-row["n"], row["category"] or ""))


def feedback_after(ctx: JobContext) -> "DataFrame":
    """Feedback within the horizon after each user's anchor: user_id, item_id, event_time, polarity.

    Raises:
        MissingError: none of those days was logged yet.
    """
    from pyspark.sql import functions as F

    require(ctx, "user_context")
    horizon = ctx.config.labels.horizon_days
    if ctx.config.anchors == "explicit":
        days = window_days(ctx, "feedback")
    else:
        day = dt.date.fromisoformat(ctx.ds)
        after = {(day + dt.timedelta(days=n)).isoformat() for n in range(1, horizon + 1)}
        days = [held for held in ctx.store.days("feedback") if held in after]
    if not days:
        raise MissingError(f"table feedback: the days after ds={ctx.ds} are not there yet")
    anchors = ctx.read("user_context", [ctx.ds]).select("user_id", "anchor_time")
    end = F.expr(f"anchor_time + make_dt_interval({horizon})")
    rows = ctx.read("feedback", days).join(anchors, "user_id")
    return rows.where((F.col("event_time") > F.col("anchor_time")) & (F.col("event_time") <= end)).select(
        "user_id", "item_id", "event_time", "polarity"
    )


@dataclass(frozen=True)
class Outcome:
    """What users with a list disliked and liked after their anchors, and how much of it is blocked."""

    dislikes: int
    dislikes_blocked: int
    likes: int
    likes_blocked: int


def outcome(ctx: JobContext, n_users: int) -> Outcome:
    """What the list would have done to the feedback that followed it, of about `gates.max_users` users.

    Raises:
        MissingError: there is none yet.
    """
    from pyspark.sql import functions as F

    after = feedback_after(ctx).withColumn("liked", F.col("polarity") > 0)
    listed = ctx.read("block_list", [ctx.ds]).select("user_id").distinct()
    given = of_some_users(ctx, after.select("user_id", "item_id", "liked").distinct(), n_users)
    judged = judge_of_list(ctx)(given.join(listed, "user_id", "left_semi"))
    counts = {
        "dislikes": ~F.col("liked"),
        "dislikes_blocked": ~F.col("liked") & F.col("blocked"),
        "likes": F.col("liked"),
        "likes_blocked": F.col("liked") & F.col("blocked"),
    }
    row = judged.agg(*(F.count_if(which).alias(name) for name, which in counts.items())).collect()[0]
    if not row["dislikes"] + row["likes"]:
        raise MissingError(f"table feedback: nothing follows the anchors of ds={ctx.ds} yet")
    return Outcome(**row.asDict())


def require(ctx: JobContext, table: str) -> None:
    """Raise MissingError where a day holds no rows, and say whether it ever did."""
    if ctx.ds in ctx.store.days(table):
        return
    if table == "block_list" and ctx.store.revision(table, ctx.ds):
        raise MissingError(f"table block_list: the list of ds={ctx.ds} was withdrawn or is empty")
    raise MissingError(f"table {table}: no rows of ds={ctx.ds}; `negrec run --ds {ctx.ds}` makes them")
