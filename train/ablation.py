"""`python -m train.ablation`: what each part of the curriculum adds (DESIGN sections 7 and 8).

A grid of variants of the generator and seeds, over warehouses that were backfilled and hold the samples of
all steps (`negrec --config movielens,conrec train generator` makes them). No Spark is needed. A variant is a
chain of training steps; chains that begin alike share what they have in common, which is trained once. Every
variant predicts 20 IDs for each judged user with the torch engine and is compared with another one, its
`above`, on the same resampled users.

A finished cell is a file and is not worked out again; a failed one keeps its error and is tried again. At the
end of `--minutes` what is unfinished is stopped: finished cells and finished steps stay.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import TYPE_CHECKING, Any

from negrec_core.config import Config, load_config
from train.report import write_report
from train.tables import DATASETS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from train.steps import Student, Task

log = logging.getLogger("negrec.ablation")

SEEDS = (7, 8, 9)
_HERE = Path(__file__).resolve().parent
# Of what judges: the users drawn, the candidates and the resamples are the same for all cells of a data set.
_JUDGE_SEED = 7
# Every seed's models start with tokens for titles, whether they learn to translate or not.
_OVERLAY = "conrec"
# Prompt and beam tokens at once where a GPU has room for them.
_GPU_BATCH_TOKENS = 131_072
_NEXT = "generator.grpo.rewarded=next"
_PLAIN, _COLLABORATIVE = "plain", "collaborative"
_TIMES_DISLIKED, _TITLES = "times_disliked", ("tallrec", "instructrec")
_NO_SETTINGS = (_COLLABORATIVE, _TIMES_DISLIKED, *_TITLES)


@dataclass(frozen=True)
class Step:
    """One training of a chain.

    Attributes:
        name: of `train.generator.STEPS`.
        settings: a.b=value, on top of the data set's; `plain` is one stage of GRPO for as many updates as
            all stages have, `as_grpo` as many updates as GRPO makes.
    """

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: in file names and on the command line.
        title: in the report.
        steps: the chain; without any, what `settings` names: the items disliked most often, or a
            title-based model, which needs a preset that can read.
        above: the row that it is compared with.
        settings: a.b=value, of all its steps; `collaborative` takes IDs of `train.collaborative`.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    above: str = ""
    settings: tuple[str, ...] = ()


_TRANSLATION, _ALIGNMENT, _WARM_UP = Step("translation"), Step("alignment"), Step("warm_up")
_MORE = Step("warm_up", ("as_grpo",))
_NEGATIVES = ("generator.context=negatives",)
_UP_TO_WARM_UP = (_TRANSLATION, _ALIGNMENT, _WARM_UP)
_ALIGNED_LAST = (_TRANSLATION, _WARM_UP, _ALIGNMENT)


def _grpo(scheme: str, *settings: str) -> Step:
    return Step("grpo", (f"generator.grpo.scheme={scheme}", *settings))


VARIANTS = (
    Variant("times-disliked", "times disliked, for reference", (), settings=(_TIMES_DISLIKED,)),
    Variant("tallrec", "TALLRec's task, by titles", (), settings=_TITLES[:1]),
    Variant("instructrec", "InstructRec's task, by titles", (), settings=_TITLES[1:]),
    Variant("warm-up", "warm-up alone (TIGER's task)", (_WARM_UP,)),
    Variant("translation", "+ translation (LC-Rec's tasks)", (_TRANSLATION, _WARM_UP), "warm-up"),
    Variant("alignment", "+ item-level alignment", _UP_TO_WARM_UP, "translation"),
    Variant(
        "grpo-next", "+ progressive GRPO, next dislike", (*_UP_TO_WARM_UP, _grpo("a", _NEXT)), "alignment"
    ),
    Variant("grpo-a", "+ future dislikes (scheme a)", (*_UP_TO_WARM_UP, _grpo("a")), "grpo-next"),
    Variant("grpo-c", "+ penalty of future likes (scheme c)", (*_UP_TO_WARM_UP, _grpo("c")), "grpo-a"),
    Variant("grpo-b", "scheme b", (*_UP_TO_WARM_UP, _grpo("b")), "grpo-c"),
    Variant("grpo-d", "scheme d", (*_UP_TO_WARM_UP, _grpo("d")), "grpo-c"),
    Variant("grpo-e", "scheme e", (*_UP_TO_WARM_UP, _grpo("e")), "grpo-c"),
    Variant("grpo-plain", "plain GRPO (scheme c)", (*_UP_TO_WARM_UP, _grpo("c", _PLAIN)), "grpo-c"),
    Variant("more-warm-up", "more warm-up instead of GRPO", (*_UP_TO_WARM_UP, _MORE), "alignment"),
    Variant("warm-up-negatives", "warm-up alone, dislikes alone", (_WARM_UP,), "warm-up", _NEGATIVES),
    Variant(
        "translation-negatives",
        "LC-Rec's tasks, dislikes alone",
        (_TRANSLATION, _WARM_UP),
        "translation",
        _NEGATIVES,
    ),
    Variant("collaborative", "IDs from co-occurrence (P5-CID)", (_WARM_UP,), "warm-up", (_COLLABORATIVE,)),
    Variant("aligned-last", "alignment after the warm-up", _ALIGNED_LAST, "alignment"),
    Variant("forget-warm-up", "then more warm-up", (*_ALIGNED_LAST, _MORE), "aligned-last"),
    Variant("forget-plain", "then plain GRPO", (*_ALIGNED_LAST, _grpo("c", _PLAIN)), "aligned-last"),
    Variant("forget-grpo", "then progressive GRPO", (*_ALIGNED_LAST, _grpo("c")), "aligned-last"),
)

_LADDER = ("times-disliked", "warm-up", "translation", "alignment", "grpo-next", "grpo-a", "grpo-c")


@dataclass(frozen=True)
class Grid:
    """What all cells share.

    Attributes:
        work: folder of the trained steps and, under `cells`, of the results.
        preset: of conf/models.
        settings: a.b=value, on top of the data set's overlays.
        users: most judged users; 0: all.
    """

    work: Path
    preset: str
    settings: tuple[str, ...]
    users: int

    def config(self, dataset: str, settings: Sequence[str] = ()) -> Config:
        """The configuration of a data set with settings on top."""
        overlays = next(d.config for d in DATASETS if d.name == dataset)
        own = (f"generator.preset={self.preset}", *self.settings)
        base = load_config([overlays, _OVERLAY], own, {})
        stages = base.generator.grpo.stages
        updates = sum(stage.steps for stage in stages)
        last = stages[-1]
        plain = f"generator.grpo.stages=[{{context: {last.context}, kl: {last.kl}, steps: {updates}}}]"
        named = {_PLAIN: plain, "as_grpo": f"generator.warm_up.max_steps={updates}"}
        chosen = [named.get(s, s) for s in settings if s not in _NO_SETTINGS]
        return load_config([overlays, _OVERLAY], [*own, *chosen], {})


@dataclass(frozen=True)
class Link:
    """A chain up to one of its steps, on one data set with one seed: what a worker does at once."""

    dataset: str
    warehouse: Path
    seed: int
    settings: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def before(self) -> "Link":
        """The chain without its last step."""
        return replace(self, steps=self.steps[:-1])


@dataclass(frozen=True)
class Trained:
    """What became of a link.

    Attributes:
        version: of the trained step in `models/training`.
        measured: per step of the chain, its name and the metrics of its manifest.
        figures: figure -> value and resamples, where the link is a whole variant.
        seconds: what judging took.
        error: why there is nothing.
    """

    version: str
    measured: list[dict[str, Any]]
    figures: dict[str, list[float]]
    seconds: float
    error: str = ""


def run_link(grid: Grid, link: Link, before: Trained | None, judged: bool) -> Trained:
    """Train the last step of a link, if it was not trained before, and judge what comes out."""
    from negrec_core.errors import NegrecError

    try:
        return _run_link(grid, link, before, judged)
    except NegrecError as error:
        return Trained("", [], {}, 0.0, str(error))
    except Exception as error:
        log.exception("%s: seed %d: %s", link.dataset, link.seed, [step.name for step in link.steps])
        return Trained("", [], {}, 0.0, f"{type(error).__name__}: {error}".splitlines()[0])


def _run_link(grid: Grid, link: Link, before: Trained | None, judged: bool) -> Trained:
    from negrec_core.artefacts import open_version
    from train.generator import TRAINING, first_student, run_step
    from train.steps import Student

    begin = time.monotonic()
    if not link.steps:
        judge = _figures_of_titles if link.settings[0] in _TITLES else _figures_of_times_disliked
        figures = judge(grid, link)
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


def _task(grid: Grid, link: Link) -> "Task":
    from negrec_core.delta import DeltaStore
    from negrec_core.generator import CODEBOOK, newest, open_codebook
    from negrec_core.progress import silent
    from negrec_core.semantic_ids import load_semantic_ids
    from train.steps import Task

    if _COLLABORATIVE in link.settings:
        return _task_with_collaborative_ids(grid, link)
    config = grid.config(link.dataset, (*link.settings, *link.steps[-1].settings))
    store, models = DeltaStore(link.warehouse), link.warehouse / "models"
    until = _until(link.warehouse)
    codebook, manifest = open_codebook(models, newest(models, CODEBOOK, until).version)
    ids = load_semantic_ids(store, manifest.version, until)
    return Task(store, config, until, link.seed, codebook, manifest, ids, silent)


def _task_with_collaborative_ids(grid: Grid, link: Link) -> "Task":
    """With IDs that are made where they are missing, and kept in the warehouse."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from negrec_core.artefacts import list_versions, new_version, open_version, seal
    from negrec_core.codebook import Codebook
    from negrec_core.semantic_ids import SemanticIds
    from train.collaborative import collaborative_ids

    task = _task(grid, replace(link, settings=tuple(s for s in link.settings if s != _COLLABORATIVE)))
    models, until = link.warehouse / "models", task.until
    if not list_versions(models, _COLLABORATIVE):
        past = _judged(grid, link.dataset, link.warehouse).past
        settings = task.config.codebook
        codebook, ids = collaborative_ids(past, settings.levels, settings.codes_per_level, _JUDGE_SEED)
        made = new_version(models, _COLLABORATIVE)
        codebook.save(made)
        (made / "items.json").write_text(json.dumps(ids.items), encoding="utf-8")
        save_file({"codes": ids.codes}, made / "ids.safetensors")
        seal(made, parameters={"until": until}, metrics={}, inputs={})
    path, manifest = open_version(models, _COLLABORATIVE, list_versions(models, _COLLABORATIVE)[-1].version)
    items = json.loads((path / "items.json").read_text(encoding="utf-8"))
    codes = load_file(path / "ids.safetensors")["codes"].astype(np.int32)
    found = SemanticIds(items, codes, {item: n for n, item in enumerate(items)})
    return replace(task, codebook=Codebook.load(path), codebook_manifest=manifest, ids=found)


