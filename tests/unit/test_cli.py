"""The command line: its help, its exit codes, and that expected failures are one line."""

import difflib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner, Result

from jobs import cli, daily
from jobs.cli import app
from jobs.pipeline import expected
from negrec_core.delta import DeltaStore
from negrec_core.errors import MissingError

HELP = Path(__file__).resolve().parents[1] / "fixtures" / "help"
REPO = Path(__file__).resolve().parents[2]


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, as words."""
    found = [path]
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += commands(command, (*path, name))
        else:
            found.append((*path, name))
    return found


COMMANDS = commands(typer.main.get_command(app))


def fixture_of(words: tuple[str, ...]) -> Path:
    return HELP / f"{'-'.join(('negrec', *words))}.txt"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "negrec")
def test_help_is_as_kept(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set NEGREC_KEEP_HELP=1 to keep the help as it is now; look at the difference in review."""
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="negrec")
    assert result.exit_code == 0
    file = fixture_of(words)
    if os.environ.get("NEGREC_KEEP_HELP"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(result.stdout, encoding="utf-8")
    kept = file.read_text(encoding="utf-8").splitlines()
    assert not list(difflib.unified_diff(kept, result.stdout.splitlines(), lineterm=""))


def test_no_help_is_kept_of_a_command_that_is_gone() -> None:
    assert {file.name for file in HELP.iterdir()} == {fixture_of(words).name for words in COMMANDS}


def test_every_option_says_what_it_does() -> None:
    group: Any = typer.main.get_command(app)
    for words in COMMANDS:
        command = group
        for word in words:
            command = command.commands[word]
        assert command.help, words
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "help", (words, parameter.name)


def ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str]:
    """Exit code and standard error of `negrec` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["negrec", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.fixture
def warehouse(tmp_path: Path) -> Path:
    root = tmp_path / "warehouse"
    DeltaStore(root).create_tables()
    return root


WRONG = {
    "a day that is none": (["run", "--ds", "2026-02-30"], "2026-02-30: not a day, write it as 2026-01-31"),
    "a day of another form": (["evaluate", "--ds", "31.1.2026"], "31.1.2026: not a day"),
    "an unknown setting": (["--set", "swing.no=1", "config"], "--set swing.no=1: swing.no: there is no such"),
    "a wrong value": (["--set", "buckets=many", "config"], "--set buckets=many: buckets:"),
    "a setting without value": (["--set", "buckets", "config"], "--set buckets: write it as a.b=value"),
    "an unknown overlay": (["--config", "nowhere", "config"], "overlay nowhere: conf/ has"),
    "days backwards": (
        ["backfill", "--start", "2026-02-02", "--end", "2026-02-01"],
        "--start 2026-02-02 is after --end 2026-02-01",
    ),
    "an unknown stage": (["run", "--ds", "2026-02-01", "--stages", "feedbak"], "stage feedbak: unknown;"),
    "an unknown stage beside a known one": (
        ["backfill", "--start", "2026-02-01", "--end", "2026-02-01", "--stages", "feedback,none"],
        "stage none: unknown;",
    ),
    "a step that is not in the curriculum": (
        ["train", "alignment", "--until", "2026-02-01"],
        "generator.steps has no alignment; it is warm_up",
    ),
    "an unknown step": (
        ["--set", "generator.steps=[warm_up, ppo]", "train", "generator", "--until", "2026-02-01"],
        "generator.steps.1:",
    ),
    "a retention of no day": (["vacuum", "--days", "0"], "a retention of 0 days: give at least 1"),
    "an exemption of nobody": (["exempt", "add"], "exempt whom or what? give --user or --item"),
    "a world too small": (["world", "nowhere", "--items", "1"], "world: items is 1; choose 50"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    warehouse: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(warehouse)
    code, err = ended(capsys, monkeypatch, "--warehouse", warehouse, *arguments)
    assert code == 2
    assert err.startswith("negrec: ")
    assert message in " ".join(err.split())
    assert err.count("\n") == 1
    assert not (warehouse / "nowhere").exists()


COMMANDS_ON_TABLES = (
    ("status",),
    ("run", "--ds", "2026-02-01"),
    ("backfill", "--start", "2026-02-01", "--end", "2026-02-01"),
    ("evaluate", "--ds", "2026-02-01"),
    ("report", "--ds", "2026-02-01", "--out", "report.html"),
    ("inspect", "u"),
    ("filter", "u", "i"),
    ("anchors", "--ds", "2026-02-01"),
    ("unpublish", "--ds", "2026-02-01"),
    ("exempt", "list"),
    ("vacuum",),
    ("exempt", "add", "--user", "u"),
    ("train", "codebook", "--until", "2026-02-01"),
    ("train", "generator", "--until", "2026-02-01"),
)


@pytest.mark.parametrize("arguments", COMMANDS_ON_TABLES, ids=lambda words: " ".join(words[:2]))
def test_a_warehouse_without_tables_is_one_line_and_exit_code_4(
    arguments: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, err = ended(capsys, monkeypatch, "--warehouse", tmp_path / "none", *arguments)
    assert code == 4
    assert "not found under" in err
    assert "--warehouse" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--ds", "2026-02-01"), "table behavior_log: no partition ds=2026-02-01; import the log"),
        (("inspect", "u"), "table block_list: nothing was published in"),
        (
            ("unpublish", "--ds", "2026-02-01"),
            "table block_list: no partition ds=2026-02-01; `negrec status`",
        ),
        (("exempt", "remove", "--item", "i"), "item i: not exempt; `negrec exempt list` shows"),
        (("evaluate", "--ds", "2026-02-01"), "table block_list: no entries for ds=2026-02-01; run"),
    ],
)
def test_what_is_missing_in_an_empty_warehouse_is_named(
    arguments: tuple[str, ...],
    message: str,
    warehouse: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, err = ended(capsys, monkeypatch, "--warehouse", warehouse, *arguments)
    assert code == 4
    assert message in err
    assert err.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.views, "show_config", broken)
    monkeypatch.setattr(sys, "argv", ["negrec", "config"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_full_disk_is_one_line_whichever_library_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        Path("/dev/full").write_text("x")

    monkeypatch.setattr(cli.views, "show_config", full)
    code, err = ended(capsys, monkeypatch, "config")
    assert code == 4
    assert "No space left on device" in err
    assert err.count("\n") == 1


def test_missing_java_is_one_line_with_what_to_install(tmp_path: Path) -> None:
    """In a process of its own, whose PATH is empty; the world and its import need no Java until then."""
    made = CliRunner().invoke(app, ["world", str(tmp_path / "log"), "--users", "5", "--items", "60"])
    assert made.exit_code == 0
    environment = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "COLUMNS")}
    environment["PATH"] = str(tmp_path)
    arguments = ["--warehouse", str(tmp_path / "warehouse"), "--config", "demo", "import", "demo"]
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments, str(tmp_path / "log")],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=environment,
        check=False,
    )
    assert ended.returncode == 4, ended.stderr
    assert "apt-get install openjdk-17-jre-headless" in ended.stderr
    assert ended.stderr.count("\n") == 1


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def test_world_writes_a_log(tmp_path: Path) -> None:
    out = tmp_path / "log"
    result = invoked("world", out, "--users", 20, "--items", 60, "--days", 3, "--seed", 1)
    assert result.exit_code == 0
    assert "20 users, 60 items" in " ".join(result.stdout.split())
    assert pq.read_table(out / "items.parquet").num_rows == 60
    assert len(list((out / "events").glob("day=*"))) == 3


def test_config_shows_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = invoked("--config", "demo", "--set", "buckets=17", "config").stdout
    line = next(line for line in shown.splitlines() if " buckets " in line)
    assert " 17 " in line
    assert "shards of generation" in line


def test_demo_refuses_to_delete_what_it_did_not_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    mine = tmp_path / "demo" / "mine.txt"
    mine.touch()
    code, err = ended(capsys, monkeypatch, "--warehouse", tmp_path, "demo")
    assert code == 2
    assert "is not a demo of negrec" in err
    assert mine.exists()


EXECUTOR_MESSAGE = """An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "/negrec/jobs/generation.py", line 75, in predict
    yield predict_batch(batch, _load(task), task)
  File "/negrec/jobs/generation.py", line 125, in _load
    raise MissingError(
negrec_core.errors.MissingError: table item_semantic_id: no item has an ID; run the stage item_semantic_id

\tat org.apache.spark.api.python.BasePythonRunner$ReaderIterator.handlePythonException
"""


def test_an_executors_error_arrives_as_itself() -> None:
    error = expected(RuntimeError(EXECUTOR_MESSAGE))
    assert type(error) is MissingError
    assert str(error) == "table item_semantic_id: no item has an ID; run the stage item_semantic_id"


@pytest.mark.parametrize(
    "message",
    ["java.lang.OutOfMemoryError: heap", "ValueError: no", "negrec_core.errors.NoSuchError: what"],
)
def test_other_failures_of_an_executor_stay_what_they_are(message: str) -> None:
    assert expected(RuntimeError(message)) is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ds", "yesterday"], 2, "yesterday: not a day"),
        (["--ds", "2026-02-01", "--stages", "none"], 2, "stage none: unknown"),
        (["--ds", "2026-02-01", "--config", "nowhere"], 2, "overlay nowhere"),
        (["--ds", "2026-02-01"], 4, "table behavior_log: no partition ds=2026-02-01"),
    ],
)
def test_the_submitted_job_ends_with_the_same_codes(
    arguments: list[str], code: int, message: str, warehouse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert daily.main(["--warehouse", str(warehouse), *arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("negrec: ")
    assert message in err
    assert err.count("\n") == 1
