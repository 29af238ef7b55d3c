"""`make tables`: cells are resumed and failures kept, and the report says what the cells hold."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from negrec_core.metrics import Estimate
from train import tables
from train.report import write_report
from train.summary import summarise
from train.tables import BESIDE, DATASETS, Dataset, run_cell

TOY = Dataset("movielens", "Toy data", "toy", ("import {data}/log", "train x --seed {seed}", "evaluate"))


FIGURES = ["blocked at 1 %", "blocked at 5 %", "AUC", "AUC within user", "candidate accuracy"]
FIGURES += [f"likes lost at {recall} %" for recall in (10, 20, 50)]


def draws(value, width=0.02):
    """A figure and resamples of it whose 95 % interval reaches `width` to either side."""
    return value + width * np.concatenate([[0], np.linspace(-1, 1, 201) / 0.95])


def evaluation(ours=0.3, other=0.2):
    """(what `negrec evaluate` writes, the draws beside it)"""
    of = {
        "negrec": dict.fromkeys([*FIGURES, "FHR@20"], draws(ours)),
        "similarity alone": dict.fromkeys(FIGURES, draws(0.9)),
        "item rate": dict.fromkeys([*FIGURES, "FHR@20"], draws(other, 0.01)),
    }
    share = {"value": 0.1, "low": 0.05, "high": 0.15}
    found = {
        "users": 10,
        "dislikes": 20,
        "likes": 30,
        "candidates": {"users": 9, "whole": 5, "other_days": 4, "alone": 1},
        "coverage": {"top-1": {"next": share, "horizon": share}},
        "rows": [{"method": method} for method in of],
    }
    return found, of


def write(folder, found, of):
    rows = [{"method": m, "figure": f, "draws": values} for m, own in of.items() for f, values in own.items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation.parquet")
    (folder / "evaluation.json").write_text(json.dumps(found))


@pytest.fixture
def negrec(monkeypatch):
    """Commands that only note what they were asked; `fail` names one that does not work."""
    made = SimpleNamespace(asked=[], fail=None, finds=evaluation())

    def run(command, **_):
        words = command[command.index("--config") + 2 :]
        work = Path(command[command.index("--warehouse") + 1])
        made.asked.append(words)
        if words[0] == made.fail:
            return SimpleNamespace(returncode=3, stderr="12:00 at work\n\nnegrec: no such | folder\n")
        if words[0] == "evaluate":
            write(work, *made.finds)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(tables.subprocess, "run", run)
    return made


def run(root, seed=8, recbole=None):
    return run_cell(TOY, seed, Path("/public data"), root / "cells", recbole)


def cell(root, seed=8):
    return json.loads((root / "cells" / f"movielens-{seed}.json").read_text())


def report(root):
    """Lines of the report on all cells there are."""
    summarise(sorted((root / "cells").glob("*.json")), root / "results" / "movielens.json")
    write_report(root / "results", ["movielens", "steam"], root / "RESULTS.md")
    return (root / "RESULTS.md").read_text().splitlines()


def test_a_cell_runs_its_commands_once(tmp_path, negrec):
    assert run(tmp_path)
    assert negrec.asked == [["import", "/public data/log"], ["train", "x", "--seed", "8"], ["evaluate"]]
    found = cell(tmp_path)
    assert found["error"] is None
    assert found["evaluation"] == evaluation()[0]
    assert pq.read_table(tmp_path / "cells" / "movielens-8.parquet").num_rows == 26
    commands = ["negrec import {data}/log", "negrec train x --seed {seed}", "negrec evaluate"]
    assert [step["command"] for step in found["steps"]] == commands
    assert not (tmp_path / "cells" / "movielens-8").exists()
    assert run(tmp_path)
    assert len(negrec.asked) == 3


def test_a_cell_without_the_sequential_recommenders_is_worked_out_again_beside_them(tmp_path, negrec):
    recbole = Path("/recbole environment/python")
    assert run(tmp_path)
    assert run(tmp_path, recbole=recbole)
    assert negrec.asked[-1] == ["evaluate", "--sequential", str(recbole)]
    assert len(negrec.asked) == 6
    assert run(tmp_path, recbole=recbole)
    assert run(tmp_path)
    assert len(negrec.asked) == 6


def test_a_failure_is_kept_and_the_next_run_goes_on_from_there(tmp_path, negrec):
    negrec.fail = "train"
    assert not run(tmp_path)
    assert cell(tmp_path)["error"] == "exit code 3: negrec: no such | folder"
    assert "evaluation" not in cell(tmp_path)
    failed = [line for line in report(tmp_path) if "Toy data" in line]
    assert len(failed) == 1
    assert "exit code 3: negrec: no such / folder" in failed[0]
    negrec.fail = None
    assert run(tmp_path)
    assert [words[0] for words in negrec.asked] == ["import", "train", "train", "evaluate"]
    assert cell(tmp_path)["error"] is None
    assert len(cell(tmp_path)["steps"]) == 3


def test_an_interrupted_cell_goes_on_from_there(tmp_path, negrec, monkeypatch):
    working = tables.subprocess.run

    def interrupted(command, **options):
        if "train" in command:
            raise KeyboardInterrupt
        return working(command, **options)

    monkeypatch.setattr(tables.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not list((tmp_path / "cells").glob("*.json"))
    monkeypatch.setattr(tables.subprocess, "run", working)
    assert run(tmp_path)
    assert [words[0] for words in negrec.asked] == ["import", "train", "evaluate"]


def test_a_cell_that_was_killed_before_it_was_written_is_written_by_the_next_run(
    tmp_path, negrec, monkeypatch
):
    writing = tables._write

    def killed(path, content):
        if "evaluation" in content:
            raise KeyboardInterrupt
        writing(path, content)

    monkeypatch.setattr(tables, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(tables, "_write", writing)
    assert run(tmp_path)
    assert len(negrec.asked) == 3
    assert any(line.startswith("| negrec | 0.300") for line in report(tmp_path))


def test_the_report_gives_means_over_seeds_and_the_best_other_method(tmp_path, negrec):
    for seed, ours in ((7, 0.3), (8, 0.5)):
        negrec.finds = evaluation(ours)
        run(tmp_path, seed)
    lines = report(tmp_path)
    best = "item rate | 0.200 | 2.00 | +0.200 [+0.190 +0.210] ±0.141 |"
    assert f"| Toy data | blocked at 1 % | 0.400 [0.380 0.420] | {best}" in lines
    assert any("likes lost at 10 % | 0.400 [0.380 0.420] | item rate" in line for line in lines)
    # A method that predicts no sets, and one without a figure.
    assert any(line.startswith("| similarity alone | - | - ") for line in lines)
    assert any("seeds 7, 8." in line for line in lines)
    assert (tmp_path / "results" / "movielens.png").stat().st_size < 100_000
    assert "![Toy data](results/movielens.png)" in lines


def test_an_interval_is_that_of_the_mean_over_seeds_in_each_resample(tmp_path, negrec):
    """Not the mean of the seeds' intervals, which is wider: what one seed misses another finds."""
    rng, expected = np.random.default_rng(1), []
    for seed in (7, 8, 9):
        found, of = evaluation()
        of["negrec"]["FHR@20"], of["item rate"]["FHR@20"] = rng.normal(0.3, 0.1, (2, 201))
        expected.append(of["negrec"]["FHR@20"] - of["item rate"]["FHR@20"])
        negrec.finds = found, of
        run(tmp_path, seed)
    report(tmp_path)
    rows = json.loads((tmp_path / "results" / "movielens.json").read_text())["rows"]
    shown = next(row for row in rows if row["method"] == "item rate")["difference"]["FHR@20"]
    mean = Estimate.of(np.mean(expected, 0))
    assert [shown[end] for end in ("value", "low", "high")] == pytest.approx(
        [mean.value, mean.low, mean.high], abs=1e-5
    )
    assert shown["spread"] == pytest.approx(np.std([one[0] for one in expected], ddof=1), abs=1e-5)
    assert shown["high"] - shown["low"] < np.mean(
        [np.ptp(np.percentile(one[1:], [2.5, 97.5])) for one in expected]
    )


