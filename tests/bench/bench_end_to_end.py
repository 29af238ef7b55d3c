"""The demo world from log to block list: seconds and memory of every command and daily stage.

    python tests/bench/bench_end_to_end.py [--quick] [--users 10000 100000 1000000]
        [--days 16] [--slate 2] [--folder DIR] [--set KEY=VALUE]

The commands are those of `negrec demo`, with the overlay `demo` and its tiny model, in processes of their
own, with beams 20 wide. All worlds have the same items, so models are trained in the first world and serve
the others. The seconds of the first daily stage include the start of Spark.

Memory is the largest sum of resident memory of a command's processes (driver, JVM, Python workers) while a
stage ran, looked at four times a second; pages that processes share count in each. What the driver's
Python alone holds is named apart.
"""

import argparse
import contextlib
import datetime as dt
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import Table

from jobs.gates import ACCEPTABLE
from jobs.world import WorldSettings

_STAGE_ENDS = re.compile(r" (\w+) ds=\S+: revision \d+ in ([\d.]+) s")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments.add_argument("--days", type=int, default=16, help="of log, 16 or more")
    arguments.add_argument("--slate", type=int, default=2, help="items shown in a session")
    arguments.add_argument("--folder", type=Path, help="where to work; default: the temporary directory")
    arguments.add_argument("--set", action="append", default=[], help="settings for negrec, key=value")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        models = Path(folder) / "models"
        for users in [1000] if options.quick else options.users:
            world = Path(folder) / "world"
            shown = WorldSettings(users=users, days=options.days, slate=options.slate)
            _world(shown, world, models, ["generation.beam_width=20", *options.set])
            if not models.exists():
                shutil.move(world / "warehouse" / "models", models)
            shutil.rmtree(world)


def _world(shown: WorldSettings, folder: Path, models: Path, settings: list[str]) -> None:
    last = shown.start + dt.timedelta(days=shown.days - 1)
    ds, before = (str(last - dt.timedelta(days=days)) for days in (7, 14))
    log, whole = str(folder / "log"), ["--start", str(shown.start), "--end", str(last)]
    commands = {
        "world": ["world", log, *(f"--{name}={getattr(shown, name)}" for name in ("users", "days", "slate"))],
        "import": ["import", "demo", log],
        f"feedback, {shown.days} days": ["backfill", *whole, "--stages", "feedback"],
        "item_graph, a week before": ["run", "--ds", before, "--stages", "item_graph"],
    }
    if models.exists():
        shutil.copytree(models, folder / "warehouse" / "models")
    else:
        commands |= {f"train {what}": ["train", what, "--until", ds] for what in ("codebook", "generator")}
    # What a tiny model blocks is not what is measured here.
    commands["daily run"] = ["run", "--ds", ds, *(part for gate in ACCEPTABLE for part in ("--accept", gate))]
    negrec = [sys.executable, "-m", "jobs.cli", "--warehouse", str(folder / "warehouse"), "--config", "demo"]
    negrec += [part for setting in settings for part in ("--set", setting)]
    table = Table(
        "end_to_end",
        f"{shown.users:,} users, {shown.items:,} items, {shown.days} days, slates of {shown.slate}",
    )
    begin, most = time.perf_counter(), _Memory()
    for name, command in commands.items():
        memory, started = _Memory(), time.perf_counter()
        with subprocess.Popen(
            [*negrec, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as child:
            with _watch(child.pid) as now:
                assert child.stderr is not None
                for line in child.stderr:
                    print(line, end="", file=sys.stderr, flush=True)
                    ended = _STAGE_ENDS.search(line)
                    if ended and name == "daily run":
                        table.add(f"{name}: {ended[1]}", f"{float(ended[2]):.1f} s", str(now))
                        memory.raise_to(now)
                        now.forget()
            memory.raise_to(now)
        table.add(name, f"{time.perf_counter() - started:.1f} s", str(memory))
        most.raise_to(memory)
        if child.returncode:
            table.print()
            sys.exit(f"negrec {' '.join(command)} ended with {child.returncode}")
    size = sum(file.stat().st_size for file in (folder / "warehouse").rglob("*.parquet")) / 2**30
    table.add("all", f"{time.perf_counter() - begin:.0f} s", f"{most}; tables of {size:.2f} GiB")
    table.print()


@dataclass
class _Memory:
    """Most resident GiB that was seen, of all processes and of the driver's Python."""

    all: float = 0.0
    driver: float = 0.0

    def raise_to(self, other: "_Memory") -> None:
        self.all, self.driver = max(self.all, other.all), max(self.driver, other.driver)

    def forget(self) -> None:
        self.all = self.driver = 0.0

    def __str__(self) -> str:
        return f"{self.all:.2f} GiB, {self.driver:.2f} of it the driver's Python"


@contextlib.contextmanager
def _watch(root: int) -> Iterator[_Memory]:
    """Memory of a process and its descendants, as far as it was looked at."""
    seen, done = _Memory(), threading.Event()
    gib = os.sysconf("SC_PAGE_SIZE") / 2**30

    def look() -> None:
        while not done.wait(0.25):
            children: dict[int, list[int]] = {}
            pages: dict[int, int] = {}
            for entry in os.listdir("/proc"):
                with contextlib.suppress(OSError, ValueError, IndexError):
                    process = int(entry)
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                    children.setdefault(int(fields[1]), []).append(process)
                    pages[process] = int(fields[21])
            wanted, total = [root], 0
            while wanted:
                process = wanted.pop()
                total += pages.get(process, 0)
                wanted += children.get(process, [])
            seen.raise_to(_Memory(total * gib, pages.get(root, 0) * gib))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
