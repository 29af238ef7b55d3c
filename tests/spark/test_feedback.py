"""Stage `feedback`: polarity of actions, reasons that are dropped, and the filter of skips."""

import datetime as dt
from typing import Any

import pytest

from jobs.feedback import feedback, item_views
from negrec_core.config import load_config

NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
DS = "2026-03-01"


def event(user: str, item: str, seconds: float, action: str, **more: Any) -> dict[str, Any]:
    time = NOON + dt.timedelta(seconds=seconds)
    return {"user_id": user, "item_id": item, "event_time": time, "action": action, "ds": DS, **more}


def rows_of(frame: Any) -> set[tuple[Any, ...]]:
    return {
        (r["user_id"], r["item_id"], r["polarity"], r["source"], r["reason_class"]) for r in frame.collect()
    }


def polarise(frame: Any, rows: list[dict[str, Any]], *settings: str) -> set[tuple[Any, ...]]:
    log = frame("behavior_log", rows)
    days = sorted({row["ds"] for row in rows})
    return rows_of(feedback(log, item_views(log, days), load_config(settings=settings).feedback))


SKIPS = (
    "feedback.implicit.enabled=true",
    "feedback.implicit.min_item_views=1",
    "feedback.implicit.max_gap_seconds=120",
)


def played(user: str, item: str, seconds: float, play: int, **more: Any) -> dict[str, Any]:
    return event(user, item, seconds, "exposure", play_ms=play, duration_ms=10_000, **more)


def test_actions_get_their_polarity_and_exposures_none(frame: Any) -> None:
    rows = [
        event("u", "a", 0, "like"),
        event("u", "b", 1, "dislike"),
        event("u", "c", 2, "exposure"),
    ]
    assert polarise(frame, rows) == {
        ("u", "a", 1, "explicit", None),
        ("u", "b", -1, "explicit", None),
    }


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("not this category", "category"),
        ("NOT THIS CATEGORY", "category"),
        ("already viewed or bought", None),
        ("suspected AI image", None),
        ("bait price", None),
        ("counterfeit", None),
        ("some wording nobody mapped", "other"),
    ],
)
def test_reasons_that_do_not_speak_of_interest_are_dropped(frame: Any, reason: str, kept: str | None) -> None:
    found = polarise(frame, [event("u", "a", 0, "dislike", reason=reason)])
    assert found == ({("u", "a", -1, "explicit", kept)} if kept else set())


def test_two_likes_at_one_instant_are_one_row(frame: Any) -> None:
    rows = [event("u", "a", 0, "like"), event("u", "a", 0, "follow")]
    assert polarise(frame, rows) == {("u", "a", 1, "explicit", None)}


def test_a_skip_counts_only_between_two_acts_of_the_same_session(frame: Any) -> None:
    around = {"session_id": "s"}
    rows = [
        played("u", "before", 0, 9_000, **around),
        played("u", "skipped", 60, 1_000, **around),
        played("u", "after", 120, 9_000, **around),
        # Nothing follows: the user may have left.
        played("v", "before", 0, 9_000, **around),
        played("v", "last", 60, 1_000, **around),
        # The next act is in another session.
        played("w", "before", 0, 9_000, **around),
        played("w", "left", 60, 1_000, **around),
        played("w", "back", 100, 9_000, session_id="t"),
        # Too long a pause.
        played("x", "before", 0, 9_000, **around),
        played("x", "slow", 60, 1_000, **around),
        played("x", "after", 500, 9_000, **around),
    ]
    assert polarise(frame, rows, *SKIPS) == {("u", "skipped", -1, "implicit", None)}


@pytest.mark.parametrize(
    ("play", "more", "setting"),
    [
        (0, {}, "feedback.implicit.min_item_views=0"),  # shown in a grid, never opened
        (3_000, {}, ""),  # played for 0.3 of its length
        (1_000, {}, "feedback.implicit.max_play_ms=500"),
        (1_000, {}, "feedback.implicit.min_item_views=2"),
        (1_000, {"surface": "grid"}, "feedback.implicit.surfaces=[feed]"),
        (1_000, {}, "feedback.implicit.enabled=false"),
    ],
)
def test_what_is_no_skip(frame: Any, play: int, more: dict[str, str], setting: str) -> None:
    rows = [
        played("u", "before", 0, 9_000),
        played("u", "item", 60, play, **more),
        played("u", "after", 120, 9_000),
    ]
    assert polarise(frame, rows, *SKIPS, *filter(None, [setting])) == set()


def test_what_the_user_said_outweighs_the_play_time(frame: Any) -> None:
    rows = [
        played("u", "before", 0, 9_000),
        played("u", "liked", 60, 1_000),
        event("u", "liked", 61, "like"),
        played("u", "after", 120, 9_000),
    ]
    assert polarise(frame, rows, *SKIPS) == {("u", "liked", 1, "explicit", None)}


def test_days_are_judged_apart(frame: Any) -> None:
    """The event after a skip is on the next day, so the skip is not one, whether days are done together."""
    following = {"ds": "2026-03-02"}
    rows = [
        played("u", "before", 0, 9_000),
        played("u", "skipped", 60, 1_000),
        {**played("u", "after", 120, 9_000), **following},
    ]
    assert polarise(frame, rows, *SKIPS) == set()


def test_views_look_back_a_week_and_never_ahead(frame: Any) -> None:
    days = [f"2026-03-{day:02d}" for day in range(1, 11)]
    log = frame("behavior_log", [{**played("u", "a", 0, 100), "ds": day} for day in days])
    views = {row["ds"]: row["views"] for row in item_views(log, days).collect()}
    assert views == {day: min(7, n + 1) for n, day in enumerate(days)}
