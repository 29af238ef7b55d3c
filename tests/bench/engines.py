"""Random models of three sizes on disk, with a tokenizer, and the engines that open them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from negrec_core.beam import BeamEngine, SidVocabulary, open_engine
from negrec_core.trie import Trie

VOCABULARY = SidVocabulary((16, 272, 528), (256,) * 3)
VOCAB_SIZE = 832  # 784 in use, rounded up to a multiple of 64
LONGEST = 1024 + 8
# Layers, hidden size, MLP size, heads and key heads of 32 or 64 dimensions.
SIZES = {
    "0.9M": (4, 128, 384, 4, 2, 32),
    "9.6M": (6, 384, 1024, 6, 2, 64),
    "107M": (30, 576, 1536, 9, 3, 64),
}


def save_model(size: str, path: Path) -> Path:
    """A Qwen3 architecture with random weights, as a Hugging Face directory."""
    layers, hidden, inner, heads, key_heads, head_dim = SIZES[size]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        max_position_embeddings=LONGEST + 128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).eval().save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB_SIZE)}, unk_token="t3"))
    names = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(path)
    return path


def open_bench_engine(kind: str, path: Path, dtype: str = "float32") -> BeamEngine:
    """The engine as `negrec` opens it, with memory for the longest prompts here."""
    options = {} if kind == "torch" else {"kv_cache_gib": 2, "max_model_len": LONGEST + 8}
    with quiet():
        return open_engine(kind, path, VOCABULARY, dtype=dtype, **options)


def catalogue(ids: int = 10_000) -> Trie:
    """A trie of random IDs."""
    codes = np.random.default_rng(0).integers(256, size=(ids, 3))
    return Trie.build(codes, VOCABULARY.code_counts)


def prompts(users: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts; another seed for every run, so that no engine finds them in a cache."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB_SIZE - 48, size=(users, length))
    return tokens.tolist()  # type: ignore[no-any-return]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """vLLM writes to the standard output, which is the table's."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
