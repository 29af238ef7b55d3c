"""Tastes: the factorisation against a plain optimiser, and what it must not depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from negrec_core.config import load_config
from negrec_core.taste import Events, ItemTastes, fit_items, fold_in

SETTINGS = load_config(environment={}).taste
DIM = 3


def some_events(rng, n_users, n_items, n):
    """Distinct pairs of users and items with random verdicts."""
    pairs = rng.permutation(n_users * n_items)[:n]
    return Events(pairs // n_items, pairs % n_items, rng.integers(0, 2, len(pairs)).astype(float))


def some_items(rng, n, factors=2):
    unit = rng.normal(size=(n, DIM))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit, ItemTastes(rng.normal(size=n), rng.normal(size=(n, factors)))


def best_weights(events, user, unit, items):
    """A user's weights by a general optimiser, one event at a time."""
    k = items.factors.shape[1]
    penalty = np.array(
        [SETTINGS.user_penalty, *[SETTINGS.content_penalty] * DIM, *[SETTINGS.factor_penalty] * k]
    )

    def loss(weights):
        total = 0.5 * (penalty * weights**2).sum()
        for owner, item, disliked in zip(events.users, events.items, events.disliked, strict=True):
            if owner == user:
                odds = items.log_odds[item] + weights[0] + unit[item] @ weights[1 : 1 + DIM]
                odds += items.factors[item] @ weights[1 + DIM :]
                total += np.logaddexp(0, odds) - disliked * odds
        return total

    return minimize(loss, np.zeros(1 + DIM + k), tol=1e-10).x


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_folding_in_finds_each_users_optimum(seed, n):
    rng = np.random.default_rng(seed)
    unit, items = some_items(rng, 6)
    events = some_events(rng, 4, 6, n)
    ours = fold_in(events, 4, unit, items, SETTINGS)
    for user in range(4):
        np.testing.assert_allclose(ours[user], best_weights(events, user, unit, items), atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_users_taste_depends_neither_on_others_nor_on_the_order_of_events(seed):
    rng = np.random.default_rng(seed)
    unit, items = some_items(rng, 6)
    events = some_events(rng, 5, 6, 18)
    everybody = fold_in(events, 5, unit, items, SETTINGS)
    mine = rng.permutation(np.flatnonzero(events.users == 2))
    alone = Events(np.zeros(len(mine), np.int64), events.items[mine], events.disliked[mine])
    np.testing.assert_allclose(fold_in(alone, 1, unit, items, SETTINGS)[0], everybody[2], atol=1e-6)


def test_who_judged_nothing_and_items_without_events_have_zeros():
    rng = np.random.default_rng(0)
    unit, items = some_items(rng, 5)
    nothing = Events(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    assert not fold_in(nothing, 3, unit, items, SETTINGS).any()
    fitted = fit_items(nothing, unit, SETTINGS)
    assert not fitted.log_odds.any()
    assert not fitted.factors.any()
    events = some_events(rng, 20, 4, 60)
    assert not fit_items(events, unit, SETTINGS).factors[4].any()


def world(seed, n_users=300, n_items=80, per_user=30):
    """Users who dislike by two hidden traits: one shows in the embedding, the other does not."""
    rng = np.random.default_rng(seed)
    shown, hidden = rng.choice([-1.0, 1.0], (2, n_items))
    unit = rng.normal(size=(n_items, DIM)) * 0.3
    unit[:, 0] += shown
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    dislikes_shown, dislikes_hidden = rng.choice([-2.0, 2.0], (2, n_users))
    odds = np.outer(dislikes_shown, shown) + np.outer(dislikes_hidden, hidden) - 0.5
    verdict = rng.random((n_users, n_items)) < 1 / (1 + np.exp(-odds))
    items = np.stack([rng.permutation(n_items) for _ in range(n_users)])
    known, later = items[:, :per_user], items[:, per_user:]
    users = np.arange(n_users)[:, None]
    events = Events(
        np.repeat(np.arange(n_users), per_user), known.ravel(), verdict[users, known].ravel().astype(float)
    )
    return events, unit, later, verdict[users, later]


def auc(scores, disliked):
    above = scores[disliked][:, None] > scores[~disliked][None]
    return above.mean()


@pytest.mark.parametrize(("factors", "least", "most"), [(0, 0.68, 0.80), (4, 0.83, 1.0)])
def test_both_traits_are_learnt_and_the_hidden_one_by_the_factors_alone(factors, least, most):
    events, unit, later, disliked = world(3)
    chosen = SETTINGS.model_copy(update={"factors": factors})
    items = fit_items(events, unit, chosen)
    users = fold_in(events, 300, unit, items, chosen)
    vectors = np.hstack([np.ones((len(unit), 1)), unit, items.factors])
    scores = items.log_odds[later] + np.einsum("ud,uid->ui", users, vectors[later])
    assert least < auc(scores.ravel()[:6000], disliked.ravel()[:6000]) < most


def test_what_all_users_have_in_common_is_the_optimum_where_nothing_else_may_differ():
    """With everything else penalised away it is a ridge-penalised logistic regression on the embedding."""
    events, unit, _, _ = world(7, 100, 40, 10)
    stiff = dict.fromkeys(["user_penalty", "item_penalty", "content_penalty", "factor_penalty"], 1e9)
    items = fit_items(events, unit, SETTINGS.model_copy(update={"factors": 0, **stiff}))
    columns = np.hstack([np.ones((len(unit), 1)), unit])
    share = events.disliked.mean()
    start = np.array([np.log(share / (1 - share)), *np.zeros(DIM)])

    def loss(weights):
        odds = columns[events.items] @ weights
        likelihood = (np.logaddexp(0, odds) - events.disliked * odds).sum()
        return likelihood + 1.5 * ((weights - start) ** 2).sum()

    best = minimize(loss, start, tol=1e-10).x
    np.testing.assert_allclose(items.log_odds, columns @ best, atol=1e-3)


def test_an_item_that_nobody_judged_is_known_by_what_is_like_it():
    rng = np.random.default_rng(2)
    unit = np.repeat(np.eye(DIM)[:2], 10, axis=0)
    events = Events(rng.integers(50, size=400), rng.integers(19, size=400), np.zeros(400))
    bad = events.items >= 10  # what lies in the second direction is disliked
    events.disliked[bad] = rng.random(bad.sum()) < 0.8
    events.disliked[~bad] = rng.random((~bad).sum()) < 0.2
    log_odds = fit_items(events, unit, SETTINGS).log_odds
    assert log_odds[19] > 0.7
    assert log_odds[:10].max() < log_odds[19]


def test_half_a_dislike_lies_between_a_dislike_and_a_like():
    events, unit, _, _ = world(5, 60, 30, 10)
    means = [
        fit_items(Events(events.users, events.items, np.full(len(events.users), part)), unit, SETTINGS)
        for part in (0.2, 0.5, 0.8)
    ]
    low, middle, high = (tastes.log_odds.mean() for tastes in means)
    assert low < middle < high
    assert middle == pytest.approx(0, abs=0.05)


def test_items_are_the_same_every_time():
    events, unit, _, _ = world(5, 60, 30, 10)
    one, two = (fit_items(events, unit, SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(one.factors, two.factors)
    np.testing.assert_array_equal(one.log_odds, two.log_odds)


def test_one_kind_of_verdict_alone_stays_finite():
    events, unit, _, _ = world(5, 60, 30, 10)
    only_likes = Events(events.users, events.items, np.zeros(len(events.users)))
    fitted = fit_items(only_likes, unit, SETTINGS)
    assert np.isfinite(fitted.log_odds).all()
    assert (fitted.log_odds < 0).all()
