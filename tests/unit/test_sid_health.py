import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.codebook import Codebook
from negrec_core.errors import GateError, InputError
from negrec_core.sid_health import (
    HealthLimits,
    SidHealth,
    check,
    cosine_fidelity,
    gini,
    perplexity,
    sid_health,
)

COUNTS = (4, 3, 5)
IDS = st.lists(st.tuples(*[st.integers(0, k - 1) for k in COUNTS]), min_size=1, max_size=40)


def naive_gini(values: list[int]) -> float:
    pairs = sum(abs(a - b) for a in values for b in values)
    return pairs / (2 * len(values) * sum(values))


@given(IDS)
def test_figures_equal_their_definitions(ids: list[tuple[int, ...]]) -> None:
    health = sid_health(np.array(ids), COUNTS)
    buckets = Counter(ids)
    assert health.items == len(ids)
    assert health.unique_ids == len(set(ids))
    shared = sum(1 for i, a in enumerate(ids) if any(a == b for j, b in enumerate(ids) if i != j))
    assert health.collision_rate == pytest.approx(shared / len(ids))
    assert health.largest_bucket == max(buckets.values())
    assert health.bucket_gini == pytest.approx(naive_gini(list(buckets.values())))
    for level, k in enumerate(COUNTS):
        usage = Counter(row[level] for row in ids)
        assert health.dead_codes[level] == k - len(usage)
        entropy = -sum(c / len(ids) * math.log(c / len(ids)) for c in usage.values())
        assert health.perplexity[level] == pytest.approx(math.exp(entropy))
        assert health.usage_gini[level] == pytest.approx(naive_gini([usage[c] for c in range(k)]))


def test_empty_catalogue() -> None:
    assert sid_health(np.zeros((0, 2), np.int32), (4, 8)) == SidHealth(
        items=0,
        unique_ids=0,
        collision_rate=0.0,
        largest_bucket=0,
        bucket_gini=0.0,
        code_counts=(4, 8),
        dead_codes=(4, 8),
        perplexity=(0.0, 0.0),
        usage_gini=(0.0, 0.0),
    )


def test_extremes() -> None:
    even = np.array([[a, b] for a in range(4) for b in range(4)])
    health = sid_health(even, (4, 4))
    assert (health.collision_rate, health.unique_ids, health.bucket_gini) == (0.0, 16, 0.0)
    assert health.perplexity == pytest.approx((4.0, 4.0))
    one = sid_health(np.zeros((10, 2), np.int64), (4, 4))
    assert (one.collision_rate, one.largest_bucket, one.dead_codes) == (1.0, 10, (3, 3))
    assert one.perplexity == pytest.approx((1.0, 1.0))
    assert one.usage_gini == pytest.approx((0.75, 0.75))
    assert gini(np.zeros(3)) == perplexity(np.zeros(3)) == 0.0


def test_a_code_outside_its_level_is_refused() -> None:
    with pytest.raises(InputError, match="row 0"):
        sid_health(np.array([[4, 0]]), (4, 4))


HEALTH = sid_health(np.array([[0, 0], [0, 0], [1, 1], [2, 1]]), (4, 2))


@pytest.mark.parametrize(
    ("limits", "figure"),
    [
        (HealthLimits(max_collision_rate=0.4), r"collision rate is 0\.5, over the limit 0\.4"),
        (HealthLimits(max_largest_bucket=1), "largest bucket is 2, over the limit 1"),
        (HealthLimits(max_dead_share=0.2), r"share of dead codes of level 0 is 0\.25"),
        (HealthLimits(min_perplexity_share=0.9), r"perplexity / codes of level 0 is 0\.7.*under"),
        (HealthLimits(max_usage_gini=0.2), r"usage Gini of level 0 is 0\.375"),
    ],
)
def test_gate_names_the_figure_and_the_limit(limits: HealthLimits, figure: str) -> None:
    with pytest.raises(GateError, match=figure) as refused:
        check(HEALTH, limits)
    assert "\n" not in str(refused.value)


def test_gate_lets_pass_at_the_limit_and_without_limits() -> None:
    check(HEALTH, HealthLimits())
    check(
        HEALTH,
        HealthLimits(
            max_collision_rate=0.5,
            max_largest_bucket=2,
            max_dead_share=0.25,
            min_perplexity_share=min(p / k for p, k in zip(HEALTH.perplexity, (4, 2), strict=True)),
            max_usage_gini=0.375,
        ),
    )
    with pytest.raises(GateError):
        check(replace(HEALTH, collision_rate=0.51), HealthLimits(max_collision_rate=0.5))


def test_cosine_fidelity_of_exact_and_of_meaningless_codes() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)).astype(np.float32)
    x -= x.mean(axis=0)
    exact = Codebook(layers=(), codewords=(x,))
    assert cosine_fidelity(x, exact, seed=0) > 0.999
    one_axis = (np.eye(8, dtype=np.float32)[:1], np.zeros(1, np.float32))
    poor = Codebook(layers=(one_axis,), codewords=(np.array([[-1.0], [1.0]], np.float32),))
    assert 0.1 < cosine_fidelity(x, poor, seed=0) < 0.6
    one_word = Codebook(layers=(), codewords=(x[:1],))
    assert cosine_fidelity(x, one_word, seed=0) == 0.0
    assert cosine_fidelity(x[:1], exact, seed=0) == 0.0
