"""Next-negative warm-up, and the supervised training on semantic IDs it shares (DESIGN section 7, 3).

A warm-up sample is a user's past before an anchor and the item disliked at it. The loss covers the
target's codes and, since each is the next event of its kind after its own prefix, those of the past.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import TrainerCallback
from trl import SFTConfig

from negrec_core.errors import InputError
from train.likelihood import ConstrainedTrainer
from train.samples import SampleWriter, digest, load_samples
from train.steps import Outcome, Student, Task, common_arguments, train

TABLE = "training_next_negative"


@dataclass(frozen=True)
class SidSamples:
    """Samples whose targets are semantic IDs."""

    rows: Dataset
    inputs: dict[str, int]

    @property
    def digest(self) -> str:
        return digest(self.rows)


def load(task: Task) -> SidSamples:
    """Samples of `training_next_negative`.

    Raises:
        MissingError: the table has no partition for the log date.
        InputError: there is no sample to learn from.
    """
    task.store.require(TABLE, [task.until], f"run `negrec train generator --until {task.until}`")
    version = task.store.version(TABLE)
    rows = load_samples(task.store.read(TABLE, days=[task.until], version=version), task.ids.index)
    if not len(rows):
        raise InputError(
            f"table {TABLE}: ds={task.until} has no sample whose item has a semantic ID;"
            " import feedback with dislikes, and run the stage item_semantic_id"
        )
    return SidSamples(rows, {TABLE: version})


def fit(task: Task, student: Student, samples: SidSamples, work: Path) -> Outcome:
    """Fine-tune the model on the samples."""
    settings = task.config.generator.warm_up
    writer = SampleWriter(
        student.prompt,
        student.prompt.blocks(task.ids.codes),
        settings.like_weight,
        1.0,
        task.config.generation.pad_prompts_to,
        settings.event_dropout,
        settings.shuffle_share,
        task.seed,
    )
    return fit_sids(task, student, samples, writer, settings, work)


def fit_sids(
    task: Task,
    student: Student,
    samples: SidSamples,
    writer: SampleWriter,
    settings: Any,
    work: Path,
    adapter: PeftConfig | None = None,
) -> Outcome:
    """Fine-tune the model, or an adapter of it, on samples as `writer` writes them.

    Args:
        task: what is trained for.
        student: the model, which is changed.
        samples: what to learn from.
        writer: makes batches of them.
        settings: epochs, max_steps, batch_size, learning_rate.
        work: directory of checkpoints.
        adapter: of peft; absent: the whole model is trained.
    """
    trainer = ConstrainedTrainer(
        model=student.model,
        args=SFTConfig(
            **common_arguments(task, work),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=samples.rows,
        data_collator=writer,
        processing_class=student.tokenizer,
        callbacks=[_ResumeAt(writer)],
        peft_config=adapter,
        trie=task.trie,
        vocabulary=student.prompt.vocabulary,
    )
    model, curve = train(trainer, task, work)
    return Outcome(
        model,
        curve,
        {
            "samples": len(samples.rows),
            "steps": trainer.state.global_step,
            "loss": curve[-1]["loss"] if curve else None,
        },
    )


class _ResumeAt(TrainerCallback):
    """A training that is taken up goes on with the variations of the batches that are left."""

    def __init__(self, writer: SampleWriter) -> None:
        self._writer = writer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._writer.batch = state.global_step * args.gradient_accumulation_steps
