"""An S3 server for tests, and the environment that leads to it."""

import os
import socket
import subprocess
import sys
import tempfile
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
        program = [sys.executable, str(server), str(self._port)]
        self._process = subprocess.Popen(program, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        with self._process.stdout as said:
            # Its own word: what answers on the port could be another's.
            if not said.readline():
                raise RuntimeError(f"the S3 server of the tests could not take port {self._port}")

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


# The same in the processes that tests start, another in each worker: the first to end would stop the other's.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
_PORT = os.environ.setdefault(f"NEGREC_TEST_STORE_PORT{_WORKER}", str(free_port()))
OBJECT_STORE = ObjectStore(int(_PORT))
# Spark's workers have the environment that Spark was started with.
os.environ.update(environment(OBJECT_STORE.url))
_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("NEGREC_CACHE", _CACHE.name)
