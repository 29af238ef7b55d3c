"""What the benches share: medians of runs that take turns, memory, and one shape of table."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Table:
    """Figures of one bench, printed as the rows of a Markdown table: bench, workload, what, figure, note."""

    name: str
    workload: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, figure: str, note: str = "") -> None:
        """Keep one figure."""
        self.rows.append((what, figure, note))

    def print(self) -> None:
        """Print all rows."""
        for what, figure, note in self.rows:
            print(f"| {self.name} | {self.workload} | {what} | {figure} | {note} |", flush=True)


def median_of(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def medians(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns, so that other work slows all alike; the first round warms up.

    Every other round goes backwards, so that what one leaves to the next (memory to collect, files to
    flush) falls on both. Threads of the one before may wait actively for a while, so a second's rest lies
    between turns.
    """
    took: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in list(work.items())[:: 1 if round_ % 2 else -1]:
            time.sleep(1)
            begin = time.perf_counter()
            run()
            if round_:
                took[name].append(time.perf_counter() - begin)
    return {name: median_of(values) for name, values in took.items()}


def resident_mib() -> float:
    """Memory that this process holds now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20
