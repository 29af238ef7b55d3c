"""Samples of next-negative training: stored as semantic IDs, written as tokens when they are seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from negrec_core.prompts import Event, PromptWriter, context_events
from train.likelihood import IGNORED


def load_samples(rows: pa.Table, sid_of_item: dict[str, int]) -> Dataset:
    """Samples of `training_next_negative` rows; targets without a semantic ID are left out.

    Args:
        rows: table rows.
        sid_of_item: item -> number of its semantic ID.

    Returns:
        Columns `sids` and `disliked`, the past in time order; `target`; `length` in events.
    """
    columns: dict[str, list[Any]] = {"sids": [], "disliked": [], "target": [], "length": []}
    for batch in rows.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            target = sid_of_item.get(row["target"])
            if target is None:
                continue
            events = sorted(context_events(row["negatives"], row["positives"], sid_of_item))
            columns["sids"].append([event.sid for event in events])
            columns["disliked"].append([event.disliked for event in events])
            columns["target"].append(target)
            columns["length"].append(len(events) + 1)
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class SampleWriter:
    """Writes samples as a padded batch, each time with another variation of their past.

    A log of thousands of users is soon known by heart. With events left out and in another order a
    past says the same of its user's taste, and is not the one seen before.

    Attributes:
        prompt: writes the prompts.
        blocks: token block of each semantic ID.
        like_weight: what a like in the past counts as a target, a dislike counting 1.
        multiple_of: padding of the prompt, as in generation.
        event_dropout: chance of an event of the past to be left out.
        shuffle_share: chance of a past to be put in random order.
        rng: source of chance.
    """

    prompt: PromptWriter
    blocks: Sequence[tuple[int, ...]]
    like_weight: float
    multiple_of: int
    event_dropout: float
    shuffle_share: float
    rng: np.random.Generator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors [batch, tokens]: `input_ids`, `attention_mask`, `labels` and `weights`.

        Where there is no loss, `labels` is -100 and `weights` 0.
        """
        written = [self.write(s["sids"], s["disliked"], s["target"]) for s in samples]
        fill = (self.prompt.pad, IGNORED, 0.0)
        tokens, labels, weights = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
            for rows, value in zip(zip(*written, strict=True), fill, strict=True)
        )
        lengths = torch.tensor([len(row) for row, _, _ in written])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "weights": weights}

    def write(
        self, sids: Sequence[int], disliked: Sequence[bool], target: int
    ) -> tuple[list[int], list[int], list[float]]:
        """Tokens, labels and weights of one variation of a sample."""
        n = len(sids)
        kept = np.flatnonzero(self.rng.random(n) >= self.event_dropout)
        time = self.rng.permutation(n) if self.rng.random() < self.shuffle_share else np.arange(n)
        past = [Event(int(time[k]), disliked[k], sids[k]) for k in kept]
        tokens, positions = self.prompt.write(past, self.blocks, self.multiple_of)
        labels, weights = [IGNORED] * len(tokens), [0.0] * len(tokens)
        block = self.blocks[target]
        for at, is_dislike in positions:
            weight = 1.0 if is_dislike else self.like_weight
            if weight:
                labels[at : at + len(block)] = tokens[at : at + len(block)]
                weights[at : at + len(block)] = [weight] * len(block)
        return [*tokens, *block], [*labels, *block], [*weights, *[1.0] * len(block)]
