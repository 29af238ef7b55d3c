"""The likelihood a generator is trained on: the one beam search ranks by (DESIGN sections 5 and 6)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl import SFTTrainer

from negrec_core.beam import SidVocabulary
from negrec_core.trie import Trie
from train.checkpoints import SafeCheckpoints
from train.samples import IGNORED, LengthGroupedBatches


def constrained_log_probs(
    logits: Tensor, ids: Tensor, trie: Trie, vocabulary: SidVocabulary
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of semantic IDs, legal codes alone competing.

    A model trained by these spends nothing on learning which IDs exist: the trie knows.

    Args:
        logits: [n, D, vocabulary], those that each code is read from.
        ids: tokens [n, D] of legal IDs.
        trie: the legal IDs.
        vocabulary: where each level's codes start among the tokens.

    Returns:
        Of each code after the codes before it: the log-probability, and the entropy of the choice, both
        float32 [n, D], nats.
    """
    codes = ids - ids.new_tensor(vocabulary.first_token)
    known = codes.cpu().numpy()
    node = np.zeros(len(known), np.int64)
    chosen, entropies = [], []
    for level, (first, count) in enumerate(zip(vocabulary.first_token, trie.code_counts, strict=True)):
        legal, _, splits = trie.children(level, node)
        illegal_codes = np.ones((len(known), count), bool)
        illegal_codes[np.repeat(np.arange(len(known)), np.diff(splits)), legal] = False
        illegal = torch.from_numpy(illegal_codes).to(logits.device)
        scores = logits[:, level, first : first + count].float().masked_fill(illegal, -torch.inf)
        log_probs = scores.log_softmax(-1)
        chosen.append(log_probs.gather(1, codes[:, level : level + 1]))
        with torch.no_grad():
            finite = log_probs.masked_fill(illegal, 0.0)
            entropies.append(-(log_probs.exp() * finite).sum(1, keepdim=True))
        node = trie.child(level, node, known[:, level])
    return torch.cat(chosen, 1), torch.cat(entropies, 1)


def constrained_nll(
    logits: Tensor, labels: Tensor, weights: Tensor, trie: Trie, vocabulary: SidVocabulary
) -> Tensor:
    """Negative log-likelihood of the semantic IDs in `labels`, by `constrained_log_probs`.

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
    n = int(labelled.sum()) // trie.depth
    ids = labels[:, 1:][labelled].view(n, trie.depth)
    rows = logits[:, :-1][labelled].view(n, trie.depth, logits.shape[-1])
    weight = weights[:, 1:][labelled].view(n, trie.depth)
    return -(weight * constrained_log_probs(rows, ids, trie, vocabulary)[0]).sum()


class ConstrainedTrainer(SafeCheckpoints, SFTTrainer):
    """The stock trainer, minimising `total_loss` over the sum of the weights."""

    def __init__(self, *args: Any, trie: Trie, vocabulary: SidVocabulary, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trie = trie
        self._sid_vocabulary = vocabulary

    def total_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of a batch's labelled tokens, each times its weight: `constrained_nll`."""
        return constrained_nll(logits, inputs["labels"], inputs["weights"], self._trie, self._sid_vocabulary)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Logits over a large vocabulary cost time and memory, so none of what comes before all labels.
        labelled = (inputs["labels"] != IGNORED).any(0).nonzero()
        kept = inputs["labels"].shape[1] - max(int(labelled[0]) - 1, 0)
        last = {name: inputs[name][:, -kept:] for name in ("labels", "weights")}
        # The trainer's own hook for a loss runs the model twice, for figures that are not used here.
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=kept
        )
        loss = self.total_loss(outputs.logits, {**inputs, **last}) / inputs["weights"].sum()
        if num_items_in_batch is not None:
            # Then the trainer leaves the mean over accumulated batches to the loss.
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # The trainer's own order cannot be taken up again inside a later epoch.
        dataset: Any = train_dataset or self.train_dataset
        lengths = np.asarray(dataset["length"])
        return LengthGroupedBatches(lengths, self.args.train_batch_size, self.args.seed)
