"""The `negrec` command in a process that ends itself by SIGKILL, at a step of a write that is given.

A write has four steps: its files are about to be written, are written, are checked and about to be
committed, are committed.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from jobs.cli import main
from negrec_core.delta import DeltaStore

left, seconds, whom = 0, 0.0, ""


def drive(
    death: tuple[int, float, str], arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> None:
    """Be that process.

    Args:
        death: a step, the seconds after it, and who dies: with `group` the JVM too, else this process alone,
            as by the kernel's out-of-memory killer, so that the JVM may go on writing for a while.
        arguments: of the command.
        folder: to work in; what is printed is added to its file `log`.
        environment: what changes in it.
    """
    global left, seconds, whom
    left, seconds, whom = death
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    with (folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    DeltaStore.new_run = counted(DeltaStore.new_run)  # type: ignore[method-assign]
    DeltaStore._replace = counted(DeltaStore._replace)  # type: ignore[method-assign]
    DeltaTable.create_write_transaction = counted(  # type: ignore[method-assign]
        DeltaTable.create_write_transaction, after=True
    )
    sys.argv[1:] = arguments
    main()


def kill(seconds: float, whom: str) -> None:
    time.sleep(seconds)
    if whom == "group":
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def counted(method: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
    """A method before which, or also after which, a step is counted."""

    @functools.wraps(method)
    def counting(*arguments: Any, **options: Any) -> Any:
        step()
        result = method(*arguments, **options)
        if after:
            step()
        return result

    return counting


def step() -> None:
    global left
    left -= 1
    if left == 0 and not seconds:
        kill(0, whom)
    if left == 0:
        # While the work goes on: in the middle of a commit, or of the stage after it.
        threading.Thread(target=kill, args=(seconds, whom), daemon=True).start()
