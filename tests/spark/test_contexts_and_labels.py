"""Contexts, labels, anchors, rates and samples against loops, and the poisoned future."""

import datetime as dt
import math
import random
from collections import Counter
from typing import Any

import pytest

from jobs.anchors import before, last_dislike_anchors
from jobs.future_feedback import future_feedback
from jobs.item_rate import item_rate
from jobs.predicted_sets import recent_counts, users_of
from jobs.training_alignment import training_alignment
from jobs.training_grpo import training_grpo
from jobs.training_next_negative import training_next_negative
from jobs.user_context import user_context, with_categories, with_newcomers
from negrec_core.config import load_config
from negrec_core.errors import MissingError

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
WEEK = 7 * DAY


def random_feedback(seed: int, users: int = 12, items: int = 15, events: int = 160) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _ in range(events):
        row = {
            "user_id": f"u{rng.randrange(users)}",
            "item_id": f"i{rng.randrange(items)}",
            # Whole hours, so that equal times happen.
            "event_time": START + dt.timedelta(hours=rng.randrange(24 * 30)),
            "polarity": rng.choice([-1, 1]),
            "source": "explicit",
            "weight": 1.0,
            "ds": "2026-01-31",
        }
        rows[row["user_id"], row["item_id"], row["event_time"], row["polarity"]] = row
    return list(rows.values())


def anchors_frame(spark: Any, anchors: list[tuple[str, dt.datetime]]) -> Any:
    return spark.createDataFrame(anchors, "user_id string, anchor_time timestamp")


def some_anchors(seed: int) -> list[tuple[str, dt.datetime]]:
    rng = random.Random(seed)
    return [(f"u{n}", START + dt.timedelta(hours=rng.randrange(24 * 30))) for n in range(12)]


def utc(time: dt.datetime) -> dt.datetime:
    return time.astimezone(dt.UTC) if time.tzinfo else time.replace(tzinfo=dt.UTC)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_context_is_the_newest_feedback_before_the_anchor(spark: Any, frame: Any, seed: int) -> None:
    rows, anchors = random_feedback(seed), some_anchors(seed)
    settings = load_config(settings=["context.max_negatives=3", "context.max_positives=2"]).context
    found = user_context(frame("feedback", rows), anchors_frame(spark, anchors), settings, 10).toArrow()
    expected = {}
    for user, anchor in anchors:
        own = [r for r in rows if r["user_id"] == user and anchor - 10 * DAY <= r["event_time"] < anchor]
        if own:
            expected[user] = {
                polarity: sorted(
                    ((r["event_time"], r["item_id"]) for r in own if r["polarity"] == polarity), reverse=True
                )
                for polarity in (-1, 1)
            }
    assert {row["user_id"] for row in found.to_pylist()} == set(expected)
    for row in found.to_pylist():
        negatives, positives = expected[row["user_id"]][-1], expected[row["user_id"]][1]
        assert [(e["event_time"], e["item_id"]) for e in row["negatives"]] == negatives[:3]
        assert [(e["event_time"], e["item_id"]) for e in row["positives"]] == positives[:2]
        assert (row["n_negatives"], row["n_positives"]) == (len(negatives), len(positives))


def test_categories_count_all_feedback_of_the_window(spark: Any, frame: Any) -> None:
    rows, anchors = random_feedback(3), some_anchors(3)
    paths = {f"i{n}": [None, "", "A/x", "A/y", "B"][n % 5] for n in range(14)}
    items = spark.createDataFrame(list(paths.items()), "item_id string, category string")
    # A list of two dislikes and one like is shorter than what is counted.
    settings = load_config(settings=["context.max_negatives=2", "context.max_positives=1"]).context
    feedback = frame("feedback", rows)
    contexts = user_context(feedback, anchors_frame(spark, anchors), settings, 10)
    found = with_categories(contexts, feedback, items, 10).toArrow().to_pylist()
    assert len(found) == contexts.count()
    of = dict(anchors)
    counted = 0
    for row in found:
        anchor = of[row["user_id"]]
        expected: dict[str, list[int]] = {}
        for event in rows:
            path = paths.get(event["item_id"])
            recent = anchor - 10 * DAY <= event["event_time"] < anchor
            if event["user_id"] == row["user_id"] and recent and path:
                expected.setdefault(path, [0, 0])[event["polarity"] == 1] += 1
        assert [(c["category"], [c["n_negatives"], c["n_positives"]]) for c in row["categories"]] == sorted(
            expected.items()
        )
        counted += len(expected)
    assert counted > 10


