"""`negrec train generator`: the curriculum that makes a generator (DESIGN section 7).

Each step starts from the model of the one before. A finished step is kept in `models/training` under a
name made of all it depends on, so that a run that was killed, or that changes a later step only, does
not train it again; inside a step training goes on from its last checkpoint.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from negrec_core.artefacts import (
    MANIFEST,
    Manifest,
    new_version,
    on_this_machine,
    open_version,
    publish,
    seal,
)
from negrec_core.config import Config
from negrec_core.delta import DeltaStore
from negrec_core.generator import CODEBOOK, GENERATOR, newest, open_codebook
from negrec_core.items import load_items
from negrec_core.progress import Progress
from negrec_core.resources import resource
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.storage import Place
from train import alignment, grpo, translation, warm_up
from train.models import build_model, load_prompt_text
from train.plots import plot_curve
from train.steps import Student, Task, processes

TRAINING = "training"
STEPS: dict[str, ModuleType] = {
    "translation": translation,
    "alignment": alignment,
    "warm_up": warm_up,
    "grpo": grpo,
}


def train_generator(
    store: DeltaStore,
    models: Place,
    config: Config,
    until: str,
    *,
    seed: int,
    progress: Progress,
    last_step: str | None = None,
) -> Manifest:
    """Train a generator by the steps of `generator.steps` and store it.

    Args:
        store: the Delta tables.
        models: directory of the model versions.
        config: section `generator` says what to train.
        until: log date; nothing after its end is read.
        seed: of weights and sample order.
        progress: told (steps done, steps in all) by each step.
        last_step: stop after this step, without a generator that would be served.

    Returns:
        The manifest of the generator, or of the last step.

    Raises:
        MissingError: no codebook up to `until`, or no samples were built for it.
        InputError: there is no sample to learn from.
    """
    codebook, codebook_manifest = open_codebook(models, newest(models, CODEBOOK, until).version)
    ids = load_semantic_ids(store, codebook_manifest.version, until)
    task = Task(store, config, until, seed, codebook, codebook_manifest, ids, progress)
    student, path, made = first_student(task), None, []
    for name in config.generator.steps:
        student, path, manifest = run_step(on_this_machine(models), name, task, student)
        made.append(manifest)
        if name == last_step:
            return manifest
    if processes().is_main_process:
        _keep(models, task, student, path, made)
    processes().wait_for_everyone()
    return newest(models, GENERATOR, until)


def _keep(models: Place, task: Task, student: Student, path: Path | None, made: list[Manifest]) -> None:
    """Store the model after the last step as a generator; it is kept in `path`, unless there was no step."""
    config, codebook_manifest = task.config, task.codebook_manifest
    out = new_version(models, GENERATOR)
    if path is None:
        student.save(out)
    else:
        _link_files(path, out)
    parameters = {
        "until": task.until,
        "codebook_version": codebook_manifest.version,
        "codebook_digest": codebook_manifest.digest,
        "held_out_share": config.calibration.held_out_share,
        "seed": task.seed,
        "training": [manifest.version for manifest in made],
        **config.generator.model_dump(),
    }
    metrics = {"parameters": student.model.num_parameters()}
    metrics |= {
        name if len(made) == 1 else f"{step}.{name}": value
        for step, manifest in zip(config.generator.steps, made, strict=True)
        for name, value in manifest.metrics.items()
    }
    inputs = {table: version for manifest in made for table, version in manifest.inputs.items()}
    seal(out, parameters=parameters, metrics=metrics, inputs=inputs)
    publish(models, out)


def first_student(task: Task) -> Student:
    """The preset's model with semantic-ID tokens."""
    settings = task.config.generator
    titles: list[str] = []
    if "translation" in settings.steps:
        items = load_items(task.store, task.until, columns=["title"])
        titles = [title for title in items["title"].to_pylist() if title]
    text = load_prompt_text(settings.prompt)
    likes = settings.context == "both"
    model, tokenizer, prompt = build_model(
        settings.preset, text, task.codebook, settings.prompt_tokens, task.seed, titles, likes
    )
    made_of = [
        resource("conf", "models", f"{settings.preset}.yaml").read_text(encoding="utf-8"),
        text.model_dump(),
        task.codebook_manifest.digest,
        settings.prompt_tokens,
        task.seed,
        titles,
        likes,
    ]
    return Student(model, tokenizer, prompt, _digest(made_of))


def run_step(models: Path, name: str, task: Task, student: Student) -> tuple[Student, Path, Manifest]:
    """Train one step of the curriculum, or open it where it was trained before.

    Args:
        models: directory of the model versions.
        name: of the step.
        task: what is trained for; its section `generator` says how.
        student: the model that the step starts from; it is changed.

    Returns:
        The trained model, where it is kept, and its manifest.

    Raises:
        MissingError: its samples were not built.
        InputError: there is no sample to learn from.
    """
    step = STEPS[name]
    samples = step.load(task)
    settings = getattr(task.config.generator, name).model_dump()
    made_of = [
        name,
        student.digest,
        samples.digest,
        # What is legal beside the samples' own IDs: all of it competes in the likelihood.
        hashlib.sha256(task.ids.codes.tobytes()).hexdigest(),
        settings,
        task.config.generation.pad_prompts_to,
        task.seed,
    ]
    version = f"{name}-{_digest(made_of)[:16]}"
    path = models / TRAINING / version
    if not (path / MANIFEST).is_file():
        work = path / ".checkpoints"
        work.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        outcome = step.fit(task, student, samples, work)
        metrics = {**outcome.metrics, "seconds": round(time.monotonic() - begin, 1)}
        if processes().is_main_process:
            trained = Student(outcome.model, student.tokenizer, student.prompt, "")
            trained.save(path)
            if "alignment" in task.config.generator.steps:
                metrics = {**metrics, "alignment_accuracy": alignment.accuracy(task, trained)}
            (path / f"curve_{name}.json").write_text(json.dumps(outcome.curve, indent=1), encoding="utf-8")
            plot_curve(outcome.curve, path / f"curve_{name}.png", name)
            shutil.rmtree(work)
            seal(path, parameters=settings, metrics=metrics, inputs=samples.inputs)
    processes().wait_for_everyone()
    path, manifest = open_version(models, TRAINING, version)
    return Student.open(path, manifest.digest), path, manifest


def _link_files(source: Path, target: Path) -> None:
    """The files of a finished step, as links where the file system has them: models are large."""
    for file in source.iterdir():
        if file.is_file() and file.name != MANIFEST:
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copy2(file, target / file.name)


def _digest(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