def _until(warehouse: Path) -> str:
    """The log date that the warehouse's newest codebook was made for."""
    from negrec_core.generator import CODEBOOK, newest

    return str(newest(warehouse / "models", CODEBOOK, "9999-12-31").parameters["until"])


@dataclass(frozen=True)
class _Judged:
    """Whom and what the cells of a data set are judged by; see `train.evaluate`."""

    past: "pd.DataFrame"
    future: "pd.DataFrame"
    exposures: "pd.DataFrame"
    candidates: "pd.DataFrame"

    @property
    def users(self) -> list[str]:
        return sorted(self.future["user_id"].unique())


@lru_cache(maxsize=1)
def _judged(grid: Grid, dataset: str, warehouse: Path) -> _Judged:
    import numpy as np

    from negrec_core.delta import DeltaStore
    from train.baselines import judged
    from train.candidates import draw_candidates
    from train.evaluate import load_shown, split_feedback

    store, config, ds = DeltaStore(warehouse), grid.config(dataset), _until(warehouse)
    past, future = split_feedback(store, config, ds)
    shown = load_shown(store, config, ds)
    users = np.sort(future["user_id"].unique())
    if 0 < grid.users < len(users):
        users = np.random.default_rng(_JUDGE_SEED).choice(users, grid.users, replace=False)
        future, shown = future[future["user_id"].isin(users)], shown[shown["user_id"].isin(users)]
    candidates = draw_candidates(future, shown, config.timezone, _JUDGE_SEED)
    return _Judged(past, future, judged(future), candidates.pairs)


