"""What the steps of the curriculum share: the task, the model that is passed on, the trainer's settings."""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback

from negrec_core.artefacts import Manifest
from negrec_core.codebook import Codebook
from negrec_core.config import Config
from negrec_core.delta import DeltaStore
from negrec_core.errors import MissingError
from negrec_core.memory import keep_freed_memory
from negrec_core.progress import Progress
from negrec_core.prompts import PromptWriter
from negrec_core.semantic_ids import SemanticIds
from negrec_core.trie import Trie
from train.checkpoints import latest_checkpoint


def processes() -> PartialState:
    """The processes of this training: one, or those that `accelerate launch` started.

    All of them train; the main one alone writes what is kept.
    """
    return PartialState(cpu=not torch.cuda.is_available())


@dataclass(frozen=True)
class Task:
    """What is trained for, the same for all steps.

    Attributes:
        store: the Delta tables.
        config: section `generator` says how.
        until: log date; nothing after its end is read.
        seed: of all chance.
        codebook: quantiser of the semantic IDs.
        codebook_manifest: its version and digest.
        ids: semantic IDs of the items known on `until`.
        progress: told (steps done, steps in all).
    """

    store: DeltaStore
    config: Config
    until: str
    seed: int
    codebook: Codebook
    codebook_manifest: Manifest
    ids: SemanticIds
    progress: Progress

    @cached_property
    def trie(self) -> Trie:
        """The legal IDs."""
        return Trie.build(self.ids.codes, self.codebook.code_counts)


@dataclass(frozen=True)
class Student:
    """A model between two steps.

    Attributes:
        model: Hugging Face model that knows the semantic-ID tokens.
        tokenizer: its tokenizer.
        prompt: writes its prompts.
        digest: of all that made it, so that equal digests are equal models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptWriter
    digest: str

    def save(self, path: Path) -> None:
        """Write a Hugging Face directory with safetensors weights, tokenizer and prompt."""
        self.model.save_pretrained(path, safe_serialization=True)
        self.tokenizer.save_pretrained(path)
        self.prompt.save(path)

    @classmethod
    def open(cls, path: Path, digest: str) -> "Student":
        """Read what `save` wrote."""
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        # Where the trainers put it; models are judged between trainings, too.
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # pyrefly: ignore[bad-argument-type]
        return cls(model, tokenizer, PromptWriter.load(path), digest)


@dataclass(frozen=True)
class Outcome:
    """What a step leaves beside the weights.

    Attributes:
        model: the trained model; often the one that was given.
        curve: log entries, each with `step`.
        metrics: figures for the manifest.
    """

    model: PreTrainedModel
    curve: list[dict[str, Any]]
    metrics: dict[str, Any]


def common_arguments(task: Task, work: Path) -> dict[str, Any]:
    """Settings of every trainer: curves to `generator.tracking`, checkpoints in `work`.

    Raises:
        MissingError: the tracker is not installed.
    """
    tracking = task.config.generator.tracking
    if tracking != "none" and importlib.util.find_spec(tracking) is None:
        raise MissingError(
            f"generator.tracking: Python package {tracking} is not installed; install it, or set none"
        )
    return {
        "output_dir": str(work),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "seed": task.seed,
        "data_seed": task.seed,
        "logging_steps": 20,
        "save_strategy": "steps",
        "save_steps": task.config.generator.checkpoint_steps,
        "save_total_limit": 2,
        "report_to": tracking,
        "run_name": work.as_posix().split("/training/")[-1].replace("/.checkpoints", ""),
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def train(trainer: Any, task: Task, work: Path) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Run a trainer to its end, from its last checkpoint if it was killed; its model and its log."""
    keep_freed_memory()
    trainer.remove_callback(PrinterCallback)
    if processes().is_main_process:
        trainer.add_callback(_Report(task.progress))
    trainer.train(resume_from_checkpoint=latest_checkpoint(work))
    return trainer.model, [entry for entry in trainer.state.log_history if "loss" in entry]


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)
