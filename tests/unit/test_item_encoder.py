"""Items by text and image: the fusion, what has no image, and the cache by content."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import picture, save_tokenizer, save_vision_model, tiny_bert, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from negrec_core.artefacts import Manifest, new_version, seal
from negrec_core.encoder import TextEncoder
from negrec_core.errors import InputError
from negrec_core.generator import CODEBOOK
from negrec_core.image_encoder import ImageEncoder
from negrec_core.item_encoder import ItemEncoder, fuse, media_file

WEIGHT = 0.3


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    text = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(text)
    save_tokenizer(text)
    return str(text), str(save_vision_model(tmp_path_factory.mktemp("vit"), tiny_vit()))


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "posters").mkdir(parents=True)
    for n in range(4):
        picture(n).save(folder / "posters" / f"{n}.png")
    return folder


def rows_of(*uris: str | None) -> list[dict[str, Any]]:
    titles = ["red car", "slow boat", "fast car", "blue boat", "red boat", "car"]
    return [{"title": title, "media_uri": uri} for title, uri in zip(titles, uris, strict=False)]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


vectors = nps.arrays(np.float64, st.tuples(st.integers(2, 6), st.just(4)), elements=st.floats(-1, 1))


@given(vectors, st.data(), st.floats(0.01, 0.99))
def test_products_are_the_weighted_cosines_of_text_and_image(
    raw: np.ndarray, data: st.DataObject, weight: float
) -> None:
    texts = unit_rows(raw[:, :2] + 3)
    images = unit_rows(raw + 0.01)
    has_image = np.array(data.draw(st.lists(st.booleans(), min_size=len(raw), max_size=len(raw))))
    images[~has_image] = 0
    centre = np.full(4, 0.1)
    fused = fuse(texts, images, centre, weight)
    assert fused.shape == (len(raw), 2 + 4)
    for a in range(len(raw)):
        for b in range(len(raw)):
            product = (1 - weight) * float(texts[a] @ texts[b])
            # Without an image on both sides the texts alone count.
            if has_image[a] and has_image[b]:
                one, other = images[a] - centre, images[b] - centre
                lengths = math.dist(one, [0] * 4) * math.dist(other, [0] * 4)
                product += weight * float(one @ other) / lengths if lengths else 0.0
            assert float(fused[a] @ fused[b]) == pytest.approx(product, abs=1e-5)


def test_an_image_at_the_centre_is_as_none() -> None:
    fused = fuse(np.eye(2), np.array([[0.6, 0.8], [0, 0]]), np.array([0.6, 0.8]), WEIGHT)
    np.testing.assert_array_equal(fused[:, 2:], 0)


def test_items_are_embedded_by_text_and_centred_image(
    encoders: tuple[str, str], media: Path, tmp_path: Path
) -> None:
    rows = rows_of("posters/0.png", None, (media / "posters/1.png").as_uri(), "", "posters/2.png")
    encoder = ItemEncoder(tmp_path, *encoders, WEIGHT, media)
    fused = encoder.fit_encode(rows)

    texts = TextEncoder(encoders[0]).encode([row["title"] for row in rows])
    images = ImageEncoder(encoders[1]).encode([media / "posters" / f"{n}.png" for n in range(3)])
    centred = unit_rows(images - images.mean(axis=0))
    expected = np.zeros((5, 32))
    expected[:, :16] = texts * math.sqrt(1 - WEIGHT)
    expected[[0, 2, 4], 16:] = centred * math.sqrt(WEIGHT)
    np.testing.assert_allclose(fused, expected, atol=1e-5)
    assert fused.dtype == np.float32
    # The centre is that of the catalogue it was fitted on, whatever is encoded later.
    np.testing.assert_allclose(encoder.encode(rows[2:3]), expected[2:3], atol=1e-5)


def test_text_alone_is_as_before(encoders: tuple[str, str], tmp_path: Path) -> None:
    rows = rows_of("posters/0.png", None)
    encoder = ItemEncoder(tmp_path, encoders[0])
    texts = TextEncoder(encoders[0]).encode([row["title"] for row in rows])
    np.testing.assert_allclose(encoder.fit_encode(rows), texts, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(rows), texts, atol=1e-6)


def test_what_has_no_usable_image_is_embedded_by_its_text_and_told_once(
    encoders: tuple[str, str], media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (media / "posters" / "1.png").read_bytes()
    (media / "cut.png").write_bytes(whole[: len(whole) // 2])
    (media / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(1000))
    rows = rows_of("posters/0.png", "posters/9.png", "cut.png", "film.mp4", "https://site/1.png", "posters")
    encoder = ItemEncoder(tmp_path, *encoders, WEIGHT, media)
    with caplog.at_level(logging.INFO, "negrec"):
        fused = encoder.fit_encode(rows)
    assert [record.getMessage() for record in caplog.records] == [
        "images: 1 of 6 items have one, the others are embedded by their text; 3 name no file that is"
        " there, first 'posters/9.png'; 2 name a file that is no whole image, first 'cut.png'"
    ]
    texts = TextEncoder(encoders[0]).encode([row["title"] for row in rows])
    np.testing.assert_allclose(fused[:, :16], texts * math.sqrt(1 - WEIGHT), atol=1e-5)
    np.testing.assert_array_equal(fused[1:, 16:], 0)


def test_a_catalogue_without_any_image_is_refused(encoders: tuple[str, str], tmp_path: Path) -> None:
    encoder = ItemEncoder(tmp_path, *encoders, WEIGHT, tmp_path / "absent")
    with pytest.raises(InputError, match="no item has an image that can be read") as refused:
        encoder.fit_encode(rows_of("posters/0.png", None))
    assert str(tmp_path / "absent") in str(refused.value)


def test_each_content_is_encoded_once_under_whatever_name(
    encoders: tuple[str, str], media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = ImageEncoder.encode

    def spy(self: ImageEncoder, files: list[Path], *rest: Any) -> np.ndarray:
        asked.extend(file.name for file in files)
        return encode(self, files, *rest)

    monkeypatch.setattr(ImageEncoder, "encode", spy)
    shutil.copy(media / "posters" / "0.png", media / "again.png")
    rows = rows_of("posters/0.png", "posters/1.png", "again.png")
    first = ItemEncoder(tmp_path, *encoders, WEIGHT, media).fit_encode(rows)
    np.testing.assert_array_equal(first[0, 16:], first[2, 16:])
    assert asked == ["0.png", "1.png"]
    again = ItemEncoder(tmp_path, *encoders, WEIGHT, media).fit_encode(rows)
    np.testing.assert_array_equal(again, first)
    assert asked == ["0.png", "1.png"]
    # Other bytes under a known name are another image.
    picture(7).save(media / "posters" / "0.png")
    changed = ItemEncoder(tmp_path, *encoders, WEIGHT, media).fit_encode(rows)
    assert asked == ["0.png", "1.png", "0.png"]
    assert not np.allclose(changed[0, 16:], first[0, 16:])


def test_an_image_that_was_mended_counts(encoders: tuple[str, str], media: Path, tmp_path: Path) -> None:
    file = media / "posters" / "1.png"
    whole = file.read_bytes()
    rows = rows_of("posters/0.png", "posters/1.png", "posters/2.png")
    expected = ItemEncoder(tmp_path / "a", *encoders, WEIGHT, media).fit_encode(rows)
    file.write_bytes(whole[: len(whole) // 2])
    broken = ItemEncoder(tmp_path / "b", *encoders, WEIGHT, media).fit_encode(rows)
    assert not broken[1, 16:].any()
    file.write_bytes(whole)
    mended = ItemEncoder(tmp_path / "b", *encoders, WEIGHT, media).fit_encode(rows)
    np.testing.assert_allclose(mended, expected, atol=1e-6)


def store_codebook(models: Path, encoder: ItemEncoder, parameters: dict[str, Any]) -> Manifest:
    path = new_version(models, CODEBOOK)
    encoder.save(path)
    return seal(path, parameters=parameters, metrics={}, inputs={})


def test_a_codebook_says_how_its_items_were_embedded(
    encoders: tuple[str, str], media: Path, tmp_path: Path
) -> None:
    rows = rows_of("posters/0.png", None, "posters/1.png", "posters/2.png")
    text, image = encoders
    both = ItemEncoder(tmp_path, text, image, WEIGHT, media)
    alone = ItemEncoder(tmp_path, text)
    fused, texts = both.fit_encode(rows), alone.fit_encode(rows)
    made = {"encoder": text, "image_encoder": image, "image_weight": WEIGHT}
    manifest = store_codebook(tmp_path, both, made)
    np.testing.assert_array_equal(ItemEncoder.of_codebook(tmp_path, manifest, media).encode(rows), fused)
    # As codebooks were before there were images.
    manifest = store_codebook(tmp_path, alone, {"encoder": text})
    np.testing.assert_array_equal(ItemEncoder.of_codebook(tmp_path, manifest, media).encode(rows), texts)


def test_names_of_files(tmp_path: Path) -> None:
    odd = tmp_path / "50% off #1?.png"
    odd.write_bytes(b"x")
    found = media_file("50% off #1?.png", tmp_path)
    assert found is not None
    assert found[0] == odd
    absolute = str(odd)
    quoted = odd.as_uri().removeprefix("file://")
    for uri in (absolute, f"file://{quoted}", f"file:{quoted}", f"file://localhost{quoted}"):
        assert media_file(uri, Path("elsewhere")) == found, uri
    for uri in (
        f"file://other{quoted}",
        f"http://other{absolute}",
        "s3://bucket/a.png",
        "",
        "\0",
        "a" * 5000,
    ):
        assert media_file(uri, tmp_path) is None, uri