def _figures(grid: Grid, link: Link, task: "Task", student: "Student") -> dict[str, list[float]]:
    import numpy as np
    import torch

    from negrec_core.beam.torch_engine import TorchBeamEngine, TorchOptions
    from train.ours import Generation

    judged = _judged(grid, link.dataset, link.warehouse)
    tokens = _GPU_BATCH_TOKENS if torch.cuda.is_available() else TorchOptions.max_batch_tokens
    engine = TorchBeamEngine(student.model, student.prompt.vocabulary, max_batch_tokens=tokens)
    generation = Generation(engine, student.prompt, task.ids, task.config.generation, task.store, task.until)
    sets = generation.sets(judged.users)
    leaf_of_item = dict(zip(task.ids.items, task.trie.find(task.ids.codes).tolist(), strict=True))
    unit = task.codebook.unit(task.trie.codes_of(np.arange(task.trie.n_ids)))

    def similarity(pairs: "pd.DataFrame") -> np.ndarray:
        """Largest cosine to the user's predicted IDs; rounded, because equal ones must tie."""
        leaf = pairs["item_id"].map(leaf_of_item).fillna(-1).to_numpy(np.int64)
        scores = np.full(len(pairs), -1.0)
        for user, rows in pairs.groupby("user_id").indices.items():
            known = rows[leaf[rows] >= 0]
            predicted = sets[str(user)]
            if len(predicted):
                scores[known] = (unit[leaf[known]] @ unit[predicted].T).max(1)
        return scores.round(6)

    return _draws(judged, sets, leaf_of_item, {"generation": generation.score, "similarity": similarity})


