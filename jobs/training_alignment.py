"""Stage `training_alignment`: which of four items the user rejected (DESIGN section 7, 2)."""

from typing import TYPE_CHECKING

from jobs.anchors import held_out, visible
from jobs.context import JobContext
from jobs.item_semantic_id import first_ids
from jobs.user_context import user_context
from negrec_core.config import AlignmentConfig, ContextConfig
from negrec_core.generator import CODEBOOK, newest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_DISTRACTORS = 3


def training_alignment(
    feedback: "DataFrame",
    semantic_ids: "DataFrame",
    settings: AlignmentConfig,
    context: ContextConfig,
    window_days: int,
    samples_per_user: int,
) -> "DataFrame":
    """One row per chosen rejection of what the user had rejected often before.

    The target is an item of which, or of whose semantic-ID prefix, the user rejected
    `settings.min_rejections` before; the distractors are three items that the user had liked by then
    and never disliked, with other semantic IDs. Which of a user's rejections and likes are taken is
    decided by hashes, so it is the same in every run.

    Args:
        feedback: `feedback` rows that may be used.
        semantic_ids: (item_id, codes), one row per item.
        settings: section `generator.alignment`.
        context: how many dislikes and likes a context keeps.
        window_days: how far back a context looks.
        samples_per_user: most samples of one user.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    events = feedback.select("user_id", "item_id", "event_time", "polarity").join(
        semantic_ids.select("item_id", "codes"), "item_id"
    )
    levels = settings.prefix_levels
    events = events.withColumn(
        "kind", F.slice("codes", 1, levels).cast("string") if levels else F.col("item_id")
    )
    dislikes = events.where("polarity = -1")
    earlier = (
        Window.partitionBy("user_id", "kind")
        .orderBy(F.unix_micros("event_time"))
        .rangeBetween(Window.unboundedPreceding, -1)
    )
    chance = F.xxhash64(F.lit("alignment"), "user_id", "item_id")
    of_user = Window.partitionBy("user_id").orderBy(F.desc("anchor_time"), "chance")
    of_pair = Window.partitionBy("user_id", "item_id").orderBy(F.desc("anchor_time"))
    of_item = Window.partitionBy("item_id").orderBy("chance", "user_id")
    targets = (
        dislikes.withColumn("n", F.count("*").over(earlier))
        .where(F.col("n") >= settings.min_rejections)
        .withColumnRenamed("event_time", "anchor_time")
        .withColumn("chance", chance)
        .withColumn("n", F.row_number().over(of_pair))
        .where("n = 1")
        .withColumn("n", F.row_number().over(of_item))
        .where(F.col("n") <= settings.max_per_item)
        .withColumn("n", F.row_number().over(of_user))
        .where(F.col("n") <= samples_per_user)
        .select("user_id", "anchor_time", F.col("item_id").alias("target"), F.col("codes").alias("of_target"))
    )
    never_disliked = (
        events.where("polarity = 1")
        .join(dislikes.select("user_id", "item_id").distinct(), ["user_id", "item_id"], "left_anti")
        .groupBy("user_id", "item_id", "codes")
        .agg(F.min("event_time").alias("since"))
    )
    liked = (
        targets.join(never_disliked, "user_id")
        .where((F.col("since") < F.col("anchor_time")) & (F.col("codes") != F.col("of_target")))
        .withColumn("chance", F.xxhash64(F.lit("distractor"), "user_id", "anchor_time", "item_id"))
    )
    # Items that share a semantic ID would be one and the same option.
    of_id = Window.partitionBy("user_id", "anchor_time", "target", "codes").orderBy("chance")
    of_sample = Window.partitionBy("user_id", "anchor_time", "target").orderBy("chance")
    distractors = (
        liked.withColumn("n", F.row_number().over(of_id))
        .where("n = 1")
        .withColumn("n", F.row_number().over(of_sample))
        .where(F.col("n") <= _DISTRACTORS)
        .groupBy("user_id", "anchor_time", "target")
        .agg(F.array_sort(F.collect_list("item_id")).alias("distractors"))
        .where(F.size("distractors") == _DISTRACTORS)
    )
    anchors = distractors.select("user_id", "anchor_time").distinct()
    contexts = user_context(feedback, anchors, context, window_days)
    return distractors.join(contexts, ["user_id", "anchor_time"]).select(
        "user_id", "anchor_time", "target", "distractors", "negatives", "positives"
    )


def run(ctx: JobContext) -> None:
    from pyspark.sql import functions as F

    version = newest(ctx.warehouse.models, CODEBOOK, ctx.ds).version
    ctx.use_model(CODEBOOK, version)
    rows = training_alignment(
        visible(ctx, ctx.read_window("feedback")),
        first_ids(ctx.read("item_semantic_id").where(F.col("ds") <= ctx.ds), version),
        ctx.config.generator.alignment,
        ctx.config.context,
        ctx.config.window_days,
        ctx.config.generator.samples_per_user,
    )
    share = ctx.config.calibration.held_out_share
    ctx.write("training_alignment", rows.withColumn("held_out", held_out(rows["user_id"], share)))
