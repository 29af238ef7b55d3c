"""Anchors: the instant of each user that splits what may be used from what is to be predicted.

A daily run has one anchor for all, the end of its day. Public rating sets, whose users come in bursts years
apart, have one explicit anchor per user in the table `anchor`.
"""

from typing import TYPE_CHECKING

from jobs.context import JobContext, run_sql
from negrec_core.errors import MissingError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame


def anchors(ctx: JobContext, feedback: "DataFrame") -> "DataFrame":
    """(user_id, anchor_time) of a run: end of day for every user of `feedback`, or the explicit ones."""
    from pyspark.sql import functions as F

    if ctx.config.anchors == "end_of_day":
        users = feedback.select("user_id").distinct()
        return users.withColumn("anchor_time", F.lit(ctx.anchor))
    if not ctx.store.revision("anchor", ctx.ds):
        raise MissingError(
            f"table anchor: no partition ds={ctx.ds}; make it with `negrec anchors --ds {ctx.ds}`,"
            " or set anchors=end_of_day"
        )
    return ctx.read("anchor", [ctx.ds]).select("user_id", "anchor_time")


def visible(ctx: JobContext, feedback: "DataFrame") -> "DataFrame":
    """The feedback that may be used in a run: before its user's anchor."""
    return before(feedback, anchors(ctx, feedback))


def before(feedback: "DataFrame", anchors: "DataFrame") -> "DataFrame":
    """Feedback before its user's anchor.

    A user without an anchor has no row to predict; all of that user's feedback is kept.
    """
    own = anchors.withColumnRenamed("anchor_time", "own_anchor")
    return (
        feedback.join(own, "user_id", "left")
        .where("own_anchor IS NULL OR event_time < own_anchor")
        .drop("own_anchor")
    )


def held_out(user_id: "Column", share: float) -> "Column":
    """Whether a user is kept out of training, so that calibration meets a model that never saw it."""
    from pyspark.sql import functions as F

    return F.pmod(F.xxhash64(F.lit("held out"), user_id), F.lit(10_000)) < round(share * 10_000)


def last_dislike_anchors(feedback: "DataFrame", horizon_days: int) -> "DataFrame":
    """Explicit anchors: just before each user's last stretch of `horizon_days` that holds a dislike.

    Where nothing of the user's lies before that stretch (one burst), the anchor is just before the
    burst's middle event. The horizon after an anchor ends inside the log; a user whose only burst comes
    too late for that has none.
    """
    return run_sql(feedback.sparkSession, "anchor", {"feedback": feedback}, horizon_days=horizon_days)


def run(ctx: JobContext) -> None:
    """Write the explicit anchors of `ds` from its feedback."""
    feedback = ctx.read_window("feedback")
    ctx.write("anchor", last_dislike_anchors(feedback, ctx.config.labels.horizon_days))
