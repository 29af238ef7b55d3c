"""Stage `feedback`: logged actions become likes and dislikes (DESIGN section 4).

No day depends on another but for how often an item was played before, so many are done at once.
"""

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.context import JobContext, run_sql
from negrec_core.config import FeedbackConfig

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_VIEW_DAYS = 7


def feedback(log: "DataFrame", views: "DataFrame", settings: FeedbackConfig) -> "DataFrame":
    """Polarise `behavior_log`; one day or several.

    Explicit: actions with a polarity, less dislikes whose reason class is `dropped`. Implicit: the
    G-UBS candidate filter. Neighbouring events are looked for inside the day, so that nothing of the
    next one can change it.

    Args:
        log: `behavior_log` of the days.
        views: (item_id, ds, views), how often each item was really played up to that day.
        settings: polarity of actions, reason classes and the filter.
    """
    spark = log.sparkSession
    rules = settings.implicit
    return run_sql(
        spark,
        "feedback",
        {
            "log": log,
            "views": views,
            "polarity": spark.createDataFrame(list(settings.polarity.items()), "action string, polarity int"),
            "reasons": spark.createDataFrame(
                list(settings.reasons.items()), "reason string, reason_class string"
            ),
        },
        other_reason=settings.other_reason,
        implicit=rules.enabled,
        max_play_rate=rules.max_play_rate,
        max_play_ms=rules.max_play_ms,
        max_gap_seconds=rules.max_gap_seconds,
        min_item_views=rules.min_item_views,
        any_surface=rules.surfaces is None,
        surfaces=rules.surfaces or [""],
        weight=rules.weight,
    )


def item_views(log: "DataFrame", days: Sequence[str]) -> "DataFrame":
    """(item_id, ds, views): exposures really played on a day and the six before it."""
    from pyspark.sql import functions as F

    played = log.where("play_ms > 0").groupBy("item_id", "ds").agg(F.count("*").alias("n"))
    wanted = log.sparkSession.createDataFrame([(day,) for day in days], "until string")
    near = F.date_diff(F.to_date("until"), F.to_date("ds")).between(0, _VIEW_DAYS - 1)
    return (
        played.join(F.broadcast(wanted), near)
        .groupBy("item_id", F.col("until").alias("ds"))
        .agg(F.sum("n").alias("views"))
    )


def run(ctx: JobContext) -> None:
    run_days(ctx, [ctx.ds])


def run_days(ctx: JobContext, days: Sequence[str]) -> None:
    """Make several days by one job and one commit, all at the revision of `ctx`."""
    ctx.require("behavior_log", days)
    log = ctx.read("behavior_log", days)
    if ctx.config.feedback.implicit.enabled:
        first = dt.date.fromisoformat(min(days)) - dt.timedelta(days=_VIEW_DAYS - 1)
        views = item_views(ctx.read_window("behavior_log", first), days)
    else:
        views = item_views(log, days)
    ctx.each_day_reads("behavior_log", _VIEW_DAYS - 1 if ctx.config.feedback.implicit.enabled else 0)
    ctx.write("feedback", feedback(log, views, ctx.config.feedback), days)
