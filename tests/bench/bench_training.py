"""Rollouts and rewards of GRPO: IDs per second beside Hugging Face's constrained generate on the same model.

    python tests/bench/bench_training.py [--quick] [--presets tiny small] [--prompts 32] [--group 8]

Medians of `--rounds` rounds in which they take turns.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import Table, medians
from transformers import GenerationConfig

from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.codebook import Codebook
from negrec_core.prompts import Event
from negrec_core.trie import Trie
from train.models import build_model, load_prompt_text
from train.rewards import Reward, Targets

ITEMS, CODES, LATENT = 10_000, 128, 32


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--presets", nargs="+", default=["tiny", "small"])
    arguments.add_argument("--prompts", type=int, default=32)
    arguments.add_argument("--group", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    if options.quick:
        options.presets, options.prompts, options.rounds = ["tiny"], 8, 1
    rng = np.random.default_rng(0)
    words = tuple(rng.normal(size=(CODES, LATENT)).astype(np.float32) for _ in range(3))
    codebook = Codebook((), words)
    codes = np.unique(rng.integers(CODES, size=(ITEMS, 3)), axis=0).astype(np.int32)
    trie = Trie.build(codes, codebook.code_counts)
    for preset in options.presets:
        _rollouts(preset, codebook, codes, trie, options, rng)
    _rewards(codebook, codes, rng, options.rounds)


def _rollouts(
    preset: str,
    codebook: Codebook,
    codes: np.ndarray,
    trie: Trie,
    options: argparse.Namespace,
    rng: np.random.Generator,
) -> None:
    model, _, prompt = build_model(preset, load_prompt_text("plain"), codebook, 128, 0)
    blocks = prompt.blocks(codes)
    prompts = [
        prompt.write(
            [Event(n, bool(n % 2), int(sid)) for n, sid in enumerate(rng.integers(len(codes), size=30))],
            blocks,
        )[0]
        for _ in range(options.prompts)
    ]
    engine = TorchBeamEngine(model, prompt.vocabulary)
    generator = torch.Generator().manual_seed(0)
    first = prompt.vocabulary.first_token

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        # All prompts are equally long.
        level, node = len(ids) - len(prompts[0]), np.zeros(1, np.int64)
        for depth in range(level):
            node = trie.child(depth, node, np.array([int(ids[len(prompts[0]) + depth]) - first[depth]]))
        legal, _, _ = trie.children(level, node)
        return list((legal + first[level]).tolist())

    def hugging_face() -> None:
        model.generate(
            input_ids=torch.tensor(prompts).repeat_interleave(options.group, 0),
            generation_config=GenerationConfig(
                do_sample=True, max_new_tokens=3, min_new_tokens=3, pad_token_id=prompt.pad, eos_token_id=None
            ),
            prefix_allowed_tokens_fn=allowed,
        )

    assert len({len(p) for p in prompts}) == 1
    seconds = medians(
        {
            "independent": lambda: engine.sample(prompts, trie, options.group, generator, distinct=False),
            "distinct": lambda: engine.sample(prompts, trie, options.group, generator, distinct=True),
            "Hugging Face generate": hugging_face,
        },
        options.rounds,
    )
    n, baseline = options.prompts * options.group, seconds["Hugging Face generate"]
    size = model.num_parameters() / 1e6
    workload = f"rollouts, {preset} ({size:.1f}M), {options.prompts} prompts of {len(prompts[0])} tokens"
    table = Table("training", f"{workload}, groups of {options.group}, {len(codes):,} legal IDs")
    for name, took in seconds.items():
        table.add(name, f"{n / took:.0f} IDs/s", f"{baseline / took:.1f} times Hugging Face")
    table.print()


def _rewards(codebook: Codebook, codes: np.ndarray, rng: np.random.Generator, rounds: int) -> None:
    batch, samples = 512, 64
    negatives, positives = (
        Targets.of([rng.integers(len(codes), size=size).tolist() for _ in range(samples)])
        for size in (60, 30)
    )
    generated, owner = (
        codes[rng.integers(len(codes), size=batch)],
        np.repeat(np.arange(samples), batch // samples),
    )
    rewards = {s: Reward(s, 0.5, codebook, codes, negatives, positives) for s in "abcde"}  # type: ignore[arg-type]
    unit = codebook.unit(codes)

    def loop() -> list[float]:
        out = []
        for row, sample in zip(codebook.unit(generated), owner, strict=True):
            near = [
                max(
                    float(row @ unit[sid])
                    for sid in targets.sids[targets.starts[sample] : targets.starts[sample + 1]]
                )
                for targets in (negatives, positives)
            ]
            out.append(near[0] - 0.5 * near[1])
        return out

    work: dict[str, Callable[[], object]] = {
        f"scheme {s}": lambda r=r: r(generated, owner) for s, r in rewards.items()
    }
    seconds = medians({**work, "loop over targets (c)": loop}, rounds)
    table = Table("training", f"reward of {batch} completions, 60 negatives and 30 positives each")
    for name, took in seconds.items():
        table.add(
            name, f"{1000 * took:.2f} ms", f"{seconds['loop over targets (c)'] / took:.1f} times the loop"
        )
    table.print()


if __name__ == "__main__":
    main()
