"""Figures against loops over all pairs and all thresholds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.metrics import Estimate, Ranking, bootstrap, user_pairs, within_user_auc

# Few distinct scores, so that ties are the rule.
ROWS = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30)


def arrays(rows):
    scores, disliked, users = (np.array(column) for column in zip(*rows, strict=True))
    return scores.astype(float), disliked, users


def auc_by_pairs(scores, disliked):
    won = [
        1.0 if bad > good else 0.5 if bad == good else 0.0
        for bad in scores[disliked]
        for good in scores[~disliked]
    ]
    return float(np.mean(won)) if won else float("nan")


def auc(scores, disliked):
    return Ranking.of(scores, disliked).curve().auc()


def blocked_at(scores, disliked, share):
    return Ranking.of(scores, disliked).curve().blocked_at(share)


def within_user_auc_of(scores, disliked, users):
    return within_user_auc(*user_pairs(scores, disliked, users))


@given(ROWS)
def test_auc_is_the_share_of_pairs_in_order(rows):
    scores, disliked, _ = arrays(rows)
    assert auc(scores, disliked) == pytest.approx(auc_by_pairs(scores, disliked), nan_ok=True)


def test_auc_of_perfect_reversed_and_constant_scores():
    disliked = np.array([True, True, False, False])
    assert auc(np.array([4.0, 3.0, 2.0, 1.0]), disliked) == 1
    assert auc(np.array([1.0, 2.0, 3.0, 4.0]), disliked) == 0
    assert auc(np.ones(4), disliked) == 0.5
    assert np.isnan(auc(np.ones(4), np.ones(4, bool)))


@given(ROWS, st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]))
def test_blocked_at_is_the_best_of_all_thresholds_that_lose_so_few_likes(rows, share):
    scores, disliked, _ = arrays(rows)
    if disliked.all() or not disliked.any():
        assert np.isnan(blocked_at(scores, disliked, share))
        return
    good, bad = scores[~disliked], scores[disliked]
    allowed = [t for t in [*good, good.max() + 0.5] if np.mean(good >= t) <= share]
    # Thresholds between two likes block no more likes than the upper of them.
    allowed += [t + 1e-9 for t in good if np.mean(good >= t + 1e-9) <= share]
    assert blocked_at(scores, disliked, share) == max(np.mean(bad >= t) for t in allowed)


def test_blocked_at_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    disliked = np.array([True, False, True, False, True, False])
    assert blocked_at(scores, disliked, 0.0) == pytest.approx(1 / 3)
    assert blocked_at(scores, disliked, 0.34) == pytest.approx(2 / 3)
    # A share that allows less than one like allows none.
    assert blocked_at(scores, disliked, 0.33) == pytest.approx(1 / 3)


def test_a_tie_with_a_like_that_must_pass_is_not_blocked():
    assert blocked_at(np.array([1.0, 1.0]), np.array([True, False]), 0.5) == 0


@given(ROWS, st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_likes_blocked_at_a_recall_are_the_mean_over_orders_of_equal_scores(rows, recall):
    """Blocked one by one, a dislike of a group of equal scores stands where chance puts it among its likes.

    Where the recall falls between two dislikes, the likes between them count in proportion.
    """
    scores, disliked, _ = arrays(rows)
    found = Ranking.of(scores, disliked).curve().likes_blocked_at(recall)
    if disliked.all() or not disliked.any():
        assert np.isnan(found)
        return
    wanted, lost = recall * disliked.sum(), 0.0
    for score in sorted(set(scores), reverse=True):
        bad, good = (disliked & (scores == score)).sum(), (~disliked & (scores == score)).sum()
        if bad >= wanted - 1e-6:
            lost += good * wanted / bad
            break
        wanted, lost = wanted - bad, lost + good
    assert found == pytest.approx(lost / (~disliked).sum(), abs=1e-6)


def test_likes_blocked_at_a_recall_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.5])
    disliked = np.array([True, False, True, False, True, False])
    curve = Ranking.of(scores, disliked).curve()
    assert curve.likes_blocked_at(1 / 3) == pytest.approx(0)
    assert curve.likes_blocked_at(2 / 3) == pytest.approx(1 / 3)
    # The last dislike and the last like are blocked together.
    assert curve.likes_blocked_at(1.0) == pytest.approx(1)


@given(ROWS)
def test_within_user_auc_counts_pairs_of_one_user_alike(rows):
    scores, disliked, users = arrays(rows)
    won, pairs = 0.0, 0
    for user in set(users.tolist()):
        own = users == user
        n = int(disliked[own].sum() * (~disliked[own]).sum())
        if n:
            won, pairs = won + auc_by_pairs(scores[own], disliked[own]) * n, pairs + n
    expected = won / pairs if pairs else float("nan")
    assert within_user_auc_of(scores, disliked, users) == pytest.approx(expected, nan_ok=True)


def test_within_user_auc_does_not_reward_telling_users_apart():
    scores = np.array([9.0, 9.0, 1.0, 1.0])
    disliked, users = np.array([True, True, False, False]), np.array([0, 0, 1, 1])
    assert auc(scores, disliked) == 1
    assert np.isnan(within_user_auc_of(scores, disliked, users))
    assert within_user_auc_of(scores, disliked, np.array([0, 1, 0, 1])) == 1


def test_a_user_drawn_twice_counts_twice_and_not_as_pairs_with_itself():
    scores = np.array([2.0, 1.0, 1.0, 2.0])
    disliked, users = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
    ordered, pairs = user_pairs(scores, disliked, users)
    assert ordered.tolist() == [1, 0]
    assert pairs.tolist() == [1, 1]
    times = np.array([2, 1])
    assert within_user_auc(ordered * times, pairs * times) == pytest.approx(2 / 3)


def test_bootstrap_draws_whole_users_and_repeats_itself():
    users = np.array([2, 0, 1, 0, 2, 2])
    drawn = []

    def figure(counts):
        drawn.append(counts)
        assert counts[1] == counts[3]
        assert counts[0] == counts[4] == counts[5]
        return float(np.average(users, weights=counts))

    first = bootstrap(figure, users, seed=4, rounds=50)
    assert (first == bootstrap(figure, users, seed=4, rounds=50)).all()
    assert (first != bootstrap(figure, users, seed=5, rounds=50)).any()
    assert len({counts.tobytes() for counts in drawn}) > 3
    assert first.shape == (51,)
    found = Estimate.of(first)
    assert found.value == users.mean()
    assert found.low <= found.value <= found.high


def test_same_seed_draws_the_same_users_for_every_figure():
    users = np.repeat(np.arange(5), 3)
    one, other = [], []
    bootstrap(lambda times: one.append(times) or 0.0, users, seed=1, rounds=5)
    bootstrap(lambda times: other.append(times) or 1.0, users, seed=1, rounds=5)
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        values = rng.normal(size=60)
        draws = bootstrap(lambda times, v=values: float(np.average(v, weights=times)), np.arange(60), seed)
        found = Estimate.of(draws)
        held += found.low <= 0 <= found.high
    assert 85 <= held <= 100


def test_bootstrap_leaves_draws_without_a_figure_out():
    ranking = Ranking.of(np.array([2.0, 1.0]), np.array([True, False]))
    draws = bootstrap(lambda times: ranking.curve(times).auc(), np.arange(2), 0)
    assert np.isnan(draws).any()
    assert Estimate.of(draws) == Estimate(1, 1, 1)


def test_a_paired_interval_leaves_out_what_both_share():
    """Users differ much more from one another than two figures of the same user."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 10, 200)
    one, other = (
        bootstrap(lambda times, v=level + gain: float(np.average(v, weights=times)), np.arange(200), 1)
        for gain in (rng.normal(1, 0.1, 200), rng.normal(0, 0.1, 200))
    )
    paired = Estimate.of(one - other)
    assert 0.9 < paired.low < paired.value < paired.high < 1.1
    assert paired.value == pytest.approx(Estimate.of(one).value - Estimate.of(other).value)
    alone = Estimate.of(one)
    assert alone.high - alone.low > 20 * (paired.high - paired.low)


@given(ROWS, st.data(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_a_weight_counts_a_row_that_often(rows, data, share):
    scores, disliked, _ = arrays(rows)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))))
    ranking, repeated = Ranking.of(scores, disliked), np.repeat(np.arange(len(rows)), weights)
    if not len(repeated):
        assert np.isnan(ranking.curve(weights).auc())
        return
    found, again = ranking.curve(weights), Ranking.of(scores[repeated], disliked[repeated]).curve()
    assert found.auc() == pytest.approx(again.auc(), nan_ok=True)
    assert found.blocked_at(share) == pytest.approx(again.blocked_at(share), nan_ok=True)
