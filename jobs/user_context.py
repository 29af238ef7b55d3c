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


def with_categories(
    contexts: "DataFrame", feedback: "DataFrame", items: "DataFrame", window_days: int
) -> "DataFrame":
    """Contexts with the column `categories`: all feedback of the window by the item's category path.

    Args:
        contexts: rows of `user_context`.
        feedback: what they were made from.
        items: (item_id, category), one row per item.
        window_days: how far back a row may look.
    """
    from pyspark.sql import functions as F

    key = ["user_id", "anchor_time"]
    age = F.col("anchor_time") - F.col("event_time")
    window = F.expr(f"make_dt_interval({window_days})")
    counts = (
        contexts.select(key)
        .join(feedback.select("user_id", "item_id", "event_time", "polarity"), "user_id")
        .where((F.col("event_time") < F.col("anchor_time")) & (age <= window))
        .join(items.where("category <> ''"), "item_id")
        .groupBy(*key, "category")
        .agg(
            F.count_if(F.col("polarity") == -1).cast("int").alias("n_negatives"),
            F.count_if(F.col("polarity") == 1).cast("int").alias("n_positives"),
        )
        .groupBy(key)
        .agg(F.sort_array(F.collect_list(F.struct("category", "n_negatives", "n_positives"))).alias("found"))
    )
    nothing = F.array().cast(counts.schema["found"].dataType)
    categories = F.coalesce("found", nothing).alias("categories")
    return contexts.join(counts, key, "left").select(*contexts.columns, categories)


def with_newcomers(contexts: "DataFrame", anchors: "DataFrame") -> "DataFrame":
    """Contexts with an empty one for every (user_id, anchor_time) that has none."""
    from pyspark.sql import functions as F

    new = anchors.join(contexts, ["user_id", "anchor_time"], "left_anti")
    empty = {
        field.name: F.lit(0) if field.name.startswith("n_") else F.array().cast(field.dataType)
        for field in contexts.schema
        if field.name not in new.columns
    }
    return contexts.unionByName(new.select("user_id", "anchor_time").withColumns(empty))


def run(ctx: JobContext) -> None:
    feedback = ctx.read_window("feedback")
    seen, anchored = visible(ctx, feedback), anchors(ctx, feedback)
    rows = user_context(seen, anchored, ctx.config.context, ctx.config.window_days)
    rows = with_categories(rows, seen, ctx.read_items(), ctx.config.window_days)
    ctx.write("user_context", with_newcomers(rows, anchored))
