"""Both beam engines beside Hugging Face's constrained generate and vLLM's own beam search.

    python tests/bench/bench_engines.py [--quick] [--users 64] [--rounds 3]

A model of 0.9M random weights in fp32, prompts of 128 tokens, 20 beams, 10,000 legal IDs. The engines
and generate find legal IDs only; `LLM.beam_search` knows no catalogue. Without vLLM its rows are left out.
"""

import argparse
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import Table, medians
from engines import LONGEST, VOCABULARY, catalogue, open_bench_engine, prompts, quiet, save_model
from transformers import AutoModelForCausalLM

from negrec_core.trie import Trie

PROMPT, WIDTH = 128, 20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--users", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    users, rounds = (8, 1) if options.quick else (options.users, options.rounds)
    seeds = itertools.count()
    trie = catalogue()
    with tempfile.TemporaryDirectory() as folder:
        path = save_model("0.9M", Path(folder))
        few = max(2, users // 8)
        ours = open_bench_engine("torch", path)
        theirs = _generate(path, trie)
        work: dict[str, Callable[[], object]] = {
            "torch engine": lambda: ours.search(prompts(users, PROMPT, next(seeds)), trie, WIDTH),
            "Hugging Face generate": lambda: theirs(prompts(few, PROMPT, next(seeds))),
        }
        asked = {"torch engine": users, "Hugging Face generate": few}
        if importlib.util.find_spec("vllm"):
            vllm = open_bench_engine("vllm", path)
            own = _own_beam_search(path)
            work["vllm engine"] = lambda: vllm.search(prompts(users, PROMPT, next(seeds)), trie, WIDTH)
            work["LLM.beam_search"] = lambda: own(prompts(users, PROMPT, next(seeds)))
            asked |= {"vllm engine": users, "LLM.beam_search": users}
        seconds = medians(work, rounds)
    speed = {name: asked[name] / took for name, took in seconds.items()}
    table = Table("engines", f"0.9M fp32, {PROMPT} tokens, W={WIDTH}, {users} users")
    for name, rate in speed.items():
        note = "10,000 legal IDs" if name != "LLM.beam_search" else "any tokens, not only legal IDs"
        table.add(name, f"{rate:.1f} users/s", note)
    for one, other in itertools.product(("torch engine", "vllm engine"), speed):
        if one in speed and other not in ("torch engine", "vllm engine"):
            table.add(f"{one} / {other}", f"{speed[one] / speed[other]:.1f}")
    table.print()


def _generate(path: Path, trie: Trie) -> Callable[[list[list[int]]], object]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    first = VOCABULARY.first_token
    children: dict[tuple[int, ...], set[int]] = {}
    for codes in trie.codes_of(range(trie.n_ids)).tolist():
        tokens = tuple(start + code for start, code in zip(first, codes, strict=True))
        for level in range(3):
            children.setdefault(tokens[:level], set()).add(tokens[level])
    legal = {prefix: sorted(tokens) for prefix, tokens in children.items()}

    def run(batch: list[list[int]]) -> object:
        ids = torch.tensor(batch)
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
        )
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=3)
    return lambda batch: llm.beam_search([{"prompt_token_ids": prompt} for prompt in batch], params)


if __name__ == "__main__":
    main()
