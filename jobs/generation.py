"""Batched beam search in Spark executors: contexts -> the likeliest semantic IDs (DESIGN section 6)."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jobs.spark import gpu_profile
from negrec_core.artefacts import fetched
from negrec_core.beam import BeamEngine, open_engine
from negrec_core.config import GenerationConfig
from negrec_core.delta import DeltaStore
from negrec_core.errors import MissingError
from negrec_core.generator import GENERATOR, Generator
from negrec_core.prompts import PromptWriter, context_events
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.storage import place
from negrec_core.trie import Trie

if TYPE_CHECKING:
    from pyspark.accumulators import Accumulator
    from pyspark.sql import DataFrame

_SCHEMA = (
    "user_id string, rank int, codes array<int>, log_prob float, codebook_version string,"
    " model_version string"
)


@dataclass(frozen=True)
class GenerationTask:
    """All that an executor needs to open its engine; small, because it travels with every task.

    Attributes:
        warehouse: root of the tables.
        ds: log date; items that came later are not legal.
        ids_version: Delta version of `item_semantic_id`.
        models: directory of the model versions.
        model_version: version of the generator.
        codebook_version: version of its codebook.
        settings: section `generation` of the configuration.
    """

    warehouse: str
    ds: str
    ids_version: int
    models: str
    model_version: str
    codebook_version: str
    settings: GenerationConfig


@dataclass(frozen=True)
class _Loaded:
    engine: BeamEngine
    prompt: PromptWriter
    trie: Trie
    blocks: list[tuple[int, ...]]
    sid_of_item: dict[str, int]
    leaf_of_sid: np.ndarray


# One engine per executor process: Spark reuses its Python workers, and loading costs seconds.
_loaded: dict[str, _Loaded] = {}


def generation_task(
    store: DeltaStore, generator: Generator, ds: str, settings: GenerationConfig
) -> GenerationTask:
    """The task of generating for `ds` with this generator and today's `item_semantic_id`."""
    return GenerationTask(
        str(store.root),
        ds,
        store.version("item_semantic_id"),
        str(store.root / "models"),
        generator.manifest.version,
        generator.codebook_manifest.version,
        settings,
    )


def generate(
    contexts: "DataFrame", task: GenerationTask, seconds: "Accumulator[float] | None" = None
) -> "DataFrame":
    """The beams of every context row, as in `negative_item_set_shard`.

    Args:
        contexts: (user_id, negatives, positives), one row per user.
        task: what to generate with.
        seconds: if given, what the engines take is added here.

    Raises:
        ConfigError, MissingError: the cluster cannot run so many engines with GPUs.
    """
    spark = contexts.sparkSession
    profile = gpu_profile(spark.sparkContext, task.settings.gpus, task.settings.parallelism)
    # Rows of one Arrow batch are one call of the engine.
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(task.settings.batch_users))

    def predict(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                loaded = _load(task)
                begin = time.monotonic()
                rows = predict_batch(batch, loaded, task)
                if seconds is not None:
                    seconds.add(time.monotonic() - begin)
                yield rows

    # Evenly sized partitions, no more than engines may run at once.
    spread = contexts.select("user_id", "negatives", "positives").repartition(task.settings.parallelism)
    rows = spread.mapInArrow(predict, _SCHEMA, profile=profile)
    # The stage ends here, or what the caller does with the rows would keep GPU executors too.
    return rows.repartition(task.settings.parallelism, "user_id") if profile else rows


def predict_batch(batch: pa.RecordBatch, loaded: _Loaded, task: GenerationTask) -> pa.RecordBatch:
    """The beams of each user, ranked from 1, without the dislikes in the context: they are known."""
    settings = task.settings
    rows = batch.to_pylist()
    events = [context_events(row["negatives"], row["positives"], loaded.sid_of_item) for row in rows]
    prompts = [loaded.prompt.write(past, loaded.blocks, settings.pad_prompts_to)[0] for past in events]
    found = loaded.engine.search(prompts, loaded.trie, settings.beam_width)
    leaves = loaded.trie.find(np.maximum(found.codes, 0).reshape(-1, loaded.trie.depth))
    new = found.codes[:, :, 0] >= 0
    for user, past in enumerate(events):
        known = [loaded.leaf_of_sid[event.sid] for event in past if event.disliked]
        new[user] &= ~np.isin(leaves.reshape(new.shape)[user], known)
    rank = new.cumsum(1)
    owner = np.nonzero(new)[0]
    n = len(owner)
    return pa.RecordBatch.from_arrays(
        [
            batch["user_id"].take(pa.array(owner)),
            pa.array(rank[new], pa.int32()),
            _lists(found.codes[new]),
            pa.array(found.log_probs[new], pa.float32()),
            pa.array([task.codebook_version] * n, pa.string()),
            pa.array([task.model_version] * n, pa.string()),
        ],
        ["user_id", "rank", "codes", "log_prob", "codebook_version", "model_version"],
    )


def _load(task: GenerationTask) -> _Loaded:
    key = repr(task)
    if key not in _loaded:
        _loaded.clear()
        begin = time.monotonic()
        gpus = _take_gpus()
        _share_cores(task.settings.parallelism)
        path = fetched(place(task.models), GENERATOR, task.model_version)
        prompt = PromptWriter.load(path)
        ids = load_semantic_ids(DeltaStore(task.warehouse), task.codebook_version, task.ds, task.ids_version)
        if not ids.items:
            raise MissingError(
                f"table item_semantic_id: no item has an ID under codebook {task.codebook_version}"
                f" on ds={task.ds}; run the stage item_semantic_id"
            )
        options: dict[str, Any] = dict(task.settings.engine_options)
        engine = open_engine(
            task.settings.engine, path, prompt.vocabulary, dtype=task.settings.dtype, **options
        )
        trie = Trie.build(ids.codes, prompt.vocabulary.code_counts)
        _loaded[key] = _Loaded(
            engine, prompt, trie, prompt.blocks(ids.codes), ids.index, trie.find(ids.codes)
        )
        if gpus:
            # For the log of the executor.
            seconds = time.monotonic() - begin
            print(
                f"negrec: {task.settings.engine} engine on GPU {gpus} after {seconds:.1f} s", file=sys.stderr
            )
    return _loaded[key]


def _take_gpus() -> str:
    """Show this process the GPUs that Spark gave its executor, and no others; their addresses.

    Spark itself does not. CUDA reads the variable once, so torch and vLLM are imported later.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    given = context.resources().get("gpu") if context else None
    if given is None:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given.addresses)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def _share_cores(parallelism: int) -> None:
    """Engines on one machine share its cores instead of each taking all."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parallelism))


def _lists(codes: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(codes.ravel(), pa.int32()))
