"""Training samples: stored as semantic IDs, written as tokens when they are seen, and their order."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from negrec_core.prompts import Event, PromptWriter, context_events

# Label of a token that is not learnt.
IGNORED = -100
# Batches of like length are put together from this many batches at random.
_BATCHES_SORTED = 50


class LengthGroupedBatches(Sampler[int]):
    """A random order of samples in which those of a batch are of like length, which saves padding.

    The order depends on the seed and the epoch alone, so that a training can be taken up anywhere.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(len(self._lengths))
        batches = []
        for start in range(0, len(order), _BATCHES_SORTED * self._batch_size):
            part = order[start : start + _BATCHES_SORTED * self._batch_size]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += np.split(part, range(self._batch_size, len(part), self._batch_size))
        # The one batch that may be short must stay last, where the loader expects it.
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        short = [batch for batch in batches if len(batch) < self._batch_size]
        for n in rng.permutation(len(whole)):
            yield from whole[n].tolist()
        for batch in short:
            yield from batch.tolist()


@dataclass(frozen=True)
class Samples:
    """What a step learns from.

    Attributes:
        rows: the samples.
        inputs: Delta tables and versions they were read from.
    """

    rows: Dataset
    inputs: dict[str, int]

    @property
    def digest(self) -> str:
        """Digest of what the rows hold, in their order."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(json.dumps(row, sort_keys=True).encode())
        return found.hexdigest()


def load_samples(rows: pa.Table, sid_of_item: dict[str, int]) -> Dataset:
    """Samples of `training_next_negative` or `training_alignment` rows.

    Rows whose target, or one of whose distractors, has no semantic ID are left out.

    Args:
        rows: table rows.
        sid_of_item: item -> number of its semantic ID.

    Returns:
        Columns `sids` and `disliked`, the past in time order; `target`; `options`, the target and its
        distractors, if there are any; `length` in events. In order of user and anchor, so that equal
        tables make equal samples.
    """
    names = ["sids", "disliked", "target", "length"]
    choosing = "distractors" in rows.column_names
    columns: dict[str, list[Any]] = {name: [] for name in [*names, *(["options"] if choosing else [])]}
    rows = rows.sort_by([("user_id", "ascending"), ("anchor_time", "ascending"), ("target", "ascending")])
    for batch in rows.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            options = [sid_of_item.get(item) for item in [row["target"], *row.get("distractors", [])]]
            if None in options:
                continue
            target = options[0]
            events = sorted(context_events(row["negatives"], row["positives"], sid_of_item))
            columns["sids"].append([event.sid for event in events])
            columns["disliked"].append([event.disliked for event in events])
            columns["target"].append(target)
            columns["length"].append(len(events) + len(options))
            if choosing:
                columns["options"].append(options)
    return Dataset.from_dict(columns)


Written = tuple[list[int], list[int], list[float]]


def padded(written: Sequence[Written], pad: int) -> dict[str, Tensor]:
    """Tokens, labels and weights of samples as tensors [batch, tokens], padded on the right.

    `input_ids`, `attention_mask`, `labels` (-100 where there is no loss) and `weights` (0 there).
    """
    tokens, labels, weights = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
        for rows, value in zip(zip(*written, strict=True), (pad, IGNORED, 0.0), strict=True)
    )
    lengths = torch.tensor([len(row) for row, _, _ in written])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "weights": weights}


@dataclass
class SampleWriter:
    """Writes samples as a padded batch, each time with another variation of their past.

    A log of thousands of users is soon known by heart. With events left out and in another order a
    past says the same of its user's taste, and is not the one seen before. A sample with `options`,
    semantic IDs of which the target is one, names them before the past, in random order.

    Attributes:
        prompt: writes the prompts.
        blocks: token block of each semantic ID.
        like_weight: what a like in the past counts as a target, the target of the sample counting 1.
        dislike_weight: the same for a dislike in the past.
        multiple_of: padding of the prompt, as in generation.
        event_dropout: chance of an event of the past to be left out.
        shuffle_share: chance of a past to be put in random order.
        seed: of all chance.
        batch: number of the next batch; together with the seed it decides how that batch varies.
    """

    prompt: PromptWriter
    blocks: Sequence[tuple[int, ...]]
    like_weight: float
    dislike_weight: float
    multiple_of: int
    event_dropout: float
    shuffle_share: float
    seed: int
    batch: int = 0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch as `padded` makes it."""
        rng = np.random.default_rng([self.seed, self.batch])
        self.batch += 1
        return padded([self.write(sample, rng) for sample in samples], self.prompt.pad)

    def write(self, sample: dict[str, Any], rng: np.random.Generator) -> Written:
        """Tokens, labels and weights of one variation of a sample."""
        sids, disliked = sample["sids"], sample["disliked"]
        n = len(sids)
        kept = np.flatnonzero(rng.random(n) >= self.event_dropout)
        time = rng.permutation(n) if rng.random() < self.shuffle_share else np.arange(n)
        past = [Event(int(time[k]), disliked[k], sids[k]) for k in kept]
        options = [self.blocks[sid] for sid in rng.permutation(sample.get("options", []))]
        prompt = self.prompt.asking(options) if options else self.prompt
        tokens, positions = prompt.write(past, self.blocks, self.multiple_of)
        labels, weights = [IGNORED] * len(tokens), [0.0] * len(tokens)
        block = self.blocks[sample["target"]]
        for at, is_dislike in positions:
            weight = self.dislike_weight if is_dislike else self.like_weight
            if weight:
                labels[at : at + len(block)] = tokens[at : at + len(block)]
                weights[at : at + len(block)] = [weight] * len(block)
        return [*tokens, *block], [*labels, *block], [*weights, *[1.0] * len(block)]
