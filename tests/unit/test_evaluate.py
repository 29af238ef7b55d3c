"""Evaluation against figures worked out by hand."""

import datetime as dt

import numpy as np
import pandas as pd
import pytest
from warehouses import DS, Entry, publish, save_codebook, small_codebook, write_rows

from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK
from negrec_core.metrics import FIGURES, LONG_TAIL
from negrec_core.schemas import TABLES
from negrec_core.set_order import ANYBODY
from negrec_core.trie import Trie
from train.evaluate import (
    CandidateCounts,
    evaluate,
    hit_table,
    load_neither,
    load_predictions,
    split_feedback,
)

DAY = dt.date.fromisoformat(DS)
CONFIG = load_config([], [], {})
MICRO = dt.timedelta(microseconds=1)


def at(day, hour=12):
    """An instant, `day` days after the log date."""
    return dt.datetime.combine(DAY + dt.timedelta(days=day), dt.time(hour), dt.UTC)


def event(user, item, time, polarity=-1):
    return {"user_id": user, "item_id": item, "event_time": time, "polarity": polarity}


def log(store, events):
    """Write feedback of every day of the window and the horizon, empty days too."""
    store.create_tables()
    by_day = {(DAY + dt.timedelta(days=n)).isoformat(): [] for n in range(-5, 9)}
    for row in events:
        by_day[row["event_time"].date().isoformat()].append(row)
    for day, rows in by_day.items():
        write_rows(store, "feedback", rows, day)
        shown = [{**row, "action": "like" if row["polarity"] == 1 else "dislike"} for row in rows]
        write_rows(store, "behavior_log", shown, day)


def seen(frame):
    return [(row.user_id, row.item_id) for row in frame.itertuples()]


def test_end_of_day_splits_at_the_last_instant_and_ends_with_the_horizon(tmp_path):
    store = DeltaStore(tmp_path)
    end = CONFIG.end_of_day(DS)
    log(
        store,
        [
            event("u", "long ago", at(-5)),
            event("u", "just before", end - MICRO),
            event("u", "first after", end + MICRO),
            event("u", "last", end + dt.timedelta(days=7)),
            event("u", "too late", end + dt.timedelta(days=7) + MICRO),
        ],
    )
    past, future = split_feedback(store, CONFIG, DS)
    assert sorted(seen(past)) == [("u", "just before"), ("u", "long ago")]
    assert sorted(seen(future)) == [("u", "first after"), ("u", "last")]


def test_the_window_and_the_time_zone_bound_the_past(tmp_path):
    store = DeltaStore(tmp_path)
    config = load_config([], ["window_days=3", "timezone=Asia/Shanghai"], {})
    # 16:00 UTC is midnight in Shanghai; rows lie in the partition of their UTC day here.
    log(store, [event("u", "old", at(-3)), event("u", "past", at(0, 15)), event("u", "future", at(0, 17))])
    past, future = split_feedback(store, config, DS)
    assert seen(past) == [("u", "past")]
    assert seen(future) == [("u", "future")]


def test_explicit_anchors_split_each_user_at_its_own(tmp_path):
    store = DeltaStore(tmp_path)
    log(
        store,
        [
            event("early", "a", at(-5)),
            event("early", "b", at(-3)),
            event("early", "c", at(-1)),
            event("late", "a", at(-1)),
            event("late", "b", at(0)),
            event("none", "a", at(-1)),
        ],
    )
    config = load_config([], ["anchors=explicit", "labels.horizon_days=3"], {})
    anchors = {"early": at(-4), "late": at(-1, 23)}
    rows = [{"user_id": user, "anchor_time": time} for user, time in anchors.items()]
    write_rows(store, "anchor", rows, DS)
    past, future = split_feedback(store, config, DS)
    assert sorted(seen(past)) == [("early", "a"), ("late", "a"), ("none", "a")]
    assert sorted(seen(future)) == [("early", "b"), ("early", "c"), ("late", "b")]


@pytest.mark.parametrize(
    ("neutral", "found"), [("null", []), ("0.0", ["passed over"]), ("0.5", ["passed over"])]
)
def test_neither_is_what_was_shown_before_the_anchor_and_never_judged(tmp_path, neutral, found):
    store = DeltaStore(tmp_path)
    log(store, [event("u", "liked", at(-1), 1)])
    shown = [
        {**event("u", item, time), "action": action}
        for item, time, action in (
            ("passed over", at(0), "exposure"),
            ("liked", at(0), "exposure"),
            ("not shown", at(0), "share"),
            ("later", CONFIG.end_of_day(DS) + MICRO, "exposure"),
        )
    ]
    logged = [{name: row[name] for name in ("user_id", "item_id", "event_time", "action")} for row in shown]
    write_rows(store, "behavior_log", logged, DS, revision=2)
    config = load_config([], [f"taste.neutral={neutral}"], {})
    past, _ = split_feedback(store, config, DS)
    rows = load_neither(store, config, DS, past)
    assert rows["item_id"].tolist() == found
    assert (rows["polarity"] == 0).all()


