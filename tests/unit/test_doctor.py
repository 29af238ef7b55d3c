"""Doctor: everything fine is said to be so; everything broken is found, with how to mend it."""

import datetime as dt
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_generator import save_generator
from typer.testing import CliRunner
from warehouses import DS, Entry, publish, save_codebook, small_codebook, write_rows

from jobs import doctor
from jobs.cli import app
from jobs.context import Warehouse
from jobs.doctor import Finding, examine
from negrec_core.artefacts import new_version
from negrec_core.config import load_config
from negrec_core.generator import CODEBOOK, GENERATOR
from negrec_core.schemas import TABLES


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor") / "ware house"
    codebook = save_codebook(root, small_codebook())
    save_generator(root, codebook)
    store = publish(root, codebook.version, {"i": (0, 1, 2)}, {"ann": [Entry((0, 1, 2))]})
    event = {"user_id": "ann", "item_id": "i", "action": "like", "event_time": dt.datetime.now(dt.UTC)}
    for ds in ("2026-03-09", DS):
        write_rows(store, "behavior_log", [event], ds)
    return root


@pytest.fixture
def root(healthy: Path, tmp_path: Path) -> Path:
    shutil.copytree(healthy, tmp_path / "warehouse")
    return tmp_path / "warehouse"


@pytest.fixture(autouse=True)
def small_lock(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lock of what is installed here: the machine of a test need not have the shipped one."""
    lock = tmp_path_factory.mktemp("lock") / "cpu.txt"
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in ("numpy", "pyarrow", "pyspark")]
    lock.write_text("\n".join(["# comment", *pins]))
    monkeypatch.setattr(doctor, "resource", lambda *_: lock)
    monkeypatch.setattr(doctor, "_gpu_names", list)
    monkeypatch.setattr(doctor, "_LEAST_ROOM", 1)
    return lock


def findings(root: Path, *settings: str) -> dict[str, Finding]:
    config = load_config([], ["spark.driver_memory=1m", *settings], {})
    return {finding.check: finding for finding in examine(Warehouse(root, config))}


def only(found: dict[str, Finding], *checks: str) -> str:
    """What is said of the checks that are not ok, which must be these."""
    assert [f.check for f in found.values() if not f.ok] == list(checks), found
    assert all(f.text.isprintable() for f in found.values())
    assert all((f.exit_code == 0) == f.ok for f in found.values())
    return found[checks[0]].text if checks else ""


def test_a_healthy_warehouse(healthy: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in healthy.rglob("*") if p.is_file()}
    found = findings(healthy)
    only(found)
    assert set(TABLES) < set(found)
    assert found["behavior_log"].text == f"newest day {DS}, 2 days in 2 files"
    assert found["anchor"].text == "no rows"
    assert "2 versions" in found["models"].text
    assert {p: p.stat().st_mtime_ns for p in healthy.rglob("*") if p.is_file()} == before


def data_file(root: Path, table: str) -> Path:
    (file,) = (root / "tables" / table).rglob(f"ds={DS}/**/*.parquet")
    return file


def cut_file(root: Path) -> None:
    file = data_file(root, "behavior_log")
    file.write_bytes(file.read_bytes()[:-20])


def garbled_file(root: Path) -> None:
    file = data_file(root, "behavior_log")
    file.write_bytes(b"x" * file.stat().st_size)


def lost_file(root: Path) -> None:
    data_file(root, "behavior_log").unlink()


def lost_table(root: Path) -> None:
    shutil.rmtree(root / "tables" / "behavior_log")
    (root / "tables" / "behavior_log").mkdir()


def garbled_log(root: Path) -> None:
    (root / "tables/behavior_log/_delta_log/00000000000000000001.json").write_text("{")


TABLE_DAMAGE = {
    cut_file: "bytes, not",
    garbled_file: "is not a whole Parquet file; restore the file, or make that day again with --force",
    lost_file: f"of ds={DS} is gone; restore the file",
}


@pytest.mark.parametrize("damage", TABLE_DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root)
    found = {name: f for name, f in findings(root).items() if name != "disk"}
    assert TABLE_DAMAGE[damage] in only(found, "behavior_log")
    assert found["behavior_log"].exit_code == 3


@pytest.mark.parametrize("damage", [lost_table, garbled_log], ids=lambda damage: damage.__name__)
def test_a_damaged_table_does_not_hide_what_comes_after(root: Path, damage: Callable[[Path], None]) -> None:
    damage(root)
    found = findings(root)
    assert not found["behavior_log"].ok
    assert found["item"].ok
    assert found["models"].ok
    assert all(f.text.isprintable() for f in found.values())


def test_an_altered_model_and_one_without_its_codebook(root: Path) -> None:
    (weights,) = root.glob(f"models/{GENERATOR}/*/model.safetensors")
    weights.write_bytes(b"other")
    found = findings(root)
    assert "model.safetensors differs from its manifest" in only(found, "models", "generator")
    assert found["models"].exit_code == 6


def test_a_generator_of_another_codebook(root: Path) -> None:
    other = save_codebook(root, small_codebook(seed=1))
    folder = root / "models" / CODEBOOK
    (mine,) = (path for path in folder.iterdir() if path.name != other.version)
    shutil.rmtree(mine)
    (folder / other.version).rename(mine)
    found = findings(root)
    only(found, "models", "generator")
    assert "train the generator again" in found["generator"].text


def test_models_that_are_missing_or_unfinished(root: Path) -> None:
    left = new_version(root / "models", CODEBOOK)
    found = findings(root)
    only(found)
    assert f"never completed, delete unless being trained: {CODEBOOK}/{left.name}" in found["models"].text
    shutil.rmtree(root / "models" / GENERATOR)
    assert "run `negrec train generator`" in only(findings(root), "models", "generator")


def test_memory_and_disk_that_do_not_suffice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "set spark.driver_memory=" in only(findings(root, "spark.driver_memory=9000g"), "memory")
    assert "write it as 2g" in only(findings(root, "spark.driver_memory=lots"), "memory")
    monkeypatch.setattr(doctor, "_LEAST_ROOM", 1 << 60)
    assert "`negrec vacuum`, or a larger disk" in only(findings(root), "disk")


def test_a_store_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the write is made to fail where it is done."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "cannot be written (Read-only file system)" in only(findings(root), "store")


def test_packages_unlike_the_lock(root: Path, small_lock: Path) -> None:
    small_lock.write_text(small_lock.read_text().replace("numpy==", "numpy==9."))
    text = only(findings(root), "packages")
    assert "numpy" in text
    assert "(lock: 9." in text
    assert f"pip install --no-deps -r {small_lock}" in text


def test_a_missing_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_needed", lambda: ["numpy", "no-such-package"])
    assert only(findings(root), "packages").startswith("no-such-package: not installed")


def test_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "install `negrec[vllm]`" in only(findings(root, "generation.engine=vllm"), "gpus")


def test_java_that_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpu_names", list)
    monkeypatch.setenv("JAVA_HOME", str(root / "no java"))
    assert "apt-get install openjdk" in only(findings(root), "java")


def test_the_command_prints_a_line_each_and_ends_with_the_first_code(root: Path) -> None:
    arguments = ["--warehouse", str(root), "--set", "spark.driver_memory=1m", "doctor"]
    fine = CliRunner().invoke(app, arguments)
    assert fine.exit_code == 0, fine.stdout
    assert all(line.startswith("ok  ") for line in fine.stdout.splitlines())
    lost_file(root)
    bad = CliRunner().invoke(app, arguments)
    assert bad.exit_code == 1  # the size of the newest day cannot be told
    assert sum(line.startswith("NOT OK  ") for line in bad.stdout.splitlines()) == 2


def test_nothing_heavy_is_imported(healthy: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from jobs.context import Warehouse; from jobs.doctor import examine\n"
        "from negrec_core.config import load_config\n"
        f"list(examine(Warehouse(Path({str(healthy)!r}), load_config())))\n"
        "print({'torch', 'pyspark', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
