"""Stage `negative_item_set`: the semantic IDs each user is predicted to reject.

Users are generated shard by shard; a finished shard is committed to a staging table, so that a run that
was stopped goes on with the shards that are left (DESIGN section 9, rule 9).
"""

import hashlib

from jobs.context import JobContext, log, read_files, with_partitions, write_files
from jobs.generation import GenerationTask, generate, generation_task
from negrec_core.errors import ConflictError
from negrec_core.generator import CODEBOOK, GENERATOR, open_generator

_STAGING = "negative_item_set_shard"


def run(ctx: JobContext) -> None:
    generator = open_generator(ctx.warehouse.models, ctx.ds)
    ctx.use_model(GENERATOR, generator.manifest.version)
    ctx.use_model(CODEBOOK, generator.codebook_manifest.version)
    ctx.require("user_context", [ctx.ds])
    ctx.require("item_semantic_id", [ctx.ds])
    contexts = ctx.read("user_context", [ctx.ds])
    ctx.read("item_semantic_id", [ctx.ds])
    task = generation_task(ctx.store, generator, ctx.ds, ctx.config.generation)
    digest = _digest(ctx, task)
    done = 0
    for bucket in range(ctx.config.buckets):
        if not ctx.store.shard_done(_STAGING, ctx.ds, bucket, digest):
            rows = generate(contexts.where(contexts["bucket"] == bucket), task)
            run_directory = ctx.store.new_run(_STAGING)
            frame = with_partitions(rows, _STAGING, ctx.ds, ctx.config.buckets)
            write_files(frame, _STAGING, run_directory)
            ctx.store.commit_shard(_STAGING, run_directory, ctx.ds, bucket, digest)
        done += 1
        ctx.progress(done, ctx.config.buckets)
    if not all(ctx.store.shard_done(_STAGING, ctx.ds, n, digest) for n in range(ctx.config.buckets)):
        raise ConflictError(
            f"table {_STAGING}: another run of ds={ctx.ds} with other models or settings replaced shards"
            " of this one; run it again when the other has ended"
        )
    files = ctx.store.files(_STAGING, [ctx.ds])
    ctx.write("negative_item_set", read_files(ctx.spark, ctx.store, _STAGING, files))
    log.info("negative_item_set: %d shards of users", done)


def _digest(ctx: JobContext, task: GenerationTask) -> str:
    """Shards are interchangeable only if they come from the same models, contexts and settings."""
    parts = [
        task.model_version,
        task.codebook_version,
        ctx.store.revision("item_semantic_id", ctx.ds),
        ctx.store.revision("user_context", ctx.ds),
        ctx.revision,
        ctx.config.buckets,
        task.settings.model_dump_json(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