def _figures_of_times_disliked(grid: Grid, link: Link) -> dict[str, list[float]]:
    import pandas as pd

    from train.baselines import Known, times_disliked

    task = _task(grid, replace(link, settings=(), steps=(_WARM_UP,)))
    judged = _judged(grid, link.dataset, link.warehouse)
    leaf_of_item = dict(zip(task.ids.items, task.trie.find(task.ids.codes).tolist(), strict=True))
    none = pd.DataFrame()
    known = Known(judged.past, pd.Series(dtype=str), none, leaf_of_item, task.trie.n_ids, 0.0)
    method = times_disliked(known, judged.users)
    assert method.sets is not None
    return _draws(judged, method.sets, leaf_of_item, {"generation": method.score})


def _figures_of_titles(grid: Grid, link: Link) -> dict[str, list[float]]:
    import tempfile
    from typing import cast

    import numpy as np

    from negrec_core.metrics import mean_over_users
    from train.candidates import chosen
    from train.generator import first_student
    from train.titles import Budget, Kind, TitleModel

    task = _task(grid, replace(link, settings=(), steps=(_WARM_UP,)))
    candidates = _judged(grid, link.dataset, link.warehouse).candidates
    model = TitleModel(task, first_student(task), cast("Kind", link.settings[0]))
    with tempfile.TemporaryDirectory() as work:
        model.fit(Path(work), Budget())
    accuracy = chosen(candidates, model.scores(candidates))
    draws = mean_over_users(accuracy, _JUDGE_SEED)
    return {"candidate accuracy, generation": np.round(draws, 5).tolist()}


