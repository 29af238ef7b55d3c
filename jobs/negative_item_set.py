"""Stage `negative_item_set`: the semantic IDs each user is predicted to reject.

Beam search finds the IDs that the generator thinks likeliest. A user whose prompt would be that of the
newest earlier run keeps the beams it found; the others are generated. That is done shard by shard; a
finished shard of users is committed to a staging table, so that a run that was stopped goes on with the
shards that are left (DESIGN section 9, rule 9). The order that `block_score` fitted then chooses each set
among the beams and what is disliked most. Users without a context have the set of `ANYBODY`.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import negrec_core
from jobs.anchors import visible
from jobs.context import JobContext, bucket_of, log, read_files, run_sql, with_partitions, write_files
from jobs.generation import GenerationTask, generate, generation_task
from jobs.item_semantic_id import first_ids
from jobs.predicted_sets import Market, predicted_sets, recent_counts, users_of
from negrec_core.errors import ConflictError
from negrec_core.generator import CODEBOOK, GENERATOR, open_generator
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.set_order import ANYBODY, read_order

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_STAGING = "negative_item_set_shard"
_OF_SETS = ("set_size", "popular_ids", "recent_days", "rare_places", "rare_from")


@dataclass(frozen=True)
class Earlier:
    """An earlier run whose beams are what would be found today, where the prompt is the same.

    Attributes:
        ds: its log date.
        beams: its `negative_item_set_shard`.
        contexts: the `user_context` that it was made from.
        new_items: (item_id) that got their semantic ID since.
    """

    ds: str
    beams: "DataFrame"
    contexts: "DataFrame"
    new_items: "DataFrame"


def carried(earlier: Earlier, contexts: "DataFrame", bucket: int) -> "DataFrame":
    """Beams of the users of a bucket whose prompt is that of the earlier run."""

    def own(frame: "DataFrame") -> "DataFrame":
        return frame.where(frame["bucket"] == bucket)

    frames = {
        "earlier": own(earlier.beams),
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
    for table in ("item_semantic_id", "item_rate", "block_score"):
        ctx.require(table, [ctx.ds])
    contexts = _with_anybody(ctx, ctx.read("user_context", [ctx.ds]))
    ctx.read("item_semantic_id", [ctx.ds])
    task = generation_task(ctx.store, generator, ctx.ds, ctx.config.generation)
    digest = _digest(ctx, task, ctx.ds, ctx.revision)
    earlier = find_earlier(ctx, task)
    seconds = ctx.spark.sparkContext.accumulator(0.0)
    made = []
    for bucket in range(ctx.config.buckets):
        if not ctx.store.shard_done(_STAGING, ctx.ds, bucket, digest):
            own = contexts.where(contexts["bucket"] == bucket)
            kept = carried(earlier, contexts, bucket) if isinstance(earlier, Earlier) else None
            if kept is not None:
                own = own.join(kept.select("user_id"), "user_id", "left_anti")
            rows = generate(own, task, seconds).withColumn("carried_from", F.lit(None).cast("string"))
            if kept is not None:
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
    ctx.write("negative_item_set", _chosen(ctx, rows, contexts, task))
    _log_share(rows.where(F.col("bucket").isin(made)), earlier, len(made), seconds.value)


def _with_anybody(ctx: JobContext, contexts: "DataFrame") -> "DataFrame":
    """Contexts with an empty one, for users of whom nothing is known."""
    from pyspark.sql import functions as F

    columns = ["user_id", "anchor_time", "bucket", "negatives", "positives"]
    anybody = ctx.spark.createDataFrame([(ANYBODY, ctx.anchor)], "user_id string, anchor_time timestamp")
    anybody = anybody.withColumn("bucket", bucket_of(F.col("user_id"), ctx.config.buckets))
    for column in ("negatives", "positives"):
        anybody = anybody.withColumn(column, F.array().cast(contexts.schema[column].dataType))
    return contexts.select(columns).unionByName(anybody)


def _chosen(ctx: JobContext, beams: "DataFrame", contexts: "DataFrame", task: GenerationTask) -> "DataFrame":
    """The predicted sets among the beams and the most disliked IDs."""
    settings, pseudo_events = ctx.config.generation, ctx.config.calibration.rate_pseudo_events
    fitted = ctx.read("block_score", [ctx.ds]).select("set_features", "set_weights").collect()[0]
    order = read_order(fitted["set_features"], fitted["set_weights"], ctx.ds)
    ids = load_semantic_ids(ctx.store, task.codebook_version, ctx.ds, task.ids_version)
    rates = ctx.read("item_rate", [ctx.ds]).select("item_id", "n_negatives", "n_positives").toArrow()
    feedback = visible(ctx, ctx.read_window("feedback"))
    recent = recent_counts(feedback, contexts, settings.recent_days).toArrow()
    market = Market.of(ids, rates, recent, pseudo_events, settings.popular_ids)
    return predicted_sets(users_of(beams, contexts, feedback), market, order, settings)


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
    beams = read_files(ctx.spark, ctx.store, _STAGING, ctx.store.files(_STAGING, [ds], check=True))
    # Not recorded as an input: what is carried over is what today's context gives, so that replacing
    # the earlier one does not make this day stale.
    files = ctx.store.files("user_context", [ds], check=True)
    contexts = read_files(ctx.spark, ctx.store, "user_context", files)
    return Earlier(ds, beams, contexts, new.select("item_id"))


def _log_share(rows: "DataFrame", earlier: Earlier | str, shards: int, seconds: float) -> None:
    """One line: how many users of these shards were carried over, and what that saved."""
    from pyspark.sql import functions as F

    counts = (
        rows.where((F.col("rank") == 1) & (F.col("user_id") != ANYBODY))
        .agg(F.count("*"), F.count("carried_from"))
        .first()
    )
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
        # What chooses the sets among the beams is no part of a beam.
        task.settings.model_dump_json(exclude={"carry_over", *_OF_SETS}),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
