"""Users per second of both beam engines, by model size, prompt length and beam width.

    python tests/bench/bench_grid.py [--quick] [--models 0.9M 9.6M 107M] [--widths 20 50 128]
        [--prompts 128 250 256 1000] [--engines torch vllm] [--seconds 5]

fp32 for the smallest model and on CPUs without AVX-512, where bf16 is slower still; else bf16. 10,000 legal
IDs. A cell takes as many users as come to about the given seconds for both its warm-up and its measure.
"""

import argparse
import importlib.util
import itertools
import tempfile
import time
from pathlib import Path

import torch
from common import Table
from engines import SIZES, catalogue, open_bench_engine, prompts, save_model

from negrec_core.beam import BeamEngine
from negrec_core.trie import Trie


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    arguments.add_argument("--widths", type=int, nargs="+", default=[20, 50, 128])
    arguments.add_argument("--prompts", type=int, nargs="+", default=[128, 250, 256, 1000])
    arguments.add_argument("--engines", nargs="+", default=["torch", "vllm"])
    arguments.add_argument("--seconds", type=float, default=5)
    options = arguments.parse_args()
    if options.quick:
        options.models, options.widths, options.prompts, options.seconds = ["0.9M"], [20, 50], [128, 250], 2
    trie = catalogue()
    kinds = [kind for kind in options.engines if kind == "torch" or importlib.util.find_spec("vllm")]
    computes_bf16 = torch.cuda.is_available() or "AVX512" in torch.backends.cpu.get_cpu_capability()
    for model, kind in itertools.product(options.models, kinds):
        dtype = "float32" if model == "0.9M" or not computes_bf16 else "bfloat16"
        with tempfile.TemporaryDirectory() as folder:
            engine = open_bench_engine(kind, save_model(model, Path(folder)), dtype)
            # Not part of a cell: what an engine compiles at its first search.
            engine.search(prompts(1, options.prompts[0], 0), trie, options.widths[0])
            for length, width in itertools.product(options.prompts, options.widths):
                rate, users = _users_per_second(engine, trie, length, width, options.seconds)
                table = Table("grid", f"{kind}, {model} {dtype}, {length} tokens, W={width}")
                table.add("users/s", f"{rate:.2f}", f"{users} users")
                table.print()


def _users_per_second(
    engine: BeamEngine, trie: Trie, length: int, width: int, seconds: float
) -> tuple[float, int]:
    """The rate over the last of a few runs, each of more users, and how many users that was."""
    users, total = 1, 0.0
    for seed in itertools.count():
        begin = time.perf_counter()
        engine.search(prompts(users, length, 1000 * seed + width), trie, width)
        took = time.perf_counter() - begin
        total += took
        # Of a run as long as that, warming up was a small part.
        if took > seconds or (seed and total + 2 * took > seconds) or users >= 512:
            return users / took, users
        users = min(512, users * max(2, min(8, int(seconds / 2 / took))))
    raise AssertionError


if __name__ == "__main__":
    main()