def _draws(
    judged: _Judged, sets: dict[str, "np.ndarray"], leaf_of_item: dict[str, int], scores: dict[str, Any]
) -> dict[str, list[float]]:
    """Figures with their resamples; those of scores by the name of the score."""
    import numpy as np
    import pandas as pd

    from negrec_core.metrics import mean_over_users
    from train.candidates import chosen
    from train.evaluate import hit_table, predicted_draws, within_user_draws

    found = predicted_draws(hit_table(judged.past, judged.future, sets, leaf_of_item), _JUDGE_SEED)
    columns = ["user_id", "item_id"]
    pairs = pd.concat([judged.exposures[columns], judged.candidates[columns]], ignore_index=True)
    for name, score in scores.items():
        of_exposures, of_candidates = np.split(score(pairs), [len(judged.exposures)])
        accuracy = chosen(judged.candidates, of_candidates)
        found[f"candidate accuracy, {name}"] = mean_over_users(accuracy, _JUDGE_SEED)
        found[f"AUC within user, {name}"] = within_user_draws(of_exposures, judged.exposures, _JUDGE_SEED)
    return {name: np.round(draws, 5).tolist() for name, draws in found.items()}


@dataclass(frozen=True)
class Cell:
    """One variant with one seed on one data set."""

    variant: Variant
    link: Link
    preset: str

    @property
    def name(self) -> str:
        return f"{self.link.dataset}-{self.preset}-{self.variant.name}-{self.link.seed}"


def cells(
    grid: Grid,
    warehouses: dict[str, Path],
    names: Sequence[str],
    rates: Sequence[str],
    seeds: Sequence[int],
    without: Sequence[str] = (),
) -> list[Cell]:
    """The cells of the grid; with learning rates, each variant with GRPO once for every one of them.

    Without names: all variants but those that need a model that can read, unless the preset can. The rows
    that add part by part come first, with all seeds. Chains are made without the steps `without`.
    """
    from train.models import ScratchPreset, load_preset

    reads = not isinstance(load_preset(grid.preset), ScratchPreset)
    chosen = [v for v in VARIANTS if v.name in names or (not names and (reads or v.name not in _TITLES))]
    chosen = _without(chosen, without)
    found = []
    for seed in seeds:
        for variant in chosen:
            for rate in rates if _has_grpo(variant) and rates else ("",):
                own = _with_rate(variant, rate) if rate else variant
                found += [
                    Cell(own, Link(dataset, path, seed, own.settings, own.steps), grid.preset)
                    for dataset, path in warehouses.items()
                ]
    return sorted(found, key=lambda cell: cell.variant.name.split("@")[0] not in _LADDER)


def _without(variants: Sequence[Variant], steps: Sequence[str]) -> list[Variant]:
    """Variants without some steps; of those that are then the same, the first stands for all."""
    same: dict[tuple[Any, ...], str] = {}
    stands_for: dict[str, str] = {}
    found = []
    for variant in variants:
        left = tuple(step for step in variant.steps if step.name not in steps)
        first = same.setdefault((left, variant.settings), variant.name)
        stands_for[variant.name] = first
        if first == variant.name:
            found.append(replace(variant, steps=left, above=stands_for.get(variant.above, variant.above)))
    return found


def _has_grpo(variant: Variant) -> bool:
    return any(step.name == "grpo" for step in variant.steps)


def _with_rate(variant: Variant, rate: str) -> Variant:
    """A variant whose GRPO learns at `rate`, beside others; what it is compared with does, too."""
    above = next((other for other in VARIANTS if other.name == variant.above), None)
    setting = f"generator.grpo.learning_rate={rate}"
    return replace(
        variant,
        name=f"{variant.name}@{rate}",
        title=f"{variant.title}, at {rate}",
        above=f"{variant.above}@{rate}" if above and _has_grpo(above) else variant.above,
        steps=tuple(
            replace(step, settings=(*step.settings, setting)) if step.name == "grpo" else step
            for step in variant.steps
        ),
    )


