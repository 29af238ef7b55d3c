import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.block_score import (
    FEATURES,
    BlockScore,
    Items,
    Tally,
    curve,
    features,
    sigmoid,
    smoothed_log_odds,
    threshold_at,
)

shares = st.sampled_from([0, 0.01, 0.05, 0.07, 0.1, 0.29, 0.5, 0.57, 0.99, 1]) | st.floats(0, 1)
# Few distinct values, so that ties are common.
scores = st.lists(st.integers(0, 6).map(lambda n: n / 6) | st.floats(0, 1), max_size=40)


FACTORS, PRIOR = 2, -1.1


def unit_rows(rng, n, dim):
    rows = rng.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def some_categories(rng, n):
    """Numbers of categories, 1 to 3, and of top categories, 4 to 6; 0 for none."""
    columns = [rng.choice(numbers, n) for numbers in ([0, 1, 2, 3], [0, 4, 5, 6])]
    return np.column_stack(columns).astype(np.int32)


def some_items(rng, n, dim, unknown=0):
    """Random items; the last ones are such that nothing is known of."""
    items = Items.of(unit_rows(rng, n, dim), some_categories(rng, n), rng.normal(size=(n, 1 + FACTORS)))
    return items.with_unknown(PRIOR) if unknown else items


def some_taste(rng, dim):
    """Weights of a user: own log odds, embedding, factors."""
    return rng.normal(size=1 + dim + FACTORS)


def some_tally(rng, n):
    """Counts of n categories, some of which share their numbers."""
    return Tally(some_categories(rng, n), rng.integers(0, 5, n), rng.integers(0, 5, n))


def features_by_loop(
    candidates, entries, log_probs, tally, taste, item_log_odds, user_log_odds, prior, pseudo
):
    share = 1 / (1 + math.exp(-prior))

    def cosine(one, other):
        return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))

    rows = []
    every = zip(candidates.vectors, candidates.categories, item_log_odds, strict=True)
    for (own, *vector), kinds, item in every:
        candidate = vector[: entries.shape[1]]
        similarity, affinity, total = -math.inf, 0.0, 0.0
        for entry, log_prob in zip(entries, log_probs, strict=True):
            similarity = max(similarity, cosine(candidate, entry))
            affinity += math.exp(log_prob) * cosine(candidate, entry)
            total += math.exp(log_prob)
        if not len(entries):
            similarity, affinity, total = 0.0, 0.0, 1.0
        within = []
        for level, kind in enumerate(kinds):
            bad, good = (
                sum(
                    count
                    for other, count in zip(tally.categories, counts, strict=True)
                    if kind > 0 and other[level] == kind
                )
                for counts in (tally.negatives, tally.positives)
            )
            within.append(math.log((bad + pseudo * share) / (good + pseudo * (1 - share))))
        liking = own + cosine(taste[1:], vector)
        rows.append(
            [
                similarity,
                affinity / total,
                float(item),
                user_log_odds,
                *within,
                liking,
                taste[0],
                not any(taste),
            ]
        )
    return np.array(rows).reshape(-1, len(FEATURES))


sizes = st.integers(0, 6)


@given(st.integers(0, 12), sizes, sizes, st.booleans(), st.integers(0, 2**32 - 1))
def test_features_equal_a_plain_loop(n, m, n_categories, new, seed):
    rng = np.random.default_rng(seed)
    candidates = some_items(rng, n, 5, unknown=1)
    entries, log_probs = unit_rows(rng, m, 5), -rng.exponential(3, m)
    known = (candidates, entries, log_probs, some_tally(rng, n_categories))
    inputs = (*known, some_taste(rng, 5) * (not new), rng.normal(size=n + 1), 0.7, PRIOR, 5.0)
    ours = features(*inputs)
    np.testing.assert_allclose(ours, features_by_loop(*inputs), atol=1e-5)
    assert ours.shape == (n + 1, len(FEATURES))
    assert (ours[-1, :2] == 0).all()
    assert ours[-1, FEATURES.index("taste")] == np.float32(PRIOR)


