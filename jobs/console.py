"""What a person sees while a command works: progress bars on a terminal, log lines otherwise."""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from negrec_core.progress import Progress as Report

console = Console()
errors = Console(stderr=True)

_QUIET_SECONDS = 10.0
log = logging.getLogger("negrec")


def set_up_process(verbose: bool) -> None:
    """Make this process a well-behaved job, before torch or Spark is imported.

    Log lines go to standard error; results go to standard output.
    """
    # Threads that wait for work must soon sleep: spinning slows everything else on a busy machine, and
    # torch itself; never spinning slows small models by half. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # negrec shows its own progress.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Of trl only the trainers are used: not its vLLM client, and `rollout_func` knowingly.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    level = logging.DEBUG if verbose else logging.INFO
    if errors.is_terminal:
        handler: logging.Handler = RichHandler(console=errors, show_path=False, show_level=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False


class ConsoleReporter:
    """Shows the running stage: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ConsoleReporter":
        if errors.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                console=errors,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def stage(self, name: str, ds: str) -> Report:
        """Start showing a stage; returns what it reports its parts to."""
        label = f"{name} {ds}".strip()
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(label, total=None)
        started = last = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last
            if self._bar and self._task is not None:
                self._bar.update(self._task, completed=done, total=total)
            elif time.monotonic() - last >= _QUIET_SECONDS and done < total:
                last = time.monotonic()
                log.info("%s: %d of %d, %.0f s", label, done, total, last - started)

        return report


@contextlib.contextmanager
def reporting() -> Iterator[ConsoleReporter]:
    """A reporter for the length of a command."""
    with ConsoleReporter() as reporter:
        yield reporter
