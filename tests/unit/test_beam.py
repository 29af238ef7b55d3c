"""The torch engine against enumeration, a beam search by loops, and Hugging Face's own."""

import itertools
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from beam_models import (
    BOS,
    SMALL,
    WIDE,
    WIDE_ROOT,
    loop_beam_search,
    random_ids,
    random_prompts,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import GenerationConfig

from negrec_core.beam import BeamResult, SidVocabulary, batches, open_engine
from negrec_core.beam.torch_engine import TorchBeamEngine
from negrec_core.errors import ArtefactError, ConfigError, InputError, MissingError
from negrec_core.trie import Trie

MODEL = tiny_model()
LENGTHS = (1, 7, 3, 12, 7)


def assert_equal_beams(result: BeamResult, row: int, expected, atol: float = 1e-4) -> None:
    n = len(expected)
    assert [tuple(codes) for codes in result.codes[row, :n].tolist()] == [e[0] for e in expected]
    np.testing.assert_allclose(result.log_probs[row, :n], [e[1] for e in expected], atol=atol)
    assert (result.codes[row, n:] == -1).all()
    assert np.isneginf(result.log_probs[row, n:]).all()


def test_a_beam_as_wide_as_the_catalogue_is_full_enumeration():
    ids = random_ids(SMALL, 60)
    trie = Trie.build(ids, SMALL.code_counts)
    prompts = random_prompts(LENGTHS)
    result = TorchBeamEngine(MODEL, SMALL).search(prompts, trie, trie.n_ids)
    np.testing.assert_allclose(np.exp(result.log_probs).sum(1), 1, atol=1e-4)
    for row, prompt in enumerate(prompts):
        assert_equal_beams(result, row, loop_beam_search(MODEL, prompt, ids, SMALL, 10**6))


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "phi-with-output-bias", "gemma2-with-soft-cap"])
def test_narrow_beams_are_those_of_a_loop(kind, width):
    model = tiny_model(kind)
    ids = random_ids(SMALL, 80)
    prompts = random_prompts(LENGTHS)
    engine = TorchBeamEngine(model, SMALL)
    result = engine.search(prompts, Trie.build(ids, SMALL.code_counts), width)
    for row, prompt in enumerate(prompts):
        assert_equal_beams(result, row, loop_beam_search(model, prompt, ids, SMALL, width))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "phi-with-output-bias", "gemma2-with-soft-cap"])
