"""Stage `training_translation`: pairs of semantic ID and title (DESIGN section 7, 1)."""

from typing import TYPE_CHECKING

from jobs.context import JobContext
from jobs.item_semantic_id import first_ids
from negrec_core.generator import CODEBOOK, newest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_TASKS = ("sid_to_title", "title_to_sid")


def training_translation(items: "DataFrame", semantic_ids: "DataFrame") -> "DataFrame":
    """Each item with a title and a semantic ID, both ways; equal pairs once, by their first item.

    Args:
        items: (item_id, title), one row per item.
        semantic_ids: (item_id, codes), one row per item.
    """
    from pyspark.sql import functions as F

    pairs = items.where("trim(title) <> ''").join(semantic_ids, "item_id")
    distinct = pairs.groupBy("codes", "title").agg(F.min("item_id").alias("item_id"))
    tasks = F.explode(F.array(*map(F.lit, _TASKS)))
    return distinct.select("item_id", tasks.alias("task"))


def run(ctx: JobContext) -> None:
    from pyspark.sql import functions as F

    version = newest(ctx.warehouse.models, CODEBOOK, ctx.ds).version
    ctx.use_model(CODEBOOK, version)
    ids = first_ids(ctx.read("item_semantic_id").where(F.col("ds") <= ctx.ds), version)
    ctx.write("training_translation", training_translation(ctx.read_items().select("item_id", "title"), ids))
