"""The likelihood a generator is trained on: the one beam search ranks by (DESIGN sections 5 and 6)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from trl import SFTTrainer

from negrec_core.beam import SidVocabulary
from negrec_core.trie import Trie

IGNORED = -100


def constrained_nll(
    logits: Tensor, labels: Tensor, weights: Tensor, trie: Trie, vocabulary: SidVocabulary
) -> Tensor:
    """Negative log-likelihood of the semantic IDs in `labels`, legal codes alone competing.

    A model trained this way spends nothing on learning which IDs exist: the trie knows.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens], `IGNORED` but for whole semantic IDs, all of them legal.
        weights: [batch, tokens], how much each labelled token counts.
        trie: the legal IDs.
        vocabulary: where each level's codes start among the tokens.

    Returns:
        The weighted sum over all labelled tokens, in nats.
    """
    labelled = labels[:, 1:] != IGNORED
    ids = labels[:, 1:][labelled].view(-1, trie.depth)
    rows = logits[:, :-1][labelled].view(-1, trie.depth, logits.shape[-1])
    weight = weights[:, 1:][labelled].view(-1, trie.depth)
    codes = ids - ids.new_tensor(vocabulary.first_token)
    known = codes.cpu().numpy()
    node = np.zeros(len(known), np.int64)
    total = logits.new_zeros((), dtype=torch.float32)
    for level, (first, count) in enumerate(zip(vocabulary.first_token, trie.code_counts, strict=True)):
        legal, _, splits = trie.children(level, node)
        illegal = np.ones((len(known), count), bool)
        illegal[np.repeat(np.arange(len(known)), np.diff(splits)), legal] = False
        scores = rows[:, level, first : first + count].float()
        scores = scores.masked_fill(torch.from_numpy(illegal).to(scores.device), float("-inf"))
        nats = F.cross_entropy(scores, codes[:, level], reduction="none")
        total = total + (weight[:, level] * nats).sum()
        node = trie.child(level, node, known[:, level])
    return total


class ConstrainedTrainer(SFTTrainer):
    """The stock trainer, minimising the weighted mean of `constrained_nll`."""

    def __init__(self, *args: Any, trie: Trie, vocabulary: SidVocabulary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trie = trie
        self._sid_vocabulary = vocabulary

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # The trainer's own hook for a loss runs the model twice, for figures that are not used here.
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        labels, weights = inputs["labels"], inputs["weights"]
        total = constrained_nll(outputs.logits, labels, weights, self._trie, self._sid_vocabulary)
        loss = total / weights.sum()
        if num_items_in_batch is not None:
            # Then the trainer leaves the mean over accumulated batches to the loss.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss
