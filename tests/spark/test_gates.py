"""Gates before publishing: what each measures, and that a list which fails one is not published."""

import datetime as dt
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from warehouses import (
    PLAIN_SCORE,
    Context,
    count_categories,
    save_codebook,
    score_row,
    small_codebook,
    write_rows,
)

from jobs import cli, daily
from jobs.context import Warehouse
from jobs.gates import ACCEPTABLE, ILLEGAL, population_stability_index
from jobs.pipeline import run_day
from negrec_core.block_score import BlockScore
from negrec_core.blocklist import BlockList
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ArtefactError, ConfigError, GateError
from negrec_core.generator import CODEBOOK

YESTERDAY, TODAY = "2026-03-09", "2026-03-10"
CODEBOOK_OF_TESTS = small_codebook()
_INTERCEPT = -2.0
# (3, 3, *) is nobody's ID.
IDS = [(a, b, c) for a in range(4) for b in range(4) for c in range(4) if (a, b) != (3, 3)]
ITEMS = {f"item {a}{b}{c}": (a, b, c) for a, b, c in IDS}
USERS = [f"user {n}" for n in range(40)]
SET_SIZE = 6
SETTINGS = [
    f"generation.set_size={SET_SIZE}",
    "gates.min_category_exposures=20",
    "gates.max_likes_blocked=0.3",
]
Rows = list[dict[str, Any]]


def category(item: str) -> str:
    return ("Toys/Games", "Books/Old", "Books/New")[int(item[5])] if item[5] != "3" else "Food"


def day_tables(version: str, seed: int) -> dict[str, Rows]:
    """All that the list of a day is made from and held against."""
    rng = np.random.default_rng(seed)
    names = list(ITEMS)

    def some(n: int) -> list[str]:
        return [names[k] for k in rng.choice(len(names), n, replace=False)]

    sets, contexts, shown, liked = [], [], [], []
    for user in USERS:
        for rank, item in enumerate(some(SET_SIZE), 1):
            sets.append({"user_id": user, "rank": rank, "codes": ITEMS[item], "log_prob": -0.5 * rank})
        known = Context(some(3), some(3))
        past = {
            column: [{"item_id": item, "reason_class": "x"} for item in getattr(known, column)]
            for column in ("negatives", "positives")
        }
        counts = count_categories(known, {item: category(item) for item in ITEMS})
        contexts.append({"user_id": user, **past, "n_negatives": 3, "n_positives": 9, "categories": counts})
        # The last user likes something that is not in the log; one item has no ID and no category, but a
        # rate and a taste.
        page = [*some(12), "no such item"]
        shown += [{"user_id": user, "item_id": item, "action": "exposure"} for item in page]
        shown += [{"user_id": user, "item_id": item, "action": "click"} for item in page[:3]]
        liked += [{"user_id": user, "item_id": item, "polarity": 1} for item in page[:3]]
        liked += [{"user_id": user, "item_id": page[4], "polarity": -1}]
    shown += [{"user_id": "stranger", "item_id": item, "action": "exposure"} for item in names]
    liked += [{"user_id": USERS[-1], "item_id": "item 000", "polarity": 1}]
    when = dt.datetime(2026, 3, 9, tzinfo=dt.UTC)
    for row in (*shown, *liked):
        row["event_time"] = when
    liked = list({(row["user_id"], row["item_id"], row["polarity"]): row for row in liked}.values())
    rates = [
        {"item_id": item, "log_odds": float(rng.normal(-1, 1))} for item in [*names[::2], "no such item"]
    ]
    factors = 2
    item_tastes = [
        {"item_id": item, "log_odds": float(rng.normal(-1, 1)), "factors": rng.normal(size=factors).tolist()}
        for item in [*names[1:], "no such item"]
    ]
    width = 1 + small_codebook().dim + factors
    user_tastes = [{"user_id": user, "weights": rng.normal(size=width).tolist()} for user in USERS[1:]]
    return {
        "negative_item_set": sets,
        "user_context": contexts,
        "behavior_log": shown,
        "feedback": liked,
        "item_rate": rates,
        "item_taste": item_tastes,
        "user_taste": user_tastes,
        "block_score": [score_row(with_threshold(0.75))],
        "item_semantic_id": [
            {"codebook_version": version, "item_id": item, "codes": codes} for item, codes in ITEMS.items()
        ],
        "item": [{"item_id": item, "category": category(item)} for item in ITEMS],
    }