def test_log_probs_of_given_ids_are_those_of_full_enumeration(kind):
    model = tiny_model(kind)
    ids = random_ids(SMALL, 80)
    trie = Trie.build(ids, SMALL.code_counts)
    prompts = random_prompts(LENGTHS)
    leaves = np.random.default_rng(1).integers(-1, trie.n_ids, (len(prompts), 9))
    # One batch for all users, and one for each.
    for most in (16_384, 1):
        found = TorchBeamEngine(model, SMALL, max_batch_tokens=most).log_probs(prompts, trie, leaves)
        for row, prompt in enumerate(prompts):
            every = dict(loop_beam_search(model, prompt, ids, SMALL, 10**6))
            expected = [
                -np.inf if leaf < 0 else every[tuple(trie.codes_of(np.array([leaf]))[0].tolist())]
                for leaf in leaves[row]
            ]
            np.testing.assert_allclose(found[row], expected, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(
    ids=st.lists(st.tuples(*(st.integers(0, k - 1) for k in SMALL.code_counts)), min_size=1),
    width=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_catalogue_gives_legal_distinct_sorted_ids_and_the_beams_of_a_loop(ids, width, lengths, seed):
    catalogue = np.array(ids)
    trie = Trie.build(catalogue, SMALL.code_counts)
    prompts = random_prompts(lengths, seed=seed)
    result = TorchBeamEngine(MODEL, SMALL).search(prompts, trie, width)
    for row, prompt in enumerate(prompts):
        found = result.codes[row][np.isfinite(result.log_probs[row])]
        assert trie.contains(found).all()
        assert len(np.unique(found, axis=0)) == len(found)
        assert (result.log_probs[row, 1:] <= result.log_probs[row, :-1]).all()
        assert_equal_beams(result, row, loop_beam_search(MODEL, prompt, catalogue, SMALL, width))


def test_equals_hugging_face_beam_search_on_left_padded_prompts():
    width, ids = 6, random_ids(SMALL, 120)
    prompts = random_prompts(LENGTHS)
    first, longest = SMALL.first_token, max(LENGTHS)
    tokens = {tuple(int(f + c) for f, c in zip(first, row, strict=True)) for row in ids}

    def allowed(_: int, text: torch.Tensor) -> list[int]:
        written = tuple(text[longest:].tolist())
        return sorted({t[len(written)] for t in tokens if t[: len(written)] == written})

    padding = [longest - len(prompt) for prompt in prompts]
    output = MODEL.generate(
        torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=3,
        do_sample=False,
        length_penalty=0.0,  # scores are sums, not means
        eos_token_id=None,
        prefix_allowed_tokens_fn=allowed,
        renormalize_logits=True,
        return_dict_in_generate=True,
        output_scores=True,
    )
    result = TorchBeamEngine(MODEL, SMALL).search(prompts, Trie.build(ids, SMALL.code_counts), width)
    codes = output.sequences[:, longest:].view(len(prompts), width, 3) - torch.tensor(first)
    np.testing.assert_array_equal(result.codes, codes)
    scores = output.sequences_scores.view(len(prompts), width)
    np.testing.assert_allclose(result.log_probs, scores, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [WIDE, WIDE_ROOT])
def test_a_level_wider_than_1024_codes(vocabulary):
    model = tiny_model(vocab_size=2540)
    ids = random_ids(vocabulary, 9000)
    trie = Trie.build(ids, vocabulary.code_counts)
    assert max(trie.max_children(level) for level in range(3)) > 1024
    prompt = random_prompts([5], vocab_size=2540)[0]
    result = TorchBeamEngine(model, vocabulary).search([prompt], trie, 6)
    assert_equal_beams(result, 0, loop_beam_search(model, prompt, ids, vocabulary, 6))


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_legal_ids_than_beams(n):
    ids = np.array([[4, 5, 6], [0, 1, 2]])[:n]
    result = TorchBeamEngine(MODEL, SMALL).search([[BOS], [BOS, 5]], Trie.build(ids, SMALL.code_counts), 4)
    assert result.codes.shape == (2, 4, 3)
    assert result.codes.dtype == np.int32
    assert result.log_probs.dtype == np.float32
    for row, prompt in enumerate([[BOS], [BOS, 5]]):
        assert_equal_beams(result, row, loop_beam_search(MODEL, prompt, ids, SMALL, 4))
    if n == 1:
        assert result.log_probs[:, 0].tolist() == [0.0, 0.0]


def test_no_users():
    trie = Trie.build(random_ids(SMALL, 5), SMALL.code_counts)
    result = TorchBeamEngine(MODEL, SMALL).search([], trie, 4)
    assert result.codes.shape == (0, 4, 3)
    assert result.log_probs.shape == (0, 4)


def test_equal_scores_stand_in_order_of_codes():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    full = np.stack(np.meshgrid(*(range(3),) * 3, indexing="ij"), -1).reshape(-1, 3)
    trie = Trie.build(full[::-1], (3, 3, 3))
    engine = TorchBeamEngine(model, SidVocabulary((10, 20, 30), (3, 3, 3)))
    result = engine.search([[BOS, 7]], trie, 5)
    assert result.codes[0].tolist() == full[:5].tolist()


def test_the_size_of_batches_changes_nothing():
    trie = Trie.build(random_ids(SMALL, 100), SMALL.code_counts)
    prompts = random_prompts([3, 14, 1, 3, 9, 20, 2])
    one = TorchBeamEngine(MODEL, SMALL, max_batch_tokens=1).search(prompts, trie, 5)
    all_together = TorchBeamEngine(MODEL, SMALL, max_batch_tokens=10**6).search(prompts, trie, 5)
    np.testing.assert_array_equal(one.codes, all_together.codes)
    np.testing.assert_allclose(one.log_probs, all_together.log_probs, atol=1e-5)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_threads_find_the_beams_of_one():
    trie = Trie.build(random_ids(SMALL, 100), SMALL.code_counts)
    prompts = random_prompts([3 + n % 20 for n in range(120)])
    engine = TorchBeamEngine(MODEL, SMALL, max_batch_tokens=200)
    found, drawn = engine.search(prompts, trie, 5), []
    for _ in range(2):
        drawn.append(engine.sample(prompts, trie, 4, torch.Generator().manual_seed(1), distinct=True))
    assert torch.get_num_threads() == 3
    np.testing.assert_array_equal(drawn[0].codes, drawn[1].codes)
    torch.set_num_threads(1)
    alone = engine.search(prompts, trie, 5)
    np.testing.assert_array_equal(found.codes, alone.codes)
    np.testing.assert_allclose(found.log_probs, alone.log_probs, atol=1e-5)


@pytest.mark.usefixtures("three_threads")
def test_what_a_thread_raises_is_raised():
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    engine = TorchBeamEngine(model, SMALL, max_batch_tokens=20)
    with pytest.raises(ArtefactError, match="NaN logits"):
        engine.search(random_prompts([9] * 6), Trie.build(random_ids(SMALL, 100), SMALL.code_counts), 4)
    assert torch.get_num_threads() == 3


def test_the_last_feed_forward_network_computes_one_token_of_a_prompt():
    model = tiny_model()
    seen = []
    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    trie = Trie.build(random_ids(SMALL, 100), SMALL.code_counts)
    TorchBeamEngine(model, SMALL).search(random_prompts([5, 9, 9]), trie, 4)
    assert seen == [(3, 1), (3, 4), (3, 4)]
    # Others who use the model find it as it was.
    model(torch.tensor([[BOS, 7, 8]]))
    assert seen[-1] == (1, 3)


@given(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(1, 40)), st.integers(1, 200))
def test_batches_hold_each_user_once_within_the_budget(lengths, budget):
    split = list(batches(lengths.tolist(), budget))
    assert sorted(user for users in split for user in users.tolist()) == list(range(len(lengths)))
    for users in split:
        assert len(users) == 1 or len(users) * lengths[users].max() <= budget


def test_follows_a_model_in_training_and_leaves_its_mode_alone():
    model = tiny_model("llama")  # with attention dropout
    ids = random_ids(SMALL, 60)
    trie = Trie.build(ids, SMALL.code_counts)
    engine = TorchBeamEngine(model, SMALL)
    before = engine.search([[BOS, 8, 9]], trie, 5)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.train()
    result = engine.search([[BOS, 8, 9]], trie, 5)
    assert model.training
    assert model.lm_head.out_features == 40
    assert_equal_beams(result, 0, loop_beam_search(model.eval(), [BOS, 8, 9], ids, SMALL, 5))
    assert result.codes.tolist() != before.codes.tolist()


def test_a_forward_that_a_trainer_hung_on_the_model_is_passed_by():
    ids = random_ids(SMALL, 40)
    trie = Trie.build(ids, SMALL.code_counts)
    prompts = random_prompts(LENGTHS)
    expected = TorchBeamEngine(MODEL, SMALL).search(prompts, trie, 4)
    model = tiny_model()
    model.forward = types.MethodType(type(model).forward, model)
    found = TorchBeamEngine(model, SMALL).search(prompts, trie, 4)
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    MODEL.save_pretrained(tmp_path)
    return tmp_path


def test_sampling_defaults_of_the_directory_do_not_leak_in(model_dir):
    trie = Trie.build(random_ids(SMALL, 60), SMALL.code_counts)
    prompts = random_prompts(LENGTHS)
    expected = TorchBeamEngine(MODEL, SMALL).search(prompts, trie, 5)
    GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=3.0
    ).save_pretrained(model_dir)
    result = open_engine("torch", model_dir, SMALL, dtype="float32").search(prompts, trie, 5)
    np.testing.assert_array_equal(result.codes, expected.codes)
    np.testing.assert_allclose(result.log_probs, expected.log_probs, atol=1e-5)


