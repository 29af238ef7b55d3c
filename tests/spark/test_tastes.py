"""Stages `item_taste` and `user_taste`: what reaches the factorisation, and folding in by Spark."""

import datetime as dt
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession
from warehouses import DS, publish, save_codebook, small_codebook

from jobs.context import JobContext, Warehouse
from jobs.item_taste import fit_item_tastes, folded_in, judged_items, sampled, taste_events
from jobs.user_taste import FoldInTask, user_taste
from negrec_core.config import load_config
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.taste import ItemTastes

SETTINGS = load_config(environment={}).taste
CODEBOOK = small_codebook()
ITEMS = {f"item {n}": (n % 4, n // 4, 1) for n in range(12)}
RNG = np.random.default_rng(6)
TASTES = {item: RNG.normal(size=3).tolist() for item in ITEMS}
# Items 12 and 13 have no semantic ID; some were only shown.
FEEDBACK = [(f"user {n % 7}", f"item {RNG.integers(14)}", int(RNG.choice([-1, 0, 1]))) for n in range(80)]
NEUTRAL = SETTINGS.model_copy(update={"neutral": 0.5})


@pytest.fixture(scope="module")
def feedback(spark: SparkSession):
    return spark.createDataFrame(FEEDBACK, "user_id string, item_id string, polarity int").repartition(3)


def verdicts():
    """One per user and item, by a loop; a dislike outweighs likes, and either that it was shown."""
    found = {}
    for user, item, polarity in FEEDBACK:
        found.setdefault((user, item), set()).add(polarity)
    return {pair: 1.0 if -1 in seen else 0.0 if 1 in seen else 0.5 for pair, seen in found.items()}


def test_a_user_judges_an_item_once_and_a_dislike_outweighs(feedback):
    assert {0.0, 0.5, 1.0} == set(verdicts().values())
    rows = judged_items(feedback, 0.5).collect()
    assert {(row["user_id"], row["item_id"]): row["disliked"] for row in rows} == verdicts()
    assert len(rows) == len(verdicts())


def test_a_sample_holds_all_of_some_users(feedback):
    whole = judged_items(feedback, 0.5)
    n = len(verdicts())
    assert sampled(whole, n).count() == n
    some = {(row["user_id"], row["item_id"]) for row in sampled(whole, n // 2).collect()}
    users = {user for user, _ in some}
    assert len(users) < 7
    assert some == {pair for pair in verdicts() if pair[0] in users}


def test_spark_folds_in_what_the_optimum_is_of_all_items_with_a_taste(feedback, spark, tmp_path: Path):
    version = save_codebook(tmp_path, CODEBOOK).version
    tastes = TASTES | {"item 12": [0.5, 1.0, -1.0]}
    store = publish(tmp_path, version, ITEMS, {}, item_tastes=tastes)
    pinned = (store.version("item_semantic_id"), store.version("item_taste"))
    task = FoldInTask(str(store.root), str(store.root / "models"), DS, version, *pinned, NEUTRAL)
    ours = {row["user_id"]: row["weights"] for row in user_taste(feedback, task).collect()}
    ids = load_semantic_ids(store, version, DS)
    names = [*ids.items, "item 12"]
    values = np.array([tastes[item] for item in names])
    items = ItemTastes(values[:, 0], values[:, 1:])
    judged, unit = judged_items(feedback, 0.5).toArrow(), CODEBOOK.unit(ids.codes)
    expected = folded_in(judged, names, unit, items, NEUTRAL)
    assert ours.keys() == expected.keys() == {user for user, _ in verdicts()}
    for user, weights in ours.items():
        np.testing.assert_allclose(weights, expected[user], atol=1e-6)
        assert np.any(weights)


def test_items_do_not_depend_on_how_rows_are_laid_out(feedback, spark, tmp_path: Path):
    version = save_codebook(tmp_path, CODEBOOK).version
    ids = load_semantic_ids(publish(tmp_path, version, ITEMS, {}), version, DS)
    unit = CODEBOOK.unit(ids.codes)
    (names, one), (_, two) = (
        fit_item_tastes(feedback.repartition(n), ids.items, unit, NEUTRAL) for n in (1, 4)
    )
    assert names == [*ids.items, "item 12", "item 13"]
    assert len(one.log_odds) == len(names)
    np.testing.assert_array_equal(one.log_odds, two.log_odds)
    np.testing.assert_array_equal(one.factors, two.factors)


@pytest.mark.parametrize("neutral", [None, 0.5])
def test_what_was_shown_and_got_no_feedback_is_an_event_where_it_counts(frame, spark, tmp_path, neutral):
    config = load_config([], [f"taste.neutral={'null' if neutral is None else neutral}", "window_days=2"], {})
    warehouse = Warehouse(tmp_path, config)
    warehouse.spark = spark
    warehouse.store.create_tables()
    days = [dt.date.fromisoformat(DS) - dt.timedelta(days=back) for back in (2, 1, 0)]
    actions = ["exposure", "comment", "click", "dislike"]
    for day in days:
        when = dt.datetime(day.year, day.month, day.day, 9, tzinfo=dt.UTC)
        rows = [
            {"user_id": "ann", "item_id": f"{day} {action}", "event_time": when, "action": action}
            for action in actions
        ]
        log = frame("behavior_log", rows).drop("ds", "bucket")
        JobContext(warehouse, day.isoformat()).write("behavior_log", log)
    judged = {"user_id": "ann", "item_id": "x", "event_time": when, "polarity": -1, "reason_class": "product"}
    ctx = JobContext(warehouse, DS)
    rows = taste_events(ctx, frame("feedback", [judged])).collect()
    found = {(row["item_id"], row["polarity"], row["reason_class"]) for row in rows}
    shown = {(f"{day} {action}", 0, None) for day in days[1:] for action in actions[:2]}
    assert found == {("x", -1, "product")} | (shown if neutral else set())
    assert len(rows) == len(found)
    # What was read is known, so that late events show the tastes as stale.
    assert ("behavior_log" in ctx.provenance().inputs) == (neutral is not None)
