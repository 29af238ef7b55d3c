"""Stage `training_next_negative`: samples for the generator (DESIGN section 7, warm-up)."""

from typing import TYPE_CHECKING

from jobs.anchors import held_out, visible
from jobs.context import JobContext
from jobs.user_context import user_context
from negrec_core.config import ContextConfig

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def training_next_negative(
    feedback: "DataFrame", settings: ContextConfig, window_days: int, samples_per_user: int
) -> "DataFrame":
    """One row per chosen dislike, with the user's past before it.

    Args:
        feedback: `feedback` rows that training may see.
        settings: how many dislikes and likes a context keeps.
        window_days: how far back a context looks.
        samples_per_user: most instants taken from one user; see `training_anchors`.
    """
    from pyspark.sql import functions as F

    targets = feedback.where("polarity = -1").select(
        "user_id", F.col("event_time").alias("anchor_time"), F.col("item_id").alias("target")
    )
    chosen = training_anchors(targets, settings, samples_per_user)
    contexts = user_context(feedback, chosen, settings, window_days)
    nothing = F.array().cast(contexts.schema["negatives"].dataType)
    # A user's first event has no past; such rows teach what to say of a user nothing is known of.
    return (
        targets.distinct()
        .join(chosen, ["user_id", "anchor_time"])
        .join(contexts, ["user_id", "anchor_time"], "left")
        .select(
            "user_id",
            "anchor_time",
            "target",
            F.coalesce("negatives", nothing).alias("negatives"),
            F.coalesce("positives", nothing).alias("positives"),
        )
    )


def training_anchors(targets: "DataFrame", settings: ContextConfig, samples_per_user: int) -> "DataFrame":
    """Instants (user_id, anchor_time) to learn from, of `targets` with those columns.

    A user's last, and then each one that is as many instants earlier as a context holds dislikes, so
    that no dislike is learnt from twice; `samples_per_user` at most.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    latest_first = Window.partitionBy("user_id").orderBy(F.desc("anchor_time"))
    stride = settings.max_negatives + 1
    return (
        targets.select("user_id", "anchor_time")
        .distinct()
        .withColumn("n", F.row_number().over(latest_first) - 1)
        .where((F.col("n") % stride == 0) & (F.col("n") < samples_per_user * stride))
        .drop("n")
    )


def learnable(ctx: JobContext) -> "DataFrame":
    """The feedback that training may see: before its user's anchor, of users not held out."""
    feedback = visible(ctx, ctx.read_window("feedback"))
    return feedback.where(~held_out(feedback["user_id"], ctx.config.calibration.held_out_share))


def run(ctx: JobContext) -> None:
    rows = training_next_negative(
        learnable(ctx),
        ctx.config.context,
        ctx.config.window_days,
        ctx.config.generator.samples_per_user,
    )
    ctx.write("training_next_negative", rows)
