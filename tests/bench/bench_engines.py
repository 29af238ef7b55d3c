"""Both beam engines beside Hugging Face's constrained generate and vLLM's own beam search.

Each has a process of its own. The torch engine has its process keep freed memory; what generate gains by
that alone is measured, too.

    python tests/bench/bench_engines.py [--quick] [--users 256] [--rounds 5]

A model of 0.9M random weights in fp32, prompts of 128 tokens, 20 beams, 10,000 legal IDs; for the torch
engine 1,500,000, too, a tenth of all IDs that 3 x 256 codes can form. The engines and generate find legal IDs
only; `LLM.beam_search` knows no catalogue. Engines and vLLM split the users into batches themselves; generate
has an eighth of the users, as it is slow, all at once and in batches of 8, its fastest here. Without vLLM its
rows are left out.
"""

import argparse
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import Table, medians
from engines import LONGEST, VOCABULARY, catalogue, open_bench_engine, prompts, quiet, save_model
from transformers import AutoModelForCausalLM

from negrec_core.memory import keep_freed_memory
from negrec_core.trie import Trie

PROMPT, WIDTH, BATCH = 128, 20, 8
TORCH, VLLM = "torch engine", "vllm engine"
LARGE, LARGE_IDS = f"{TORCH}, large catalogue", 1_500_000
GENERATE = "Hugging Face generate, all at once"
BATCHES = f"the same, batches of {BATCH}"
KEPT = f"{BATCHES}, freed memory kept"
OWN = "LLM.beam_search"
# In a contender's process: its beam search.
_search: Callable[[list[list[int]]], object]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--users", type=int, default=256)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    users, rounds = (8, 1) if options.quick else (options.users, options.rounds)
    seeds = itertools.count()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = save_model("0.9M", Path(folder))
        few = max(2, users // 8)
        asked = {TORCH: users, LARGE: users, GENERATE: few, BATCHES: few, KEPT: few}
        if importlib.util.find_spec("vllm"):
            asked |= {VLLM: users, OWN: users}
        work: dict[str, Callable[[], object]] = {}
        for name, n in asked.items():
            # Not a pool of multiprocessing: its workers may have no children, which vLLM wants.
            process = stack.enter_context(
                ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _open, (name, path))
            )
            work[name] = lambda process=process, n=n: process.submit(_ask, n, next(seeds)).result()
        seconds = medians(work, rounds)
    speed = {name: asked[name] / took for name, took in seconds.items()}
    threads = torch.get_num_threads()
    table = Table("engines", f"0.9M fp32, {PROMPT} tokens, W={WIDTH}, {users} users, {threads} threads")
    for name, rate in speed.items():
        note = f"{LARGE_IDS:,} legal IDs" if name == LARGE else "10,000 legal IDs"
        table.add(name, f"{rate:.1f} users/s", note if name != OWN else "any tokens, not only legal IDs")
    pairs = [(LARGE, TORCH), *itertools.product((TORCH, VLLM), (GENERATE, BATCHES, KEPT, OWN))]
    for one, other in pairs:
        if one in speed and other in speed:
            table.add(f"{one} / {other}", f"{speed[one] / speed[other]:.3g}")
    table.print()


def _open(name: str, path: Path) -> None:
    global _search
    trie = catalogue(LARGE_IDS) if name == LARGE else catalogue()
    if name in (TORCH, LARGE, VLLM):
        engine = open_bench_engine(name.split()[0], path)
        _search = lambda batch: engine.search(batch, trie, WIDTH)  # noqa: E731
    elif name == OWN:
        _search = _own_beam_search(path)
    else:
        if name == KEPT:
            keep_freed_memory()
        _search = _generate(path, trie, None if name == GENERATE else BATCH)


def _ask(users: int, seed: int) -> None:
    _search(prompts(users, PROMPT, seed))


def _generate(path: Path, trie: Trie, batch: int | None) -> Callable[[list[list[int]]], object]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    first = VOCABULARY.first_token
    children: dict[tuple[int, ...], set[int]] = {}
    for codes in trie.codes_of(range(trie.n_ids)).tolist():
        tokens = tuple(start + code for start, code in zip(first, codes, strict=True))
        for level in range(3):
            children.setdefault(tokens[:level], set()).add(tokens[level])
    legal = {prefix: sorted(tokens) for prefix, tokens in children.items()}

    def run(asked: list[list[int]]) -> object:
        each = batch or len(asked)
        return [search(torch.tensor(asked[first : first + each])) for first in range(0, len(asked), each)]

    def search(ids: torch.Tensor) -> object:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            max_new_tokens=3,
            do_sample=False,
            renormalize_logits=True,
            eos_token_id=None,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _, text: legal[tuple(text[PROMPT:].tolist())],
        )

    return run


def _own_beam_search(path: Path) -> Callable[[list[list[int]]], object]:
    # What the engine sets for itself before it imports vLLM.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams

    with quiet():
        llm = LLM(
            str(path),
            dtype="float32",
            max_model_len=LONGEST + 8,
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            max_logprobs=2 * WIDTH,
            enforce_eager=True,
            enable_prefix_caching=True,
            gpu_memory_utilization=0.3,  # of memory, on a CPU
        )
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=3)
    return lambda batch: llm.beam_search([{"prompt_token_ids": prompt} for prompt in batch], params)


if __name__ == "__main__":
    main()