def with_threshold(threshold: float, intercept: float = _INTERCEPT) -> BlockScore:
    return replace(PLAIN_SCORE, threshold=threshold, intercept=intercept)


class Site:
    """A warehouse whose list of `YESTERDAY` is published and that of `TODAY` can be made."""

    def __init__(self, root: Path, spark: SparkSession) -> None:
        self.root, self.spark = root, spark
        self.store = DeltaStore(root)

    def warehouse(self, *settings: str) -> Warehouse:
        warehouse = Warehouse(self.root, load_config([], [*SETTINGS, *settings], {}))
        warehouse.spark = self.spark
        return warehouse

    @property
    def codebook(self) -> str:
        (folder,) = (self.root / "models" / CODEBOOK).iterdir()
        return folder.name

    def write(self, table: str, rows: Rows, ds: str = TODAY) -> None:
        revision = self.store.revision(table, ds) + 1
        write_rows(self.store, table, rows, ds, revision, Provenance(models={CODEBOOK: self.codebook}))

    def rows(self, table: str, ds: str = TODAY) -> Rows:
        return self.store.read(table, days=[ds]).to_pylist()

    def publish(self, *settings: str, accept: tuple[str, ...] = (), ds: str = TODAY) -> None:
        run_day(self.warehouse(*settings), ds, ["block_list"], force=True, accept=accept)

    def gates(self, ds: str = TODAY) -> dict[str, dict[str, Any]]:
        rows = self.rows("gate", ds)
        newest = max(row["revision"] for row in rows)
        return {row["name"]: row for row in rows if row["revision"] == newest}


@pytest.fixture(scope="module")
def base(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("gates") / "warehouse", spark)
    site.store.create_tables()
    version = save_codebook(site.root, CODEBOOK_OF_TESTS, YESTERDAY).version
    for seed, ds in enumerate((YESTERDAY, TODAY)):
        for table, rows in day_tables(version, seed).items():
            if ds == YESTERDAY or table not in ("item", "item_semantic_id"):
                site.write(table, rows, ds)
    site.publish(ds=YESTERDAY)
    return site


@pytest.fixture
def site(base: Site, tmp_path: Path) -> Site:
    shutil.copytree(base.root, tmp_path / "warehouse")
    return Site(tmp_path / "warehouse", base.spark)


def test_the_first_list_has_nothing_to_be_held_against_and_says_so(base: Site) -> None:
    gates = base.gates(YESTERDAY)
    assert set(gates) == {*ACCEPTABLE, ILLEGAL}
    for name in ("users_covered", "score_drift"):
        assert gates[name]["value"] is None
        assert gates[name]["passed"]
        assert "no list of the 7 days before" in gates[name]["note"]
    assert all(row["passed"] and not row["accepted"] for row in gates.values())


def test_values_are_what_the_reader_does(site: Site) -> None:
    """Likes and exposures blocked, counted one by one with the list as the ranking service reads it."""
    site.publish()
    gates = site.gates()
    blocks = BlockList.open(site.root, today=dt.date.fromisoformat(TODAY))
    shown = {(row["user_id"], row["item_id"]) for row in site.rows("behavior_log")}
    liked = {(row["user_id"], row["item_id"]) for row in site.rows("feedback") if row["polarity"] == 1}
    blocked = {pair for pair in shown | liked if blocks.why(*pair).blocked}
    assert 0 < len(blocked & liked) < len(liked)
    assert gates["likes_blocked"]["value"] == pytest.approx(len(blocked & liked) / len(liked))
    shares = {}
    for top in ("Toys", "Books", "Food"):
        own = {pair for pair in shown | liked if pair[1] in ITEMS and category(pair[1]).startswith(top)}
        shares[top] = len(own & blocked) / len(own)
    assert gates["category_blocked"]["value"] == pytest.approx(max(shares.values()))
    assert gates["category_blocked"]["note"].startswith(max(shares, key=shares.__getitem__))
    assert gates["users_covered"]["value"] == 1
    assert gates["entries_per_user"]["value"] == gates["entries_per_user"]["limit"] * 2 == SET_SIZE
    scores = {ds: [row["score"] for row in site.rows("block_list", ds)] for ds in (YESTERDAY, TODAY)}
    edges = np.quantile(scores[YESTERDAY], np.arange(0.1, 1, 0.1), method="inverted_cdf")
    counts = [np.bincount(np.searchsorted(edges, values, "left"), minlength=10) for values in scores.values()]
    drift = population_stability_index(*counts)
    assert gates["score_drift"]["value"] == pytest.approx(drift, abs=0.02)
    assert site.store.commit_of("block_list", TODAY).provenance.accepted == []


