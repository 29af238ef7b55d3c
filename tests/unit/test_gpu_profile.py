"""Asking for GPU executors: what is refused before Spark would wait, and what an engine's process sees."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import generation, spark
from negrec_core.config import GpuConfig, load_config
from negrec_core.errors import ConfigError, MissingError, NegrecError

PROPERTIES = {
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.maxExecutors": "2",
    "spark.executor.cores": "4",
}
NODES = [(8, 2), (8, 1), (4, 0)]  # cores, GPUs


class Context:
    """As much of a SparkContext as is asked before a profile is made."""

    def __init__(self, master: str = "spark://here:7077", **changes: str | None) -> None:
        self.master = master
        named = {"spark." + name.replace("_", "."): value for name, value in changes.items()}
        self.properties: dict[str, str | None] = {**PROPERTIES, **named}

    def getConf(self) -> Any:
        return self.properties


def gpus(per_engine: int) -> GpuConfig:
    return load_config([], [f"generation.gpus.per_engine={per_engine}"], {}).generation.gpus


@pytest.mark.parametrize(("master", "per_engine"), [("local[2]", 1), ("spark://here:7077", 0), ("yarn", 0)])
def test_without_gpus_or_on_one_machine_nothing_is_asked_for(master: str, per_engine: int) -> None:
    assert spark.gpu_profile(Context(master), gpus(per_engine), 2) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("context", "per_engine", "engines", "kind", "message"),
    [
        (Context(dynamicAllocation_enabled=None), 1, 1, ConfigError, "spark.dynamicAllocation.enabled=true"),
        (Context("yarn", dynamicAllocation_enabled="false"), 1, 1, ConfigError, "allocation, which is off"),
        (Context(), 1, 4, MissingError, "asks for 4 GPUs (generation.parallelism=4 engines"),
        (Context(), 1, 4, MissingError, "has 3 on 3 workers; set generation.parallelism=3"),
        # Two GPUs of one engine are on one worker.
        (Context(), 2, 2, MissingError, "has 3 on 3 workers; set generation.parallelism=1"),
        (Context(), 3, 1, MissingError, "no worker has enough for one engine"),
        (Context(dynamicAllocation_maxExecutors=None), 1, 2, ConfigError, "product is at most 18"),
        (Context(executor_cores=None), 1, 2, ConfigError, "has 20 cores"),
        (Context(dynamicAllocation_maxExecutors="5"), 1, 1, ConfigError, "product is at most 19"),
    ],
)
def test_what_the_cluster_cannot_give_is_one_line(
    context: Any,
    per_engine: int,
    engines: int,
    kind: type[NegrecError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spark, "_standalone_workers", lambda context: NODES)
    with pytest.raises(kind) as raised:
        spark.gpu_profile(context, gpus(per_engine), engines)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_engine_sees_the_gpus_of_its_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyspark import TaskContext

    def given(*addresses: str) -> None:
        resources = {"gpu": SimpleNamespace(addresses=addresses)} if addresses else {}
        task = SimpleNamespace(resources=lambda: resources)
        monkeypatch.setattr(TaskContext, "get", staticmethod(lambda: task))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    given()
    assert generation._take_gpus() == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    given("2", "5")
    assert generation._take_gpus() == "2,5"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"


def test_what_an_executor_imports_first_leaves_cuda_alone() -> None:
    code = "import jobs.generation, sys; print(*{'torch', 'vllm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
