"""`negrec train generator`: next-negative supervised fine-tuning (DESIGN section 7, warm-up).

A sample is a user's past before an anchor and the item disliked at it. The loss covers the target's
codes and, since each is the next event of its kind after its own prefix, those of the past.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from negrec_core.artefacts import Manifest, new_version, seal
from negrec_core.config import Config
from negrec_core.delta import DeltaStore
from negrec_core.errors import InputError
from negrec_core.generator import GENERATOR, newest, open_codebook
from negrec_core.progress import Progress
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.trie import Trie
from train.likelihood import ConstrainedTrainer
from train.models import build_model, load_prompt_text
from train.plots import plot_curve
from train.samples import SampleWriter, load_samples


def train_generator(
    store: DeltaStore,
    models: Path,
    config: Config,
    until: str,
    *,
    seed: int,
    progress: Progress,
) -> Manifest:
    """Train a generator on `training_next_negative` of the log date `until` and store it.

    Args:
        store: the Delta tables.
        models: directory of the model versions.
        config: section `generator` says what to train.
        until: log date; nothing after its end is read.
        seed: of weights and sample order.
        progress: told (steps done, steps in all).

    Raises:
        MissingError: no codebook up to `until`, or no samples were built for it.
        InputError: there is no sample to learn from.
    """
    settings = config.generator
    codebook_version = newest(models, "codebook", until).version
    codebook, codebook_manifest = open_codebook(models, codebook_version)
    store.require("training_next_negative", [until], f"run `negrec train generator --until {until}`")
    version = store.version("training_next_negative")
    rows = store.read("training_next_negative", days=[until], version=version)
    ids = load_semantic_ids(store, codebook_version, until)
    model, tokenizer, prompt = build_model(
        settings.preset,
        load_prompt_text(settings.prompt),
        codebook,
        settings.prompt_tokens,
        seed,
    )
    samples = load_samples(rows, ids.index)
    if not len(samples):
        raise InputError(
            f"table training_next_negative: ds={until} has no sample whose item has a semantic ID;"
            " import feedback with dislikes, and run the stage item_semantic_id"
        )
    path = new_version(models, GENERATOR)
    trainer = ConstrainedTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(path / ".training"),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            seed=seed,
            data_seed=seed,
            max_length=None,
            # Prompts differ much in length: alike ones together waste least on padding.
            train_sampling_strategy="group_by_length",
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=False,
            use_cpu=not _has_gpu(),
        ),
        train_dataset=samples,
        data_collator=SampleWriter(
            prompt,
            prompt.blocks(ids.codes),
            settings.like_weight,
            config.generation.pad_prompts_to,
            settings.event_dropout,
            settings.shuffle_share,
            np.random.default_rng(seed),
        ),
        processing_class=tokenizer,
        callbacks=[_Report(progress)],
        trie=Trie.build(ids.codes, codebook.code_counts),
        vocabulary=prompt.vocabulary,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(path / ".training", ignore_errors=True)
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)
    prompt.save(path)
    curve = [entry for entry in trainer.state.log_history if "loss" in entry]
    (path / "curve.json").write_text(json.dumps(curve, indent=1), encoding="utf-8")
    plot_curve(curve, path / "curve.png", "Next-negative fine-tuning")
    return seal(
        path,
        parameters={
            "until": until,
            "codebook_version": codebook_version,
            "codebook_digest": codebook_manifest.digest,
            "held_out_share": config.calibration.held_out_share,
            "seed": seed,
            **settings.model_dump(),
        },
        metrics={
            "samples": len(samples),
            "steps": trainer.state.global_step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss": curve[-1]["loss"] if curve else None,
        },
        inputs={"training_next_negative": version},
    )


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps)


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
