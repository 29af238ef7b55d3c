"""An archive of the classes that Spark loads; a JVM that maps it starts in a third of the time.

The JVM itself writes it (class data sharing) when a small job ends: `spark-submit java_classes.py`.
"""

import functools
import hashlib
import subprocess
from pathlib import Path
from subprocess import PIPE, STDOUT

import pyspark
from filelock import FileLock
from pyspark.sql import SparkSession

from negrec_core.config import load_config

REPO = Path(__file__).resolve().parents[1]


@functools.cache
def java_options() -> str:
    """Options of a JVM that is over soon: compiled quickly rather than well, with shared classes."""
    return f"{load_config().spark.driver_java_options} -Xlog:disable -XX:SharedArchiveFile={_archive()}"


def _archive() -> Path:
    """Made by the first who asks, whole or not at all: a JVM crashes on one that is cut short."""
    java = subprocess.run(["java", "-version"], capture_output=True, check=True).stderr
    made_of = java + pyspark.__file__.encode() + pyspark.__version__.encode()
    folder = REPO / ".pytest_cache"
    folder.mkdir(exist_ok=True)
    path = folder / f"classes-{hashlib.sha256(made_of).hexdigest()[:16]}.jsa"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part")
            part.unlink(missing_ok=True)
            # The JVM is the parent here: it writes when it ends, and is waited for.
            submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
            java = f"{load_config().spark.driver_java_options} -Xlog:disable -XX:ArchiveClassesAtExit={part}"
            command = [str(submit), "--master", "local[1]", "--driver-java-options", java, __file__]
            done = subprocess.run(command, stdout=PIPE, stderr=STDOUT, text=True, check=False)
            assert not done.returncode, done.stdout[-2000:]
            part.rename(path)
    return path


def main() -> None:
    """Load the classes."""
    session = SparkSession.builder.getOrCreate()
    rows = session.range(10).selectExpr("id % 3 AS n").groupBy("n").count()
    assert len(rows.collect()) == 3
    session.stop()


if __name__ == "__main__":
    main()