def frame(*events):
    return pd.DataFrame([event(*row) for row in events])


PAST = (
    ("u", "x", at(-1), -1),
    ("v", "x", at(-1), -1),
    ("v", "y", at(-1), 1),
    ("w", "y", at(-1), -1),
    ("w", "z", at(-1), 1),
)


def test_hit_table_by_hand():
    past = frame(
        *((f"other {n}", "common", at(-2), -1) for n in range(5)),
        *(("long", f"item {n}", at(-2), -1) for n in range(3)),
        ("short", "item 0", at(-2), -1),
    )
    future = frame(
        ("long", "common", at(1), -1),
        ("long", "rare", at(2), -1),
        ("long", "liked", at(1), 1),
        ("short", "rare", at(1), -1),
        ("only likes", "common", at(1), 1),
        ("without list", "rare", at(1), -1),
    )
    leaves = {"common": 0, "rare": 1, "liked": 2}
    predicted = {"long": np.array([1, 2]), "short": np.array([0])}
    found = hit_table(past, future, predicted, leaves).set_index("user_id")
    assert found.loc["long"].to_dict() == {
        "hr": False,  # the first dislike was not predicted
        "fhr": True,
        "short": False,
        "tail": True,
        "lif": True,
    }
    assert found.loc["short", ["hr", "fhr", "short", "tail", "lif"]].tolist() == [0, 0, 1, 1, 0]
    assert "only likes" not in found.index
    assert not found.loc["without list", "fhr"]


def test_all_first_dislikes_of_one_instant_count_for_hr():
    future = frame(("u", "a", at(1), -1), ("u", "b", at(1), -1))
    found = hit_table(frame(*PAST), future, {"u": np.array([1])}, {"a": 0, "b": 1})
    assert found["hr"].tolist() == [True]


def test_illegal_predictions_are_counted_and_match_nothing(tmp_path):
    store = DeltaStore(tmp_path)
    store.create_tables()
    rows = [
        {"user_id": "u", "rank": rank, "codes": codes, "log_prob": -1.0}
        for rank, codes in enumerate([[1, 1], [0, 1], [9, 0], [0, 0]], 1)
    ]
    write_rows(store, "negative_item_set", rows[::-1], DS)
    trie = Trie.build(np.array([[0, 0], [1, 1]], np.int32), (2, 2))
    predicted, illegal = load_predictions(store, DS, trie, ["u", "v"])
    assert illegal == 2
    assert {user: own.tolist() for user, own in predicted.items()} == {"u": [1, -1, -1, 0], "v": []}


def test_users_of_whom_nothing_was_known_are_predicted_what_anybody_is(tmp_path):
    store = DeltaStore(tmp_path)
    store.create_tables()
    codes = {"u": [[0, 0]], ANYBODY: [[1, 1], [0, 0]], "w": [[1, 1]]}
    rows = [
        {"user_id": user, "rank": rank, "codes": own}
        for user, sets in codes.items()
        for rank, own in enumerate(sets, 1)
    ]
    write_rows(store, "negative_item_set", rows, DS)
    trie = Trie.build(np.array([[0, 0], [1, 1]], np.int32), (2, 2))
    predicted, _ = load_predictions(store, DS, trie, ["u", "v"])
    assert {user: own.tolist() for user, own in predicted.items()} == {"u": [0], "v": [1, 0]}


