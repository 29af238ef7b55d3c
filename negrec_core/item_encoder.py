"""From `item` rows to the embeddings that semantic IDs are made of (DESIGN section 5)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from negrec_core.embedding_cache import EmbeddingCache
from negrec_core.encoder import TextEncoder
from negrec_core.items import item_text
from negrec_core.progress import Progress, silent

_CACHE = "embeddings"


class ItemEncoder:
    """Embeds items by their text; no text is encoded twice for one `models` directory."""

    def __init__(self, models: Path, encoder: str) -> None:
        """Open the encoder.

        Args:
            models: directory of the model versions; what is embedded is kept in its `embeddings`.
            encoder: as `TextEncoder` takes it.
        """
        self._text = TextEncoder(encoder)
        self._texts = EmbeddingCache(models / _CACHE, self._text.fingerprint())

    def encode(self, rows: Sequence[dict[str, Any]], progress: Progress = silent) -> np.ndarray:
        """Embeddings float32 [n, dim] of `item` rows, unit length."""
        texts = [item_text(row) for row in rows]
        return self._texts.encode(
            [text.encode() for text in texts],
            lambda missing, shown: self._text.encode([texts[n] for n in missing], shown),
            progress,
        )
