"""`make tables`: train and judge negrec on every data set with every seed (DESIGN section 8).

A cell is one data set with one seed, worked out by the commands of the README in a warehouse of its own. A
finished cell is a file in `warehouse/tables` and is not worked out again; one that was interrupted or failed
goes on with the command that it had come to. In the end the cells of each data set become a file in
`train/results`, and `train/RESULTS.md` is made from all of those.

With `--sequential` the first seed of each public data set is judged beside RecBole's models, too, minutes
to an hour for each; a cell that was finished without them is worked out again.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negrec_core import __version__
from train.report import write_report
from train.summary import summarise

log = logging.getLogger("negrec.tables")

SEEDS = (7, 8, 9)
_HERE = Path(__file__).resolve().parent
_REPO = _HERE.parent
# What a cell's last step gets to judge RecBole's models, too.
BESIDE = " --sequential {recbole}"


@dataclass(frozen=True)
class Dataset:
    """How a data set is judged.

    Attributes:
        name: in file names and on the command line.
        title: in the report.
        config: overlays.
        steps: arguments of `negrec` after the global options; {data}, {seed} and {work} are filled in.
        result: what the last step writes, under {work}, with the draws beside it.
    """

    name: str
    title: str
    config: str
    steps: tuple[str, ...]
    result: str = "evaluation.json"


def _trained(ds: str) -> tuple[str, ...]:
    return (f"train codebook --until {ds} --seed {{seed}}", f"train generator --until {ds} --seed {{seed}}")


def _judged(ds: str) -> tuple[str, ...]:
    return (f"run --ds {ds}", f"evaluate --ds {ds} --seed {{seed}} --out {{work}}/evaluation.json")


def _archive(importer: str, folder: str, ds: str) -> tuple[str, ...]:
    return (f"import {importer} {{data}}/{folder}", f"anchors --ds {ds}", *_trained(ds), *_judged(ds))


def _demo(name: str, title: str, users: int) -> Dataset:
    return Dataset(name, title, "", (f"demo --users {users} --seed {{seed}}",), "demo/evaluation.json")


DATASETS = (
    Dataset(
        "movielens",
        "MovieLens latest-small",
        "movielens",
        _archive("movielens", "ml-latest-small", "2018-09-24"),
    ),
    Dataset("ml-100k", "MovieLens 100K", "movielens", _archive("movielens", "ml-100k", "1998-04-22")),
    Dataset("steam", "Steam", "steam", _archive("steam", "steam-au", "2015-12-31")),
    Dataset(
        "kuairand",
        "KuaiRand, 2022-05-01",
        "kuairand",
        (
            "import kuairand {data}/kuairand-pure --start 2022-04-25",
            "backfill --start 2022-04-25 --end 2022-05-08",
            *_trained("2022-05-01"),
            *_judged("2022-05-01"),
        ),
    ),
    _demo("demo", "Demo world", 5000),
    _demo("small-demo", "Demo world, 1,500 users", 1500),
)
_FULL = tuple(dataset.name for dataset in DATASETS if dataset.name != "small-demo")
_QUICK = ("movielens", "small-demo")


def run_cell(dataset: Dataset, seed: int, data: Path, cells: Path, recbole: Path | None = None) -> bool:
    """Work out one cell, unless it is finished; a failure is kept with its last line of error.

    Args:
        dataset: what to run.
        seed: of the models, the demo world and the evaluation.
        data: folder of the public data sets.
        cells: folder of the cells; their warehouses lie there, too, until they are finished.
        recbole: Python of RecBole's environment, whose models are then judged, too.

    Returns:
        Whether it is finished.
    """
    work = cells / f"{dataset.name}-{seed}"
    path = work.with_name(f"{work.name}.json")
    *before, last = dataset.steps
    if recbole:
        last += BESIDE
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["error"] is None and (not recbole or known["steps"][-1]["command"].endswith(BESIDE)):
            log.info("%s: finished before", path.stem)
            return True
    work.mkdir(parents=True, exist_ok=True)
    done_file = work / "steps.json"
    done = json.loads(done_file.read_text(encoding="utf-8")) if done_file.exists() else []
    cell: dict[str, Any] = {
        "dataset": dataset.name,
        "title": dataset.title,
        "seed": seed,
        "version": __version__,
        "cores": os.cpu_count(),
        "steps": done,
        "error": None,
    }
    values = {"data": data, "seed": seed, "work": work, "recbole": recbole}
    for step in [*before, last][len(done) :]:
        begin = time.monotonic()
        error = _negrec(dataset.config, step, values)
        done.append({"command": f"negrec {step}", "seconds": round(time.monotonic() - begin, 1)})
        log.info("%s: negrec %s: %s", path.stem, step, error or f"{done[-1]['seconds']} s")
        if error:
            cell["error"] = error
            break
        _write(done_file, done)
    else:
        result = work / dataset.result
        cell["evaluation"] = json.loads(result.read_text(encoding="utf-8"))
        # A copy, so that whoever is killed before the cell is written finds it here again.
        shutil.copyfile(result.with_suffix(".parquet"), path.with_suffix(".parquet"))
    _write(path, cell)
    if cell["error"] is None:
        shutil.rmtree(work)
    return cell["error"] is None


def _negrec(config: str, step: str, values: dict[str, Any]) -> str | None:
    """Run one command; its last line of error if it failed."""
    words = [word.format(**values) for word in step.split()]
    program = [sys.executable, "-m", "jobs.cli", "--warehouse", str(values["work"]), "--config", config]
    ended = subprocess.run([*program, *words], cwd=_REPO, capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        return None
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    return f"exit code {ended.returncode}: {lines[-1] if lines else 'no message'}"


def _write(path: Path, content: Any) -> None:
    """A file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m train.tables`."""
    parser = argparse.ArgumentParser(prog="python -m train.tables", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of MovieLens and a small demo world")
    parser.add_argument("--only", action="append", choices=[d.name for d in DATASETS], help="these data sets")
    parser.add_argument("--seed", action="append", type=int, help=f"these seeds; default: {SEEDS}")
    parser.add_argument(
        "--sequential", type=Path, metavar="PYTHON", help="RecBole's models, too (`make recbole`)"
    )
    parser.add_argument("--report", action="store_true", help="only write the report of the cells there are")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    data = Path(os.environ.get("NEGREC_DATA", _REPO.parent / "shared" / "data")).absolute()
    names = given.only or (_QUICK if given.quick else _FULL)
    seeds = given.seed or (SEEDS[:1] if given.quick else SEEDS)
    cells, results = _REPO / "warehouse" / "tables", _HERE / "results"
    # All data sets with one seed first: an early look at everything.
    asked = [(d, seed) for seed in seeds for d in DATASETS if d.name in names and not given.report]
    recbole = given.sequential and given.sequential.absolute()
    finished = []
    for d, seed in asked:
        # The demo judges itself.
        beside = recbole if seed == SEEDS[0] and d.steps[-1].startswith("evaluate") else None
        finished.append(run_cell(d, seed, data, cells, beside))
    for d in DATASETS:
        if own := sorted(cells.glob(f"{d.name}-*.json")):
            summarise(own, results / f"{d.name}.json")
    write_report(results, [dataset.name for dataset in DATASETS], _HERE / "RESULTS.md")
    if not all(finished):
        sys.exit(f"{finished.count(False)} of {len(finished)} cells failed: see {_HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
