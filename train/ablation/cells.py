"""The cells of the ablation, worked out by several processes; each is a file once it is finished."""

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.pool import AsyncResult
from pathlib import Path

from train.ablation.grid import Grid, Link, Trained
from train.ablation.variants import LADDER, TITLES, VARIANTS, Variant, has_grpo, with_rate, without_steps

log = logging.getLogger("negrec.ablation")


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
    chosen = [v for v in VARIANTS if v.name in names or (not names and (reads or v.name not in TITLES))]
    chosen = without_steps(chosen, without)
    found = []
    for seed in seeds:
        for variant in chosen:
            for rate in rates if has_grpo(variant) and rates else ("",):
                own = with_rate(variant, rate) if rate else variant
                found += [
                    Cell(own, Link(dataset, path, seed, own.settings, own.steps), grid.preset)
                    for dataset, path in warehouses.items()
                ]
    return sorted(found, key=lambda cell: cell.variant.name.split("@")[0] not in LADDER)


def run(grid: Grid, wanted: Sequence[Cell], jobs: int, minutes: float) -> int:
    """Work out cells, `jobs` links at once; how many are not finished in the end."""
    # Here, because it takes seconds, which nothing else needs.
    from train.ablation.links import run_link

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
