"""Coverage of main negative interests by hand."""

import datetime as dt

import pandas as pd
import pytest

from train.coverage import coverage, main_interests

START = dt.datetime(2026, 3, 10, tzinfo=dt.UTC)
CATEGORY = pd.Series({f"{kind}{n}": kind for kind in "abcdef" for n in range(9)})
NO_GRAPH = pd.DataFrame({"item_id": [], "neighbor_id": [], "score": [], "rank": []}).astype({"rank": int})


def frame(*rows):
    columns = ["user_id", "item_id", "event_time", "polarity"]
    whole = [(user, item, START + dt.timedelta(hours=hour), sign) for user, item, hour, sign in rows]
    return pd.DataFrame(whole, columns=columns)


def values(found, top):
    return [figure.value for figure in found[top].values()]


def test_main_interests_are_counted_by_item_and_then_by_name():
    rows = frame(
        ("u", "a1", 0, -1), ("u", "a1", 1, -1), ("u", "b1", 2, -1), ("u", "b2", 3, -1), ("u", "?", 4, -1)
    )
    found = main_interests(rows, CATEGORY)
    assert found[["category", "place"]].to_numpy().tolist() == [["b", 0], ["a", 1]]
    tied = main_interests(frame(("u", "b1", 0, -1), ("u", "a1", 1, -1)), CATEGORY)
    assert tied["category"].tolist() == ["a", "b"]


def test_coverage_by_hand():
    past = frame(
        *(("u", f"a{n}", n, -1) for n in range(4)),
        *(("u", f"b{n}", n, -1) for n in range(3)),
        ("u", "c1", 1, -1),
        ("u", "d1", 1, -1),
        ("u", "e1", 1, -1),
        *(("u", f"f{n}", n, 1) for n in range(9)),
        ("without a later dislike", "a1", 1, -1),
    )
    future = frame(
        ("u", "c2", 100, -1),
        ("u", "b8", 101, -1),
        ("u", "a8", 99, 1),
        ("v", "d1", 100, -1),
        ("v", "e1", 101, 1),
    )
    graph = pd.DataFrame(
        [("b8", "a5", 0.5, 1), ("c2", "d5", 0.1, 2), ("c2", "e5", 0.1, 3), ("a8", "e6", 1.0, 1)],
        columns=NO_GRAPH.columns,
    )
    found = coverage(past, future, CATEGORY, graph, 2)
    assert list(found["top-1"]) == ["next", "horizon", "horizon + Swing"]
    # u mainly dislikes a, b, c and d, v only d: u's next dislike is of c, then of b; Swing adds a and d.
    assert values(found, "top-1") == pytest.approx([(0 + 1) / 2, (0 + 1) / 2, (1 + 1) / 2])
    assert values(found, "top-4") == pytest.approx([(1 / 4 + 1) / 2, (2 / 4 + 1) / 2, 1])
    without = coverage(past, future, CATEGORY, NO_GRAPH, 2)
    assert values(without, "top-4")[1:] == pytest.approx([(2 / 4 + 1) / 2] * 2)


def test_a_catalogue_without_categories_has_no_coverage():
    rows = frame(("u", "a1", 0, -1))
    found = coverage(rows, rows, pd.Series(dtype=object), NO_GRAPH, 2)
    assert all(figure.value != figure.value for figures in found.values() for figure in figures.values())
