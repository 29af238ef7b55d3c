"""The training likelihood is the one that beam search ranks by."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from negrec_core.beam import SidVocabulary
from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.trie import Trie
from train.likelihood import IGNORED, ConstrainedTrainer, constrained_nll

COUNTS = (3, 4, 2)
VOCABULARY = SidVocabulary((5, 8, 12), COUNTS)
CODES = st.tuples(*(st.integers(0, count - 1) for count in COUNTS))


def loop_nll(logits, labels, weights, legal):
    """Sum of -log softmax over the children of each prefix, one token at a time."""
    total = 0.0
    for row, wanted, weight in zip(logits.double().numpy(), labels.tolist(), weights.tolist(), strict=True):
        prefix = ()
        for at, token in enumerate(wanted):
            if token == IGNORED:
                continue
            level = len(prefix)
            children = sorted({codes[level] for codes in legal if codes[:level] == prefix})
            scores = np.array([row[at - 1][VOCABULARY.first_token[level] + code] for code in children])
            code = token - VOCABULARY.first_token[level]
            total -= weight[at] * (scores[children.index(code)] - np.log(np.exp(scores).sum()))
            prefix = (*prefix, code) if level < len(COUNTS) - 1 else ()
    return total


@given(st.sets(CODES, min_size=1, max_size=12), st.data())
def test_nll_equals_a_loop_over_legal_children(legal, data):
    targets = data.draw(
        st.lists(st.lists(st.sampled_from(sorted(legal)), max_size=3), min_size=1, max_size=4)
    )
    rows = []
    for ids in targets:
        row = [IGNORED]
        for codes in ids:
            row += [
                IGNORED,
                *(first + code for first, code in zip(VOCABULARY.first_token, codes, strict=True)),
            ]
        rows.append(row)
    width = max(map(len, rows))
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*labels.shape, 16, generator=generator)
    weights = torch.rand(labels.shape, generator=generator)
    trie = Trie.build(np.array(sorted(legal)), COUNTS)
    found = constrained_nll(logits, labels, weights, trie, VOCABULARY)
    assert abs(float(found) - loop_nll(logits, labels, weights, legal)) < 1e-3


def test_nll_of_an_id_is_minus_the_score_beam_search_gives_it():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    ).eval()
    ids = np.array([[0, 1, 0], [0, 1, 1], [0, 3, 0], [2, 2, 1]])
    trie = Trie.build(ids, COUNTS)
    prompt = [1, 2, 3, 4]
    found = TorchBeamEngine(model, VOCABULARY).search([prompt], trie, 4)
    for codes, score in zip(found.codes[0], found.log_probs[0], strict=True):
        tokens = [*prompt, *(codes + np.array(VOCABULARY.first_token)).tolist()]
        labels = torch.tensor([[IGNORED] * len(prompt) + tokens[len(prompt) :]])
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits
        assert (
            abs(float(constrained_nll(logits, labels, torch.ones(labels.shape), trie, VOCABULARY)) + score)
            < 1e-4
        )


def test_a_gradient_reaches_legal_codes_only():
    trie = Trie.build(np.array([[0, 1, 0], [1, 2, 1]]), COUNTS)
    logits = torch.zeros(1, 4, 16, requires_grad=True)
    labels = torch.tensor([[IGNORED, 5, 9, 12]])
    constrained_nll(logits, labels, torch.ones(labels.shape), trie, VOCABULARY).backward()
    assert set(torch.nonzero(logits.grad[0, 0]).flatten().tolist()) == {5, 6}
    # An only child is certain: there is nothing to learn.
    assert not logits.grad[0, 1].any()
    assert not logits.grad[0, 2].any()


def test_the_trainer_asks_for_no_logits_before_all_labels():
    """A prompt of hundreds of tokens has no loss, and logits of it over a large vocabulary are costly."""
    trie = Trie.build(np.array([[0, 1, 0], [1, 2, 1]]), COUNTS)
    labels = torch.full((2, 12), IGNORED)
    labels[0, 7:10] = torch.tensor([5, 9, 12])
    labels[1, 9:12] = torch.tensor([6, 10, 13])
    weights = torch.rand(2, 12) * (labels != IGNORED)
    logits = torch.randn(2, 12, 16)
    asked = []

    def model(input_ids, attention_mask, logits_to_keep):
        asked.append(logits_to_keep)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    trainer = object.__new__(ConstrainedTrainer)
    trainer._trie, trainer._sid_vocabulary = trie, VOCABULARY
    inputs = {"input_ids": labels, "attention_mask": labels, "labels": labels, "weights": weights}
    found = trainer.compute_loss(model, inputs)
    expected = constrained_nll(logits, labels, weights, trie, VOCABULARY) / weights.sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    # The first label is read from the token before it.
    assert asked == [6]