def half_of_the_users(site: Site) -> None:
    site.write("negative_item_set", [r for r in site.rows("negative_item_set") if r["user_id"][-1] > "4"])


def other_users(site: Site) -> None:
    """As many users under other names, as when a site changes its ids."""
    for table in ("negative_item_set", "user_context"):
        site.write(table, [{**row, "user_id": f"new {row['user_id']}"} for row in site.rows(table)])


def one_entry_each(site: Site) -> None:
    site.write("negative_item_set", [r for r in site.rows("negative_item_set") if r["rank"] == 1])


def no_entries(site: Site) -> None:
    site.write("negative_item_set", [])


def a_category_condemned(site: Site) -> None:
    rates = [{"item_id": item, "log_odds": 12.0} for item in ITEMS if category(item) == "Food"]
    site.write("item_rate", rates)
    site.write("feedback", [r for r in site.rows("feedback") if category(r["item_id"]) != "Food"])


def everything_blocked(site: Site) -> None:
    site.write("block_score", [score_row(with_threshold(0.0))])


def scores_moved(site: Site) -> None:
    site.write("block_score", [score_row(with_threshold(0.999, _INTERCEPT + 2))])


def illegal_ids(site: Site) -> None:
    rows = site.rows("negative_item_set")
    for row, codes in zip(rows[::20], ((3, 3, 0), (9, 9, 9), (-1, 0, 0)), strict=False):
        row["codes"] = codes
    site.write("negative_item_set", rows)


