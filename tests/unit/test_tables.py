"""`make tables`: cells are resumed and failures kept, and the report says what the cells hold."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from train import tables
from train.report import write_report
from train.tables import BESIDE, DATASETS, Dataset, run_cell

TOY = Dataset("movielens", "Toy data", "toy", ("import {data}/log", "train x --seed {seed}", "evaluate"))


def estimate(value, width=0.02):
    return {"value": value, "low": value - width, "high": value + width}


def evaluation(ours=0.3, other=0.2):
    names = ["blocked at 1 %", "blocked at 5 %", "AUC", "AUC within user", "candidate accuracy"]
    names += [f"likes lost at {recall} %" for recall in (10, 20, 50)]
    figures = {
        "negrec": dict.fromkeys([*names, "FHR@20"], estimate(ours)),
        "similarity alone": dict.fromkeys(names, estimate(0.9)),
        "item rate": dict.fromkeys([*names, "FHR@20"], estimate(other)),
    }
    return {
        "users": 10,
        "dislikes": 20,
        "likes": 30,
        "candidates": {"users": 9, "whole": 5, "other_days": 4, "alone": 1},
        "coverage": {"top-1": {"next": estimate(0.1), "horizon": estimate(0.5)}},
        "rows": [
            {
                "method": method,
                "figures": own,
                "difference": {}
                if method == "negrec"
                else {f: estimate(ours - own[f]["value"]) for f in own},
            }
            for method, own in figures.items()
        ],
    }


@pytest.fixture
def negrec(monkeypatch):
    """Commands that only note what they were asked; `fail` names one that does not work."""
    made = SimpleNamespace(asked=[], fail=None)

    def run(command, **_):
        words = command[command.index("--config") + 2 :]
        work = Path(command[command.index("--warehouse") + 1])
        made.asked.append(words)
        if words[0] == made.fail:
            return SimpleNamespace(returncode=3, stderr="12:00 at work\n\nnegrec: no such | folder\n")
        if words[0] == "evaluate":
            (work / "evaluation.json").write_text(json.dumps(evaluation()))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(tables.subprocess, "run", run)
    return made


def run(root, seed=8, recbole=None):
    return run_cell(TOY, seed, Path("/public data"), root / "work", root / "results", recbole)


def cell(root, seed=8):
    return json.loads((root / "results" / f"movielens-{seed}.json").read_text())


def test_a_cell_runs_its_commands_once(tmp_path, negrec):
    assert run(tmp_path)
    assert negrec.asked == [["import", "/public data/log"], ["train", "x", "--seed", "8"], ["evaluate"]]
    found = cell(tmp_path)
    assert found["error"] is None
    assert found["evaluation"] == evaluation()
    commands = ["negrec import {data}/log", "negrec train x --seed {seed}", "negrec evaluate"]
    assert [step["command"] for step in found["steps"]] == commands
    assert not (tmp_path / "work").exists()
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
    write_report(tmp_path / "results", ["movielens"], tmp_path / "RESULTS.md")
    failed = [line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if "Toy data" in line]
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
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(tables.subprocess, "run", working)
    assert run(tmp_path)
    assert [words[0] for words in negrec.asked] == ["import", "train", "evaluate"]


def test_the_report_gives_means_over_seeds_and_the_best_other_method(tmp_path, negrec):
    for seed, ours in ((7, 0.3), (8, 0.5)):
        run(tmp_path, seed)
        path = tmp_path / "results" / f"movielens-{seed}.json"
        path.write_text(json.dumps({**cell(tmp_path, seed), "evaluation": evaluation(ours)}))
    write_report(tmp_path / "results", ["movielens", "steam"], tmp_path / "RESULTS.md")
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    best = "item rate | 0.200 | 2.00 | +0.200 [+0.180 +0.220] |"
    assert f"| Toy data | blocked at 1 % | 0.400 [0.380 0.420] | {best}" in lines
    assert any("likes lost at 10 % | 0.400 [0.380 0.420] | item rate" in line for line in lines)
    # A method that predicts no sets, and one without a figure.
    assert any(line.startswith("| similarity alone | - | - ") for line in lines)
    assert any("seeds 7, 8." in line for line in lines)
    assert (tmp_path / "results" / "movielens.png").stat().st_size < 100_000
    assert "![Toy data](results/movielens.png)" in lines


def test_a_method_of_one_seed_is_named_so_and_stands_beside_ours_of_that_seed(tmp_path, negrec):
    for seed, ours in ((7, 0.3), (8, 0.5)):
        run(tmp_path, seed)
        found = evaluation(ours)
        if seed == 7:
            found["rows"].append({**found["rows"][-1], "method": "SASRec"})
            found["rows"][-1]["figures"] = {f: estimate(0.25) for f in found["rows"][-1]["figures"]}
            found["rows"][-1]["difference"] = {f: estimate(0.05) for f in found["rows"][-1]["figures"]}
        path = tmp_path / "results" / f"movielens-{seed}.json"
        path.write_text(json.dumps({**cell(tmp_path, seed), "evaluation": found}))
    write_report(tmp_path / "results", ["movielens"], tmp_path / "RESULTS.md")
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    best = "SASRec (seed 7) | 0.250 | 1.20 | +0.050 [+0.030 +0.070] |"
    assert f"| Toy data | blocked at 1 % | 0.300 [0.280 0.320] | {best}" in lines
    assert any(line.startswith("| SASRec (seed 7) | 0.250 [0.230 0.270] |") for line in lines)
    assert any(line.startswith("| negrec | 0.400 [0.380 0.420] |") for line in lines)


def test_a_command_that_really_fails_leaves_its_line(tmp_path):
    steam = next(dataset for dataset in DATASETS if dataset.name == "steam")
    assert not run_cell(steam, 7, tmp_path / "nowhere", tmp_path / "work", tmp_path / "results")
    found = json.loads((tmp_path / "results" / "steam-7.json").read_text())
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
