"""Baselines against loops and figures worked out by hand."""

import datetime as dt
import math
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from train.baselines import Known, baselines, features, fit_classifier, judged

START = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)


def frame(*rows):
    """Feedback of (user, item, hour, polarity) rows."""
    columns = {"user_id": [], "item_id": [], "event_time": [], "polarity": []}
    for user, item, hour, polarity in rows:
        values = (user, item, START + dt.timedelta(hours=hour), polarity)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return pd.DataFrame(columns)


def known_of(past, category=None, edges=(), leaf=None):
    items = sorted(set(past["item_id"]))
    return Known(
        past,
        pd.Series(category or dict.fromkeys(items, "all")),
        pd.DataFrame(edges, columns=["item_id", "neighbor_id", "score"]).astype({"score": float}),
        leaf or {item: n for n, item in enumerate(items)},
        len(items),
        5,
    )


PAST = frame(("u", "x", 1, -1), ("v", "x", 1, -1), ("v", "y", 1, 1), ("w", "y", 1, -1), ("w", "z", 1, 1))


def test_an_item_both_disliked_and_liked_counts_once_as_disliked():
    rows = judged(frame(("u", "x", 1, 1), ("u", "x", 2, -1), ("u", "y", 1, 1), ("v", "x", 1, 1)))
    assert rows[["user_id", "item_id", "disliked", "user"]].to_numpy().tolist() == [
        ["u", "x", True, 0],
        ["u", "y", False, 0],
        ["v", "x", False, 1],
    ]


def test_rates_are_smoothed_log_odds():
    exposures = judged(frame(("u", "x", 1, -1), ("u", "new", 1, -1), ("new", "y", 1, -1)))
    found = baselines(known_of(PAST), ["u"], seed=1)
    prior = np.log(3 / 2)
    of = {
        "x": np.log((2 + 5 * 0.6) / (0 + 5 * 0.4)),
        "y": np.log((1 + 5 * 0.6) / (1 + 5 * 0.4)),
        "u": np.log((1 + 5 * 0.6) / (0 + 5 * 0.4)),
    }
    order = list(zip(exposures["user_id"], exposures["item_id"], strict=True))
    assert order == [("new", "y"), ("u", "new"), ("u", "x")]
    assert found["times disliked"].score(exposures).tolist() == [1, 0, 2]
    np.testing.assert_allclose(found["item rate"].score(exposures), [of["y"], prior, of["x"]])
    np.testing.assert_allclose(
        found["item + user rate"].score(exposures), [of["y"] + prior, prior + of["u"], of["x"] + of["u"]]
    )


def test_sets_count_items_of_one_id_together_and_leave_out_items_without_one():
    past = pd.concat([PAST, frame(("u", "lost", 1, -1))])
    known = known_of(past, leaf={"x": 4, "y": 4, "z": 2})
    found = baselines(known, ["u", "new"], seed=1)
    for name in ("times disliked", "item rate", "item + user rate"):
        assert found[name].sets["new"].tolist() == [4, 2]
        assert found[name].sets["u"].tolist() == [2]


def test_a_rate_of_few_events_stands_behind_one_of_many():
    rows = [("u", "once", 1, -1)]
    rows += [(f"u{n}", "often", 1, -1) for n in range(30)]
    rows += [(f"v{n}", "liked", 1, 1) for n in range(30)]
    past = frame(*rows)
    known = known_of(past, leaf={"once": 0, "often": 1, "liked": 2})
    assert baselines(known, ["new"], seed=1)["item rate"].sets["new"].tolist() == [1, 0, 2]


def random_past(seed, events=200):
    rng = random.Random(seed)
    return frame(
        *(
            (f"u{rng.randrange(8)}", f"i{rng.randrange(12)}", rng.randrange(500), rng.choice((-1, 1)))
            for _ in range(events)
        )
    )


CATEGORY = {f"i{n}": f"t{n % 2}/c{n % 3}" for n in range(12)}


def test_features_equal_counting_in_loops():
    past = random_past(1)
    pairs = judged(random_past(2, 30))
    found = features(past, pd.Series(CATEGORY), pairs, 5)
    rows = list(past.itertuples())
    share = sum(row.polarity == -1 for row in rows) / len(rows)

    def log_odds(of):
        bad = sum(of(row) and row.polarity == -1 for row in rows)
        good = sum(of(row) and row.polarity == 1 for row in rows)
        return math.log((bad + 5 * share) / (good + 5 * (1 - share)))

    for pair, values in zip(pairs.itertuples(), found.to_dict("records"), strict=True):
        kind = CATEGORY[pair.item_id]

        def same_kind(row, kind=kind):
            return CATEGORY[row.item_id] == kind

        assert values["item"] == pytest.approx(log_odds(lambda r, p=pair: r.item_id == p.item_id))
        assert values["user"] == pytest.approx(log_odds(lambda r, p=pair: r.user_id == p.user_id))
        assert values["category"] == pytest.approx(log_odds(same_kind))
        assert values["user_category"] == pytest.approx(
            log_odds(lambda r, p=pair, k=same_kind: r.user_id == p.user_id and k(r))
        )
        top = kind.split("/")[0]

        def same_top(row, top=top):
            return CATEGORY[row.item_id].startswith(top)

        assert values["top"] == pytest.approx(log_odds(same_top))
        assert values["user_top"] == pytest.approx(
            log_odds(lambda r, p=pair, k=same_top: r.user_id == p.user_id and k(r))
        )
        assert values["n_item"] == sum(r.item_id == pair.item_id and r.polarity == -1 for r in rows)
        assert values["n_user"] == sum(r.user_id == pair.user_id and r.polarity == -1 for r in rows)


