"""What every test runs under: no network, this interpreter in Spark workers, repeatable search."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import SmallDisk
from hypothesis import settings
from object_stores import OBJECT_STORE, ObjectStore

from negrec_core.delta import DeltaStore

# Set before any library reads them at import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    PYSPARK_PYTHON=sys.executable,
    PYSPARK_DRIVER_PYTHON=sys.executable,
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores instead of each taking all.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# A width in the environment is read once, when consoles are made; tests set their own.
os.environ.pop("COLUMNS", None)

# Two cores under load make any deadline a coin toss. In CI the examples are the same every time.
settings.register_profile("negrec", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("negrec")

REPO = Path(__file__).resolve().parents[1]
# Test files that take more than a minute, by time.
_LONGEST = (
    "test_pipeline.py",
    "test_curriculum.py",
    "test_cluster.py",
    "test_import_log.py",
    "test_ablation.py",
    "test_negative_item_set.py",
    "test_gates.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=30, help="drivers, and writers, to kill -9 (`make soak`: 200)"
    )
    about = "users of the list that is read under load (`make soak`: a million)"
    parser.addoption("--list-users", type=int, default=20_000, help=about)
    about = "the packed environment of the cluster (conf/cluster.md); by default a thin one is made"
    parser.addoption("--archive", type=Path, help=about)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two workers end together.

    The first makes the archive of Java's classes, for which others that want a JVM would wait; the second
    wants none.
    """
    items.sort(
        key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST)
    )


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How many processes a test of `kill -9` kills."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session")
def list_users(request: pytest.FixtureRequest) -> int:
    """How many users the list has that is read under load."""
    return int(request.config.getoption("--list-users"))


@pytest.fixture(scope="session")
def public_data() -> Callable[[str], Path]:
    """`public_data("ml-100k")` is that data set's folder; the test is skipped where it is absent.

    The folders lie in `NEGREC_DATA`, by default `../shared/data` beside the repository.
    """
    root = Path(os.environ.get("NEGREC_DATA", REPO.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"public data set {name} is not in {root} (set NEGREC_DATA)")
        return path

    return find


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """64 MB in memory; the test is skipped where mounting is not allowed."""
    disk = SmallDisk(tmp_path / "small disk")
    disk.root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk.root)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a disk that fills up needs the program mount")
    if mounted.returncode:
        pytest.skip(f"a disk that fills up cannot be mounted (not root?): {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk.root)], check=True)


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server; the environment leads to it."""
    pytest.importorskip("moto")
    with OBJECT_STORE:
        yield OBJECT_STORE


@pytest.fixture(autouse=True)
def logging_left_alone() -> Iterator[None]:
    """Commands set up the log of the process; other tests look at it too."""
    log = logging.getLogger("negrec")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with all tables, to be copied."""
    root = tmp_path_factory.mktemp("fresh") / "warehouse"
    DeltaStore(root).create_tables()
    return root


@pytest.fixture
def store(fresh: Path, tmp_path: Path) -> DeltaStore:
    """A warehouse with all tables, empty."""
    root = tmp_path / "ware house"
    shutil.copytree(fresh, root)
    return DeltaStore(root)
