"""Candidates against loops and cases made by hand."""

import datetime as dt
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.candidates import OTHERS, chosen, draw_candidates

START = dt.datetime(2026, 3, 10, 12, tzinfo=dt.UTC)


def frame(rows, polarity=True):
    """Events of (user, item, hours after noon of the first day, polarity) rows."""
    columns = ["user_id", "item_id", "event_time", "polarity"]
    whole = [(user, item, START + dt.timedelta(hours=hour), sign) for user, item, hour, sign in rows]
    found = pd.DataFrame(whole, columns=columns).astype({"event_time": "datetime64[us, UTC]"})
    return found if polarity else found.drop(columns="polarity")


def draw(future, more=(), timezone="UTC", seed=1):
    return draw_candidates(frame(future), frame([*future, *more], polarity=False), timezone, seed)


def others_of(found, user):
    rows = found.pairs[(found.pairs["user_id"] == user) & ~found.pairs["target"]]
    return rows["item_id"].tolist()


def target_of(found, user):
    rows = found.pairs[(found.pairs["user_id"] == user) & found.pairs["target"]]
    assert len(rows) == 1
    return rows["item_id"].item()


def test_the_next_dislike_stands_among_what_was_shown_the_same_day():
    same_day = [("u", f"same {n}", n / 10, 1) for n in range(25)]
    later = [("u", f"later {n}", 24, 1) for n in range(25)]
    found = draw([("u", "first", 1, -1), ("u", "second", 2, -1), *same_day], later)
    assert target_of(found, "u") == "first"
    others = others_of(found, "u")
    assert len(set(others)) == OTHERS
    assert all(item.startswith("same") for item in others)
    assert (found.whole, found.other_days, found.alone) == (1, 0, 0)


def test_nearest_days_fill_up_before_and_after():
    shown = [("u", f"{day} {n}", 24 * day, 1) for day in (0, 1, 3, 5) for n in range(8)]
    found = draw([("u", "target", 24 * 2, -1)], shown)
    days = [item.split()[0] for item in others_of(found, "u")]
    # Days 1 and 3 are one day away; of days 0 and 5 the nearer is day 0.
    assert sorted(days) == ["0"] * 3 + ["1"] * 8 + ["3"] * 8
    assert found.other_days == 1


def test_an_item_counts_on_its_nearest_day_and_once():
    found = draw([("u", "target", 0, -1)], [("u", "x", 48, 1), ("u", "x", 1, 1), ("u", "y", 48, 1)])
    assert others_of(found, "u") == ["x", "y"]
    assert (found.whole, found.other_days) == (0, 1)


def test_what_the_user_disliked_in_the_horizon_is_no_other_whenever_it_was_shown():
    future = [("u", "target", 0, -1), ("u", "bad", 100, -1), ("v", "bad", 0, 1), ("v", "worse", 0, -1)]
    found = draw(future, [("u", "bad", 1, 1), ("u", "seen", 1, 1), ("u", "target", 2, 1)])
    assert others_of(found, "u") == ["seen"]
    assert others_of(found, "v") == ["bad"]


def test_users_who_were_shown_nothing_else_are_counted_and_left_out():
    found = draw([("u", "target", 0, -1), ("v", "a", 0, -1), ("v", "b", 0, 1), ("only likes", "b", 0, 1)])
    assert found.pairs["user_id"].unique().tolist() == ["v"]
    assert found.alone == 1
    empty = draw([("u", "target", 0, -1)])
    assert (len(empty.pairs), empty.alone) == (0, 1)
    assert len(chosen(empty.pairs, np.zeros(0))) == 0


def test_a_day_is_one_of_the_time_zone():
    # 16:00 UTC is midnight in Shanghai.
    shown = [
        *(("u", f"before {n}", 3, 1) for n in range(30)),
        *(("u", f"after {n}", 5, 1) for n in range(30)),
    ]
    future = [("u", "target", 6, -1)]
    assert draw(future, shown, "UTC").other_days == 0
    assert {item.split()[0] for item in others_of(draw(future, shown, "UTC"), "u")} == {"before", "after"}
    assert {item.split()[0] for item in others_of(draw(future, shown, "Asia/Shanghai"), "u")} == {"after"}


def random_log(seed, events=300):
    rng = random.Random(seed)
    users, items = [f"u{n}" for n in range(6)], [f"i{n}" for n in range(40)]
    return [
        (rng.choice(users), rng.choice(items), rng.randrange(150), rng.choice((-1, 1, 1, 1)))
        for _ in range(events)
    ]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(10, 400))
def test_any_log_gives_what_the_loop_allows(seed, events):
    log = random_log(seed, events)
    found = draw(log, seed=seed)
    for user in {row[0] for row in log if row[3] == -1}:
        bad = {
            item: min(h for u, i, h, s in log if (u, i, s) == (user, item, -1))
            for u, item, _, s in log
            if u == user and s == -1
        }
        target = target_of(found, user) if user in set(found.pairs["user_id"]) else None
        away = {}
        first = min(bad.values())
        for u, item, hour, _ in log:
            if u == user and item not in bad:
                distance = abs((hour + 12) // 24 - (first + 12) // 24)
                away[item] = min(distance, away.get(item, 99))
        if target is None:
            assert not away
            continue
        assert bad[target] == first
        others = others_of(found, user)
        assert set(others) <= set(away)
        assert sorted(away[item] for item in others) == sorted(away.values())[:OTHERS]


def test_the_same_seed_draws_the_same_whatever_the_order_of_rows():
    log = random_log(3)
    one = draw_candidates(frame(log), frame(log, polarity=False), "UTC", 5)
    other = draw_candidates(frame(log[::-1]), frame(log[::-1], polarity=False), "UTC", 5)
    pd.testing.assert_frame_equal(one.pairs, other.pairs)
    third = draw_candidates(frame(log), frame(log, polarity=False), "UTC", 6)
    assert not one.pairs.equals(third.pairs)


def test_chosen_is_the_chance_of_the_target_among_the_best():
    pairs = pd.DataFrame(
        {"user": [0, 0, 0, 1, 1, 2, 2, 2], "target": [True, False, False, False, True, False, True, False]}
    )
    scores = np.array([3.0, 2.0, 1.0, 2.0, 1.0, 5.0, 5.0, 5.0])
    assert chosen(pairs, scores).tolist() == pytest.approx([1, 0, 1 / 3])
    # What nothing is known of ties with nothing known.
    assert chosen(pairs, np.full(8, -np.inf)).tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3])
