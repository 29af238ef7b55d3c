"""Stage `item_rate`: each item's smoothed log odds of being disliked (DESIGN section 8)."""

from typing import TYPE_CHECKING

from jobs.anchors import visible
from jobs.context import JobContext, run_sql

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def item_rate(feedback: "DataFrame", pseudo_events: float) -> "DataFrame":
    """Log odds of dislike against like per item; a user counts once per item and polarity.

    Args:
        feedback: `feedback` rows before the anchors.
        pseudo_events: weight of the mean of all items.
    """
    return run_sql(feedback.sparkSession, "item_rate", {"feedback": feedback}, pseudo_events=pseudo_events)


def run(ctx: JobContext) -> None:
    feedback = visible(ctx, ctx.read_window("feedback"))
    ctx.write("item_rate", item_rate(feedback, ctx.config.calibration.rate_pseudo_events))