def test_a_user_without_feedback_has_an_empty_context(spark: Any, frame: Any) -> None:
    anchors = anchors_frame(spark, [*some_anchors(1), ("newcomer", START + 20 * DAY)])
    rows = random_feedback(1)
    settings = load_config().context
    contexts = user_context(frame("feedback", rows), anchors, settings, 30)
    found = with_newcomers(contexts, anchors).toArrow().to_pylist()
    early = {user for user, anchor in some_anchors(1)} - {
        row["user_id"] for row in contexts.toArrow().to_pylist()
    }
    empty = {"negatives": [], "positives": [], "n_negatives": 0, "n_positives": 0}
    for row in found:
        if row["user_id"] in early | {"newcomer"}:
            assert {name: row[name] for name in empty} == empty
    assert sorted(row["user_id"] for row in found) == sorted(row[0] for row in anchors.collect())
    assert [row for row in found if row["n_negatives"]] == [
        row for row in contexts.toArrow().to_pylist() if row["n_negatives"]
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_recent_counts_are_those_of_the_days_before_each_anchor(spark: Any, frame: Any, seed: int) -> None:
    rows, anchors = random_feedback(seed), some_anchors(seed)
    found = recent_counts(frame("feedback", rows), anchors_frame(spark, anchors), 4).toArrow().to_pylist()
    expected: Counter[tuple[dt.datetime, str, int]] = Counter()
    for anchor in {anchor for _, anchor in anchors}:
        for row in rows:
            if anchor - 4 * DAY <= row["event_time"] < anchor:
                expected[anchor, row["item_id"], row["polarity"]] += 1
    got = {
        (row["anchor_time"], row["item_id"], polarity): row[name]
        for row in found
        for polarity, name in ((-1, "n_negatives"), (1, "n_positives"))
        if row[name]
    }
    assert got == expected


def test_users_have_their_beams_in_order_and_all_their_dislikes(spark: Any, frame: Any) -> None:
    rows, anchors = random_feedback(2), some_anchors(2)
    beams = [
        {"user_id": user, "rank": rank, "codes": [rank, n], "log_prob": -rank / 2, "codebook_version": "c"}
        for n, (user, _) in enumerate(anchors)
        for rank in (3, 1, 2)
    ]
    contexts = anchors_frame(spark, anchors)
    found = users_of(frame("negative_item_set_shard", beams), contexts, frame("feedback", rows)).toArrow()
    by_user = {row["user_id"]: row for row in found.to_pylist()}
    assert by_user.keys() == dict(anchors).keys()
    for n, (user, anchor) in enumerate(anchors):
        row = by_user[user]
        assert row["anchor"] == (anchor - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(
            microseconds=1
        )
        assert [(e["rank"], e["codes"], e["log_prob"]) for e in row["entries"]] == [
            (rank, [rank, n], -rank / 2) for rank in (1, 2, 3)
        ]
        known = {r["item_id"] for r in rows if r["user_id"] == user and r["polarity"] == -1}
        assert set(row["known"] or []) == known
        assert (row["codebook_version"], row["carried_from"]) == ("c", None)


@pytest.mark.parametrize("seed", [1, 2])
def test_labels_are_the_week_after_the_anchor_with_its_swing_neighbours(
    spark: Any, frame: Any, seed: int
) -> None:
    rows, anchors = random_feedback(seed), some_anchors(seed)
    rng = random.Random(seed)
    graph = [
        {"item_id": f"i{i}", "neighbor_id": f"i{j}", "score": rng.random(), "rank": rank, "ds": "x"}
        for i in range(15)
        for rank, j in enumerate(rng.sample([j for j in range(15) if j != i], 4), 1)
    ]
    end = START + 60 * DAY
    found = future_feedback(
        frame("feedback", rows), anchors_frame(spark, anchors), frame("item_graph", graph), end, 7, 2
    )
    expected = {}
    for user, anchor in anchors:
        window = [r for r in rows if r["user_id"] == user and anchor < r["event_time"] <= anchor + WEEK]
        if not window:
            continue
        negatives = {r["item_id"] for r in window if r["polarity"] == -1}
        near: dict[str, tuple[float, str]] = {}
        for edge in graph:
            if edge["item_id"] in negatives and edge["rank"] <= 2 and edge["neighbor_id"] not in negatives:
                near[edge["neighbor_id"]] = max(
                    near.get(edge["neighbor_id"], (0.0, "")), (edge["score"], edge["item_id"])
                )
        expected[user] = (
            sorted(negatives),
            sorted(((-s, item, via) for item, (s, via) in near.items())),
            sorted({r["item_id"] for r in window if r["polarity"] == 1}),
        )
    got = {
        row["user_id"]: (
            row["future_negatives"],
            [(-e["score"], e["item_id"], e["via"]) for e in row["expanded_negatives"]],
            row["future_positives"],
        )
        for row in found.toArrow().to_pylist()
    }
    assert got == expected


def test_the_window_is_open_at_the_anchor_and_closed_at_its_end(spark: Any, frame: Any) -> None:
    anchor = START + 10 * DAY
    times = {"at": anchor, "next": anchor + dt.timedelta(microseconds=1), "end": anchor + WEEK}
    times["after"] = anchor + WEEK + dt.timedelta(microseconds=1)
    rows = [
        {"user_id": "u", "item_id": name, "event_time": time, "polarity": -1, "ds": "x"}
        for name, time in times.items()
    ]
    found = future_feedback(
        frame("feedback", rows),
        anchors_frame(spark, [("u", anchor)]),
        frame("item_graph", []),
        anchor + WEEK,
        7,
        5,
    )
    assert found.collect()[0]["future_negatives"] == ["end", "next"]


def test_a_future_that_is_not_there_is_an_error_not_a_shorter_window(spark: Any, frame: Any) -> None:
    anchor = START + 10 * DAY
    late = anchors_frame(spark, [("u", anchor), ("late", anchor + dt.timedelta(microseconds=1))])
    with pytest.raises(MissingError, match="of user late end after the feedback"):
        future_feedback(frame("feedback", []), late, frame("item_graph", []), anchor + WEEK, 7, 5)


@pytest.mark.parametrize("seed", [3, 4])
def test_item_rates_count_a_user_once_and_shrink_to_the_mean(frame: Any, seed: int) -> None:
    rows = random_feedback(seed)
    pairs = {(r["user_id"], r["item_id"], r["polarity"]) for r in rows}
    negatives = Counter(item for _, item, polarity in pairs if polarity == -1)
    positives = Counter(item for _, item, polarity in pairs if polarity == 1)
    rate = (negatives.total() + 1) / (len(pairs) + 2)
    found = item_rate(frame("feedback", rows), 5).toArrow().to_pylist()
    assert {r["item_id"] for r in found} == {r["item_id"] for r in rows}
    for row in found:
        minus, plus = negatives[row["item_id"]], positives[row["item_id"]]
        assert (row["n_negatives"], row["n_positives"]) == (minus, plus)
        assert row["log_odds"] == pytest.approx(math.log((minus + 5 * rate) / (plus + 5 * (1 - rate))))


@pytest.mark.parametrize("seed", [5, 6])
def test_samples_hold_only_what_came_before_their_target(frame: Any, seed: int) -> None:
    rows = random_feedback(seed)
    settings = load_config().context.model_copy(update={"max_negatives": 2, "max_positives": 50})
    found = training_next_negative(frame("feedback", rows), settings, 365, 3).toArrow().to_pylist()
    dislikes = {(r["user_id"], r["event_time"], r["item_id"]) for r in rows if r["polarity"] == -1}
    # The last dislike, and each one that has a context's worth of dislikes and the target between.
    expected = set()
    for user in {user for user, _, _ in dislikes}:
        instants = sorted({time for other, time, _ in dislikes if other == user}, reverse=True)
        expected |= {(user, time) for time in instants[::3][:3]}
    assert {(row["user_id"], row["anchor_time"]) for row in found} == expected
    assert len(expected) > len({user for user, _ in expected})
    for row in found:
        assert (row["user_id"], row["anchor_time"], row["target"]) in dislikes
        past = [r for r in rows if r["user_id"] == row["user_id"] and r["event_time"] < row["anchor_time"]]
        negatives = sorted((r for r in past if r["polarity"] == -1), key=lambda r: r["event_time"])
        assert {e["event_time"] for e in row["negatives"]} == {r["event_time"] for r in negatives[-2:]}
        assert {e["item_id"] for e in row["positives"]} == {r["item_id"] for r in past if r["polarity"] == 1}


def test_poisoned_future_changes_no_context_rate_or_sample(spark: Any, frame: Any) -> None:
    """Events at and after each user's anchor, added to the feedback, leave everything as it was."""
    rows, anchors = random_feedback(7), dict(some_anchors(7))
    clean = [r for r in rows if r["event_time"] < anchors[r["user_id"]]]
    poison = [
        {
            **clean[0],
            "user_id": user,
            "item_id": f"poison{n}",
            "event_time": anchor + n * dt.timedelta(hours=1),
            "polarity": polarity,
        }
        for user, anchor in anchors.items()
        for n in range(3)
        for polarity in (-1, 1)
    ]
    config = load_config(settings=["generator.alignment.min_rejections=1"])
    settings, end = config.context, START + 60 * DAY
    who = anchors_frame(spark, list(anchors.items()))
    names = sorted({row["item_id"] for row in clean + poison})
    items = spark.createDataFrame([(name, "A") for name in names], "item_id string, category string")
    ids = spark.createDataFrame(
        [(name, [0, n]) for n, name in enumerate(names)], "item_id string, codes array<int>"
    )

    def artefacts(log: list[dict[str, Any]]) -> list[Any]:
        feedback = frame("feedback", log)
        seen = before(feedback, who)
        contexts = user_context(feedback, who, settings, 365)
        made = [
            with_categories(contexts, seen, items, 365),
            item_rate(seen, 5),
            recent_counts(seen, who, 30),
            training_next_negative(seen, settings, 365, 3),
            training_alignment(seen, ids, config.generator.alignment, settings, 365, 3),
            training_grpo(seen, frame("item_graph", []), settings, config.labels, 365, 3, end),
        ]
        return [sorted(map(repr, m.toArrow().to_pylist())) for m in made]

    assert artefacts(clean + poison) == artefacts(clean)
    assert artefacts(clean)[0], "the clean log has contexts to compare"


def test_explicit_anchors_precede_the_last_stretch_with_a_dislike(frame: Any) -> None:
    def row(user: str, item: str, day: float, polarity: int) -> dict[str, Any]:
        time = START + day * DAY
        return {"user_id": user, "item_id": item, "event_time": time, "polarity": polarity, "ds": "x"}

    rows = [
        # The last dislike is on day 30; the stretch (23, 30] begins with the like on day 25.
        row("long", "a", 0, 1),
        row("long", "b", 23, -1),
        row("long", "c", 25, 1),
        row("long", "d", 30, -1),
        row("long", "e", 40, 1),
        # One burst: the middle event.
        *[row("burst", f"b{n}", 50 + n / 100, -1 if n == 4 else 1) for n in range(5)],
        # The same, too late for a horizon after it: no anchor.
        *[row("end", f"e{n}", 57 + n / 100, -1 if n == 4 else 1) for n in range(5)],
        # No dislike: no anchor.
        row("happy", "a", 10, 1),
        # A dislike at the very end: the stretch must end inside the log.
        row("late", "a", 1, 1),
        row("late", "b", 60, -1),
    ]
    found = {
        r["user_id"]: r["anchor_time"]
        for r in last_dislike_anchors(frame("feedback", rows), 7).toArrow().to_pylist()
    }
    tick = dt.timedelta(microseconds=1)
    assert found == {
        "long": START + 25 * DAY - tick,
        "burst": START + 50.02 * DAY - tick,
        "late": START + 53 * DAY - tick,
    }
