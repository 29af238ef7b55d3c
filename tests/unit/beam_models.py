"""Tiny random models and slow, plain beam searches to compare the engines with."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen3Config,
)

from negrec_core.beam import SidVocabulary

BOS = 1
SMALL = SidVocabulary(first_token=(10, 20, 30), code_counts=(5, 6, 7))
# Level 1 has more codes than vLLM allows in one request, and tokens stand out of level order.
WIDE = SidVocabulary(first_token=(2530, 10, 2520), code_counts=(4, 2500, 5))
WIDE_ROOT = SidVocabulary(first_token=(10, 2520, 2530), code_counts=(2500, 4, 5))

# Threads only get in each other's way on models this small.
torch.set_num_threads(1)

_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(kind: str = "qwen3", vocab_size: int = 40, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode, with next-token distributions far from uniform."""
    shape = {**_SHAPE, "vocab_size": vocab_size}
    config = {
        "qwen3": lambda: Qwen3Config(**shape, tie_word_embeddings=True),
        "llama": lambda: LlamaConfig(**shape, attention_dropout=0.5),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocab_size, n_positions=256, n_embd=64, n_layer=2, n_head=2, bos_token_id=BOS
        ),
        "phi-with-output-bias": lambda: PhiConfig(**shape),
        "gemma2-with-soft-cap": lambda: Gemma2Config(**shape, sliding_window=32, final_logit_softcapping=2.0),
    }[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # The usual initialisation is nearly uniform over tokens: every ID would tie.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif kind == "phi-with-output-bias":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def random_ids(vocabulary: SidVocabulary, n: int, seed: int = 0) -> np.ndarray:
    """n random semantic IDs `[n, D]`, possibly with duplicates."""
    return np.random.default_rng(seed).integers(0, vocabulary.code_counts, (n, vocabulary.depth))


def random_prompts(lengths: Sequence[int], vocab_size: int = 40, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, each starting with BOS."""
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(3, vocab_size, length - 1).tolist()] for length in lengths]


@torch.no_grad()
def loop_beam_search(
    model: PreTrainedModel,
    prompt: Sequence[int],
    ids: np.ndarray,
    vocabulary: SidVocabulary,
    width: int,
) -> list[tuple[tuple[int, ...], float]]:
    """Beam search by loops over sets of prefixes; with an endless `width`, full enumeration.

    Each level is scored by its definition: whole texts without any cache, log-softmax over the
    legal tokens.
    """
    catalogue = {tuple(row) for row in ids.tolist()}
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for level, first in enumerate(vocabulary.first_token):
        before = vocabulary.first_token[:level]
        texts = [[*prompt, *(f + code for f, code in zip(before, codes, strict=True))] for codes, _ in beams]
        logits = model(input_ids=torch.tensor(texts)).logits[:, -1].float()
        grown = []
        for (codes, score), row in zip(beams, logits, strict=True):
            legal = sorted({sid[level] for sid in catalogue if sid[:level] == codes})
            values = row[[first + code for code in legal]].log_softmax(0).tolist()
            grown += [((*codes, c), score + v) for c, v in zip(legal, values, strict=True)]
        beams = sorted(grown, key=lambda beam: (-beam[1], beam[0]))[:width]
    return beams
