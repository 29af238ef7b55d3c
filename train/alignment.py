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

from negrec_core.errors import ArtefactError, InputError
from train.likelihood import constrained_log_probs
from train.samples import SampleWriter, load_samples, padded
from train.steps import Outcome, Student, Task
from train.warm_up import SidSamples, fit_sids

TABLE = "training_alignment"
# Merging adds the adapter's product to the weights: rounding may move a logit by this much of the largest.
_MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def load(task: Task) -> SidSamples:
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
    return SidSamples(samples, {TABLE: version})


def fit(task: Task, student: Student, samples: SidSamples, work: Path) -> Outcome:
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
    outcome = fit_sids(task, student, samples, writer, settings, work, adapter)
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


@torch.no_grad()
def accuracy(task: Task, student: Student, batch_size: int = 64) -> float | None:
    """Share of held-out samples whose rejected item is the likeliest of the four; None without any.

    The forgetting of a later step is what it loses of this.
    """
    if not task.store.revision(TABLE, task.until):
        return None
    rows = task.store.read(TABLE, days=[task.until])
    samples = load_samples(rows.filter(rows["held_out"]), task.ids.index)
    if not len(samples):
        return None
    blocks = student.prompt.blocks(task.ids.codes)
    device, right = student.model.device, 0
    student.model.eval()
    for start in range(0, len(samples), batch_size):
        part = [samples[n] for n in range(start, min(start + batch_size, len(samples)))]
        written, rng = [], np.random.default_rng([task.seed, start])
        for sample in part:
            writer = SampleWriter(student.prompt, blocks, 0.0, 0.0, 1, 0.0, 0.0, task.seed)
            order = rng.permutation(sample["options"])
            # The target comes first, so that ties count against the model.
            others = [sid for sid in order if sid != sample["target"]]
            for answer in [*others, sample["target"]]:
                written.append(writer.write({**sample, "target": answer}, np.random.default_rng(start)))
        batch = padded(written, student.prompt.pad)
        tokens = batch["input_ids"].to(device)
        logits = student.model(input_ids=tokens, attention_mask=batch["attention_mask"].to(device)).logits
        depth = task.trie.depth
        last = batch["attention_mask"].sum(1) - depth
        at = (last[:, None] + torch.arange(depth)).to(device)
        rows_of = torch.arange(len(tokens), device=device)[:, None]
        scores = constrained_log_probs(
            logits[rows_of, at - 1], tokens.gather(1, at), task.trie, student.prompt.vocabulary
        )[0].sum(1)
        right += int((scores.view(len(part), -1).argmax(1) == len(sample["options"]) - 1).sum())
    return right / len(samples)
