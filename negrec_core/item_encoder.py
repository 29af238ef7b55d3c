"""From `item` rows to the embeddings that semantic IDs are made of (DESIGN section 5).

With an image encoder, a row's text embedding t and image embedding v, both of unit length, become

    [ sqrt(1 - w) t , sqrt(w) u ],  u = (v - c) / |v - c|,  c = mean of v over the codebook's catalogue

so that the product of two items is (1 - w) cos(t, t') + w cos(u, u'). Concatenation asks nothing of the
two encoders: their lengths and spaces may differ, where an average would need one shared space. An item
without image has u = 0: its product with any other item is the text's part alone, as with an image of
average likeness, because centred embeddings have cosines around 0. Uncentred ones all have a large
cosine, and having an image would be what tells items apart first: on MovieLens, where a third of the films
has a poster, the first code then says without error whether there is one. So does, nearly, a large w.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from safetensors.numpy import load_file, save_file

from negrec_core.artefacts import Manifest, fetched, on_this_machine
from negrec_core.embedding_cache import EmbeddingCache, file_digest, text_digest
from negrec_core.encoder import TextEncoder
from negrec_core.errors import InputError
from negrec_core.generator import CODEBOOK
from negrec_core.items import item_text
from negrec_core.progress import Progress, silent
from negrec_core.storage import Place

_CACHE = "embeddings"
# With or without an authority, which has to be this machine.
_FILE_SCHEME = re.compile(r"^file:(//(localhost)?(?=/))?")
_CENTRE = "image_centre.safetensors"

log = logging.getLogger("negrec")


class ItemEncoder:
    """Embeds items by text and image; neither is encoded twice for one `models` directory."""

    def __init__(
        self,
        models: Place,
        encoder: str,
        image_encoder: str | None = None,
        image_weight: float = 0.3,
        media: Path | None = None,
    ) -> None:
        """Open the encoders.

        Args:
            models: directory of the model versions; what is embedded is kept in its `embeddings`.
            encoder: as `TextEncoder` takes it.
            image_encoder: as `ImageEncoder` takes it; None: items are embedded by their text alone.
            image_weight: w, share of the image in the likeness of two items, 0 < w < 1.
            media: folder that a relative `media_uri` starts from; absent: the current one.
        """
        self._text = TextEncoder(encoder)
        cache = on_this_machine(models) / _CACHE
        self._texts = EmbeddingCache(cache, self._text.fingerprint())
        self._weight = image_weight
        self._media = media or Path()
        self._image = None
        self._centre: np.ndarray | None = None
        if image_encoder is not None:
            # Text alone needs no Pillow.
            from negrec_core.image_encoder import ImageEncoder

            self._image = ImageEncoder(image_encoder)
            self._images = EmbeddingCache(cache, self._image.fingerprint())

    @classmethod
    def of_codebook(cls, models: Place, manifest: Manifest, media: Path) -> "ItemEncoder":
        """The encoder whose embeddings a codebook was trained on.

        Args:
            models: as in the constructor.
            manifest: of the codebook.
            media: as in the constructor.
        """
        made_with = manifest.parameters
        # Codebooks of before there were images do not name an encoder for them.
        encoder = cls(
            models,
            made_with["encoder"],
            made_with.get("image_encoder"),
            made_with.get("image_weight", 0.3),
            media,
        )
        if encoder._image is not None:
            encoder._centre = load_file(fetched(models, CODEBOOK, manifest.version) / _CENTRE)["centre"]
        return encoder

    def fit_encode(self, rows: Sequence[dict[str, Any]], progress: Progress = silent) -> np.ndarray:
        """`encode`, with c taken from these rows.

        Raises:
            InputError: not one of them has an image.
        """
        if self._image is None:
            return self.encode(rows, progress)
        images = self._encode_images(rows, progress)
        seen = images.any(axis=1)
        if not seen.any():
            raise InputError(
                f"table item: no item has an image that can be read; put the files that media_uri names"
                f" under {self._media}, set media_root, or leave out codebook.image_encoder"
            )
        self._centre = images[seen].mean(axis=0, dtype=np.float64).astype(np.float32)
        return fuse(self._encode_texts(rows, progress), images, self._centre, self._weight)

    def encode(self, rows: Sequence[dict[str, Any]], progress: Progress = silent) -> np.ndarray:
        """Embeddings float32 [n, dim] of `item` rows; unit length, sqrt(1 - w) of those without image.

        One line is logged that says how many items have no image and why. `progress` is told items,
        of texts and images each.
        """
        texts = self._encode_texts(rows, progress)
        if self._image is None or self._centre is None:
            return texts
        return fuse(texts, self._encode_images(rows, progress), self._centre, self._weight)

    def save(self, codebook: Path) -> None:
        """Write into a codebook's directory what `of_codebook` needs beside its manifest."""
        if self._centre is not None:
            save_file({"centre": self._centre}, codebook / _CENTRE)

    def _encode_texts(self, rows: Sequence[dict[str, Any]], progress: Progress) -> np.ndarray:
        texts = [item_text(row) for row in rows]
        return self._texts.encode(
            [text_digest(text) for text in texts],
            lambda missing, shown: self._text.encode([texts[n] for n in missing], shown),
            progress,
        )

    def _encode_images(self, rows: Sequence[dict[str, Any]], progress: Progress) -> np.ndarray:
        """Unit embeddings float32 [n, dim]; zero where there is no image."""
        assert self._image is not None
        encoder = self._image
        named = {n: uri for n, row in enumerate(rows) if (uri := row.get("media_uri"))}
        read = {n: file for n, uri in named.items() if (file := media_file(uri, self._media))}
        files, digests = [*zip(*read.values(), strict=True)] or ((), ())
        embeddings = np.zeros((len(rows), encoder.dim), np.float32)
        if read:
            embeddings[list(read)] = self._images.encode(
                digests, lambda missing, shown: encoder.encode([files[n] for n in missing], shown), progress
            )
        absent = [uri for n, uri in named.items() if n not in read]
        broken = [named[n] for n in read if not embeddings[n].any()]
        _report(len(rows), len(read) - len(broken), absent, broken)
        return embeddings


