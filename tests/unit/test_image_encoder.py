"""Images of every kind become unit vectors or nothing, and never an error."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import SIDE, VISION, picture, save_vision_model, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip import CLIPImageProcessorPil

from negrec_core.errors import ArtefactError, MissingError
from negrec_core.image_encoder import ImageEncoder, open_image


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {key: VISION[key] for key in VISION if key not in ("image_size", "patch_size")}
    text |= {"vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 3}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)).eval()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vit"), tiny_vit())


def save_pictures(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{n}.png" for n in range(count)]
    for n, file in enumerate(files):
        picture(n).save(file)
    return files


def pixels_of(file: Path) -> torch.Tensor:
    """What the processor makes of a 16 x 16 picture, worked out by hand: values from -1 to 1."""
    values = np.asarray(Image.open(file).convert("RGB"), np.float32) / 127.5 - 1
    return torch.from_numpy(values.transpose(2, 0, 1)[None])


def unit(vector: torch.Tensor) -> np.ndarray:
    flat = vector.detach().numpy().reshape(-1)
    return flat / np.linalg.norm(flat)


def test_embedding_is_the_normalised_pooler_output(vit: Path, tmp_path: Path) -> None:
    files = save_pictures(tmp_path, 3)
    encoder = ImageEncoder(str(vit))
    embeddings = encoder.encode(files)
    assert embeddings.dtype == np.float32
    assert encoder.dim == 16
    for row, file in zip(embeddings, files, strict=True):
        expected = unit(tiny_vit()(pixels_of(file)).pooler_output)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_without_trained_pooler_it_is_the_mean_of_the_hidden_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = ViTForImageClassification(ViTConfig(**VISION)).eval()
    (file,) = save_pictures(tmp_path, 1)
    encoder = ImageEncoder(str(save_vision_model(tmp_path / "model", classifier)))
    hidden = classifier.vit(pixels_of(file)).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode([file])[0], unit(hidden.mean(dim=0)), atol=1e-5)


def test_image_tower_of_a_clip_like_model(tmp_path: Path) -> None:
    (file,) = save_pictures(tmp_path, 1)
    model = tiny_clip()
    encoder = ImageEncoder(str(save_vision_model(tmp_path / "model", model)))
    hidden = model.vision_model(pixels_of(file)).pooler_output
    assert encoder.dim == 6
    np.testing.assert_allclose(encoder.encode([file])[0], unit(model.visual_projection(hidden)), atol=1e-5)


def test_convolutional_backbones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    files = save_pictures(tmp_path, 2)
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ).eval()
    convnext = ConvNextModel(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], patch_size=4)
    ).eval()
    for name, model, backbone in (("resnet", resnet, resnet.resnet), ("convnext", convnext, convnext)):
        embeddings = ImageEncoder(str(save_vision_model(tmp_path / name, model))).encode(files)
        for row, file in zip(embeddings, files, strict=True):
            expected = unit(backbone(pixels_of(file)).pooler_output)
            np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_embeddings_do_not_depend_on_the_batch(vit: Path, tmp_path: Path, batch_size: int) -> None:
    files = save_pictures(tmp_path, 5)
    files[2].write_bytes(b"nothing")
    told: list[tuple[int, int]] = []
    whole = ImageEncoder(str(vit)).encode(files)
    encoder = ImageEncoder(str(vit), batch_size=batch_size)
    found = encoder.encode(files, lambda done, total: told.append((done, total)))
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert told[-1] == (5, 5)
    assert len(told) == -(-5 // batch_size)
    lengths = np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 0, 1, 1], atol=1e-5)


def test_no_image_gives_no_row(vit: Path) -> None:
    assert ImageEncoder(str(vit)).encode([]).shape == (0, 16)


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]), st.data())
def test_a_cut_or_altered_file_is_an_image_or_none_but_no_error(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("cut") / "image"
    picture(0, (40, 30)).save(file, form)
    content = bytearray(file.read_bytes())
    assert open_image(file) is not None
    del content[data.draw(st.integers(0, len(content)), "length") :]
    if content:
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4), "altered"):
            content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(file)
    assert image is None or (image.mode == "RGB" and max(image.size) <= 1024)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_in_half_is_no_image(tmp_path: Path, form: str) -> None:
    file = tmp_path / "image"
    picture(0, (64, 64)).save(file, form)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert open_image(file) is None


def test_a_decompression_bomb_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bomb.png"
    Image.new("1", (100, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert open_image(file) is not None
    # Pillow itself only warns up to twice its limit.
    for limit in (9_999, 4_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert open_image(file) is None


def test_images_are_upright_on_white_and_not_too_large(tmp_path: Path) -> None:
    file = tmp_path / "image"
    clear = Image.new("RGBA", (2, 3), (255, 0, 0, 0))
    clear.save(file, "PNG")
    np.testing.assert_array_equal(np.asarray(open_image(file)), np.full((3, 2, 3), 255))
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(file, "JPEG", exif=exif)
    assert open_image(file).size == (20, 40)
    Image.new("L", (4000, 1000)).save(file, "PNG")
    assert open_image(file).size == (1024, 256)
    Image.new("L", (2001, 100)).save(file, "PNG")
    assert open_image(file) is None
    Image.new("RGB", (10, 10)).save(file, "EPS")
    assert open_image(file) is None


def test_fingerprint_names_weights_and_preparation(vit: Path, tmp_path: Path) -> None:
    known = ImageEncoder(str(vit)).fingerprint()
    assert ImageEncoder(str(vit), batch_size=1).fingerprint() == known
    other = tiny_vit()
    with torch.no_grad():
        other.embeddings.cls_token += 0.1
    assert ImageEncoder(str(save_vision_model(tmp_path / "other", other))).fingerprint() != known
    save_vision_model(tmp_path / "cropped", tiny_vit())
    CLIPImageProcessorPil(
        size={"height": 20, "width": 20}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(tmp_path / "cropped")
    assert ImageEncoder(str(tmp_path / "cropped")).fingerprint() != known


def test_unusable_models_are_one_clear_line(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="name an existing directory") as refused:
        ImageEncoder(str(tmp_path / "absent"))
    assert "\n" not in str(refused.value)

    tiny_vit().save_pretrained(tmp_path / "bare")
    with pytest.raises(MissingError, match="Hugging Face image model"):
        ImageEncoder(str(tmp_path / "bare"))

    pickled = save_vision_model(tmp_path / "pickled", tiny_vit())
    (pickled / "model.safetensors").unlink()
    torch.save(tiny_vit().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(MissingError, match="safetensors"):
        ImageEncoder(str(pickled))

    model = tiny_vit()
    state = {k: v for k, v in model.state_dict().items() if "patch_embeddings" not in k}
    save_vision_model(tmp_path / "lacking", model)
    model.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.raises(ArtefactError, match=r"weights lack embeddings\.patch_embeddings"):
        ImageEncoder(str(tmp_path / "lacking"))

    text = BertModel(BertConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(MissingError, match="BertModel takes no images"):
        ImageEncoder(str(save_vision_model(tmp_path / "text", text)))