FAULTS: dict[Callable[[Site], None], dict[str, str]] = {
    half_of_the_users: {"users_covered": r"0\.5 \(at least 0\.8; 20 of 40 users of the list of 2026-03-09"},
    other_users: {"users_covered": r"0 \(at least 0\.8; 0 of 40 users"},
    one_entry_each: {"entries_per_user": r"1 \(at least 3; mean of 40 users"},
    no_entries: {"users_covered": "0 ", "entries_per_user": "0 "},
    a_category_condemned: {"category_blocked": r".* \(at most 0\.5; Food, \d+ of \d+ exposures"},
    everything_blocked: {"likes_blocked": r"1 \(at most 0\.3; 12\d of 12\d", "category_blocked": r"0\.[89]"},
    scores_moved: {"score_drift": r".* \(at most 0\.25; index against the scores of the list of 2026-03-09"},
    illegal_ids: {ILLEGAL: r"3 \(at most 0; entries"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_its_gate_alone_and_nothing_is_published(site: Site, fault: Any) -> None:
    fault(site)
    before, runs = site.store.version("block_list"), sorted(site.store.path("block_list").glob("run=*"))
    with pytest.raises(GateError) as raised:
        site.publish()
    line = str(raised.value)
    assert "\n" not in line
    assert "nothing was published" in line
    failed = {name for name, row in site.gates().items() if not row["passed"]}
    assert failed >= FAULTS[fault].keys()
    # Scores of first ranks alone are distributed otherwise, rightly.
    assert failed - {"score_drift"} == FAULTS[fault].keys() - {"score_drift"}
    for name, what in FAULTS[fault].items():
        assert re.search(rf"{name} {what}", line), line
    assert site.store.version("block_list") == before
    assert sorted(site.store.path("block_list").glob("run=*")) == runs
    assert BlockList.open(site.root, today=dt.date.fromisoformat(TODAY)).snapshot.ds == YESTERDAY


def test_an_accepted_gate_publishes_and_the_commit_says_so(site: Site) -> None:
    everything_blocked(site)
    with pytest.raises(GateError, match="category_blocked") as raised:
        site.publish(accept=("likes_blocked",))
    assert "likes_blocked" not in str(raised.value)
    assert str(raised.value).endswith("--accept category_blocked")
    site.publish(accept=("likes_blocked", "category_blocked", "score_drift"))
    made = site.store.commit_of("block_list", TODAY).provenance
    assert sorted(made.accepted) == ["category_blocked", "likes_blocked"]
    accepted = {name for name, row in site.gates().items() if row["accepted"]}
    assert accepted == set(made.accepted)
    assert not any(site.gates()[name]["passed"] for name in accepted)


@pytest.mark.parametrize("table", ["item_taste", "user_taste", "negative_item_set"])
def test_tables_of_two_codebooks_are_not_scored_together(site: Site, table: str) -> None:
    rows = [{name: row[name] for name in row if name != "ds"} for row in site.rows(table)]
    revision = site.store.revision(table, TODAY) + 1
    write_rows(site.store, table, rows, TODAY, revision, Provenance(models={CODEBOOK: "another"}))
    before = site.rows("block_list")
    with pytest.raises(ArtefactError, match=rf"{table}: .* codebook another, block_score with .*--force"):
        site.publish()
    assert site.rows("block_list") == before


def test_gates_of_every_publication_are_kept(site: Site) -> None:
    site.publish()
    first = site.gates()
    site.publish()
    rows = site.rows("gate")
    assert sorted({row["revision"] for row in rows}) == [1, 2]
    assert {row["name"]: row for row in rows if row["revision"] == 1} == first


def test_a_list_that_no_longer_holds_is_not_held_against(site: Site) -> None:
    site.publish("block_list.valid_days=1")
    assert site.gates()["users_covered"]["value"] == 1
    tastes = ("item_taste", "user_taste")
    for table in ("negative_item_set", "user_context", "item_rate", *tastes, "block_score", "feedback"):
        site.write(
            table, [{k: v for k, v in row.items() if k != "ds"} for row in site.rows(table)], "2026-03-12"
        )
    site.publish("block_list.valid_days=1", ds="2026-03-12")
    gates = site.gates("2026-03-12")
    assert gates["users_covered"]["value"] is None
    # Nothing was logged on that day; its likes are all there is to look at.
    assert gates["category_blocked"]["value"] is not None
    assert gates["likes_blocked"]["value"] is not None


def test_a_sample_of_users_is_looked_at_where_there_are_many(site: Site) -> None:
    site.publish("gates.max_users=10")
    n_likes = int(re.search(r"of (\d+) likes", site.gates()["likes_blocked"]["note"])[1])
    assert 3 <= n_likes < 100
    assert site.gates()["users_covered"]["note"].startswith("40 of 40")


def test_commands_end_with_their_own_code_and_take_accept(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Warehouse, "spark", site.spark)
    everything_blocked(site)
    options = ["--ds", TODAY, "--stages", "block_list", "--force"]
    common = [part for setting in SETTINGS for part in ("--set", setting)]
    assert daily.main(["--warehouse", str(site.root), *common, *options]) == 7
    assert "likes_blocked 1 (at most 0.3" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(
        sys,
        "argv",
        ["negrec", "--warehouse", str(site.root), *common, "run", *options, "--accept", "likes_blocked"],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 7
    assert (
        "negrec: block_list ds=2026-03-10: 1 of 6 gates failed: category_blocked" in capsys.readouterr().err
    )
    accept = ["--accept", "likes_blocked", "--accept", "category_blocked"]
    assert daily.main(["--warehouse", str(site.root), *common, *options, *accept]) == 0
    assert site.store.revision("block_list", TODAY) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("likes", "gate likes: unknown; there are users_covered"), (ILLEGAL, "illegal_ids cannot be accepted")],
)
def test_what_cannot_be_accepted_is_refused_before_anything_runs(base: Site, name: str, message: str) -> None:
    before = {table: base.store.version(table) for table in ("gate", "feedback", "block_list")}
    with pytest.raises(ConfigError, match=message):
        run_day(base.warehouse(), TODAY, accept=[name])
    assert {table: base.store.version(table) for table in before} == before


def test_a_failure_while_gates_are_judged_leaves_no_files(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sorted(site.store.path("block_list").glob("run=*"))
    Path(site.store.files("behavior_log", [TODAY])[0]).unlink()
    with pytest.raises(Exception, match="behavior_log"):
        site.publish()
    assert sorted(site.store.path("block_list").glob("run=*")) == runs
    assert not site.store.revision("block_list", TODAY)


counts = st.lists(st.integers(0, 1000), min_size=2, max_size=8)


@given(st.data(), counts)
def test_stability_index_is_zero_for_equal_shares_and_positive_otherwise(
    data: st.DataObject, before: Any
) -> None:
    after = data.draw(st.lists(st.integers(0, 1000), min_size=len(before), max_size=len(before)))
    p, q = (np.array(n) for n in (before, after))
    assert population_stability_index(p, p) == pytest.approx(0)
    by_hand = 0.0
    for one, other in zip(before, after, strict=True):
        a = (one + 0.5) / (sum(before) + 0.5 * len(before))
        b = (other + 0.5) / (sum(after) + 0.5 * len(after))
        by_hand += (b - a) * np.log(b / a)
    assert population_stability_index(p, q) == pytest.approx(by_hand)
    assert by_hand >= 0
