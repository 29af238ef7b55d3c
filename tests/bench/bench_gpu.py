"""The torch engine on a GPU: Qwen3-1.7B (random weights), long prompts, wide beams, large catalogues.

    PYTHONPATH=. python tests/bench/bench_gpu.py --out gpu.json [--minutes 8] [--profile]
    PYTHONPATH=. python tests/bench/bench_gpu.py --tiny        # seconds, on a CPU, to try the script

Needs numpy, torch and transformers only. Cells run in order of importance until the time is up, and
the file is written after each one. A cell that runs out of memory stays as a row that says so, and
is tried again with half the users per batch. Nothing is asserted but that a GPU finds the beams of
a CPU.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from negrec_core.beam import SidVocabulary
from negrec_core.beam.torch_engine import TorchBeamEngine, _prefill
from negrec_core.trie import Trie

TEXT_TOKENS = 151_936
COLUMNS = (
    ("ids", "{ids:>9,}"),
    ("prompt", "{prompt:>6}"),
    ("W", "{width:>5}"),
    ("attention", "{attention:>9}"),
    ("users", "{users:>5}"),
    ("batches", "{batches:>7}"),
    ("users/s", "{users_per_second:>8.1f}"),
    ("p50 ms", "{p50_ms:>8.1f}"),
    ("p99 ms", "{p99_ms:>8.1f}"),
    ("prefill", "{prefill_share:>7.2f}"),
    ("TFLOP/s", "{weight_tflops:>7.0f}"),
    ("GiB", "{peak_gib:>6.1f}"),
)


@dataclass(frozen=True)
class Cell:
    """One workload: `users` prompts of `prompt` tokens in one batch, `width` beams over `ids` IDs."""

    ids: int
    prompt: int
    width: int
    users: int
    attention: str = "default"


@dataclass(frozen=True)
class Scale:
    """What is measured; the tiny form only tries the script."""

    config: dict[str, Any]
    text_tokens: int
    codes: int
    catalogues: tuple[int, ...]
    prompts: tuple[int, ...]
    widths: tuple[int, ...]
    batch_tokens: int
    batches: int
    seconds: float


QWEN3_1B7 = Scale(
    config={
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    text_tokens=TEXT_TOKENS,
    codes=8192,
    # Most important first.
    catalogues=(1_520_000, 430_000),
    prompts=(1000, 5000, 303, 2465),
    widths=(128, 1000, 50, 512, 256),
    batch_tokens=65_536,
    batches=20,
    seconds=6,
)
TINY = Scale(
    config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    text_tokens=100,
    codes=64,
    catalogues=(3000, 1000),
    prompts=(30, 100),
    widths=(20, 64),
    batch_tokens=1024,
    batches=3,
    seconds=0.2,
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    arguments.add_argument("--minutes", type=float, default=8, help="no cell starts after this long")
    arguments.add_argument("--profile", action="store_true", help="also print where two cells spend time")
    arguments.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU if there is no GPU")
    options = arguments.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        sys.exit("bench_gpu: no GPU here; --tiny tries the script on a CPU")
    scale = TINY if options.tiny else QWEN3_1B7
    vocabulary = _vocabulary(scale)
    model = _model(scale, vocabulary, device, torch.bfloat16)
    tries = {n: _trie(n, scale.codes) for n in scale.catalogues}
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model_parameters": model.num_parameters(),
        "model_gib": round(2 * model.num_parameters() / 2**30, 2),
        "tries": {
            n: {"ids": trie.n_ids, "build_seconds": round(seconds, 2)} for n, (trie, seconds) in tries.items()
        },
        "rows": [],
        "profiles": {},
    }
    report["same_beams_as_cpu"] = _same_beams_as_cpu(device)
    print(json.dumps({key: value for key, value in report.items() if value}, indent=1), flush=True)
    print(" ".join(f"{name:>{len(layout.format(**_WIDE))}}" for name, layout in COLUMNS), flush=True)
    profiled = {(scale.prompts[0], scale.widths[0]), (scale.prompts[1], scale.widths[1])}
    for cell in _cells(scale):
        tried: Cell | None = cell
        while tried and time.monotonic() < deadline:
            row = _measure(model, vocabulary, tries[cell.ids][0], tried, scale)
            report["rows"].append(row)
            print(_line(row), flush=True)
            options.out.write_text(json.dumps(report, indent=1))
            halved = replace(tried, users=tried.users // 2)
            tried = halved if "error" in row and halved.users else None
        key = (cell.prompt, cell.width)
        if options.profile and key in profiled and time.monotonic() < deadline:
            profiled.remove(key)
            report["profiles"][f"prompt {cell.prompt}, W {cell.width}"] = table = _profile(
                model, vocabulary, tries[cell.ids][0], cell
            )
            print(table, flush=True)
            options.out.write_text(json.dumps(report, indent=1))
    options.out.write_text(json.dumps(report, indent=1))
    print(f"{len(report['rows'])} rows in {options.out}")


def _cells(scale: Scale) -> Iterator[Cell]:
    """The grid on the large catalogue, attention kernels, one user alone, the grid on the small one."""
    large, small = scale.catalogues
    levels = 2
    grid = [
        (prompt, width, max(1, scale.batch_tokens // (prompt + levels * width)))
        for width in scale.widths
        for prompt in scale.prompts
    ]
    first = len(scale.prompts) * 2
    yield from (Cell(large, prompt, width, users) for prompt, width, users in grid[:first])
    for attention in ("cudnn", "efficient"):
        yield from (
            Cell(large, prompt, width, users, attention)
            for prompt, width, users in grid[:first]
            if width == scale.widths[1] and prompt in scale.prompts[:2]
        )
    yield from (Cell(large, prompt, scale.widths[0], 1) for prompt in scale.prompts)
    yield from (Cell(large, prompt, width, users) for prompt, width, users in grid[first:])
    yield from (Cell(small, prompt, width, users) for prompt, width, users in grid)


def _measure(
    model: PreTrainedModel, vocabulary: SidVocabulary, trie: Trie, cell: Cell, scale: Scale
) -> dict[str, Any]:
    row: dict[str, Any] = {**vars(cell)}
    gpu = model.device.type == "cuda"
    engine = TorchBeamEngine(model, vocabulary, max_batch_tokens=sys.maxsize)
    rng = np.random.default_rng(0)
    try:
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        whole, prefill = [], []
        with _attention(cell.attention):
            begun = time.perf_counter()
            for batch in range(-2, scale.batches):  # two batches to warm up
                prompts = _prompts(rng, cell, vocabulary)
                start = time.perf_counter()
                found = engine.search(prompts, trie, cell.width)
                middle = time.perf_counter()
                _prefill_only(engine, prompts)
                end = time.perf_counter()
                if batch == -1:
                    begun = end
                if batch >= 0:
                    whole.append(middle - start)
                    prefill.append(end - middle)
                    if end - begun > scale.seconds and batch >= 2:
                        break
        legal = trie.contains(found.codes.reshape(-1, trie.depth)).all()
    except torch.OutOfMemoryError as error:
        row["error"] = f"out of memory: {str(error).splitlines()[0][:200]}"
        return row
    except RuntimeError as error:  # an attention kernel that does not take this workload
        row["error"] = str(error).splitlines()[0][:200]
        return row
    p50 = float(np.median(whole))
    tokens = cell.users * (cell.prompt + (trie.depth - 1) * cell.width)
    weights = model.num_parameters() - model.get_input_embeddings().weight.numel()
    row |= {
        "batches": len(whole),
        "users_per_second": cell.users * len(whole) / sum(whole),
        "p50_ms": 1000 * p50,
        "p99_ms": 1000 * float(np.percentile(whole, 99)),
        "prefill_p50_ms": 1000 * float(np.median(prefill)),
        "prefill_share": float(np.median(prefill)) / p50,
        # Arithmetic of the weights alone, without attention: what a matrix unit does at best is known.
        "weight_tflops": 2 * weights * tokens / p50 / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan"),
        "all_legal": bool(legal),
    }
    return row


def _prefill_only(engine: TorchBeamEngine, prompts: list[list[int]]) -> None:
    device = engine._model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    with engine._levels() as levels, torch.inference_mode():
        _prefill(levels[0], prompts, lengths, DynamicCache()).sum().item()  # waits for the GPU


@contextlib.contextmanager
def _attention(kind: str) -> Iterator[None]:
    """Which fused kernel takes the masked attention of the tree; the prompt's is flash's by default."""
    first = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    if kind == "default":
        yield
        return
    order = [first[kind], SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def _profile(model: PreTrainedModel, vocabulary: SidVocabulary, trie: Trie, cell: Cell) -> str:
    from torch.profiler import ProfilerActivity, profile

    engine = TorchBeamEngine(model, vocabulary, max_batch_tokens=sys.maxsize)
    prompts = _prompts(np.random.default_rng(0), cell, vocabulary)
    engine.search(prompts, trie, cell.width)
    gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    try:
        with profile(activities=activities) as profiler:
            engine.search(prompts, trie, cell.width)
        key = "self_device_time_total" if gpu else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70)
    except RuntimeError as error:
        return f"no profile: {error}"


def _vocabulary(scale: Scale) -> SidVocabulary:
    return SidVocabulary(
        tuple(scale.text_tokens + level * scale.codes for level in range(3)), (scale.codes,) * 3
    )


def _model(
    scale: Scale, vocabulary: SidVocabulary, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=vocabulary.end, attn_implementation="sdpa", dtype=dtype, **scale.config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _trie(n: int, codes: int) -> tuple[Trie, float]:
    ids = np.random.default_rng(n).integers(codes, size=(n, 3), dtype=np.int32)
    begin = time.perf_counter()
    trie = Trie.build(ids, (codes,) * 3)
    return trie, time.perf_counter() - begin


def _prompts(rng: np.random.Generator, cell: Cell, vocabulary: SidVocabulary) -> list[list[int]]:
    tokens = rng.integers(vocabulary.end, size=(cell.users, cell.prompt))
    return tokens.tolist()  # type: ignore[no-any-return]


def _same_beams_as_cpu(device: torch.device) -> str:
    """Whether the device finds the beams that the CPU finds, in fp32 on a tiny model."""
    vocabulary = _vocabulary(TINY)
    model = _model(TINY, vocabulary, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # sharper: equal scores would leave the order to rounding
    trie, _ = _trie(3000, TINY.codes)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(vocabulary.end, size=n).tolist() for n in (1, 50, 7, 100, 33)]
    found = []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for where in ("cpu", device):
        found.append(TorchBeamEngine(model.to(where), vocabulary).search(prompts, trie, 40))
    torch.set_float32_matmul_precision(precision)
    same = int((found[0].codes == found[1].codes).all(2).sum())
    gap = float(np.abs(found[0].log_probs - found[1].log_probs).max())
    return f"{same} of {found[0].codes.shape[0] * 40} beams, log-probabilities within {gap:.1e}"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        cell = " ".join(layout.format(**row) for name, layout in COLUMNS[:5])
        return f"{cell} {row['error']}"
    return " ".join(layout.format(**row) for _, layout in COLUMNS)


_WIDE = dict.fromkeys(
    ("ids", "prompt", "width", "users", "batches", "users_per_second", "p50_ms", "p99_ms"), 0
) | {"prefill_share": 0, "weight_tflops": 0, "peak_gib": 0, "attention": ""}


if __name__ == "__main__":
    main()
