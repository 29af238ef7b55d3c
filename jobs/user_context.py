"""Stage `user_context`: what each user disliked and liked before the anchor (DESIGN section 3)."""

from typing import TYPE_CHECKING

from jobs.anchors import anchors, visible
from jobs.context import JobContext, run_sql
from negrec_core.config import ContextConfig

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def user_context(
    feedback: "DataFrame", anchors: "DataFrame", settings: ContextConfig, window_days: int
) -> "DataFrame":
    """One row per (user, anchor) with feedback in the window before the anchor.

    Args:
        feedback: `feedback` rows; those at or after an anchor do not reach its row.
        anchors: (user_id, anchor_time), one or more per user.
        settings: how many dislikes and likes are kept.
        window_days: how far back a row may look.
    """
    return run_sql(
        feedback.sparkSession,
        "user_context",
        {"feedback": feedback, "anchors": anchors},
        max_negatives=settings.max_negatives,
        max_positives=settings.max_positives or 1,
        window_days=window_days,
    )


def run(ctx: JobContext) -> None:
    feedback = ctx.read_window("feedback")
    rows = user_context(
        visible(ctx, feedback),
        anchors(ctx, feedback),
        ctx.config.context,
        ctx.config.window_days,
    )
    ctx.write("user_context", rows)
