"""GRPO beside plain trl and Hugging Face's generate on the same model: whole steps, rollouts, rewards.

    python tests/bench/bench_training.py [--quick] [--presets tiny small] [--prompts 32] [--group 8]

Medians of `--rounds` rounds in which they take turns; of steps, the median of those after the second.
Plain trl samples any tokens, by `generate` without constraints.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Table, median_of, medians
from datasets import Dataset
from transformers import GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from negrec_core.artefacts import Manifest
from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.codebook import Codebook
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore
from negrec_core.prompts import Event
from negrec_core.semantic_ids import SemanticIds
from negrec_core.trie import Trie
from train import grpo
from train.models import build_model, load_prompt_text
from train.rewards import Reward, Targets
from train.samples import Samples
from train.steps import Student, Task, common_arguments

ITEMS, CODES, LATENT = 10_000, 128, 32
PAST, NEGATIVES, POSITIVES = 30, 60, 30
STEPS = 6


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
        _steps(preset, codebook, codes, options, rng)
        _rollouts(preset, codebook, codes, trie, options, rng)
    _rewards(codebook, codes, rng, options.rounds)


def _steps(
    preset: str,
    codebook: Codebook,
    codes: np.ndarray,
    options: argparse.Namespace,
    rng: np.random.Generator,
) -> None:
    n_prompts = max(1, options.prompts // 4)  # an update takes a CPU long
    samples = [
        {
            "sids": rng.integers(len(codes), size=PAST).tolist(),
            "disliked": [bool(n % 2) for n in range(PAST)],
            "time": list(range(PAST)),
            "anchor": PAST,
            "negatives": rng.integers(len(codes), size=NEGATIVES).tolist(),
            "positives": rng.integers(len(codes), size=POSITIVES).tolist(),
        }
        for _ in range(4 * n_prompts)
    ]
    config = load_config(
        [],
        (
            f"generator.grpo.stages=[{{context: both, kl: 0.02, steps: {STEPS}}}]",
            f"generator.grpo.prompts={n_prompts}",
            f"generator.grpo.group_size={options.group}",
            "generator.grpo.rollouts=independent",
        ),
        {},
    )
    seconds, tokens = {}, 0
    for name in ("negrec", "plain trl"):
        student = Student(*build_model(preset, load_prompt_text("plain"), codebook, 128, 0), "")
        blocks = student.prompt.blocks(codes)
        prompts = [student.prompt.write(grpo.past(row, "both", 1), blocks)[0] for row in samples]
        tokens = n_prompts * options.group * (len(prompts[0]) + codes.shape[1])
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            # From disk, where the trainer looks for its reference.
            student.save(Path(folder) / "begin")
            student = Student.open(Path(folder) / "begin", "")
            # Neither a store nor a version of the codebook is looked at.
            task = Task(
                DeltaStore(folder),
                config,
                "2026-01-01",
                0,
                codebook,
                Manifest("codebook", "bench", "", "", {}, {}, {}, {}),
                SemanticIds([], codes, {}),
                clock,
            )
            rows = Samples(Dataset.from_list(samples), {})
            if name == "negrec":
                grpo.fit(task, student, rows, Path(folder))
            else:
                _plain_trl(task, student, rows, prompts, clock, Path(folder))
        seconds[name] = clock.step()
    table = Table(
        "training",
        f"GRPO step, {preset} ({student.model.num_parameters() / 1e6:.1f}M), {n_prompts} prompts of"
        f" {len(prompts[0])} tokens, groups of {options.group}",
    )
    for name, took in seconds.items():
        ratio = f"{seconds['plain trl'] / took:.1f} times plain trl"
        table.add(name, f"{tokens / took:,.0f} tokens/s", ratio)
    table.print()


class _Clock:
    """When each step ended; is told as a training's progress is."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def __call__(self, done: int, total: int) -> None:
        self._ends.append(time.perf_counter())

    def step(self) -> float:
        """Seconds of a step."""
        return median_of(np.diff(self._ends)[1:].tolist())


def _plain_trl(
    task: Task, student: Student, samples: Samples, prompts: list[list[int]], clock: _Clock, work: Path
) -> None:
    """The stock trainer with the settings of ours and the same rewards, 0 for what is no item."""
    settings, tokenizer = task.config.generator.grpo, student.tokenizer
    texts = tokenizer.batch_decode(prompts)
    assert tokenizer(texts)["input_ids"] == prompts
    rng, first = np.random.default_rng(0), np.asarray(student.prompt.vocabulary.first_token)
    targets = [Targets.of(samples.rows[name]) for name in ("negatives", "positives")]
    reward = Reward(settings.scheme, settings.gamma, task.codebook, task.ids.codes, *targets)

    def rewarded(completion_ids: list[list[int]], sample: list[int], **_: Any) -> list[float]:
        codes = np.asarray(completion_ids) - first
        inside = ((codes >= 0) & (codes < CODES)).all(1)
        legal = np.flatnonzero(inside)[task.trie.contains(codes[inside])]
        out = np.zeros(len(codes))
        out[legal] = reward(codes[legal], np.asarray(sample)[legal])
        return list(map(float, out))

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock(state.global_step, state.max_steps)

    order = rng.integers(len(prompts), size=STEPS * settings.prompts).tolist()
    GRPOTrainer(
        model=student.model,
        reward_funcs=[rewarded],
        args=GRPOConfig(
            **common_arguments(task, work),
            num_train_epochs=1,
            per_device_train_batch_size=settings.prompts * settings.group_size,
            num_generations=settings.group_size,
            max_completion_length=task.trie.depth,
            generation_kwargs={"min_new_tokens": task.trie.depth},
            learning_rate=settings.learning_rate,
            beta=settings.stages[0].kl,
            loss_type="grpo",
            temperature=1.0,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [texts[n] for n in order], "sample": order}),
        processing_class=tokenizer,
        callbacks=[Tell()],
    ).train()


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
            [Event(n, bool(n % 2), int(sid)) for n, sid in enumerate(rng.integers(len(codes), size=PAST))],
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
        for size in (NEGATIVES, POSITIVES)
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
    table = Table(
        "training", f"reward of {batch} completions, {NEGATIVES} negatives and {POSITIVES} positives each"
    )
    for name, took in seconds.items():
        table.add(
            name, f"{1000 * took:.2f} ms", f"{seconds['loop over targets (c)'] / took:.1f} times the loop"
        )
    table.print()


if __name__ == "__main__":
    main()
