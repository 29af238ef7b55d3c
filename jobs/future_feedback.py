"""Stage `future_feedback`: what each user disliked and liked after the anchor (DESIGN section 4).

A run for `ds` labels the anchor one horizon earlier, the newest whose whole window has been logged.
"""

import datetime as dt
from typing import TYPE_CHECKING

from jobs.anchors import anchors
from jobs.context import JobContext, log, run_sql
from negrec_core.errors import MissingError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def future_feedback(
    feedback: "DataFrame",
    anchors: "DataFrame",
    graph: "DataFrame",
    log_end: dt.datetime,
    horizon_days: int,
    expansion: int,
) -> "DataFrame":
    """Labels of (user, anchor) pairs from the window (anchor, anchor + horizon].

    Args:
        feedback: `feedback` rows that cover all windows.
        anchors: (user_id, anchor_time).
        graph: `item_graph` built from feedback before the anchors.
        log_end: last instant of the feedback.
        horizon_days: length of the window.
        expansion: Swing neighbours added per future negative.

    Raises:
        MissingError: a window ends after `log_end`: its future is not there yet.
    """
    from pyspark.sql import functions as F

    horizon = dt.timedelta(days=horizon_days)
    late = anchors.where(F.col("anchor_time") > F.lit(log_end - horizon)).limit(1).collect()
    if late:
        raise MissingError(
            f"table future_feedback: the {horizon_days} days after anchor"
            f" {late[0]['anchor_time']} of user {late[0]['user_id']} end after the feedback, which"
            f" reaches {log_end:%Y-%m-%d %H:%M} UTC; use an earlier anchor or a later ds"
        )
    return run_sql(
        feedback.sparkSession,
        "future_feedback",
        {"feedback": feedback, "anchors": anchors, "graph": graph},
        horizon_days=horizon_days,
        expansion=expansion,
    )


def run(ctx: JobContext) -> None:
    labels = ctx.config.labels
    if ctx.config.anchors == "explicit":
        feedback = ctx.read_window("feedback")
        graph_day, who = ctx.ds, anchors(ctx, feedback)
    else:
        day = dt.date.fromisoformat(ctx.ds) - dt.timedelta(days=labels.horizon_days)
        graph_day = day.isoformat()
        if graph_day < ctx.store.days("feedback")[0]:
            log.info("future_feedback: ds=%s comes before the log, nothing to label", graph_day)
            ctx.write("future_feedback", ctx.empty("future_feedback"))
            return
        feedback = ctx.read_window("feedback", day)
        who = anchors(ctx.at(graph_day), feedback)
    ctx.require("item_graph", [graph_day])
    graph = ctx.read("item_graph", [graph_day])
    rows = future_feedback(feedback, who, graph, ctx.anchor, labels.horizon_days, labels.expansion)
    ctx.write("future_feedback", rows)
