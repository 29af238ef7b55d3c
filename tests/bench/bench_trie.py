"""The trie: seconds to build, and the time of one step of a beam search as the catalogue grows.

    python tests/bench/bench_trie.py [--quick] [--ids 10000 100000 1500000]

A step asks for the children of 64 users x 50 beams, at two levels, in tries whose nodes have
about as many children whatever their size: 4 of the second level and 2 of the third. A hundred steps
follow on each other, each with beams of its own.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from common import Table, median_of, medians

from negrec_core.trie import Trie

BEAMS = 64 * 50
STEPS = 100


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--ids", type=int, nargs="+", default=[10_000, 100_000, 1_500_000])
    options = arguments.parse_args()
    rounds = 3 if options.quick else 7
    sizes = [10_000, 100_000] if options.quick else options.ids
    tries = {}
    for ids in sizes:
        rng = np.random.default_rng(0)
        codes = rng.integers(8192, size=(ids, 3), dtype=np.int32)
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            Trie.build(codes, (8192,) * 3)
            seconds.append(time.perf_counter() - begin)
        table = Table("trie", f"{ids:,} random IDs of 3 x 8,192 codes")
        table.add("build", f"{median_of(seconds):.2f} s", "median of 3")
        table.print()
        tries[ids] = _even_trie(ids, rng)
    rng = np.random.default_rng(1)
    work = {f"{ids}": _steps(trie, rng) for ids, trie in tries.items()}
    took = medians(work, rounds)
    for ids in sizes:
        table = Table("trie", f"{ids:,} IDs, {BEAMS:,} beams")
        ratio = took[f"{ids}"] / took[f"{sizes[0]}"]
        step = 1000 * took[f"{ids}"] / STEPS
        table.add("children, two levels", f"{step:.2f} ms", f"{ratio:.2f} of the smallest's")
        table.print()


def _even_trie(ids: int, rng: np.random.Generator) -> Trie:
    """Each first code has four second codes, each of those two third ones."""
    number = np.arange(ids // 8 * 8)
    codes = np.stack([number // 8, number // 2 % 4, number % 2], 1).astype(np.int32)
    return Trie.build(codes, (max(ids // 8, 1), 4, 2))


def _steps(trie: Trie, rng: np.random.Generator) -> Callable[[], object]:
    beams = [
        (level, np.sort(rng.integers(trie.n_nodes(level), size=BEAMS)))
        for _ in range(STEPS)
        for level in (1, 2)
    ]
    return lambda: [trie.children(level, nodes) for level, nodes in beams]


if __name__ == "__main__":
    main()
