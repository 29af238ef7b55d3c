"""Stage `negative_item_set`: the semantic IDs each user is predicted to reject.

A user whose prompt would be that of the newest earlier run keeps the set it made; the others are
generated. That is done shard by shard; a finished shard of users is committed to a staging table, so
that a run that was stopped goes on with the shards that are left (DESIGN section 9, rule 9).
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import negrec_core
from jobs.context import JobContext, log, read_files, run_sql, with_partitions, write_files
from jobs.generation import GenerationTask, generate, generation_task
from jobs.item_semantic_id import first_ids
from negrec_core.errors import ConflictError
from negrec_core.generator import CODEBOOK, GENERATOR, open_generator

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_STAGING = "negative_item_set_shard"


@dataclass(frozen=True)
class Earlier:
    """An earlier run whose sets are what would be generated today, where the prompt is the same.

    Attributes:
        ds: its log date.
        sets: its `negative_item_set`.
        contexts: the `user_context` that it was made from.
        new_items: (item_id) that got their semantic ID since.
    """

    ds: str
    sets: "DataFrame"
    contexts: "DataFrame"
    new_items: "DataFrame"


def carried(earlier: Earlier, contexts: "DataFrame", bucket: int) -> "DataFrame":
    """Rows of `negative_item_set` of users of a bucket whose prompt is that of the earlier run."""

    def own(frame: "DataFrame") -> "DataFrame":
        return frame.where(frame["bucket"] == bucket)

    frames = {
        "earlier": own(earlier.sets),
        "contexts_before": own(earlier.contexts),
        "contexts": own(contexts),
        "new_items": earlier.new_items,
    }
    return run_sql(contexts.sparkSession, "negative_item_set", frames)


def run(ctx: JobContext) -> None:
    from pyspark.sql import functions as F

    generator = open_generator(ctx.warehouse.models, ctx.ds)
    ctx.use_model(GENERATOR, generator.manifest.version)
    ctx.use_model(CODEBOOK, generator.codebook_manifest.version)
    ctx.require("user_context", [ctx.ds])
    ctx.require("item_semantic_id", [ctx.ds])
    contexts = ctx.read("user_context", [ctx.ds])
    ctx.read("item_semantic_id", [ctx.ds])
    task = generation_task(ctx.store, generator, ctx.ds, ctx.config.generation)
    digest = _digest(ctx, task, ctx.ds, ctx.revision)
    earlier = find_earlier(ctx, task)
    seconds = ctx.spark.sparkContext.accumulator(0.0)
    made = []
    for bucket in range(ctx.config.buckets):
        if not ctx.store.shard_done(_STAGING, ctx.ds, bucket, digest):
            own = contexts.where(contexts["bucket"] == bucket)
            if isinstance(earlier, Earlier):
                kept = carried(earlier, contexts, bucket)
                own = own.join(kept.select("user_id"), "user_id", "left_anti")
            rows = generate(own, task, seconds).withColumn("carried_from", F.lit(None).cast("string"))
            if isinstance(earlier, Earlier):
                rows = rows.unionByName(kept)
            run_directory = ctx.store.new_run(_STAGING)
            frame = with_partitions(rows, _STAGING, ctx.ds, ctx.config.buckets)
            write_files(frame, _STAGING, run_directory)
            ctx.store.commit_shard(_STAGING, run_directory, ctx.ds, bucket, digest)
            made.append(bucket)
        ctx.progress(bucket + 1, ctx.config.buckets)
    if not all(ctx.store.shard_done(_STAGING, ctx.ds, n, digest) for n in range(ctx.config.buckets)):
        raise ConflictError(
            f"table {_STAGING}: another run of ds={ctx.ds} with other models or settings replaced shards"
            " of this one; run it again when the other has ended"
        )
    files = ctx.store.files(_STAGING, [ctx.ds])
    rows = read_files(ctx.spark, ctx.store, _STAGING, files)
    ctx.write("negative_item_set", rows)
    _log_share(rows.where(F.col("bucket").isin(made)), earlier, len(made), seconds.value)


def find_earlier(ctx: JobContext, task: GenerationTask) -> Earlier | str:
    """The newest earlier run, if its models, settings and legal IDs are today's; else what is not.

    It counts only as long as its shards are marked as made by this release from the tables as they are
    now: whatever may change a prediction and is not in the context itself is in their digest.
    """
    if not task.settings.carry_over:
        return "generation.carry_over is off"
    revisions = ctx.store.revisions("negative_item_set")
    ds = max((day for day in revisions if day < ctx.ds), default=None)
    if ds is None:
        return "there is no earlier run"
    digest = _digest(ctx, task, ds, revisions[ds])
    if not all(ctx.store.shard_done(_STAGING, ds, n, digest) for n in range(ctx.config.buckets)):
        return f"ds={ds} had another model, release or settings, or its inputs were replaced since"
    ids = ctx.read("item_semantic_id")
    then = first_ids(ids.where(ids["ds"] <= ds), task.codebook_version)
    now = first_ids(ids.where(ids["ds"] <= ctx.ds), task.codebook_version)
    new = now.join(then, "item_id", "left_anti")
    # One more legal ID takes probability from all others.
    if not new.join(then, "codes", "left_anti").isEmpty():
        return f"there are new semantic IDs since ds={ds}"
    sets = ctx.read("negative_item_set", [ds])
    # Not recorded as an input: what is carried over is what today's context gives, so that replacing
    # the earlier one does not make this day stale.
    files = ctx.store.files("user_context", [ds], check=True)
    contexts = read_files(ctx.spark, ctx.store, "user_context", files)
    return Earlier(ds, sets, contexts, new.select("item_id"))


def _log_share(rows: "DataFrame", earlier: Earlier | str, shards: int, seconds: float) -> None:
    """One line: how many users of these shards were carried over, and what that saved."""
    from pyspark.sql import functions as F

    counts = rows.where("rank = 1").agg(F.count("*"), F.count("carried_from")).first()
    users, kept = counts or (0, 0)
    share = f"{kept} of {users} users ({kept / max(users, 1):.0%}) carried over"
    if isinstance(earlier, str):
        source, saved = f"because {earlier}", ""
    else:
        source = f"from ds={earlier.ds}"
        # Engines' time alone: what it takes to start them is not saved.
        per_user = seconds / max(users - kept, 1)
        saved = f", about {kept * per_user:.1f} s of beam search saved" if seconds else ", none generated"
    log.info("negative_item_set: %d shards of users; %s %s%s", shards, share, source, saved)


def _digest(ctx: JobContext, task: GenerationTask, ds: str, revision: int) -> str:
    """Shards are interchangeable only if they come from the same models, contexts and settings.

    Args:
        ctx: the run.
        task: models and settings.
        ds: log date of the shards.
        revision: of `negative_item_set` that they are for.
    """
    legal = {day: n for day, n in ctx.store.revisions("item_semantic_id").items() if day <= ds}
    parts = [
        negrec_core.__version__,
        task.model_version,
        task.codebook_version,
        sorted(legal.items()),
        ctx.store.revision("user_context", ds),
        revision,
        ctx.config.buckets,
        task.settings.model_dump_json(exclude={"carry_over"}),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
