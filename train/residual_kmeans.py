"""Residual k-means codebook: PCA, then faiss k-means level by level (DESIGN section 5).

The quick trainer: no gradient, no hyperparameter that can go wrong, and a baseline for
`train.rqvae`, which has the same `train_codebook`. Also what the two share.
"""

from dataclasses import dataclass

import faiss
import numpy as np

from negrec_core.codebook import Codebook, auto_codes_per_level, check_embeddings
from negrec_core.errors import ConfigError, InputError
from negrec_core.progress import Progress, silent
from negrec_core.sid_health import cosine_fidelity


@dataclass(frozen=True)
class TrainingCurve:
    """How a training went.

    Attributes:
        steps: one row per epoch (RQ-VAE) or level (residual k-means), figure -> value.
        metrics: figures of the finished codebook on the embeddings it was trained on:
            `explained`, the share of the embeddings' variance that is reconstructed from the IDs
            (0: no better than the mean, 1: all), and `cosine_fidelity` (see
            `negrec_core.sid_health.cosine_fidelity`).
    """

    steps: tuple[dict[str, float], ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class ResidualKmeansSettings:
    """Settings of residual k-means.

    Attributes:
        levels: D, codes in an ID.
        codes_per_level: K of every level; None takes `auto_codes_per_level` of the distinct rows.
        latent_dim: principal components kept, at most the embedding's length.
        iterations: Lloyd iterations per level.
    """

    levels: int = 3
    codes_per_level: int | None = None
    latent_dim: int = 32
    iterations: int = 25

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that cannot be trained with."""
        check_sizes(self.levels, self.codes_per_level, self.latent_dim, self.iterations)


def train_codebook(
    embeddings: np.ndarray,
    settings: ResidualKmeansSettings,
    seed: int,
    progress: Progress = silent,
) -> tuple[Codebook, TrainingCurve]:
    """Train on embeddings float [n, e], one row per item; equal rows count once.

    The same input, seed and thread count give the same codebook. `progress` is told levels.

    Raises:
        InputError: a row that is not finite or all zero, or fewer distinct rows than codes.
    """
    rows, codes_per_level = training_rows(embeddings, settings.codes_per_level)
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = (rows - mean).astype(np.float32)
    components = _principal_components(centred, settings.latent_dim)
    latents = centred @ components.T.astype(np.float32)
    total, kept = _squared(centred), _squared(latents)

    codewords: list[np.ndarray] = []
    steps = []
    residual = latents
    for level in range(settings.levels):
        words, code = kmeans(residual, codes_per_level, seed + level, iterations=settings.iterations)
        residual = residual - words[code]
        left = total - kept + _squared(residual)
        codewords.append(words)
        steps.append({"level": float(level), "explained": 1.0 - left / total})
        progress(level + 1, settings.levels)

    projection = (components.astype(np.float32), (-components @ mean).astype(np.float32))
    codebook = Codebook(layers=(projection,), codewords=tuple(codewords))
    rebuilt = codebook.embed(codebook.encode(rows)) @ components
    metrics = {
        "explained": 1.0 - _squared(centred - rebuilt) / total,
        "cosine_fidelity": cosine_fidelity(rows, codebook, seed=seed),
    }
    return codebook, TrainingCurve(tuple(steps), metrics)


def kmeans(points: np.ndarray, k: int, seed: int, *, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """faiss k-means: centroids float32 [k, dim] and the nearest centroid [n] of points [n, dim]."""
    points = np.ascontiguousarray(points, np.float32)
    clustering = faiss.Kmeans(points.shape[1], k, niter=iterations, seed=seed, min_points_per_centroid=1)
    clustering.train(points)
    nearest = clustering.index.search(points, 1)[1][:, 0]
    return np.asarray(clustering.centroids), nearest


def training_rows(embeddings: np.ndarray, codes_per_level: int | None) -> tuple[np.ndarray, int]:
    """The distinct rows of `embeddings` as float32, in order of first appearance, and K.

    Items with the same text share an ID whatever the codebook; counting them once keeps the codes
    for what can be told apart.

    Raises:
        InputError: a row that is not finite or all zero, or fewer distinct rows than codes.
    """
    check_embeddings(embeddings)
    rows = np.ascontiguousarray(embeddings, np.float32)
    as_bytes = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    first = np.sort(np.unique(as_bytes, return_index=True)[1])
    codes = codes_per_level or auto_codes_per_level(len(first))
    if len(first) < codes:
        raise InputError(
            f"codebook: {len(first)} distinct embeddings cannot fill {codes} codes per level; lower"
            " codes_per_level or give more items"
        )
    return rows[first], codes


def check_sizes(levels: int, codes_per_level: int | None, latent_dim: int, rounds: int) -> None:
    """Raises ConfigError unless all are positive and a level has at least two codes."""
    too_few = codes_per_level is not None and codes_per_level < 2
    if levels < 1 or too_few or latent_dim < 1 or rounds < 1:
        raise ConfigError(
            f"codebook: levels {levels}, codes_per_level {codes_per_level}, latent_dim"
            f" {latent_dim}, {rounds} epochs or iterations; all have to be positive and a level"
            " needs two codes"
        )


def _squared(values: np.ndarray) -> float:
    return float(np.square(values).sum(dtype=np.float64))


def _principal_components(centred: np.ndarray, count: int) -> np.ndarray:
    """The first `count` principal axes [count, e] of centred rows, signs fixed."""
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = vectors.T[::-1][:count]
    largest = np.abs(axes).argmax(axis=1)
    return axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
