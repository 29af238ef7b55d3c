"""Stage `training_grpo`: contexts with the horizon that followed, for rewards (DESIGN section 7, 4)."""

import datetime as dt
from typing import TYPE_CHECKING

from jobs.context import JobContext
from jobs.future_feedback import future_feedback
from jobs.training_next_negative import learnable, training_anchors
from jobs.user_context import user_context
from negrec_core.config import ContextConfig, LabelConfig
from negrec_core.errors import MissingError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def training_grpo(
    feedback: "DataFrame",
    graph: "DataFrame",
    settings: ContextConfig,
    labels: LabelConfig,
    window_days: int,
    samples_per_user: int,
    log_end: dt.datetime,
) -> "DataFrame":
    """One row per chosen dislike, with the user's past before it and the horizon that begins with it.

    Args:
        feedback: `feedback` rows that training may see.
        graph: `item_graph`, by which the future negatives are expanded.
        settings: how many dislikes and likes a context keeps.
        labels: length of the horizon and of the expansion.
        window_days: how far back a context looks.
        samples_per_user: most instants taken from one user.
        log_end: every horizon ends by then.
    """
    from pyspark.sql import functions as F

    latest = log_end - dt.timedelta(days=labels.horizon_days)
    targets = feedback.where((F.col("polarity") == -1) & (F.col("event_time") <= F.lit(latest)))
    chosen = training_anchors(
        targets.withColumnRenamed("event_time", "anchor_time"), settings, samples_per_user
    )
    contexts = user_context(feedback, chosen, settings, window_days)
    # A horizon begins after its anchor, and is to hold the dislike at it.
    tick = F.expr("make_dt_interval(0, 0, 0, 0.000001)")
    futures = future_feedback(
        feedback,
        chosen.withColumn("anchor_time", F.col("anchor_time") - tick),
        graph,
        log_end,
        labels.horizon_days,
        labels.expansion,
    ).withColumn("anchor_time", F.col("anchor_time") + tick)
    nothing = F.array().cast(contexts.schema["negatives"].dataType)
    return futures.join(contexts, ["user_id", "anchor_time"], "left").select(
        "user_id",
        "anchor_time",
        F.coalesce("negatives", nothing).alias("negatives"),
        F.coalesce("positives", nothing).alias("positives"),
        "future_negatives",
        "expanded_negatives",
        "future_positives",
    )


def run(ctx: JobContext) -> None:
    labels, log_end = ctx.config.labels, ctx.anchor
    if ctx.config.anchors == "explicit":
        # Each user's log ends at the user's own anchor; what came after it is no label either.
        log_end += dt.timedelta(days=labels.horizon_days)
    # By revision: the graph of a small log may be empty.
    day = max((day for day in ctx.store.revisions("item_graph") if day <= ctx.ds), default=None)
    if day is None:
        raise MissingError(
            f"table item_graph: nothing on or before ds={ctx.ds}; run `negrec backfill --start {ctx.ds}"
            f" --end {ctx.ds} --stages item_graph`"
        )
    rows = training_grpo(
        learnable(ctx),
        ctx.read("item_graph", [day]),
        ctx.config.context,
        labels,
        ctx.config.window_days,
        ctx.config.generator.samples_per_user,
        log_end,
    )
    ctx.write("training_grpo", rows)
