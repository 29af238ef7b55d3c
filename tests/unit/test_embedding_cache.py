import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.embedding_cache import EmbeddingCache
from negrec_core.progress import Progress


class Encoder:
    """Embeds a content as its length and its first byte, and remembers what it was asked."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents
        self.asked: list[bytes] = []

    def __call__(self, numbers: list[int], progress: Progress) -> np.ndarray:
        chosen = [self.contents[n] for n in numbers]
        self.asked += chosen
        return embed(chosen)


def embed(contents: list[bytes]) -> np.ndarray:
    rows = [(len(content), content[0] if content else -1) for content in contents]
    return np.array(rows, np.float32).reshape(-1, 2)


contents_lists = st.lists(st.binary(max_size=3), min_size=1, max_size=8)


@given(st.lists(contents_lists, min_size=1, max_size=4))
def test_each_content_is_encoded_once_and_all_come_back_in_order(calls: list[list[bytes]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asked: list[bytes] = []
        for contents in calls:
            encoder = Encoder(contents)
            cache = EmbeddingCache(Path(directory), "model")
            np.testing.assert_array_equal(cache.encode(contents, encoder), embed(contents))
            asked += encoder.asked
        assert sorted(asked) == sorted({content for contents in calls for content in contents})


def test_another_encoder_has_embeddings_of_its_own(tmp_path: Path) -> None:
    contents = [b"red"]
    EmbeddingCache(tmp_path, "one").encode(contents, Encoder(contents))
    encoder = Encoder(contents)
    EmbeddingCache(tmp_path, "two").encode(contents, encoder)
    assert encoder.asked == contents


def test_a_file_that_was_cut_is_encoded_again(tmp_path: Path) -> None:
    contents = [b"red", b"blue"]
    EmbeddingCache(tmp_path, "model").encode(contents, Encoder(contents))
    (file,) = (tmp_path / "model").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    encoder = Encoder(contents)
    found = EmbeddingCache(tmp_path, "model").encode(contents, encoder)
    np.testing.assert_array_equal(found, embed(contents))
    assert encoder.asked == contents


def test_progress_counts_what_is_known_already(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "model")
    cache.encode([b"red"], Encoder([b"red"]))
    seen: list[tuple[int, int]] = []
    contents = [b"red", b"blue", b"blue"]

    def encode(numbers: list[int], progress: Progress) -> np.ndarray:
        progress(1, 1)
        return embed([contents[n] for n in numbers])

    cache.encode(contents, encode, lambda done, total: seen.append((done, total)))
    assert seen[0] == (2, 3)
    assert seen[-1] == (3, 3)