def test_swing_adds_up_the_edges_from_past_dislikes():
    past, rng = random_past(3), random.Random(4)
    edges = [(f"i{a}", f"i{b}", rng.random()) for a in range(12) for b in rng.sample(range(12), 4)]
    exposures = judged(random_past(5, 30))
    users = [f"u{n}" for n in range(8)]
    found = baselines(known_of(past, edges=edges), users, seed=1)["Swing neighbours"]
    disliked = {(row.user_id, row.item_id) for row in past.itertuples() if row.polarity == -1}

    def total(user, item):
        return sum(score for a, b, score in edges if b == item and (user, a) in disliked)

    expected = [total(row.user_id, row.item_id) for row in exposures.itertuples()]
    np.testing.assert_allclose(found.score(exposures), expected)
    items = sorted(set(past["item_id"]))
    for user in users:
        ranked = [total(user, items[leaf]) for leaf in found.sets[user]]
        assert ranked == sorted(ranked, reverse=True)
        assert len(ranked) == sum(total(user, item) > 0 and (user, item) not in disliked for item in items)


def test_category_sets_are_what_is_disliked_most_in_the_users_worst_category():
    past = frame(
        *(("u", f"i{n}", n, -1) for n in (0, 6, 1)),
        *((f"other {n}", "i6", n, -1) for n in range(4)),
        *((f"other {n}", "i3", n, -1) for n in range(2)),
        *((f"third {n}", "i9", n, -1) for n in range(1)),
    )
    category = {f"i{n}": f"c{n % 3}" for n in range(12)}
    leaf = {f"i{n}": n for n in range(12)}
    found = baselines(known_of(past, category, leaf=leaf), ["u", "new"], seed=1)
    assert found["category rule"].sets["u"].tolist() == [3, 9]
    assert found["category rule"].sets["new"].tolist()[:2] == [6, 3]


def test_classifier_learns_whose_dislikes_are_of_which_category():
    """Half of the users dislike c0 and like the rest, the others the other way round."""
    rng = random.Random(6)
    rows = []
    for n in range(60):
        for hour in range(30):
            item = rng.randrange(12)
            rows.append((f"u{n}", f"i{item}", hour, -1 if (item % 3 == 0) == (n % 2 == 0) else 1))
    classify = fit_classifier(known_of(frame(*rows), CATEGORY), seed=1)
    pairs = pd.DataFrame({"user_id": ["u0", "u0", "u1", "u1"], "item_id": ["i0", "i1"] * 2})
    scores = classify(pairs)
    assert (scores > 0.5).tolist() == [True, False, False, True]


def test_classifier_knows_what_was_shown_and_got_neither():
    """Early on all users dislike and like as much, and only those who also pass over much dislike later."""
    rows, shown = [], []
    for n in range(80):
        rows += [(f"u{n}", item, hour, (-1) ** hour) for hour, item in enumerate("abcd")]
        if n % 2:
            shown += [(f"u{n}", item, 4 + hour, 0) for hour, item in enumerate("efgh")]
            rows += [(f"u{n}", item, 8 + hour, -1) for hour, item in enumerate("efgh")]
        else:
            rows += [(f"u{n}", item, 8 + hour, 1) for hour, item in enumerate("ef")]
    sighted = replace(known_of(frame(*rows)), shown=frame(*shown))
    pairs = pd.DataFrame({"user_id": ["u2", "u3"], "item_id": ["a", "a"]})
    even, odd = fit_classifier(sighted, seed=1)(pairs)
    assert odd > even + 0.5


def test_log_odds_of_what_was_shown_are_smoothed():
    history = pd.concat([PAST, frame(("u", "x", 2, 0), ("v", "y", 2, 0))])
    found = features(history, pd.Series({"x": "a", "y": "a"}), frame(("u", "y", 9, -1)), 5)
    # Two of four that are not disliked; y: one neither, one like; u: one neither.
    assert found["shown_item"].tolist() == pytest.approx([np.log((1 + 2.5) / (1 + 2.5))])
    assert found["shown_user"].tolist() == pytest.approx([np.log((1 + 2.5) / 2.5)])
    pd.testing.assert_frame_equal(
        found.drop(columns=["shown_item", "shown_user"]),
        features(PAST, pd.Series({"x": "a", "y": "a"}), frame(("u", "y", 9, -1)), 5).drop(
            columns=["shown_item", "shown_user"]
        ),
    )


def test_nothing_to_tell_apart_leaves_the_classifier_out():
    past = frame(("u", "a", 1, -1), ("u", "b", 2, -1))
    assert fit_classifier(known_of(past), seed=1) is None
    assert "boosted classifier" not in baselines(known_of(past), ["u"], seed=1)


def test_scores_do_not_depend_on_what_else_is_scored():
    past, pairs = random_past(7), judged(random_past(8, 60))
    edges = [("i1", "i2", 0.5), ("i2", "i3", 0.25), ("i3", "elsewhere", 1.0)]
    extra = pd.DataFrame({"user_id": ["nobody", "u1"], "item_id": ["i2", "elsewhere"]})
    found = baselines(known_of(past, CATEGORY, edges), ["u1", "nobody"], seed=1)
    assert len(found) == 7
    for name, method in found.items():
        together = method.score(pd.concat([pairs, extra], ignore_index=True))
        np.testing.assert_allclose(together[: len(pairs)], method.score(pairs), err_msg=name)
    assert found["Swing neighbours"].score(extra)[0] == 0
