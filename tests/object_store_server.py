"""moto's S3, one request at a time: `python object_store_server.py PORT`.

Requests at once would break what is tested: moto looks whether an object exists and writes it in two
steps, so that of two conditional writes both could succeed, which no real store allows. `ready` says that
it has the port.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from object_stores import CARELESS
from werkzeug.serving import make_server


def serve(port: int) -> None:
    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith(f"/{CARELESS}"):
            environ.pop("HTTP_IF_NONE_MATCH", None)
        found: Iterable[bytes] = moto(environ, start_response)
        return found

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", port, answer, threaded=False)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
