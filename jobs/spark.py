"""The Spark session, and the check of Java that precedes it."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

from negrec_core.config import SparkConfig
from negrec_core.errors import MissingError
from negrec_core.resources import resource

if TYPE_CHECKING:
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
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.ansi.enabled": "true",
        # How threads wait is set for the driver by jobs.console; executors elsewhere do not inherit it.
        **{
            f"spark.executorEnv.{name}": os.environ[name]
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
            if name in os.environ
        },
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(progress).lower(),
        "spark.driver.extraJavaOptions": (
            f"-Dlog4j2.configurationFile={_log_settings()} {settings.driver_java_options}"
        ),
        **settings.conf,
    }
    for name, value in properties.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()
