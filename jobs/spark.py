"""The Spark session, and the check of Java that precedes it."""

import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

from negrec_core.config import GpuConfig, SparkConfig
from negrec_core.errors import ConfigError, MissingError
from negrec_core.resources import resource

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

# Spark needs this module, which some cut-down runtimes lack.
_MODULES = ("--add-modules=jdk.incubator.vector",)
_JAVA_HINT = "install it with `apt-get install openjdk-17-jre-headless`, or set JAVA_HOME to it"


def check_java() -> None:
    """Raise MissingError unless Java 17 or newer answers; Spark's own failure would be a stack trace."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if not java or not os.path.exists(java):
        raise MissingError(f"Spark needs Java 17 or newer and there is none; {_JAVA_HINT}")
    answer = subprocess.run([java, *_MODULES, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "(\d+)', answer.stderr)
    if not found or int(found.group(1)) < 17:
        version = found.group(1) if found else "an unknown version"
        raise MissingError(f"Spark needs Java 17 or newer, {java} is {version}; {_JAVA_HINT}")


def _log_settings() -> str:
    return resource("conf", "log4j2.properties").as_uri()


def open_session(settings: SparkConfig, timezone: str, progress: bool) -> "SparkSession":
    """Start or join the Spark session.

    Args:
        settings: master, memory and further properties.
        timezone: time zone of `to_date` and friends, the one of the log date.
        progress: show Spark's own progress bar (on a terminal).
    """
    check_java()
    # Workers must run the interpreter of the driver, or they miss its packages.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("negrec")
    if settings.master:
        builder = builder.master(settings.master)
        if settings.master.startswith("local"):
            # A laptop's host name often does not resolve; local mode needs no other address.
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    properties = {
        "spark.driver.memory": settings.driver_memory,
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.sql.session.timeZone": timezone,
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.parquet.compression.codec": "zstd",
        # Room for the names of some 400,000 items (1 MiB by default): a column that outgrows its dictionary
        # is written in full, and takes the block list's reader five times as long.
        "spark.hadoop.parquet.dictionary.page.size": str(8 << 20),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.ansi.enabled": "true",
        # How threads wait is set for the driver by jobs.console; executors elsewhere do not inherit it.
        **{
            f"spark.executorEnv.{name}": os.environ[name]
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
            if name in os.environ
        },
        "spark.ui.enabled": "false",
        # Plans are put into words even for no page; the usual form takes a fifth of a small query's planning.
        "spark.sql.ui.explainMode": "simple",
        "spark.ui.showConsoleProgress": str(progress).lower(),
        "spark.driver.extraJavaOptions": (
            f"-Dlog4j2.configurationFile={_log_settings()} {settings.driver_java_options}"
        ),
        **settings.conf,
    }
    for name, value in properties.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


# Spark starts new executors for every profile it is given, even one that is equal to another.
@functools.lru_cache(maxsize=1)
def gpu_profile(context: "SparkContext", gpus: GpuConfig, engines: int) -> "ResourceProfile | None":
    """What a stage of `engines` tasks asks for, so that each has an executor with GPUs of its own.

    Args:
        context: the running application.
        gpus: section `generation.gpus` of the configuration.
        engines: tasks at once.

    Returns:
        None where no GPUs are configured or Spark runs in this process alone.

    Raises:
        ConfigError: Spark could not start such executors, and would wait for ever.
        MissingError: the cluster has fewer GPUs; only a standalone master can be asked.
    """
    master = context.master or ""
    if not gpus.per_engine or master.startswith("local"):
        return None
    if context.getConf().get("spark.dynamicAllocation.enabled") != "true":
        raise ConfigError(
            "generation.gpus.per_engine: GPU executors come by dynamic allocation, which is off; set"
            " spark.dynamicAllocation.enabled=true"
        )
    if master.startswith("spark://"):
        _check_workers(context, gpus.per_engine, engines)
    from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests

    executor = ExecutorResourceRequests().cores(1)
    executor.resource("gpu", gpus.per_engine, gpus.discovery_script, gpus.vendor)
    if gpus.memory_overhead:
        executor.memoryOverhead(gpus.memory_overhead)
    task = TaskResourceRequests().cpus(1).resource("gpu", gpus.per_engine)
    return ResourceProfileBuilder().require(executor).require(task).build


def _check_workers(context: "SparkContext", per_engine: int, engines: int) -> None:
    """Raise unless the workers of a standalone cluster have GPUs and cores for so many engines."""
    workers = _standalone_workers(context)
    found = sum(gpus for _, gpus in workers)
    room = sum(gpus // per_engine for _, gpus in workers)
    if room < engines:
        raise MissingError(
            f"generation asks for {engines * per_engine} GPUs (generation.parallelism={engines} engines,"
            f" generation.gpus.per_engine={per_engine}), the cluster {context.master} has {found} on"
            f" {len(workers)} workers; "
            + (f"set generation.parallelism={room}" if room else "no worker has enough for one engine")
        )
    # Executors that hold results of earlier stages do not give their cores back.
    conf = context.getConf()
    each, most = conf.get("spark.executor.cores"), conf.get("spark.dynamicAllocation.maxExecutors")
    cores = sum(cores for cores, _ in workers)
    if not each or not most or int(each) * int(most) + engines > cores:
        raise ConfigError(
            f"the cluster {context.master} has {cores} cores, of which other stages may leave none for"
            f" {engines} engines: set spark.executor.cores and spark.dynamicAllocation.maxExecutors so that"
            f" their product is at most {cores - engines}"
        )


def _standalone_workers(context: "SparkContext") -> list[tuple[int, int]]:
    """Cores and GPUs of every live worker, as the masters say."""
    from py4j.protocol import Py4JJavaError

    jvm: Any = context._jvm
    spark = jvm.org.apache.spark
    messages = "org.apache.spark.deploy.DeployMessages$"
    request = getattr(getattr(jvm, f"{messages}RequestMasterState$"), "MODULE$")
    answer = jvm.java.lang.Class.forName(f"{messages}MasterStateResponse")
    tag = jvm.scala.reflect.ClassTag.apply(answer)
    session: Any = context._jsc
    rpc = session.sc().schedulerBackend().rpcEnv()
    workers = []
    for address in (context.master or "").removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        try:
            master = rpc.setupEndpointRef(spark.rpc.RpcAddress(host, int(port)), "Master")
            alive = [worker for worker in master.askSync(request, tag).workers() if worker.isAlive()]
        except Py4JJavaError:
            continue  # one of several masters may be down
        for worker in alive:
            gpus = worker.resourcesInfo().get("gpu")
            workers.append((worker.cores(), len(gpus.get().addresses()) if gpus.isDefined() else 0))
    return workers
