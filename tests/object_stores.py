"""An S3 server for tests, and the environment that leads to it."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path
from types import TracebackType

# A bucket of this name stands for a store that does not know conditional writes. Not in the server's file:
# vLLM cannot start in a process that has imported Flask.
CARELESS = "careless"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class ObjectStore:
    """A server on a port; `stop` and `start` make it go away and come back empty."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port

    def start(self) -> None:
        server = Path(__file__).with_name("object_store_server.py")
        self._process = subprocess.Popen([sys.executable, str(server), str(self._port)])
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/moto-api/"):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the S3 server of the tests does not answer")
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "ObjectStore":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def bucket(self, name: str | None = None) -> str:
        """The URL of a new bucket."""
        name = name or f"negrec-{uuid.uuid4().hex[:12]}"
        put = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        with urllib.request.urlopen(put):
            return f"s3://{name}"


def environment(url: str) -> dict[str, str]:
    """What delta-rs reads."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "negrec",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-told",
    }


# The same in the processes that tests start.
_PORT = os.environ.setdefault("NEGREC_TEST_STORE_PORT", str(free_port()))
OBJECT_STORE = ObjectStore(int(_PORT))
# Spark's workers have the environment that Spark was started with.
os.environ.update(environment(OBJECT_STORE.url))
_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("NEGREC_CACHE", _CACHE.name)