def run(grid: Grid, wanted: Sequence[Cell], jobs: int, minutes: float) -> int:
    """Work out cells, `jobs` links at once; how many are not finished in the end."""
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    left = [cell for cell in wanted if not _finished(grid, cell)]
    log.info("%d of %d cells to do", len(left), len(wanted))
    of_link: dict[Link, list[Cell]] = {}
    # What most cells wait for comes first, and then the order of the cells.
    waiting: dict[Link, tuple[int, int]] = {}
    for place, cell in enumerate(left):
        of_link.setdefault(cell.link, []).append(cell)
        link = cell.link
        while True:
            needed, first = waiting.get(link, (0, place))
            waiting[link] = (needed - 1, first)
            if len(link.steps) < 2:
                break
            link = link.before
    done: dict[Link, Trained] = {}
    running: dict[Link, AsyncResult[Trained]] = {}
    _share_cores(jobs)
    # Spawned: a process that was forked cannot use the GPU.
    with multiprocessing.get_context("spawn").Pool(jobs, _begin_worker, (jobs,)) as pool:
        while (waiting or running) and time.monotonic() < deadline:
            for link in sorted(waiting, key=waiting.__getitem__):
                before = done.get(link.before) if len(link.steps) > 1 else None
                if len(link.steps) > 1 and before is None:
                    continue
                if before is not None and before.error:
                    done[link] = before
                    _keep(grid, of_link.get(link, []), before)
                    del waiting[link]
                elif len(running) < jobs:
                    judged = link in of_link
                    running[link] = pool.apply_async(run_link, (grid, link, before, judged))
                    del waiting[link]
            for link in [link for link, result in running.items() if result.ready()]:
                trained = done[link] = running.pop(link).get()
                _keep(grid, of_link.get(link, []), trained)
                what = " > ".join(step.name for step in link.steps) or link.settings[0]
                log.info("%s, seed %d: %s: %s", link.dataset, link.seed, what, trained.error or "done")
            time.sleep(0.1)
        # Left by the end of the block, which stops what runs.
    return sum(not _finished(grid, cell) for cell in wanted)


