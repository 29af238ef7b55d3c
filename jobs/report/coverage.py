"""How much of what users mainly dislike shows in the labels (DESIGN section 8)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.context import JobContext
from jobs.report.figures import window_days
from negrec_core.errors import MissingError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

TOP = (1, 4)
COVERS = ("next", "horizon", "swing")


@dataclass(frozen=True)
class Coverage:
    """How much of what users mainly dislike shows in what they disliked next.

    Attributes:
        ds: partition of `future_feedback`.
        users: users with a later dislike.
        covered: for each of `TOP`, the mean share covered by each of `COVERS`.
    """

    ds: str
    users: int
    covered: list[list[float]]


def label_coverage(ctx: JobContext) -> Coverage:
    """Coverage of the main negative interests by the newest labels known on `ds` (DESIGN section 8).

    A user's main negative interests are the categories of most of the items disliked, before the anchor and
    within the horizon; equal counts stand in the order of their names.
    """
    labelled = [day for day in ctx.store.days("future_feedback") if day <= ctx.ds]
    if not labelled:
        raise MissingError(
            f"table future_feedback: nothing is labelled up to ds={ctx.ds}; a label needs the"
            f" {ctx.config.labels.horizon_days} days after its anchor"
        )
    at = JobContext(ctx.warehouse, labelled[-1])
    past = at.read("feedback", window_days(at, "feedback"))
    return coverage_of(at.read("future_feedback", [at.ds]), past, _categories(at), at.ds)


def coverage_of(labels: "DataFrame", feedback: "DataFrame", categories: "DataFrame", ds: str) -> Coverage:
    """Coverage by `future_feedback` rows.

    Args:
        labels: rows of `future_feedback`.
        feedback: feedback before the anchors and within the horizons.
        categories: (item_id, category); items without one are left out.
        ds: what to call it.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    labels = labels.where("size(future_negatives) > 0").cache()
    later = labels.select("user_id", F.explode("future_negatives").alias("item_id"))
    near = labels.select("user_id", F.explode("expanded_negatives.item_id").alias("item_id"))
    dislikes = feedback.where("polarity = -1").join(labels.select("user_id", "anchor_time"), "user_id")
    before = dislikes.where("event_time <= anchor_time").select("user_id", "item_id")
    first = F.min("event_time").over(Window.partitionBy("user_id"))
    following = (
        dislikes.where("event_time > anchor_time").withColumn("first", first).where("event_time = first")
    )
    categories = categories.where("category IS NOT NULL")
    counts = before.unionByName(later).distinct().join(categories, "item_id").groupBy("user_id", "category")
    place = F.row_number().over(Window.partitionBy("user_id").orderBy(F.desc("count"), "category"))
    interests = counts.count().withColumn("place", place).where(F.col("place") <= max(TOP))
    reach = {"next": following, "horizon": later, "swing": near}
    marked = [
        items.select("user_id", "item_id", *(F.lit(name == other).alias(other) for other in COVERS))
        for name, items in reach.items()
    ]
    held = (
        marked[0]
        .unionByName(marked[1])
        .unionByName(marked[2])
        .join(categories, "item_id")
        .groupBy("user_id", "category")
        .agg(*(F.max(name).alias(name) for name in COVERS))
        # The neighbours are those of the later dislikes, and come on top of them.
        .withColumn("swing", F.col("swing") | F.col("horizon"))
    )
    joined = interests.join(held, ["user_id", "category"], "left")
    shares = [
        F.avg(F.when(F.col("place") <= top, F.coalesce(F.col(name), F.lit(False)).cast("int"))).alias(
            f"{name} {top}"
        )
        for top in TOP
        for name in COVERS
    ]
    users = joined.groupBy("user_id").agg(*shares)
    means = [F.avg(f"`{name} {top}`").alias(f"{name} {top}") for top in TOP for name in COVERS]
    row = users.agg(F.count("*").alias("users"), *means).collect()[0]
    labels.unpersist()
    if not row["users"]:
        raise MissingError(
            f"table future_feedback: ds={ds} holds no later dislike of an item with a category"
        )
    return Coverage(ds, row["users"], [[row[f"{name} {top}"] for name in COVERS] for top in TOP])


def _categories(ctx: JobContext) -> "DataFrame":
    """(item_id, category) of the newest version of every item known on `ds`."""
    from pyspark.sql import functions as F

    return ctx.read_until("item").groupBy("item_id").agg(F.max_by("category", "ds").alias("category"))
