"""One training step of a chain, and what becomes of the model: the work of one process."""

import json
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file

from negrec_core.artefacts import list_versions, new_version, open_version, seal
from negrec_core.beam.torch_engine import TorchBeamEngine, TorchOptions
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore
from negrec_core.errors import NegrecError
from negrec_core.generator import CODEBOOK, newest, open_codebook
from negrec_core.metrics import mean_over_users
from negrec_core.progress import silent
from negrec_core.semantic_ids import SemanticIds, load_semantic_ids
from train.ablation.grid import Grid, Link, Trained
from train.ablation.judges import JUDGE_SEED, draws_of, judged_of, until_of
from train.ablation.variants import COLLABORATIVE, TITLES, WARM_UP
from train.baselines import Known, times_disliked
from train.candidates import chosen
from train.collaborative import collaborative_ids
from train.generator import TRAINING, first_student, run_step
from train.ours import Generation
from train.steps import Student, Task
from train.titles import Budget, Kind, TitleModel

log = logging.getLogger("negrec.ablation")

# Prompt and beam tokens at once where a GPU has room for them.
_GPU_BATCH_TOKENS = 131_072


def run_link(grid: Grid, link: Link, before: Trained | None, judged: bool) -> Trained:
    """Train the last step of a link, if it was not trained before, and judge what comes out."""
    try:
        return _run_link(grid, link, before, judged)
    except NegrecError as error:
        return Trained("", [], {}, 0.0, str(error))
    except Exception as error:
        log.exception("%s: seed %d: %s", link.dataset, link.seed, [step.name for step in link.steps])
        return Trained("", [], {}, 0.0, f"{type(error).__name__}: {error}".splitlines()[0])


def _run_link(grid: Grid, link: Link, before: Trained | None, judged: bool) -> Trained:
    begin = time.monotonic()
    if not link.steps:
        if link.settings[0] in TITLES:
            return _trained_on_titles(grid, link)
        figures = _figures_of_times_disliked(grid, link)
        return Trained("", [], figures, round(time.monotonic() - begin, 1))
    task = _task(grid, link)
    models = grid.work / link.dataset
    if before is None:
        student, measured = first_student(task), []
    else:
        path, manifest = open_version(models, TRAINING, before.version)
        student, measured = Student.open(path, manifest.digest), before.measured
    student, path, manifest = run_step(models, link.steps[-1].name, task, student)
    measured = [*measured, {"step": link.steps[-1].name, **manifest.metrics}]
    begin = time.monotonic()
    figures = _figures(grid, link, task, student) if judged else {}
    return Trained(path.name, measured, figures, round(time.monotonic() - begin, 1))


def _task(grid: Grid, link: Link) -> Task:
    if COLLABORATIVE in link.settings:
        return _task_with_collaborative_ids(grid, link)
    config = grid.config(link.dataset, (*link.settings, *link.steps[-1].settings))
    store, models = DeltaStore(link.warehouse), link.warehouse / "models"
    until = until_of(link.warehouse)
    codebook, manifest = open_codebook(models, newest(models, CODEBOOK, until).version)
    ids = load_semantic_ids(store, manifest.version, until)
    return Task(store, config, until, link.seed, codebook, manifest, ids, silent)


def _task_with_collaborative_ids(grid: Grid, link: Link) -> Task:
    """With IDs that are made where they are missing, and kept in the warehouse."""
    task = _task(grid, replace(link, settings=tuple(s for s in link.settings if s != COLLABORATIVE)))
    models, until = link.warehouse / "models", task.until
    if not list_versions(models, COLLABORATIVE):
        past = judged_of(grid, link.dataset, link.warehouse).past
        settings = task.config.codebook
        codebook, ids = collaborative_ids(past, settings.levels, settings.codes_per_level, JUDGE_SEED)
        made = new_version(models, COLLABORATIVE)
        codebook.save(made)
        (made / "items.json").write_text(json.dumps(ids.items), encoding="utf-8")
        save_file({"codes": ids.codes}, made / "ids.safetensors")
        seal(made, parameters={"until": until}, metrics={}, inputs={})
    path, manifest = open_version(models, COLLABORATIVE, list_versions(models, COLLABORATIVE)[-1].version)
    items = json.loads((path / "items.json").read_text(encoding="utf-8"))
    codes = load_file(path / "ids.safetensors")["codes"].astype(np.int32)
    found = SemanticIds(items, codes, {item: n for n, item in enumerate(items)})
    return replace(task, codebook=Codebook.load(path), codebook_manifest=manifest, ids=found)


def _figures(grid: Grid, link: Link, task: Task, student: Student) -> dict[str, list[float]]:
    judged = judged_of(grid, link.dataset, link.warehouse)
    tokens = _GPU_BATCH_TOKENS if torch.cuda.is_available() else TorchOptions.max_batch_tokens
    engine = TorchBeamEngine(student.model, student.prompt.vocabulary, max_batch_tokens=tokens)
    generation = Generation(engine, student.prompt, task.ids, task.config.generation, task.store, task.until)
    sets = generation.sets(judged.users)
    leaf_of_item = dict(zip(task.ids.items, task.trie.find(task.ids.codes).tolist(), strict=True))
    unit = task.codebook.unit(task.trie.codes_of(np.arange(task.trie.n_ids)))

    def similarity(pairs: pd.DataFrame) -> np.ndarray:
        """Largest cosine to the user's predicted IDs; rounded, because equal ones must tie."""
        leaf = pairs["item_id"].map(leaf_of_item).fillna(-1).to_numpy(np.int64)
        scores = np.full(len(pairs), -1.0)
        for user, rows in pairs.groupby("user_id").indices.items():
            known = rows[leaf[rows] >= 0]
            predicted = sets[str(user)]
            if len(predicted):
                scores[known] = (unit[leaf[known]] @ unit[predicted].T).max(1)
        return scores.round(6)

    return draws_of(judged, sets, leaf_of_item, {"generation": generation.score, "similarity": similarity})


def _figures_of_times_disliked(grid: Grid, link: Link) -> dict[str, list[float]]:
    task = _task(grid, replace(link, settings=(), steps=(WARM_UP,)))
    judged = judged_of(grid, link.dataset, link.warehouse)
    leaf_of_item = dict(zip(task.ids.items, task.trie.find(task.ids.codes).tolist(), strict=True))
    none = pd.DataFrame()
    known = Known(judged.past, pd.Series(dtype=str), none, leaf_of_item, task.trie.n_ids, 0.0)
    method = times_disliked(known, judged.users)
    assert method.sets is not None
    return draws_of(judged, method.sets, leaf_of_item, {"generation": method.score})


def _trained_on_titles(grid: Grid, link: Link) -> Trained:
    begin = time.monotonic()
    task = _task(grid, replace(link, settings=(), steps=(WARM_UP,)))
    candidates = judged_of(grid, link.dataset, link.warehouse).candidates
    model = TitleModel(task, first_student(task), cast("Kind", link.settings[0]))
    with tempfile.TemporaryDirectory() as work:
        measured = model.fit(Path(work), Budget(max_steps=grid.title_updates))
    measured = {"step": link.settings[0], **measured, "seconds": round(time.monotonic() - begin, 1)}
    begin = time.monotonic()
    draws = mean_over_users(chosen(candidates, model.scores(candidates)))
    figures = {"candidate accuracy, generation": np.round(draws, 5).tolist()}
    return Trained("", [measured], figures, round(time.monotonic() - begin, 1))
