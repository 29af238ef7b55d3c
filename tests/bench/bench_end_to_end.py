"""The demo world from log to block list: seconds and memory of every command and stage.

    python tests/bench/bench_end_to_end.py [--quick] [--users 10000 100000 1000000] [--folder DIR]

The commands are those of `negrec demo`, with the overlay `demo` and its tiny model, in processes of their
own. Memory is the largest sum of resident memory of a command's processes (driver, JVM, Python workers)
while a stage ran, looked at four times a second; pages that processes share count in each.
"""

import argparse
import contextlib
import datetime as dt
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common import Table

from jobs.pipeline import DAILY_STAGES
from jobs.world import WorldSettings


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000])
    arguments.add_argument("--folder", type=Path, help="where to work; default: the temporary directory")
    arguments.add_argument("--set", action="append", default=[], help="settings for negrec, key=value")
    options = arguments.parse_args()
    for users in [2000] if options.quick else options.users:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _world(users, Path(folder), options.set)


def _world(users: int, folder: Path, settings: list[str]) -> None:
    shown = WorldSettings(users=users)
    last = shown.start + dt.timedelta(days=shown.days - 1)
    ds, before = (str(last - dt.timedelta(days=days)) for days in (7, 14))
    log, whole = str(folder / "log"), ["--start", str(shown.start), "--end", str(last)]
    commands = [
        ["world", log, "--users", str(users)],
        ["import", "demo", log],
        ["backfill", *whole, "--stages", "feedback"],
        ["run", "--ds", before, "--stages", "item_graph"],
        ["train", "codebook", "--until", ds],
        ["train", "generator", "--until", ds],
        *(["run", "--ds", ds, "--stages", stage] for stage in DAILY_STAGES),
    ]
    negrec = [sys.executable, "-m", "jobs.cli", "--warehouse", str(folder / "warehouse"), "--config", "demo"]
    negrec += [part for setting in settings for part in ("--set", setting)]
    table = Table("end_to_end", f"{users:,} users, {shown.items:,} items, {shown.days} days")
    whole_seconds, most = 0.0, 0.0
    for command in commands:
        name = command[-1] if command[0] == "run" else " ".join(command[:2])
        name = {f"world {log}": "world", "backfill --start": f"feedback, {shown.days} days"}.get(name, name)
        name = f"{name}, a week before" if before in command else name
        begin = time.perf_counter()
        child = subprocess.Popen([*negrec, *command], stdout=subprocess.DEVNULL)
        with _watch(child.pid) as peak:
            code = child.wait()
        took = time.perf_counter() - begin
        if code:
            table.print()
            sys.exit(f"negrec {' '.join(command)} ended with {code}")
        whole_seconds, most = whole_seconds + took, max(most, *peak)
        table.add(name, f"{took:.0f} s", f"{max(peak):.2f} GiB")
    size = sum(file.stat().st_size for file in (folder / "warehouse").rglob("*.parquet")) / 2**30
    table.add("all", f"{whole_seconds:.0f} s", f"at most {most:.2f} GiB; tables of {size:.2f} GiB")
    table.print()


@contextlib.contextmanager
def _watch(root: int) -> Iterator[list[float]]:
    """Resident GiB of a process and its descendants, one number for each look."""
    seen, done = [0.0], threading.Event()

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
            seen.append(total * os.sysconf("SC_PAGE_SIZE") / 2**30)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
