"""Item-level alignment: which of four items the user rejected (DESIGN section 7, 2).

The answer is written as a semantic ID after a prompt that names the four and the user's past. A LoRA
adapter and the semantic-ID tokens are trained; both are merged into the model before it is passed on.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from peft import LoraConfig, TaskType
from transformers import PreTrainedModel

from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.errors import ArtefactError, InputError
from negrec_core.prompts import Event
from train.samples import Samples, SampleWriter, load_samples
from train.steps import Outcome, Student, Task
from train.supervised import fine_tune

TABLE = "training_alignment"
# Merging adds the adapter's product to the weights: rounding may move a logit by this much of the largest.
_MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def load(task: Task) -> Samples:
    """Samples of `training_alignment` of users that training may see.

    Raises:
        MissingError: the table has no partition for the log date.
        InputError: there is no sample to learn from.
    """
    task.store.require(TABLE, [task.until], f"run `negrec train alignment --until {task.until}`")
    version = task.store.version(TABLE)
    rows = task.store.read(TABLE, days=[task.until], version=version)
    samples = load_samples(rows.filter(pc.invert(rows["held_out"])), task.ids.index)
    if not len(samples):
        raise InputError(
            f"table {TABLE}: ds={task.until} has no sample; lower generator.alignment.min_rejections or"
            " raise generator.alignment.prefix_levels, or leave alignment out of generator.steps"
        )
    return Samples(samples, {TABLE: version})


def fit(task: Task, student: Student, samples: Samples, work: Path) -> Outcome:
    """Train an adapter and the semantic-ID tokens, and merge them.

    Raises:
        ArtefactError: the merged model does not say what the adapted one said.
    """
    settings = task.config.generator.alignment
    vocabulary = student.prompt.vocabulary
    writer = SampleWriter(
        student.prompt,
        student.prompt.blocks(task.ids.codes),
        0.0,
        0.0,
        task.config.generation.pad_prompts_to,
        0.0,
        0.0,
        task.seed,
    )
    tokens = [
        first + code
        for first, count in zip(vocabulary.first_token, vocabulary.code_counts, strict=True)
        for code in range(count)
    ]
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules="all-linear",
        trainable_token_indices=tokens,
    )
    outcome = fine_tune(task, student, samples, writer, settings, work, adapter=adapter)
    probe = writer([samples.rows[0]])
    merged = merge(outcome.model, probe["input_ids"])
    return Outcome(merged, outcome.curve, outcome.metrics)


@torch.no_grad()
def merge(adapted: Any, probe: torch.Tensor) -> PreTrainedModel:
    """The plain model that says the same as an adapted one.

    Args:
        adapted: peft model.
        probe: token ids [batch, tokens] to compare the two on.

    Raises:
        ArtefactError: their logits differ by more than rounding.
    """
    adapted.eval()
    probe = probe.to(adapted.device)
    before = adapted(input_ids=probe).logits
    merged: PreTrainedModel = adapted.merge_and_unload()
    after = merged(input_ids=probe).logits
    gap = float((after - before).abs().max() / before.abs().max())
    if not gap <= _MERGE_TOLERANCE[before.dtype]:
        raise ArtefactError(f"alignment: merging the adapter moved the logits by {gap:.1e}; train it again")
    return merged


def accuracy(task: Task, student: Student) -> float | None:
    """Share of held-out samples whose rejected item is the likeliest of the four; None without any.

    The forgetting of a later step is what it loses of this.
    """
    if not task.store.revision(TABLE, task.until):
        return None
    rows = task.store.read(TABLE, days=[task.until])
    samples = load_samples(rows.filter(rows["held_out"]), task.ids.index)
    if not len(samples):
        return None
    blocks, rng = student.prompt.blocks(task.ids.codes), np.random.default_rng(task.seed)
    prompts = []
    for sample in samples:
        events = enumerate(zip(sample["disliked"], sample["sids"], strict=True))
        past = [Event(time, disliked, sid) for time, (disliked, sid) in events]
        named = [blocks[sid] for sid in rng.permutation(sample["options"])]
        prompts.append(student.prompt.asking(named).write(past, blocks)[0])
    options = np.asarray(samples["options"])
    leaves = task.trie.find(task.ids.codes[options.ravel()]).reshape(options.shape)
    engine = TorchBeamEngine(student.model, student.prompt.vocabulary)
    scores = engine.log_probs(prompts, task.trie, leaves)
    # The target is the first option.
    return float((scores[:, 0] > scores[:, 1:].max(1)).mean())
