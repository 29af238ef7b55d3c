"""Supervised fine-tuning, what translation, alignment and warm-up share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig

from train.likelihood import ConstrainedTrainer
from train.samples import Samples, SampleWriter
from train.steps import Outcome, Student, Task, common_arguments, train


def fine_tune(
    task: Task,
    student: Student,
    samples: Samples,
    writer: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    settings: Any,
    work: Path,
    *,
    trainer_class: type[ConstrainedTrainer] = ConstrainedTrainer,
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
        trainer_class: knows the loss.
        adapter: of peft; absent: the whole model is trained.
    """
    trainer = trainer_class(
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
        callbacks=[_ResumeAt(writer)] if isinstance(writer, SampleWriter) else [],
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