ITEMS = {f"i{n}": (n % 4, n // 4, 0) for n in range(12)}


def published(root, listed):
    """A list of `DS` with predictions of the items in it, and the feedback after it."""
    manifest = save_codebook(root, small_codebook())
    entries = {user: [Entry(ITEMS[item]) for item in items] for user, items in listed.items()}
    store = publish(root, manifest.version, ITEMS, entries)
    rows = [
        {"user_id": user, "rank": rank, "codes": entry.codes, "log_prob": entry.log_prob}
        for user, own in entries.items()
        for rank, entry in enumerate(own, 1)
    ]
    made = Provenance(models={CODEBOOK: manifest.version})
    write_rows(store, "negative_item_set", rows, DS, provenance=made)
    past = [event("u", "i0", at(-1)), event("v", "i1", at(-1), 1), event("v", "i2", at(-2))]
    return store, past


def test_evaluation_of_a_list_that_is_right(tmp_path):
    store, past = published(tmp_path, {"u": ["i3", "i4"], "v": ["i5"]})
    log(
        store,
        [
            *past,
            *(event("u", item, at(1)) for item in ("i3", "i4")),
            event("u", "i7", at(2), 1),
            event("v", "i5", at(3)),
            event("v", "i8", at(3), 1),
            event("v", "i9", at(8)),
        ],
    )
    found = evaluate(tmp_path, CONFIG, DS, seed=1)
    assert (found.users, found.dislikes, found.likes, found.listed, found.illegal) == (2, 3, 2, 2, 0)
    ours = found.rows[0]
    assert ours.method == "negrec"
    names = ("HR@20", "FHR@20", "blocked at 1 %", "AUC", "AUC within user")
    assert [ours.figures[name].value for name in names] == [1] * 5
    assert not ours.difference
    assert set(ours.figures) == {name for names in FIGURES.values() for name in names} | set(LONG_TAIL)
    for row in found.rows[1:]:
        assert set(row.difference) == set(row.figures)
        for name in row.figures:
            difference = ours.figures[name].value - row.figures[name].value
            assert row.difference[name].value == pytest.approx(difference, nan_ok=True)
    # Of v's two dislikes the later one is beyond the horizon.
    assert found.candidates == CandidateCounts(users=2, whole=0, other_days=1, alone=0)
    assert ours.figures["candidate accuracy"].value == 1
    again = evaluate(tmp_path, CONFIG, DS, seed=1)
    assert again.rows == found.rows


def test_two_seeds_are_judged_on_the_same_resamples(tmp_path):
    """So that the mean over seeds in each of them has an interval."""
    users = [f"u{n}" for n in range(20)]
    store, past = published(tmp_path, {user: ["i3"] for user in users})
    dislikes = [event(user, "i3", at(1)) for user in users]
    log(store, [*past, *dislikes, *(event(user, "i7", at(2), 1) for user in users[::3])])
    one, other = (evaluate(tmp_path, CONFIG, DS, seed=seed).draws for seed in (1, 2))
    for name, draws in one["item rate"].items():
        np.testing.assert_array_equal(draws, other["item rate"][name], name)
    assert (one["random"]["AUC"] != other["random"]["AUC"]).any()


def test_methods_without_sets_have_no_figures_of_sets(tmp_path):
    store, past = published(tmp_path, {"u": ["i3"]})
    log(store, [*past, event("u", "i3", at(1)), event("u", "i7", at(1), 1)])
    rows = {row.method: row for row in evaluate(tmp_path, CONFIG, DS, seed=1).rows}
    assert "generation alone" not in rows  # this list names no generator
    missing = set(rows["negrec"].figures) - set(rows["similarity alone"].figures)
    assert missing == {"HR@20", "FHR@20", "LUF@20", "LIF@20"}


def test_a_long_tail_is_blocked_at_a_threshold_of_its_own(tmp_path):
    """Two users with a past, whose likes and dislikes score alike, and a new one told apart."""
    store, past = published(tmp_path, {"u": ["i3"], "new": ["i4"]})
    often = [event("u", f"i{n}", at(-3)) for n in (0, 1, 2)]
    log(
        store,
        [
            *past,
            *often,
            *(event("u", item, at(1), polarity) for item, polarity in (("i3", 1), ("i8", -1))),
            *(event("new", item, at(1), polarity) for item, polarity in (("i4", -1), ("i8", 1))),
        ],
    )
    ours = evaluate(tmp_path, CONFIG, DS, seed=1).rows[0].figures
    assert ours["blocked at 1 %"].value < 1
    assert ours["new users: blocked at 1 %"].value == 1
    assert ours["rare items: blocked at 1 %"].value == ours["blocked at 1 %"].value


def test_a_future_that_is_not_there_yet_is_an_error_not_a_shorter_window(tmp_path):
    store, past = published(tmp_path, {"u": ["i3"]})
    for n in range(-5, 7):
        day = (DAY + dt.timedelta(days=n)).isoformat()
        rows = [row for row in past if row["event_time"].date().isoformat() == day]
        rows += [event("u", "i3", at(n)), event("u", "i4", at(n), 1)] if n > 0 else []
        write_rows(store, "feedback", rows, day)
    missing = (DAY + dt.timedelta(days=7)).isoformat()
    with pytest.raises(MissingError, match=f"feedback: no partition ds={missing}; .* --stages feedback"):
        evaluate(tmp_path, CONFIG, DS, seed=1)


def test_a_future_of_likes_alone_cannot_judge(tmp_path):
    store, past = published(tmp_path, {"u": ["i3"]})
    log(store, [*past, event("u", "i3", at(1), 1)])
    with pytest.raises(MissingError, match="no dislikes and likes within 7 days"):
        evaluate(tmp_path, CONFIG, DS, seed=1)


def test_a_day_without_a_list_is_not_judged_by_an_earlier_one(tmp_path):
    store, past = published(tmp_path, {"u": ["i3"]})
    log(store, past)
    next_day = (DAY + dt.timedelta(days=1)).isoformat()
    with pytest.raises(MissingError, match=f"no entries for ds={next_day}"):
        evaluate(tmp_path, CONFIG, next_day, seed=1)
    empty = TABLES["block_list"].schema.empty_table()
    store.write_arrow("block_list", empty, {next_day: 1}, Provenance())
    with pytest.raises(MissingError, match=f"no entries for ds={next_day}"):
        evaluate(tmp_path, CONFIG, next_day, seed=1)