def test_affinity_survives_tiny_probabilities():
    rng = np.random.default_rng(0)
    candidates, entries = some_items(rng, 3, 4), unit_rows(rng, 2, 4)
    rest = (some_tally(rng, 2), some_taste(rng, 4), np.zeros(3), 0.0, -1.0, 5.0)
    far = features(candidates, entries, np.array([-1000.0, -1001.0]), *rest)
    close = features(candidates, entries, np.array([0.0, -1.0]), *rest)
    np.testing.assert_allclose(far, close)


def test_score_is_the_logistic_of_the_weighted_features():
    score = BlockScore(np.array([1.0, -2.0, 0.5, 0.25, 2.0, -1.0, 0.5, 1.5, 0.3]), 0.5, 0.5, -1.0, 5.0)
    row = [0.3, 0.1, -1.2, 2.0, 0.1, 0.3, 0.8, -0.2, 1.0]
    odds = 0.3 - 0.2 - 0.6 + 0.5 + 0.2 - 0.3 + 0.4 - 0.3 + 0.3 + 0.5
    assert score.score(np.array([row]))[0] == pytest.approx(1 / (1 + math.exp(-odds)))


@given(st.floats(-1e6, 1e6))
def test_sigmoid_never_overflows(x):
    with np.errstate(over="raise"):
        value = float(sigmoid(x))
    assert 0 <= value <= 1
    if abs(x) < 30:
        assert value == pytest.approx(1 / (1 + math.exp(-x)), abs=1e-12)


def test_log_odds_start_at_the_prior_and_follow_the_counts():
    score = BlockScore(np.zeros(len(FEATURES)), 0.0, 0.5, math.log(0.2 / 0.8), 5.0)
    prior, many, few = score.user_log_odds(np.array([0, 1000, 1]), np.array([0, 1000, 0]))
    assert prior == pytest.approx(score.prior_log_odds)
    assert many == pytest.approx(math.log((1000 + 1) / (1000 + 4)))
    assert few == pytest.approx(math.log((1 + 1) / 4))
    assert smoothed_log_odds(np.array([3]), np.array([1]), 0.5, 2.0)[0] == math.log(4 / 2)


def most_that_may_be_blocked(n, share):
    return max(k for k in range(n + 1) if k <= share * n + 1e-9)


@given(scores, shares)
def test_threshold_is_the_lowest_that_keeps_the_share(liked, share):
    threshold = threshold_at(np.array(liked), share)
    if not liked:
        assert threshold == 1.0
        return

    def blocked(at):
        return sum(score >= at for score in liked)

    allowed = most_that_may_be_blocked(len(liked), share)
    assert blocked(threshold) <= allowed
    # Any lower threshold changes nothing, or blocks too many.
    lower = [score for score in liked if score < threshold]
    if lower:
        assert blocked(max(lower)) > allowed
    else:
        assert threshold == min(liked)


@pytest.mark.parametrize("percent", [7, 29, 57, 58])
def test_a_share_is_not_lost_to_rounding(percent):
    """0.29 * 100 is less than 29 in floating point."""
    liked = np.arange(100) / 100
    assert (liked >= threshold_at(liked, percent / 100)).sum() == percent


def test_equal_scores_pass_together():
    assert threshold_at(np.array([0.9, 0.5, 0.5, 0.5, 0.1]), 0.4) == np.nextafter(0.5, 1)
    assert threshold_at(np.array([0.9, 0.5, 0.1]), 0.4) == np.nextafter(0.5, 1)


@given(scores, scores, st.lists(shares, min_size=1, max_size=6).map(sorted))
def test_curve_is_monotone_and_says_what_each_threshold_blocks(liked, disliked, wanted):
    liked, disliked = np.array(liked), np.array(disliked)
    points = curve(liked, disliked, np.array(wanted, float))
    assert len(points) == len(wanted)
    for share, point in zip(wanted, points, strict=True):
        assert point.likes_blocked <= share + 1e-12 or not len(liked)
        for part, scores_of in ((point.likes_blocked, liked), (point.dislikes_blocked, disliked)):
            over = [score for score in scores_of if score >= point.threshold]
            assert part == pytest.approx(len(over) / max(len(scores_of), 1))
    for looser, stricter in zip(points[1:], points, strict=False):
        assert looser.threshold <= stricter.threshold
        assert looser.likes_blocked >= stricter.likes_blocked
        assert looser.dislikes_blocked >= stricter.dislikes_blocked
