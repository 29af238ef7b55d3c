"""A standalone cluster of two workers with a pretended GPU each, a packed environment, and its faults."""

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyspark
import pytest
import torch
from java_classes import java_options
from warehouses import (
    DS,
    PLAIN_SCORE,
    Context,
    Entry,
    publish,
    save_codebook,
    score_row,
    small_codebook,
    write_rows,
)

import jobs.daily
from negrec_core.artefacts import new_version, seal
from negrec_core.blocklist import BlockList
from negrec_core.delta import DeltaStore
from negrec_core.generator import GENERATOR
from negrec_core.schemas import TABLES
from train.models import build_model, load_prompt_text

REPO = Path(__file__).resolve().parents[2]
TODAY = dt.date.fromisoformat(DS)
YESTERDAY = (TODAY - dt.timedelta(days=1)).isoformat()
STAGES = ("feedback", "item_rate", "item_graph", "user_context", "negative_item_set")
SETTINGS = (
    "buckets=3",
    "spark.shuffle_partitions=2",
    "swing.min_common_users=1",
    "generation.beam_width=24",
    "generation.set_size=8",
)
RUN = ["--ds", DS, "--stages", ",".join(STAGES), *(part for s in SETTINGS for part in ("--set", s))]
GPUS = ("0", "1")
ON_GPUS = ("--set", "generation.gpus.per_engine=1", "--set", f"generation.parallelism={len(GPUS)}")
ENGINE_LINE = "negrec: torch engine on GPU "

Rows = list[dict[str, Any]]


def spark_submit(
    root: Path, master: str, properties: dict[str, str], options: Sequence[str]
) -> "subprocess.Popen[bytes]":
    """Start `spark-submit jobs/daily.py` on a warehouse; `log_of` says what it writes."""
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    properties = {
        **{f"spark.{who}.extraJavaOptions": java_options() for who in ("driver", "executor")},
        # A handful of rows is not worth compiling queries.
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        **properties,
    }
    conf = [part for name, value in properties.items() for part in ("--conf", f"{name}={value}")]
    job = [jobs.daily.__file__, "--warehouse", str(root), *RUN, *options]
    outside = {n: v for n, v in os.environ.items() if n not in ("PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON")}
    with root.with_name("driver.log").open("wb") as out:
        return subprocess.Popen(
            [str(submit), "--master", master, *conf, *job], env=outside, stdout=out, stderr=out
        )


def log_of(root: Path) -> str:
    return root.with_name("driver.log").read_text()


def rows_of(root: Path, table: str) -> tuple[Rows, list[float]]:
    """Rows of the day in key order without their floats, and those floats."""
    rows = DeltaStore(root).read(table, days=[DS]).to_pylist()
    rows.sort(key=lambda row: tuple(str(row[name]).zfill(40) for name in TABLES[table].key))
    exact = [{n: v for n, v in row.items() if not isinstance(v, float)} for row in rows]
    return exact, [v for row in rows for v in row.values() if isinstance(v, float)]