def _share_cores(jobs: int) -> None:
    """Before torch is loaded in a worker: workers share the cores and do not spin on them."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
        TRL_EXPERIMENTAL_SILENCE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )


def _begin_worker(jobs: int) -> None:
    import torch

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _path(grid: Grid, cell: Cell) -> Path:
    return grid.work / "cells" / f"{cell.name}.json"


def _finished(grid: Grid, cell: Cell) -> bool:
    path = _path(grid, cell)
    return path.is_file() and not json.loads(path.read_text(encoding="utf-8"))["error"]


def _keep(grid: Grid, own: Sequence[Cell], trained: Trained) -> None:
    """Write the cells that a link finishes; a file that is there is whole."""
    for cell in own:
        config = grid.config(cell.link.dataset, cell.variant.settings)
        content = {
            "dataset": cell.link.dataset,
            "preset": cell.preset,
            "variant": cell.variant.name,
            "title": cell.variant.title,
            "above": cell.variant.above,
            "seed": cell.link.seed,
            "users": grid.users,
            "steps": [asdict(step) for step in cell.variant.steps],
            "generator": config.generator.model_dump(),
            **asdict(trained),
        }
        path = _path(grid, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(path)


def summarise(folder: Path, out: Path) -> None:
    """Write one file per data set and preset from the cells in a folder: rows in the order of `VARIANTS`.

    A figure is a mean over seeds; its interval is over users, from the mean of the seeds on each resample,
    and so is that of the difference to the row above, over the seeds that both have. `spread` is the
    standard deviation over seeds.
    """
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for dataset, preset in sorted({(cell["dataset"], cell["preset"]) for cell in cells}):
        own = [cell for cell in cells if (cell["dataset"], cell["preset"]) == (dataset, preset)]
        by_variant: dict[str, list[dict[str, Any]]] = {}
        for cell in own:
            by_variant.setdefault(cell["variant"], []).append(cell)
        names = [variant.name for variant in VARIANTS]
        order = sorted(by_variant, key=lambda name: (names.index(name.split("@")[0]), name))
        content = {
            "dataset": dataset,
            "title": next(d.title for d in DATASETS if d.name == dataset),
            "preset": preset,
            "generator": by_variant[order[0]][0]["generator"],
            "rows": [_summary(by_variant[name], by_variant) for name in order],
        }
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        (out / f"{dataset}-{preset}.json").write_text(text, encoding="utf-8")


def _summary(own: list[dict[str, Any]], all_: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    first = own[0]
    judged = {cell["seed"]: cell for cell in own if not cell["error"]}
    above = {cell["seed"]: cell for cell in all_.get(first["above"], []) if not cell["error"]}
    both = sorted(judged.keys() & above.keys())
    some = next(iter(judged.values()), first)
    return {
        **{name: first[name] for name in ("variant", "title", "above", "users")},
        "seeds": sorted(judged),
        "figures": {
            figure: _estimate([cell["figures"][figure] for cell in judged.values()])
            for figure in some["figures"]
        },
        "difference": {
            figure: _estimate(
                [_less(judged[s]["figures"][figure], above[s]["figures"][figure]) for s in both]
            )
            for figure in some["figures"]
            if both and figure in above[both[0]]["figures"]
        },
        "steps": [
            {
                "step": step["step"],
                "measured": {
                    name: _mean([cell["measured"][n][name] for cell in judged.values()])
                    for name in step
                    if all(isinstance(c["measured"][n].get(name), int | float) for c in judged.values())
                },
            }
            for n, step in enumerate(some["measured"] if judged else [])
        ],
        "judging_seconds": _mean([cell["seconds"] for cell in judged.values()]) if judged else None,
        "errors": {str(cell["seed"]): cell["error"] for cell in own if cell["error"]},
    }


def _less(draws: list[float], others: list[float]) -> list[float]:
    return [a - b for a, b in zip(draws, others, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)


def _estimate(draws: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean over seeds with its interval over users, and the spread over seeds."""
    import numpy as np

    from negrec_core.metrics import Estimate

    found = np.array(draws, float)
    estimate = Estimate.of(found.mean(0))
    spread = float(found[:, 0].std(ddof=1)) if len(found) > 1 else float("nan")
    return {name: round(value, 5) for name, value in (asdict(estimate) | {"spread": spread}).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m train.ablation`."""
    parser = argparse.ArgumentParser(prog="python -m train.ablation", description=__doc__)
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=WAREHOUSE", help="a data set of `make tables`"
    )
    parser.add_argument("--work", type=Path, default=Path("warehouse/ablation"), help="trained steps, cells")
    parser.add_argument("--preset", default="tiny", help="of conf/models")
    parser.add_argument("--variant", action="append", default=[], choices=[v.name for v in VARIANTS])
    parser.add_argument("--seed", action="append", type=int, help=f"default: {SEEDS}")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="STEP",
        help="chains without it, where there is nothing to learn it from",
    )
    parser.add_argument(
        "--grpo-rate", action="append", default=[], metavar="RATE", help="GRPO once with each learning rate"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="of all variants")
    parser.add_argument("--users", type=int, default=0, help="judge a sample of so many users")
    parser.add_argument("--jobs", type=int, default=1, help="processes, all on one GPU if there is one")
    parser.add_argument("--minutes", type=float, default=0, help="stop then; what is finished is kept")
    parser.add_argument("--report", action="store_true", help="only put the cells into train/RESULTS.md")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    warehouses = {}
    for pair in given.data:
        name, _, path = pair.partition("=")
        if name not in {dataset.name for dataset in DATASETS} or not path:
            parser.error(f"--data {pair}: give NAME=WAREHOUSE, NAME one of {[d.name for d in DATASETS]}")
        warehouses[name] = Path(path).absolute()
    grid = Grid(given.work.absolute(), given.preset, tuple(given.set), given.users)
    wanted = cells(grid, warehouses, given.variant, given.grpo_rate, given.seed or SEEDS, given.without)
    if given.report:
        summarise(grid.work / "cells", _HERE / "results" / "ablation")
        write_report(_HERE / "results", [dataset.name for dataset in DATASETS], _HERE / "RESULTS.md")
        return
    missing = run(grid, wanted, given.jobs, given.minutes) if wanted else 0
    if missing:
        sys.exit(f"{missing} of {len(wanted)} cells are not finished or failed: see {grid.work / 'cells'}")


if __name__ == "__main__":
    main()