def test_a_method_of_one_seed_is_named_so_and_stands_beside_ours_of_that_seed(tmp_path, negrec):
    for seed, ours in ((7, 0.3), (8, 0.5)):
        found, of = evaluation(ours)
        if seed == 7:
            of["SASRec"] = dict.fromkeys([*FIGURES, "FHR@20"], draws(0.25, 0.01))
        negrec.finds = found, of
        run(tmp_path, seed)
    lines = report(tmp_path)
    best = "SASRec (seed 7) | 0.250 | 1.20 | +0.050 [+0.040 +0.060] |"
    assert f"| Toy data | blocked at 1 % | 0.300 | {best}" in lines
    assert any(line.startswith("| SASRec (seed 7) | 0.250 [0.240 0.260] |") for line in lines)
    assert any(line.startswith("| negrec | 0.400 [0.380 0.420] |") for line in lines)


def test_a_command_that_really_fails_leaves_its_line(tmp_path):
    steam = next(dataset for dataset in DATASETS if dataset.name == "steam")
    assert not run_cell(steam, 7, tmp_path / "nowhere", tmp_path / "cells")
    found = json.loads((tmp_path / "cells" / "steam-7.json").read_text())
    assert found["error"].startswith("exit code ")
    assert "nowhere" in found["error"]


def test_the_commands_of_all_data_sets_are_known(tmp_path):
    """A command or an option that is not there is refused before --help is looked at."""
    from typer.testing import CliRunner

    from jobs.cli import app

    for dataset in DATASETS:
        for step in dataset.steps:
            step += BESIDE if step.startswith("evaluate") else ""
            values = {"data": tmp_path, "seed": 7, "work": tmp_path, "recbole": tmp_path}
            words = [word.format(**values) for word in step.split()]
            given = ["--warehouse", str(tmp_path / "none"), "--config", dataset.config]
            help_ = CliRunner().invoke(app, [*given, *words, "--help"])
            assert help_.exit_code == 0, step