def versions(root: Path) -> dict[str, int]:
    return {table: DeltaStore(root).version(table) for table in TABLES}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a list of yesterday, a random generator, and the log of today, to be copied."""
    root = tmp_path_factory.mktemp("site") / "warehouse"
    rng = np.random.default_rng(4)
    items = {f"item {n}": tuple(int(c) for c in rng.integers(0, 4, 3)) for n in range(60)}
    users = [f"user {n}" for n in range(90)]
    codebook = small_codebook()
    made_of = save_codebook(root, codebook, YESTERDAY)
    store = publish(
        root,
        made_of.version,
        items,
        {user: [Entry((0, 0, 0))] for user in users},
        ds=YESTERDAY,
        contexts={user: Context() for user in users},
        categories=dict.fromkeys(items, "a/b"),
    )
    write_rows(store, "item_semantic_id", [], DS)
    write_rows(store, "block_score", [score_row(PLAIN_SCORE)], DS)
    start = dt.datetime.combine(TODAY, dt.time(), dt.UTC)
    log = [
        {
            "user_id": user,
            "item_id": str(item),
            "event_time": start + dt.timedelta(minutes=int(rng.integers(1, 1430))),
            "action": str(rng.choice(["like", "dislike"])),
        }
        for user in users
        for item in rng.choice(list(items), 12, replace=False)
    ]
    write_rows(store, "behavior_log", log, DS)

    model, tokenizer, prompt = build_model("tiny", load_prompt_text("plain"), codebook, 64, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)  # the usual one is nearly uniform over tokens
    path = new_version(root / "models", GENERATOR)
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)
    prompt.save(path)
    origin = {"codebook_version": made_of.version, "codebook_digest": made_of.digest}
    seal(path, parameters={"until": YESTERDAY, **origin}, metrics={}, inputs={})
    return root


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        url: of its master.
        work: folder of the workers; an executor works in `<application>/<executor>`.
        events: folder of the applications' event logs.
        archive: the packed environment of the executors.
    """

    url: str
    work: Path
    events: Path
    archive: Path

    def submit(self, root: Path, *options: str) -> "subprocess.Popen[bytes]":
        """Start a driver on this machine, whose executors have nothing but the archive."""
        properties = {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.executor.memory": "600m",
            "spark.executor.cores": "1",
            "spark.dynamicAllocation.enabled": "true",
            "spark.dynamicAllocation.maxExecutors": "2",
            "spark.archives": f"{self.archive}#environment",
            "spark.pyspark.python": "./environment/bin/python",
            "spark.pyspark.driver.python": sys.executable,
            "spark.eventLog.enabled": "true",
            "spark.eventLog.dir": self.events.as_uri(),
            "spark.eventLog.compress": "false",
            "spark.eventLog.rolling.enabled": "false",
        }
        return spark_submit(root, self.url, properties, [*ON_GPUS, *options])

    def engines(self, application: str) -> dict[str, str]:
        """Executor -> the GPU that its engine saw, so far."""
        found = {}
        for log in self.work.glob(f"{application}/*/stderr"):
            for line in log.read_text().splitlines():
                if line.startswith(ENGINE_LINE):
                    found[log.parent.name] = line.removeprefix(ENGINE_LINE).split()[0]
        return found

    def executor_process(self, application: str, executor: str) -> int:
        """Process id of an executor's JVM."""
        here = self.work / application / executor
        for process in Path("/proc").glob("[0-9]*"):
            try:
                java = b"CoarseGrainedExecutorBackend" in (process / "cmdline").read_bytes()
                if java and (process / "cwd").resolve() == here.resolve():
                    return int(process.name)
            except OSError:
                continue  # it ended meanwhile
        raise LookupError(f"no executor works in {here}")


@pytest.fixture(scope="module")
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed environment with negrec as a wheel; heavy packages are those of this environment.

    A site packs them too (conf/cluster.md), which takes minutes and gigabytes: `--archive` runs on that.
    """
    whole: Path | None = request.config.getoption("--archive")
    if whole:
        return whole.resolve(strict=True)
    folder = tmp_path_factory.mktemp("packed")
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # A plain path: links of editable installs in there are not followed, so negrec is the wheel's.
    (packages / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
    subprocess.run([*pip, *options, "--target", str(packages), str(REPO)], check=True, cwd=folder)
    packed = folder / "environment.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        for path in sorted(environment.iterdir()):
            tar.add(path, path.name)
    shutil.rmtree(environment)
    return packed


@pytest.fixture(scope="module")
def cluster(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A master and two workers of three cores, from the pip-installed pyspark."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "events").mkdir()
    home = Path(pyspark.__file__).parent
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYSPARK_PYTHON")},
        "SPARK_HOME": str(home),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": java_options(),
        "SPARK_LOCAL_DIRS": str(folder / "local"),
    }
    daemons = []

    def start(name: str, kind: str, *options: str, **more: str) -> Path:
        log = folder / f"{name}.log"
        command = [str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{kind}", *options]
        command += ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
        with log.open("wb") as out:
            daemons.append(
                subprocess.Popen(command, cwd=folder, env={**environment, **more}, stdout=out, stderr=out)
            )
        return log

    def wait_for(log: Path, text: str, times: int = 1) -> str:
        return eventually(
            lambda: log.read_text() if log.read_text().count(text) >= times else None, f"{text} in {log}"
        )

    try:
        master_log = start("master", "master.Master", SPARK_MASTER_OPTS="-Dspark.master.rest.enabled=false")
        started = wait_for(master_log, "Starting Spark master at ")
        url = started.split("Starting Spark master at ")[1].split()[0]
        for gpu in GPUS:
            script = folder / f"gpu{gpu}.sh"
            script.write_text(f"""#!/bin/sh\necho '{{"name": "gpu", "addresses": ["{gpu}"]}}'\n""")
            script.chmod(0o755)
            resource = "-Dspark.worker.resource.gpu"
            options = f"{resource}.amount=1 {resource}.discoveryScript={script}"
            size = ("--cores", "3", "--memory", "3g", "--work-dir", str(folder / "work"))
            start(f"worker{gpu}", "worker.Worker", *size, url, SPARK_WORKER_OPTS=options)
        wait_for(master_log, "Registering worker", len(GPUS))
        yield Cluster(url, folder / "work", folder / "events", archive)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait()


