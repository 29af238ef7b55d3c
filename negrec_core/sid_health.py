"""How well IDs tell a catalogue apart: figures and the gate on them (DESIGN section 5)."""

from dataclasses import dataclass

import numpy as np

from negrec_core.codebook import Codebook, check_codes
from negrec_core.errors import GateError


@dataclass(frozen=True)
class SidHealth:
    """Figures of one catalogue under one codebook; an empty catalogue has zeros and all codes dead.

    Attributes:
        items: number of items.
        unique_ids: number of distinct IDs.
        collision_rate: share of the items that share their ID with at least one other item.
        largest_bucket: most items under one ID.
        bucket_gini: Gini coefficient of the items per used ID: 0 if all hold the same number.
        code_counts: K_l per level.
        dead_codes: per level, codes that no item uses.
        perplexity: per level, exp of the entropy (nats) of code usage: how many codes are in
            effect in use, from 1 to K_l.
        usage_gini: per level, Gini coefficient of the items per code over all K_l codes: 0 if all
            are used alike, (K_l - 1) / K_l if one code takes all.
    """

    items: int
    unique_ids: int
    collision_rate: float
    largest_bucket: int
    bucket_gini: float
    code_counts: tuple[int, ...]
    dead_codes: tuple[int, ...]
    perplexity: tuple[float, ...]
    usage_gini: tuple[float, ...]


@dataclass(frozen=True)
class HealthLimits:
    """What a release has to keep; None leaves a figure unchecked.

    Attributes:
        max_collision_rate: of `SidHealth.collision_rate`.
        max_largest_bucket: of `SidHealth.largest_bucket`.
        max_dead_share: of dead codes among the codes of any level.
        min_perplexity_share: of perplexity / K_l on any level.
        max_usage_gini: of `SidHealth.usage_gini` on any level.
    """

    max_collision_rate: float | None = None
    max_largest_bucket: int | None = None
    max_dead_share: float | None = None
    min_perplexity_share: float | None = None
    max_usage_gini: float | None = None


def sid_health(codes: np.ndarray, code_counts: tuple[int, ...]) -> SidHealth:
    """Health of the IDs `codes`, integers [n, D], one row per item, of a codebook with K_l codes.

    Raises:
        InputError: a code outside its level.
    """
    check_codes(codes, code_counts)
    if len(codes):
        buckets = np.unique(codes, axis=0, return_counts=True)[1]
    else:
        buckets = np.zeros(0, np.int64)
    usage = [np.bincount(codes[:, level], minlength=k) for level, k in enumerate(code_counts)]
    return SidHealth(
        items=len(codes),
        unique_ids=len(buckets),
        collision_rate=float(buckets[buckets > 1].sum() / max(len(codes), 1)),
        largest_bucket=int(buckets.max(initial=0)),
        bucket_gini=gini(buckets),
        code_counts=tuple(code_counts),
        dead_codes=tuple(int((counts == 0).sum()) for counts in usage),
        perplexity=tuple(perplexity(counts) for counts in usage),
        usage_gini=tuple(gini(counts) for counts in usage),
    )


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy (nats) of the distribution `counts` [k]; 0 if all are zero."""
    if not counts.any():
        return 0.0
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of `counts` [k] >= 0, mean |c_i - c_j| / (2 mean c); 0 if all are zero."""
    if not counts.any():
        return 0.0
    k = len(counts)
    rank = np.arange(1, k + 1)
    return float(((2 * rank - k - 1) * np.sort(counts)).sum() / (k * counts.sum()))


def cosine_fidelity(embeddings: np.ndarray, codebook: Codebook, *, seed: int, pairs: int = 20_000) -> float:
    """How well cosines between IDs mirror cosines between items: Pearson correlation, at most 1.

    Taken over random pairs of different rows of `embeddings` [n, e], after their mean is removed,
    so that what all items have in common counts for nothing. Fewer than two rows, or cosines that
    do not vary, give 0.
    """
    n = len(embeddings)
    if n < 2:
        return 0.0
    rng = np.random.default_rng(seed)
    left = rng.integers(0, n, pairs)
    right = (left + rng.integers(1, n, pairs)) % n
    centred = embeddings - embeddings.mean(axis=0)
    centred = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    of_ids = codebook.unit(codebook.encode(embeddings))
    item_cosine = np.einsum("nd,nd->n", centred[left], centred[right])
    id_cosine = np.einsum("nd,nd->n", of_ids[left], of_ids[right])
    if item_cosine.std() == 0 or id_cosine.std() == 0:
        return 0.0
    return float(np.corrcoef(item_cosine, id_cosine)[0, 1])


def check(health: SidHealth, limits: HealthLimits) -> None:
    """Let a codebook pass only within `limits`.

    Raises:
        GateError: the first figure over its limit, with both.
    """
    figures: list[tuple[str, float, float | None]] = [
        ("collision rate", health.collision_rate, limits.max_collision_rate),
        ("largest bucket", health.largest_bucket, limits.max_largest_bucket),
    ]
    for level, k in enumerate(health.code_counts):
        where = f"of level {level}"
        dead, used = health.dead_codes[level] / k, health.perplexity[level] / k
        figures.append((f"share of dead codes {where}", dead, limits.max_dead_share))
        figures.append((f"usage Gini {where}", health.usage_gini[level], limits.max_usage_gini))
        least = limits.min_perplexity_share
        if least is not None and used < least:
            raise _refusal(f"perplexity / codes {where}", used, "under", least)
    for name, value, most in figures:
        if most is not None and value > most:
            raise _refusal(name, value, "over", most)


def _refusal(name: str, value: float, side: str, limit: float) -> GateError:
    return GateError(
        f"semantic IDs: {name} is {value:.4g}, {side} the limit {limit:.4g}; change codes_per_level"
        " or the trainer's settings and train again, or change the limit"
    )
