import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.embedding_cache import EmbeddingCache, file_digest, text_digest
from negrec_core.progress import Progress


class Encoder:
    """Embeds a text as its length and its first letter, and remembers what it was asked."""

    def __init__(self, contents: list[str]) -> None:
        self.contents = contents
        self.asked: list[str] = []

    def __call__(self, numbers: list[int], progress: Progress) -> np.ndarray:
        chosen = [self.contents[n] for n in numbers]
        self.asked += chosen
        return embed(chosen)


def embed(contents: list[str]) -> np.ndarray:
    rows = [(len(content), ord(content[0]) if content else -1) for content in contents]
    return np.array(rows, np.float32).reshape(-1, 2)


def digests(contents: list[str]) -> list[bytes]:
    return [text_digest(content) for content in contents]


contents_lists = st.lists(st.text("a", max_size=3), min_size=1, max_size=8)


@given(st.lists(contents_lists, min_size=1, max_size=4))
def test_each_content_is_encoded_once_and_all_come_back_in_order(calls: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asked: list[str] = []
        for contents in calls:
            encoder = Encoder(contents)
            cache = EmbeddingCache(Path(directory), "model")
            np.testing.assert_array_equal(cache.encode(digests(contents), encoder), embed(contents))
            asked += encoder.asked
        assert sorted(asked) == sorted({content for contents in calls for content in contents})


def test_another_encoder_has_embeddings_of_its_own(tmp_path: Path) -> None:
    contents = ["red"]
    EmbeddingCache(tmp_path, "one").encode(digests(contents), Encoder(contents))
    encoder = Encoder(contents)
    EmbeddingCache(tmp_path, "two").encode(digests(contents), encoder)
    assert encoder.asked == contents


def test_a_file_that_was_cut_is_encoded_again(tmp_path: Path) -> None:
    contents = ["red", "blue"]
    EmbeddingCache(tmp_path, "model").encode(digests(contents), Encoder(contents))
    (file,) = (tmp_path / "model").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    encoder = Encoder(contents)
    found = EmbeddingCache(tmp_path, "model").encode(digests(contents), encoder)
    np.testing.assert_array_equal(found, embed(contents))
    assert encoder.asked == contents


def test_progress_counts_what_is_known_already(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "model")
    cache.encode(digests(["red"]), Encoder(["red"]))
    seen: list[tuple[int, int]] = []
    contents = ["red", "blue", "blue"]

    def encode(numbers: list[int], progress: Progress) -> np.ndarray:
        progress(1, 1)
        return embed([contents[n] for n in numbers])

    cache.encode(digests(contents), encode, lambda done, total: seen.append((done, total)))
    assert seen[0] == (2, 3)
    assert seen[-1] == (3, 3)


def test_what_cannot_be_embedded_is_tried_again(tmp_path: Path) -> None:
    contents = ["red", "blue"]
    cache = EmbeddingCache(tmp_path, "model")
    failing = cache.encode(digests(contents), lambda numbers, _: embed(contents) * [[1], [0]])
    np.testing.assert_array_equal(failing, embed(contents) * [[1], [0]])
    encoder = Encoder(contents)
    np.testing.assert_array_equal(cache.encode(digests(contents), encoder), embed(contents))
    assert encoder.asked == ["blue"]


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("red")
    (tmp_path / "b").write_text("red")
    (tmp_path / "c").write_text("blue")
    one, other, third = (file_digest(tmp_path / name) for name in "abc")
    assert one == other == text_digest("red")
    assert third != one