def test_bfloat16_finds_nearly_the_same_ids(model_dir):
    trie = Trie.build(random_ids(SMALL, 150), SMALL.code_counts)
    prompts = random_prompts([16] * 40)
    found = [
        open_engine("torch", model_dir, SMALL, dtype=dtype).search(prompts, trie, 10).codes
        for dtype in ("float32", "bfloat16")
    ]
    sets = [[set(map(tuple, user)) for user in codes.tolist()] for codes in found]
    overlap = np.mean([len(a & b) / 10 for a, b in zip(*sets, strict=True)])
    assert overlap >= 0.8


def test_bad_searches_are_refused_in_one_line():
    trie = Trie.build(random_ids(SMALL, 5), SMALL.code_counts)
    engine = TorchBeamEngine(MODEL, SMALL)
    with pytest.raises(InputError, match=r"prompt 1 has 0 tokens"):
        engine.search([[BOS], []], trie, 3)
    with pytest.raises(InputError, match="prompt 0 has 255 tokens"):
        engine.search([[BOS] * 255], trie, 3)
    assert engine.search([[BOS] * 254], trie, 3).codes.shape == (1, 3, 3)
    with pytest.raises(InputError, match=r"prompt 0 holds a token outside 0\.\.39"):
        engine.search([[BOS, 40]], trie, 3)
    with pytest.raises(ConfigError, match="beam width 0"):
        engine.search([[BOS]], trie, 0)
    with pytest.raises(ArtefactError, match="codes per level"):
        engine.search([[BOS]], Trie.build(np.zeros((1, 3), int), (5, 6, 8)), 3)


def test_nan_logits_are_an_error_not_an_order():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ArtefactError, match="NaN"):
        TorchBeamEngine(model, SMALL).search([[BOS]], Trie.build(random_ids(SMALL, 5), SMALL.code_counts), 3)


