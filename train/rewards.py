"""Rewards of GRPO: how near a generated semantic ID comes to what the user rejects next, and likes next.

Similarity is the cosine of the IDs' codeword sums, as in the block list (DESIGN sections 5 and 7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from negrec_core.codebook import Codebook

Scheme = Literal["a", "b", "c", "d", "e"]

# Scheme b and d: a similarity below it is chance, not a hit.
TRUNCATED_BELOW = 0.6
# Scheme e: an ID whose first 0, 1, 2, ... codes agree with a rejected one; the last value is a hit.
PREFIX_REWARDS = (0.0, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Targets:
    """Semantic IDs of many samples, by number: those of sample i are `sids[starts[i]:starts[i + 1]]`."""

    sids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Targets":
        """Pack one list of semantic-ID numbers per sample."""
        starts = np.concatenate([[0], np.cumsum([len(sids) for sids in lists], dtype=np.int64)])
        return cls(np.concatenate([np.asarray(sids, np.int64) for sids in lists]), starts)

    def take(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets of `samples` [n], which may repeat: the sids, and the row of `samples` of each."""
        counts = np.diff(self.starts)[samples]
        row = np.repeat(np.arange(len(samples)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.sids[self.starts[samples][row] + within], row


@dataclass(frozen=True)
class Reward:
    """One of the reward schemes.

    a: nearest rejected item. b: a, truncated. c: a, less `gamma` times the nearest liked item. d: c, both
    truncated. e: 1, 0.1 or 0.01 where three, two or one of the codes are those of a rejected item.

    Attributes:
        scheme: a to e.
        gamma: weight of the penalty.
        codebook: of the semantic IDs.
        codes: int32 [S, D], the semantic ID of each number.
        negatives: per sample, what the user rejects in the horizon, with its Swing neighbours (GTS).
        positives: per sample, what the user likes in the horizon (FPS).
    """

    scheme: Scheme
    gamma: float
    codebook: Codebook
    codes: np.ndarray
    negatives: Targets
    positives: Targets

    @cached_property
    def _unit(self) -> np.ndarray:
        return self.codebook.unit(self.codes)

    def __call__(self, generated: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Rewards float32 [n] of generated IDs [n, D], one for each of `samples` [n].

        A sample without targets of a kind has similarity 0 to them.
        """
        if self.scheme == "e":
            sids, row = self.negatives.take(samples)
            agree = (self.codes[sids] == generated[row]).cumprod(1).sum(1)
            depth = generated.shape[1]
            # Counted from the end, so that a hit earns the most at any number of levels.
            values = np.array(PREFIX_REWARDS, np.float32)[np.maximum(agree - depth, -3) + 3]
            return _most(np.where(agree > 0, values, 0.0), row, len(samples))
        unit = self.codebook.unit(generated)
        reward = self.similarity(unit, samples, self.negatives)
        if self.scheme in "cd":
            reward = reward - self.gamma * self.similarity(unit, samples, self.positives)
        return reward

    def similarity(self, unit: np.ndarray, samples: np.ndarray, targets: Targets) -> np.ndarray:
        """Largest cosine [n] of unit embeddings [n, dim] to their samples' targets."""
        sids, row = targets.take(samples)
        cosine = np.einsum("nd,nd->n", self._unit[sids], unit[row])
        if self.scheme in "bd":
            cosine = np.where(cosine < TRUNCATED_BELOW, 0.0, cosine)
        return _most(cosine, row, len(unit))


def _most(values: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
    """Largest value of each of `n` rows; rows ascend; 0 for a row without any."""
    found = np.zeros(n, np.float32)
    if len(row):
        first = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
        found[row[first]] = np.maximum.reduceat(values, first)
    return found
