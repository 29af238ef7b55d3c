"""Users put back to their calibration anchors: what was known of them then, and what they did next."""

import datetime as dt
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession
from warehouses import DS, publish, save_codebook, small_codebook

from jobs.calibration import calibration_anchors, put_back
from jobs.context import JobContext, Warehouse
from negrec_core.config import load_config
from negrec_core.semantic_ids import load_semantic_ids

CODEBOOK = small_codebook()
ITEMS = {f"item {n}": (n % 4, n // 4, 1) for n in range(12)}
NOON = dt.datetime.fromisoformat(DS).replace(hour=12, tzinfo=dt.UTC)
RNG = np.random.default_rng(8)
# Over four weeks; items 12 and 13 have no semantic ID.
EVENTS = [
    (
        f"user {n % 40}",
        f"item {RNG.integers(14)}",
        NOON - dt.timedelta(hours=int(RNG.integers(700))),
        polarity,
    )
    for n, polarity in enumerate(RNG.choice([-1, 0, 1], 600).tolist())
]
SCHEMA = "user_id string, item_id string, event_time timestamp, polarity int, reason_class string"


class Site:
    def __init__(self, root: Path, spark: SparkSession) -> None:
        self.version = save_codebook(root, CODEBOOK).version
        self.store = publish(root, self.version, ITEMS, {}, categories=dict.fromkeys(ITEMS, "a/x"))
        self.ids = load_semantic_ids(self.store, self.version, DS)
        self.root, self.spark = root, spark

    def put_back(self, *settings: str):
        """What `put_back` finds, and the anchors: user -> instant and whether held out."""
        warehouse = Warehouse(self.root, load_config([], ["calibration.held_out_share=0.3", *settings], {}))
        warehouse.spark = self.spark
        ctx = JobContext(warehouse, DS)
        events = self.spark.createDataFrame([(*event, None) for event in EVENTS], SCHEMA)
        if warehouse.config.taste.neutral is None:
            events = events.where("polarity <> 0")
        anchors = calibration_anchors(ctx, events.where("polarity <> 0"))
        found = {row["user_id"]: (row["anchor_time"], row["held_out"]) for row in anchors.collect()}
        with put_back(ctx, events, anchors, self.ids, CODEBOOK.unit(self.ids.codes)) as (back, _):
            return back, {user: (at.astimezone(dt.UTC), held) for user, (at, held) in found.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Site:
    return Site(tmp_path_factory.mktemp("site"), spark)


@pytest.mark.parametrize("days", [3, 7])
@pytest.mark.parametrize("anchors", ["end_of_day", "explicit"])
def test_labels_are_what_was_judged_within_the_days_after_the_anchor(site: Site, anchors: str, days: int):
    back, at = site.put_back(f"anchors={anchors}", f"calibration.days={days}", "window_days=100")
    expected: dict[tuple[str, str], int] = {}
    known: dict[str, list[int]] = {}
    for user, item, when, polarity in EVENTS:
        anchor, _ = at[user]
        if polarity and anchor < when <= anchor + dt.timedelta(days=days):
            expected[user, item] = min(polarity, expected.get((user, item), 1))
        if polarity and when < anchor:
            known.setdefault(user, []).append(polarity)
    rows = back.labels.to_pylist()
    assert {(row["user_id"], row["item_id"]): row["polarity"] for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(row["held_out"] == at[row["user_id"]][1] for row in rows)
    assert {True, False} == {row["held_out"] for row in rows}
    counts = {row["user_id"]: (row["n_negatives"], row["n_positives"]) for row in back.contexts.to_pylist()}
    for user, (bad, good) in counts.items():
        assert (bad, good) == (known.get(user, []).count(-1), known.get(user, []).count(1))
    past = [polarity for verdicts in known.values() for polarity in verdicts]
    assert back.prior_log_odds == pytest.approx(np.log((past.count(-1) + 1) / (past.count(1) + 1)))


def test_what_has_no_semantic_id_has_a_taste_and_what_was_only_shown_counts_where_it_may(site: Site):
    without, _ = site.put_back()
    assert without.items == [*site.ids.items, "item 12", "item 13"]
    assert without.item_tastes.shape[0] == len(without.items)
    with_shown, _ = site.put_back("taste.neutral=0.5")
    assert with_shown.items == without.items
    assert not np.allclose(with_shown.item_tastes, without.item_tastes)
    assert with_shown.labels.equals(without.labels)
    assert with_shown.rates.sort_by("item_id").equals(without.rates.sort_by("item_id"))


def test_of_many_users_the_held_out_come_first(site: Site):
    back, at = site.put_back("calibration.max_users=15")
    held_out = {user for user, (_, held) in at.items() if held}
    assert 0 < len(held_out) < 15
    chosen = set(back.contexts["user_id"].to_pylist()) | set(back.labels["user_id"].to_pylist())
    assert held_out <= chosen
    assert len(chosen) == 15