def test_models_that_cannot_be_decoded_as_a_tree_are_refused():
    gemma = tiny_model("gemma2-with-soft-cap")
    trie = Trie.build(random_ids(SMALL, 5), SMALL.code_counts)
    with pytest.raises(InputError, match="prompt 0 has 31 tokens"):  # its window is 32
        TorchBeamEngine(gemma, SMALL).search([[BOS] * 31], trie, 3)
    hybrid = tiny_model()
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        TorchBeamEngine(hybrid, SMALL)
    other = tiny_model()
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="4-D mask"):
        TorchBeamEngine(other, SMALL)


def test_opening_what_cannot_be_opened(model_dir, tmp_path_factory):
    with pytest.raises(ConfigError, match="'jax' is unknown"):
        open_engine("jax", model_dir, SMALL)
    with pytest.raises(ConfigError, match="unknown option temperature; it takes dtype"):
        open_engine("torch", model_dir, SMALL, temperature=1.0)
    with pytest.raises(ConfigError, match="float8"):
        open_engine("torch", model_dir, SMALL, dtype="float8")
    with pytest.raises(ConfigError, match="device 'abacus'"):
        open_engine("torch", model_dir, SMALL, device="abacus")
    with pytest.raises(MissingError, match=r"no config\.json"):
        open_engine("torch", tmp_path_factory.mktemp("empty"), SMALL)
    with pytest.raises(ArtefactError, match="40 tokens but semantic-ID tokens go up to 49"):
        open_engine("torch", model_dir, SidVocabulary((10, 20, 40), (5, 6, 10)))
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"no \*\.safetensors"):
        open_engine("torch", model_dir, SMALL)


@pytest.mark.parametrize(
    ("first", "counts"),
    [((3, 8), (5,)), ((), ()), ((3, 7), (5, 4)), ((3, 8), (5, 0)), ((-1, 8), (5, 3))],
)
def test_a_vocabulary_that_makes_no_sense_is_refused(first, counts):
    with pytest.raises(ConfigError, match="semantic-ID vocabulary"):
        SidVocabulary(first, counts)


def few_ids_and_their_chances():
    """An engine, a trie of six IDs, a prompt, and the chance of each ID in the order of leaves."""
    codes = random_ids(SMALL, 6)
    trie = Trie.build(codes, SMALL.code_counts)
    engine = TorchBeamEngine(MODEL, SMALL)
    (prompt,) = random_prompts([5])
    found = engine.search([prompt], trie, 6)
    chances = np.empty(6)
    chances[trie.find(found.codes[0])] = np.exp(found.log_probs[0])
    return engine, trie, prompt, chances


def test_draws_come_as_often_as_their_probability_says():
    engine, trie, prompt, chances = few_ids_and_their_chances()
    drawn = engine.sample([prompt], trie, 4000, torch.Generator().manual_seed(1), distinct=False)
    leaves = trie.find(drawn.codes[0])
    shares = np.bincount(leaves, minlength=6) / 4000
    assert (np.abs(shares - chances) < 4 * np.sqrt(chances * (1 - chances) / 4000)).all()
    np.testing.assert_allclose(drawn.log_probs[0], np.log(chances)[leaves], atol=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_distinct_draws_are_those_of_an_urn(n):
    """The chance of a set is that of drawing it without replacement, in any order."""
    engine, trie, prompt, chances = few_ids_and_their_chances()
    rounds = 3000
    generator = torch.Generator().manual_seed(2)
    drawn = engine.sample([prompt] * rounds, trie, n, generator, distinct=True)
    sets = Counter(map(frozenset, trie.find(drawn.codes.reshape(-1, trie.depth)).reshape(rounds, n).tolist()))
    for chosen in itertools.combinations(range(6), n):
        expected = 0.0
        for order in itertools.permutations(chosen):
            chance, left = 1.0, 1.0
            for leaf in order:
                chance, left = chance * chances[leaf] / left, left - chances[leaf]
            expected += chance
        error = 4 * np.sqrt(expected * (1 - expected) / rounds)
        assert abs(sets[frozenset(chosen)] / rounds - expected) < error + 1e-9


def test_distinct_draws_end_with_the_catalogue():
    engine, trie, prompt, _ = few_ids_and_their_chances()
    drawn = engine.sample([prompt, prompt], trie, 8, torch.Generator().manual_seed(3), distinct=True)
    whole = engine.search([prompt], trie, 8)
    for row in range(2):
        np.testing.assert_array_equal(drawn.codes[row], whole.codes[0])
        np.testing.assert_allclose(drawn.log_probs[row], whole.log_probs[0], atol=1e-4)
