"""Which candidates make up a predicted set, against loops that say it in full."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.predicted_sets import Market, conditional_logit, fit_order, set_rows
from negrec_core.config import load_config
from negrec_core.errors import ArtefactError
from negrec_core.semantic_ids import SemanticIds
from negrec_core.set_order import RARE, SET_FEATURES, Popularity, SetOrder, candidates, read_order

COUNT = st.integers(0, 12)
GENERATION = load_config([], [], {}).generation


@st.composite
def markets(draw: st.DrawFn) -> tuple[np.ndarray, Popularity]:
    """Counts [4, ids] (dislikes, likes, recent dislikes, recent likes) and what is made of them."""
    n = draw(st.integers(1, 12))
    counts = np.array(draw(st.lists(st.lists(COUNT, min_size=n, max_size=n), min_size=4, max_size=4)))
    return counts, Popularity.of(*counts, 5.0)


def most(counts: np.ndarray, n: int) -> set[int]:
    return set(sorted((i for i in range(len(counts)) if counts[i]), key=lambda i: (-counts[i], i))[:n])


@given(markets(), st.integers(0, 14))
def test_everybodys_candidates_are_the_most_disliked(market: tuple[np.ndarray, Popularity], n: int) -> None:
    counts, popularity = market
    assert popularity.most_disliked(n).tolist() == sorted(most(counts[0], n) | most(counts[2], n))


@given(markets(), st.data())
def test_candidates_and_their_features(market: tuple[np.ndarray, Popularity], data: st.DataObject) -> None:
    counts, popularity = market
    ids = range(counts.shape[1])
    some = st.lists(st.sampled_from(ids), unique=True)
    beams, common, known = data.draw(some), sorted(data.draw(some)), data.draw(some)
    log_probs = sorted((-1.0 - 0.5 * beam for beam in range(len(beams))), reverse=True)
    found = candidates(
        np.array(beams, int), np.array(log_probs), np.array(common, int), np.array(known, int), popularity
    )
    share = (counts[0].sum() + 1) / (counts[:2].sum() + 2)
    rows = [(own, log_prob, 1.0) for own, log_prob in zip(beams, log_probs, strict=True)]
    rows += [(own, log_probs[-1] if beams else 0.0, 0.0) for own in common if own not in beams]
    rows = [row for row in rows if row[0] not in known]
    assert found.ids.tolist() == [row[0] for row in rows]
    assert found.log_probs.tolist() == [row[1] for row in rows]
    for row, features in zip(rows, found.features, strict=True):
        own, log_prob, beam = row
        odds = math.log((counts[0, own] + 5 * share) / (counts[1, own] + 5 * (1 - share)))
        wanted = [log_prob, beam, math.log1p(counts[0, own]), odds]
        wanted += [math.log1p(counts[2, own]), math.log1p(counts[3, own])]
        assert features.tolist() == pytest.approx(wanted)


@given(markets(), st.integers(1, 6), st.integers(0, 4), st.randoms())
def test_a_set_is_the_best_with_room_for_the_best_rare_ones(
    market: tuple[np.ndarray, Popularity], size: int, places: int, random: Any
) -> None:
    counts, popularity = market
    ids = list(range(counts.shape[1]))
    random.shuffle(ids)
    scores = [random.random() for _ in ids]
    nobody = np.zeros(0, int)
    found = candidates(np.array(ids), np.array(scores), nobody, nobody, popularity)
    order = SetOrder(np.array([1.0, 0, 0, 0, 0, 0]))
    chosen = order.choose(found, popularity, size, places).tolist()
    best = sorted(range(len(ids)), key=lambda row: -scores[row])
    rare = [row for row in best if counts[0, ids[row]] < RARE][:places]
    wanted = rare + [row for row in best if row not in rare][: max(size - len(rare), 0)]
    assert chosen == sorted(wanted, key=best.index)[:size]
    if not places:
        assert chosen == best[:size]


def loss(weights: np.ndarray, scaled: np.ndarray, disliked: np.ndarray, users: np.ndarray) -> float:
    """What `conditional_logit` minimises, user by user."""
    total = weights @ weights / 2
    for user in set(users.tolist()):
        scores = scaled[users == user] @ weights
        hits = disliked[users == user]
        if hits.any():
            likelihood = sum(scores[row] - math.log(np.exp(scores).sum()) for row in np.flatnonzero(hits))
            total -= likelihood
    return float(total)


def test_no_other_weights_explain_the_dislikes_better() -> None:
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(30), 12)
    features = rng.normal(size=(len(users), len(SET_FEATURES)))
    features[:, 5] = 0.1  # tells nothing
    disliked = rng.random(len(users)) < 0.2 * (features[:, 2] > 0)
    hits = np.isin(users, users[disliked])
    features, disliked, users = features[hits], disliked[hits], users[hits]
    order = conditional_logit(features, disliked, users)
    assert order.weights[5] == 0
    assert order.weights[2] == max(order.weights) > 0.5
    mean, spread = features.mean(0), features.std(0)
    spread[5] = np.inf
    scaled = (features - mean) / spread
    fitted = order.weights * np.where(np.isinf(spread), 0.0, spread)
    least = loss(fitted, scaled, disliked, users)
    for step in (0.05, -0.05):
        for column in range(5):
            other = fitted.copy()
            other[column] += step
            assert loss(other, scaled, disliked, users) > least


def test_an_order_of_other_features_is_refused() -> None:
    weights = [float(n) for n in range(len(SET_FEATURES))]
    assert read_order(list(SET_FEATURES), weights, "2026-01-01").weights.tolist() == weights
    for names in (None, ["log_prob"], list(SET_FEATURES)[::-1]):
        with pytest.raises(
            ArtefactError, match=r"ds=2026-01-01 orders sets by .* run the stage block_score again"
        ):
            read_order(names, weights, "2026-01-01")


CODES = {"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [1, 0], "e": [2, 2]}  # c and d share an ID


def market(recent: list[tuple[int, str, int, int]], popular_ids: int = 2) -> Market:
    ids = SemanticIds(list(CODES), np.array(list(CODES.values()), np.int32), {})
    rates = pa.table(
        {"item_id": ["d", "a", "c", "gone"], "n_negatives": [3, 1, 6, 99], "n_positives": [0, 4, 1, 0]}
    )
    columns = list(zip(*recent, strict=True)) or [()] * 4
    names = ("anchor_time", "item_id", "n_negatives", "n_positives")
    types = (pa.timestamp("us", "UTC"), pa.string(), pa.int64(), pa.int64())
    table = pa.table({name: pa.array(own, t) for name, own, t in zip(names, columns, types, strict=True)})
    return Market.of(ids, rates, table, 5.0, popular_ids)


def test_counts_of_items_that_share_an_id_are_summed_and_anchors_kept_apart() -> None:
    made = market([(20, "e", 2, 0), (10, "d", 1, 5), (10, "c", 2, 1), (10, "gone", 9, 9)])
    assert made.negatives.tolist() == [1, 0, 9, 0]
    assert made.positives.tolist() == [4, 0, 1, 0]
    at_10, common = made.at(10)
    assert at_10.recent_dislikes.tolist() == [0, 0, 3, 0]
    assert at_10.recent_likes.tolist() == [0, 0, 6, 0]
    assert common.tolist() == [0, 2]
    at_20, common = made.at(20)
    assert at_20.recent_dislikes.tolist() == [0, 0, 0, 2]
    assert common.tolist() == [0, 2, 3]
    never, common = made.at(30)
    assert never.recent_dislikes.tolist() == never.recent_likes.tolist() == [0] * 4
    assert common.tolist() == [0, 2]


def test_a_set_may_hold_what_no_beam_found_and_nothing_that_is_known() -> None:
    settings = GENERATION.model_copy(update={"set_size": 2, "rare_places": 0})
    entries = [{"rank": 1, "codes": [2, 2], "log_prob": -1.0}, {"rank": 2, "codes": [0, 1], "log_prob": -2.0}]
    user = {"user_id": "u", "anchor": 0, "known": None, "entries": entries, "model_version": "m"}
    by_dislikes = SetOrder(np.array([0.1, 0, 1.0, 0, 0, 0]))
    rows = list(set_rows(user, market([]), by_dislikes, settings))
    assert [(row["rank"], row["codes"], row["log_prob"]) for row in rows] == [
        (1, [1, 0], -2.0),
        (2, [0, 0], -2.0),
    ]
    assert {row["model_version"] for row in rows} == {"m"}
    rows = list(set_rows({**user, "known": ["d", "gone"]}, market([]), by_dislikes, settings))
    assert [row["codes"] for row in rows] == [[0, 0], [2, 2]]


def test_places_are_kept_for_rare_ids_from_so_many_dislikes_on() -> None:
    settings = GENERATION.model_copy(update={"set_size": 1, "rare_places": 1, "rare_from": 2})
    entries = [{"rank": 1, "codes": [2, 2], "log_prob": -1.0}]
    by_dislikes = SetOrder(np.array([0.1, 0, 1.0, 0, 0, 0]))
    for known, first in ((None, [1, 0]), (["gone"], [1, 0]), (["gone", "lost"], [0, 0])):
        user = {"user_id": "u", "anchor": 0, "known": known, "entries": entries}
        assert [row["codes"] for row in set_rows(user, market([]), by_dislikes, settings)] == [first]


def test_the_order_puts_first_what_was_disliked_next() -> None:
    """Beams say e, but everybody goes on to dislike c or d; what lacks an ID or was liked says nothing."""
    entries = [{"rank": 1, "codes": [2, 2], "log_prob": -1.0}, {"rank": 2, "codes": [0, 1], "log_prob": -2.0}]
    users = [{"user_id": f"u{n}", "anchor": 0, "known": None, "entries": entries} for n in range(6)]
    labels = [(f"u{n}", "cd"[n % 2], -1) for n in range(6)] + [("u0", "gone", -1), ("u1", "e", 1)]

    def order_after(labels: list[tuple[str, str, int]]) -> SetOrder:
        columns = zip(*labels, strict=True) if labels else ([], [], [])
        names = ("user_id", "item_id", "polarity")
        table = pa.table(dict(zip(names, map(list, columns), strict=True)))
        return fit_order(users, table, market([]))

    settings = GENERATION.model_copy(update={"set_size": 1, "rare_places": 0})
    first = [
        next(set_rows(users[0], market([]), order_after(found), settings)) for found in (labels, labels[6:])
    ]
    assert [row["codes"] for row in first] == [[1, 0], [2, 2]]
