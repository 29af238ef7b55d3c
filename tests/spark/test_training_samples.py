"""The samples of the curriculum against what loops over the feedback find."""

import datetime as dt
import random
from typing import Any

import pytest

from jobs.training_alignment import training_alignment
from jobs.training_grpo import training_grpo
from jobs.training_translation import training_translation
from negrec_core.config import load_config

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
CODES = {f"i{n}": [n % 3, n % 5, n // 2] for n in range(12)}


def random_feedback(seed: int) -> list[dict[str, Any]]:
    """Users who mostly dislike the items of one parity and like the others."""
    rng = random.Random(seed)
    rows = []
    for _ in range(150):
        user, item = rng.randrange(4), rng.randrange(12)
        polarity = 1 if (user + item) % 2 else -1
        rows.append(
            {
                "user_id": f"u{user}",
                "item_id": f"i{item}",
                "event_time": START + dt.timedelta(hours=rng.randrange(24 * 20)),
                "polarity": -polarity if rng.random() < 0.05 else polarity,
                "ds": "2026-01-20",
            }
        )
    return rows


def ids_frame(spark: Any, codes: dict[str, list[int]] | None = None) -> Any:
    return spark.createDataFrame(list((codes or CODES).items()), "item_id string, codes array<int>")


def alignment_of(
    spark: Any, frame: Any, rows: list[dict[str, Any]], *settings: str, per_user: int = 1000
) -> Any:
    config = load_config(settings=["generator.alignment.max_per_item=1000", *settings])
    found = training_alignment(
        frame("feedback", rows),
        ids_frame(spark),
        config.generator.alignment,
        config.context,
        365,
        per_user,
    )
    return found.toArrow().to_pylist()


@pytest.mark.parametrize(("levels", "least"), [(0, 2), (1, 3)])
def test_targets_were_rejected_often_before_and_distractors_only_liked(
    spark: Any, frame: Any, levels: int, least: int
) -> None:
    rows = random_feedback(levels)
    found = alignment_of(
        spark,
        frame,
        rows,
        f"generator.alignment.prefix_levels={levels}",
        f"generator.alignment.min_rejections={least}",
    )

    def kind(item: str) -> Any:
        return tuple(CODES[item][:levels]) if levels else item

    expected: dict[tuple[str, str], tuple[dt.datetime, set[str]]] = {}
    for row in rows:
        user, item, time = row["user_id"], row["item_id"], row["event_time"]
        own = [r for r in rows if r["user_id"] == user]
        disliked = {r["item_id"] for r in own if r["polarity"] == -1}
        before = [r for r in own if r["event_time"] < time]
        rejections = sum(r["polarity"] == -1 and kind(r["item_id"]) == kind(item) for r in before)
        if row["polarity"] == -1 and rejections >= least:
            liked = {r["item_id"] for r in before if r["polarity"] == 1} - disliked
            last = expected.get((user, item), (START, set()))[0]
            if time >= last:
                expected[user, item] = (time, {i for i in liked if CODES[i] != CODES[item]})
    expected = {pair: (time, liked) for pair, (time, liked) in expected.items() if len(liked) >= 3}
    assert expected, "the log holds something to choose from"
    assert {(row["user_id"], row["target"]): row["anchor_time"] for row in found} == {
        pair: time for pair, (time, _) in expected.items()
    }
    for row in found:
        assert len(set(row["distractors"])) == 3
        assert set(row["distractors"]) <= expected[row["user_id"], row["target"]][1]
        past = [*row["negatives"], *row["positives"]]
        assert all(event["event_time"] < row["anchor_time"] for event in past)


def test_alignment_is_balanced_and_the_same_in_every_run(spark: Any, frame: Any) -> None:
    rows = random_feedback(7)
    rows += [{**row, "user_id": row["user_id"] + "x"} for row in rows]
    every = alignment_of(spark, frame, rows, "generator.alignment.min_rejections=1")
    settings = ("generator.alignment.min_rejections=1", "generator.alignment.max_per_item=1")
    few = alignment_of(spark, frame, rows, *settings, per_user=3)
    again = alignment_of(spark, frame, list(reversed(rows)), *settings, per_user=3)
    assert sorted(map(repr, few)) == sorted(map(repr, again))
    targets = [row["target"] for row in few]
    users = [row["user_id"] for row in few]
    assert len(every) > len(few) > 0
    assert len(set(targets)) == len(targets)
    assert max(map(users.count, users)) <= 3


def test_options_that_share_a_semantic_id_are_one(spark: Any, frame: Any) -> None:
    def row(item: str, day: int, polarity: int) -> dict[str, Any]:
        return {
            "user_id": "u",
            "item_id": item,
            "event_time": START + day * DAY,
            "polarity": polarity,
            "ds": "x",
        }

    rows = [row("i0", day, -1) for day in (1, 2, 3, 9)] + [row(f"i{n}", 5, 1) for n in (1, 2, 3)]
    config = load_config(settings=["generator.alignment.prefix_levels=0"])
    settings = config.generator.alignment, config.context, 365, 10

    def targets(codes: dict[str, list[int]]) -> list[str]:
        found = training_alignment(frame("feedback", rows), ids_frame(spark, codes), *settings)
        return [r["target"] for r in found.collect()]

    assert targets(CODES) == ["i0"]
    assert targets({**CODES, "i2": CODES["i1"]}) == []
    assert targets({**CODES, "i2": CODES["i0"]}) == []


def test_a_future_follows_each_context_and_begins_with_the_dislike_at_it(spark: Any, frame: Any) -> None:
    rows, end = random_feedback(3), START + 20 * DAY
    graph = [{"item_id": "i0", "neighbor_id": "i1", "score": 0.5, "rank": 1, "ds": "x"}]
    config = load_config(settings=["context.max_negatives=2"])
    found = training_grpo(
        frame("feedback", rows), frame("item_graph", graph), config.context, config.labels, 365, 5, end
    )
    chosen = found.toArrow().to_pylist()
    per_user: dict[str, list[dt.datetime]] = {}
    for row in chosen:
        per_user.setdefault(row["user_id"], []).append(row["anchor_time"])
        own = [r for r in rows if r["user_id"] == row["user_id"]]
        window = [r for r in own if row["anchor_time"] <= r["event_time"] < row["anchor_time"] + 7 * DAY]
        negatives = {r["item_id"] for r in window if r["polarity"] == -1}
        assert row["future_negatives"] == sorted(negatives)
        assert row["future_positives"] == sorted({r["item_id"] for r in window if r["polarity"] == 1})
        assert [e["item_id"] for e in row["expanded_negatives"]] == (
            ["i1"] if "i0" in negatives and "i1" not in negatives else []
        )
        assert all(e["event_time"] < row["anchor_time"] for e in [*row["negatives"], *row["positives"]])
    for user in {row["user_id"] for row in rows}:
        instants = sorted(
            {
                r["event_time"]
                for r in rows
                if r["user_id"] == user and r["polarity"] == -1 and r["event_time"] <= end - 7 * DAY
            },
            reverse=True,
        )
        assert sorted(per_user.get(user, []), reverse=True) == instants[::3][:5]


def test_titles_are_paired_both_ways_and_once(spark: Any, frame: Any) -> None:
    items = spark.createDataFrame(
        [("i0", "Red"), ("i1", "Red"), ("i2", " "), ("i3", None), ("i4", "Blue"), ("i5", "Red")],
        "item_id string, title string",
    )
    codes = {"i0": [1, 1], "i1": [1, 1], "i2": [0, 0], "i3": [0, 1], "i5": [1, 2]}
    found = training_translation(items, ids_frame(spark, codes)).collect()
    assert sorted((row["item_id"], row["task"]) for row in found) == [
        ("i0", "sid_to_title"),
        ("i0", "title_to_sid"),
        ("i5", "sid_to_title"),
        ("i5", "title_to_sid"),
    ]