def fuse(texts: np.ndarray, images: np.ndarray, centre: np.ndarray, weight: float) -> np.ndarray:
    """Embeddings float32 [n, d + e] of texts [n, d] and images [n, e], as the head of this module says.

    Args:
        texts: t, unit length.
        images: v, unit length; zero where an item has none.
        centre: c [e].
        weight: w.
    """
    centred = np.where(images.any(axis=1, keepdims=True), images - centre, 0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    directions = np.divide(centred, length, out=np.zeros_like(images), where=length > 0)
    return np.hstack([np.sqrt(1 - weight) * texts, np.sqrt(weight) * directions]).astype(np.float32)


def media_file(uri: str, root: Path) -> tuple[Path, bytes] | None:
    """The file that a `media_uri` names, and the digest of its bytes.

    Args:
        uri: a path, from `root` where relative, or a file: URI.
        root: folder that a relative path starts from.

    Returns:
        None where there is no such file, it cannot be read, or it is on another machine: nothing is
        fetched.
    """
    path = uri
    if uri.startswith("file:"):
        path = unquote(_FILE_SCHEME.sub("", uri))
        if path.startswith("//"):
            return None
    try:
        file = root / path
        # Reading a pipe would wait for its writer.
        return (file, file_digest(file)) if file.is_file() else None
    except (OSError, ValueError):
        return None


def _report(items: int, seen: int, absent: Sequence[str], broken: Sequence[str]) -> None:
    line = f"images: {seen} of {items} items have one, the others are embedded by their text"
    if absent:
        line += f"; {len(absent)} name no file that is there, first {absent[0]!r}"
    if broken:
        line += f"; {len(broken)} name a file that is no whole image, first {broken[0]!r}"
    log.log(logging.WARNING if absent or broken else logging.INFO, line)
