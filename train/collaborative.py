"""Semantic IDs from who reacted to what, instead of from text: P5-CID's idea (DESIGN section 8, baselines).

P5-CID (Hua et al. 2023) clusters items by how often they occur together, and clusters again within each
cluster. Here items disliked by the same users, and liked by the same users, get near embeddings, and those
are quantised level by level like any others, so that similarity stays the cosine of codeword sums. An item
without feedback gets no ID.
"""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import svds

from negrec_core.codebook import Codebook, encode_unique
from negrec_core.semantic_ids import SemanticIds

_DIMENSIONS = 32


def collaborative_embeddings(past: pd.DataFrame, seed: int) -> tuple[list[str], np.ndarray]:
    """Items with feedback, in order of item id, and unit embeddings float32 [n, at most 32].

    The leading right singular vectors of the matrix of users by items, dislikes above likes, each entry
    divided by the root of the events in its row and in its column.

    Args:
        past: feedback (user_id, item_id, polarity).
        seed: of the start of the iteration.
    """
    events = past.drop_duplicates(["user_id", "item_id", "polarity"])
    items = np.sort(events["item_id"].unique())
    column = np.searchsorted(items, events["item_id"].to_numpy())
    row = pd.factorize(pd.MultiIndex.from_frame(events[["user_id", "polarity"]]))[0]
    matrix = sparse.csr_matrix((np.ones(len(events)), (row, column)))
    of_row, of_column = (np.asarray(matrix.sum(axis)).ravel() for axis in (1, 0))
    scaled = sparse.diags(of_row**-0.5) @ matrix @ sparse.diags(of_column**-0.5)
    start = np.random.default_rng(seed).random(min(scaled.shape))
    _, values, right = svds(scaled, min(_DIMENSIONS, min(scaled.shape) - 1), v0=start)
    vectors = (right * values[:, None]).T
    # An item apart from all others has no direction; any will do.
    vectors[~(np.abs(vectors).max(1) > 1e-9)] = 1.0
    return items.tolist(), (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def collaborative_ids(
    past: pd.DataFrame, levels: int, codes_per_level: int | None, seed: int
) -> tuple[Codebook, SemanticIds]:
    """A codebook of such embeddings and the items' IDs under it, unique where they can be."""
    # faiss is not needed to read what this makes.
    from train.residual_kmeans import ResidualKmeansSettings, train_codebook

    items, embeddings = collaborative_embeddings(past, seed)
    settings = ResidualKmeansSettings(levels, codes_per_level, latent_dim=_DIMENSIONS)
    codebook, _ = train_codebook(embeddings, settings, seed)
    codes = encode_unique(codebook, embeddings).astype(np.int32)
    return codebook, SemanticIds(items, codes, {item: n for n, item in enumerate(items)})
