"""Embeddings kept by the digest of what was embedded, so that nothing is encoded twice.

A cache is a directory of safetensors files, each with digests and embeddings. Every writer adds a file
under a new name, complete when it appears, so that executors share a cache without asking each other.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from negrec_core.progress import Progress, silent

_DIGEST_BYTES = 16
# What a killed job loses is at most this many embeddings.
_ITEMS_PER_FILE = 20_000


def text_digest(text: str) -> bytes:
    """Digest of a text, for `EmbeddingCache`."""
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]


def file_digest(file: Path) -> bytes:
    """Digest of a file's bytes, for `EmbeddingCache`; OSError where it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()[:_DIGEST_BYTES]


class EmbeddingCache:
    """The embeddings that one encoder made."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        """Open or begin a cache.

        Args:
            directory: where the caches of all encoders are.
            fingerprint: identifies the encoder: another one must have another.
        """
        self._path = directory / fingerprint

    def encode(
        self,
        digests: Sequence[bytes],
        encode: Callable[[list[int], Progress], np.ndarray],
        progress: Progress = silent,
    ) -> np.ndarray:
        """Embeddings float32 [n, dim] of what has these digests, in their order.

        Args:
            digests: of what is embedded, by `text_digest` or `file_digest`; at least one.
            encode: embeds what has the digests whose numbers it is given; called for what is not in
                the cache, once for each distinct digest. A row of zeros, for what cannot be
                embedded, is not kept.
            progress: told embeddings done.
        """
        found = self._read(set(digests))
        first = {digest: n for n, digest in reversed(list(enumerate(digests)))}
        missing = [
            n for digest, n in sorted(first.items(), key=lambda entry: entry[1]) if digest not in found
        ]
        known = len(digests) - len(missing)
        progress(known, len(digests))
        for start in range(0, len(missing), _ITEMS_PER_FILE):
            part = missing[start : start + _ITEMS_PER_FILE]

            def show(done: int, _: int, before: int = known + start) -> None:
                progress(before + done, len(digests))

            fresh = encode(part, show)
            # What could not be embedded this time may be another time.
            kept = [n for n, row in enumerate(fresh) if row.any()]
            self._write([digests[part[n]] for n in kept], fresh[kept])
            found |= {digests[n]: row for n, row in zip(part, fresh, strict=True)}
        return np.stack([found[digest] for digest in digests])

    def _read(self, wanted: set[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        for file in sorted(self._path.glob("*.safetensors")):
            try:
                tensors = load_file(file)
                keys, rows = tensors["digests"], tensors["embeddings"]
            except (SafetensorError, KeyError, OSError):
                # What cannot be read is encoded again.
                continue
            for digest, row in zip(map(bytes, keys), rows, strict=True):
                if digest in wanted:
                    found[digest] = row
        return found

    def _write(self, digests: list[bytes], embeddings: np.ndarray) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        name = f"{uuid.uuid4().hex}.safetensors"
        unfinished = self._path / f"{name}.unfinished"
        keys = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, _DIGEST_BYTES)
        save_file({"digests": keys, "embeddings": np.ascontiguousarray(embeddings)}, unfinished)
        os.replace(unfinished, self._path / name)