def eventually(ask: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first answer that is not None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = ask()
        if answer is not None:
            return answer
        time.sleep(0.05)
    raise TimeoutError(f"no {what} within {seconds} s")


@dataclass(frozen=True)
class Application:
    """What an event log says of an application.

    Attributes:
        name: its id.
        gpus: executor -> addresses of its GPUs.
        lost: executors that ended before the application did.
        ran: (executor, resource profile of the stage), one per task that ended.
    """

    name: str
    gpus: dict[str, list[str]]
    lost: set[str]
    ran: list[tuple[str, int]]

    @classmethod
    def newest(cls, events: Path) -> "Application":
        log = max(events.iterdir(), key=lambda path: path.stat().st_mtime)
        happened = [json.loads(line) for line in log.read_text().splitlines()]

        def all_of(kind: str) -> list[dict[str, Any]]:
            return [event for event in happened if event["Event"] == f"SparkListener{kind}"]

        profile = {
            event["Stage Info"]["Stage ID"]: event["Stage Info"]["Resource Profile Id"]
            for event in all_of("StageSubmitted")
        }
        return cls(
            log.name.removesuffix(".inprogress"),
            {
                event["Executor ID"]: event["Executor Info"]["Resources"].get("gpu", {}).get("addresses", [])
                for event in all_of("ExecutorAdded")
            },
            {event["Executor ID"] for event in all_of("ExecutorRemoved")},
            [(e["Task Info"]["Executor ID"], profile[e["Stage ID"]]) for e in all_of("TaskEnd")],
        )


@dataclass(frozen=True)
class Day:
    """The day of the site, made on the cluster.

    Attributes:
        root: of the warehouse.
        application: what Spark did.
        engines: executor -> the GPU that its engine saw.
        killed: executor that was killed as soon as its engine stood.
    """

    root: Path
    application: Application
    engines: dict[str, str]
    killed: str


@pytest.fixture(scope="module")
def day(site: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Day:
    root = shutil.copytree(site, tmp_path_factory.mktemp("day") / "warehouse")
    driver = cluster.submit(root)
    try:

        def generating() -> tuple[str, str] | None:
            assert driver.poll() is None, log_of(root)[-3000:]
            found = [(path.name, cluster.engines(path.name)) for path in cluster.work.glob("*")]
            return next(((name, min(engines)) for name, engines in found if engines), None)

        name, victim = eventually(generating, "engine", 240)
        os.kill(cluster.executor_process(name, victim), signal.SIGKILL)
        assert not DeltaStore(root).revision("negative_item_set", DS)
        assert driver.wait(timeout=240) == 0, log_of(root)[-3000:]
    finally:
        driver.kill()
    return Day(root, Application.newest(cluster.events), cluster.engines(name), victim)


def test_generation_and_nothing_else_is_on_gpus(day: Day) -> None:
    gpus = day.application.gpus
    with_gpu = {executor for executor, addresses in gpus.items() if addresses}
    assert {executor for executor, profile in day.application.ran if profile} <= with_gpu
    assert {executor for executor, profile in day.application.ran if not profile} <= gpus.keys() - with_gpu
    # One engine per executor, which saw the GPU of that executor alone.
    assert set(day.engines.values()) == set(GPUS)
    assert {executor: [gpu] for executor, gpu in day.engines.items()} == {e: gpus[e] for e in day.engines}


def test_tables_are_those_of_one_machine_though_an_executor_was_killed(
    day: Day, site: Path, tmp_path: Path
) -> None:
    assert day.killed in day.application.lost
    root = shutil.copytree(site, tmp_path / "warehouse")
    python = {"spark.pyspark.python": sys.executable}
    assert spark_submit(root, "local[2]", python, []).wait(timeout=240) == 0, log_of(root)[-3000:]
    for table in STAGES:
        (made, floats), (expected, expected_floats) = rows_of(day.root, table), rows_of(root, table)
        assert made == expected, table
        np.testing.assert_allclose(floats, expected_floats, atol=1e-4, err_msg=table)
        assert made


def test_more_gpus_than_there_are_is_one_line_and_the_list_is_served(
    site: Path, cluster: Cluster, tmp_path: Path
) -> None:
    root = shutil.copytree(site, tmp_path / "warehouse")
    before = versions(root)
    driver = cluster.submit(root, "--set", "generation.parallelism=3")
    try:
        assert driver.wait(timeout=120) == 4, log_of(root)[-3000:]
    finally:
        driver.kill()
    (line,) = [line for line in log_of(root).splitlines() if line.startswith("negrec: ")]
    assert "generation asks for 3 GPUs" in line
    assert "has 2 on 2 workers; set generation.parallelism=2" in line
    assert "Traceback" not in log_of(root)
    # Found out before the first stage.
    assert versions(root) == before
    assert BlockList.open(root, today=TODAY).snapshot.ds == YESTERDAY
