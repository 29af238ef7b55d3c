"""Who is carried over from an earlier day and who is generated, by a generator that can be seen through."""

import datetime as dt
import hashlib
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from warehouses import write_rows

import jobs.negative_item_set
import negrec_core
from jobs.context import JobContext, Warehouse, bucket_of
from jobs.generation import generation_task
from jobs.negative_item_set import find_earlier
from jobs.pipeline import run_day, stale
from negrec_core.config import load_config
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.set_order import ANYBODY, SET_FEATURES

STAGE = "negative_item_set"
D0, D1, D2, D3 = "2026-03-01", "2026-03-02", "2026-03-03", "2026-03-04"
SETTINGS = ("buckets=2", "spark.shuffle_partitions=2")
IDS = {"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [1, 1], "e": [2, 0]}

Row = dict[str, Any]
Lists = dict[str, tuple[str, str]]  # user -> (items disliked, items liked), one letter each, recent first


class Site:
    """A warehouse whose generator draws from all that a prediction may depend on, and from nothing else."""

    def __init__(self, root: Path, spark: SparkSession) -> None:
        self.root = root
        self.spark = spark
        self.model = "generator-1"
        self.generated: list[str] = []

    def open(self, *settings: str) -> Warehouse:
        warehouse = Warehouse(self.root, load_config([], [*SETTINGS, *settings], {}))
        warehouse.spark = self.spark
        return warehouse

    def generator(self, *_: object) -> Any:
        return SimpleNamespace(
            path=self.root,
            manifest=SimpleNamespace(version=self.model),
            codebook_manifest=SimpleNamespace(version="codebook-1"),
        )

    def generate(self, contexts: DataFrame, task: Any, seconds: Any) -> DataFrame:
        ids = load_semantic_ids(self.open().store, task.codebook_version, task.ds, task.ids_version)
        legal = sorted(set(map(tuple, ids.codes.tolist())))
        rows = []
        for row in contexts.toArrow().to_pylist():
            if row["user_id"] != ANYBODY:
                self.generated.append(row["user_id"])
                seconds.add(0.5)
            prompt = [
                (event["item_id"], tuple(ids.codes[ids.index[event["item_id"]]]))
                for event in (*row["negatives"], *row["positives"])
                if event["item_id"] in ids.index
            ]
            seen = repr((task.model_version, task.settings.beam_width, prompt, legal)).encode()
            draw = hashlib.sha256(seen).digest()
            for rank in (1, 2):
                codes = list(legal[(draw[0] + rank) % len(legal)])
                rows.append((row["user_id"], rank, codes, -draw[rank] / 8, "codebook-1", task.model_version))
        schema = "user_id string, rank int, codes array<int>, log_prob float"
        return self.spark.createDataFrame(rows, f"{schema}, codebook_version string, model_version string")

    def ids(self, ds: str, items: str, revision: int = 1, codes: dict[str, list[int]] = IDS) -> None:
        rows = [{"codebook_version": "codebook-1", "item_id": i, "codes": codes[i]} for i in items]
        write_rows(self.open().store, "item_semantic_id", rows, ds, revision)

    def market(self, ds: str, *dislikes: int) -> None:
        """What everybody disliked of a, b, c and d, and an order that looks at it too."""
        store = self.open().store
        rates = [
            {"item_id": item, "n_negatives": n, "n_positives": 1}
            for item, n in zip("abcd", dislikes, strict=True)
        ]
        order = {"set_features": list(SET_FEATURES), "set_weights": [1.0, 0.0, 0.7, 0.0, 0.0, 0.0]}
        for table, rows in (("feedback", []), ("item_rate", rates), ("block_score", [order])):
            write_rows(store, table, rows, ds)

    def contexts(self, ds: str, lists: Lists, revision: int = 1, reason: str | None = None) -> None:
        frame = self.spark.createDataFrame([(user,) for user in lists], "user_id string")
        buckets = dict(frame.select("user_id", bucket_of(frame["user_id"], 2)).collect())
        rows = [
            {
                "user_id": user,
                "bucket": buckets[user],
                "negatives": [event(item, n, reason) for n, item in enumerate(negatives)],
                "positives": [event(item, n, None) for n, item in enumerate(positives)],
            }
            for user, (negatives, positives) in lists.items()
        ]
        write_rows(self.open().store, "user_context", rows, ds, revision)

    def run(self, ds: str, *settings: str, force: bool = False) -> list[Row]:
        """The day's rows without their origin, after making them; `generated` tells for whom."""
        self.generated.clear()
        run_day(self.open(*settings), ds, [STAGE], force)
        return [{name: row[name] for name in row if name != "carried_from"} for row in self.rows(ds)]

    def rows(self, ds: str) -> list[Row]:
        rows = self.open().store.read(STAGE, days=[ds]).to_pylist()
        assert {row["carried_from"] for row in rows if row["user_id"] == ANYBODY} == {None}
        rows = [row for row in rows if row["user_id"] != ANYBODY]
        return sorted(rows, key=lambda row: (row["user_id"], row["rank"]))

    def origin(self, ds: str) -> dict[str, str | None]:
        return {row["user_id"]: row["carried_from"] for row in self.rows(ds)}

    def earlier(self, ds: str, *settings: str) -> Any:
        ctx = JobContext(self.open(*settings), ds)
        return find_earlier(ctx, generation_task(ctx.store, self.generator(), ds, ctx.config.generation))


def event(item: str, age: int, reason: str | None) -> Row:
    when = dt.datetime(2026, 2, 20, tzinfo=dt.UTC) - dt.timedelta(hours=age)
    return {"item_id": item, "event_time": when, "reason_class": reason}


def generating(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(jobs.negative_item_set, "open_generator", site.generator)
    monkeypatch.setattr(jobs.negative_item_set, "generate", site.generate)
    return site


@pytest.fixture(scope="module")
def second_day(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse: `D0` gave four items an ID; on `D1` sets were generated for seven users."""
    root = tmp_path_factory.mktemp("second day") / "warehouse"
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = generating(Site(root, spark), monkeypatch)
        made.open().store.create_tables()
        for ds, dislikes in ((D1, (1, 2, 3, 0)), (D2, (9, 2, 3, 4)), (D3, (9, 2, 9, 0))):
            made.market(ds, *dislikes)
        made.ids(D0, "abcd")
        made.ids(D1, "")
        made.contexts(D1, LISTS)
        made.run(D1)
        assert sorted(made.generated) == sorted(LISTS)
        assert set(made.origin(D1).values()) == {None}
    return root


@pytest.fixture
def site(second_day: Path, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A copy of that warehouse of one's own."""
    root = tmp_path / "warehouse"
    shutil.copytree(second_day, root)
    return generating(Site(root, spark), monkeypatch)


LISTS: Lists = {
    "same": ("ab", "c"),
    "liked one more": ("ab", "c"),
    "disliked one more": ("ab", ""),
    "one grew too old": ("ab", "cd"),
    "names an item without an ID": ("ax", "b"),
    "gone for a day": ("d", ""),
    "nothing disliked": ("", "abc"),
}
CHANGED = {"liked one more": ("ab", "dc"), "disliked one more": ("dab", ""), "one grew too old": ("a", "cd")}


def test_what_is_carried_over_is_what_a_full_run_gives(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    lists = {**LISTS, **CHANGED, "new": ("ab", "c")}
    del lists["gone for a day"]
    # The item without an ID gets one that another item has: no new ID is legal, but a prompt changes.
    site.ids(D2, "x", codes={"x": IDS["d"]})
    site.contexts(D2, lists)
    with caplog.at_level(logging.INFO, "negrec"):
        rows = site.run(D2)
    fresh = {*CHANGED, "new", "names an item without an ID"}
    assert sorted(site.generated) == sorted(fresh)
    assert site.origin(D2) == {user: None if user in fresh else D1 for user in lists}
    assert [line.message for line in caplog.records if "carried" in line.message] == [
        f"negative_item_set: 2 shards of users; 2 of 7 users (29%) carried over from ds={D1}, about 1.0 s"
        " of beam search saved"
    ]
    # The day after, nothing is new: the origin stays the day on which it was generated.
    site.ids(D3, "")
    site.contexts(D3, {**lists, "gone for a day": ("d", "")})
    last = site.run(D3)
    assert site.generated == ["gone for a day"]
    assert site.origin(D3) == {
        **{user: D2 if user in fresh else D1 for user in lists},
        "gone for a day": None,
    }
    for ds, found in ((D2, rows), (D3, last)):
        assert site.run(ds, "generation.carry_over=false", force=True) == found
        assert set(site.generated) == {row["user_id"] for row in found}
        assert set(site.origin(ds).values()) == {None}


def test_a_day_on_which_nothing_changed_generates_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.ids(D2, "")
    site.contexts(D2, LISTS)
    with caplog.at_level(logging.INFO, "negrec"):
        site.run(D2)
    assert site.generated == []
    assert site.origin(D2) == dict.fromkeys(LISTS, D1)
    assert f"7 of 7 users (100%) carried over from ds={D1}, none generated" in caplog.text


def test_replacing_the_earlier_contexts_makes_no_carried_set_stale(site: Site) -> None:
    """Carried rows are what the day's own context gives."""
    site.ids(D2, "")
    site.contexts(D2, LISTS)
    site.run(D2)
    site.contexts(D1, LISTS, revision=2)
    assert {(one.table, one.ds) for one in stale(site.open())} == {(STAGE, D1)}


def test_shards_that_are_done_are_not_made_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.ids(D2, "")
    site.contexts(D2, {**LISTS, **CHANGED})
    warehouse = site.open()
    commit, stopped = type(warehouse.store).commit_shard, []

    def stopping(store: Any, table: str, run: Path, ds: str, bucket: int, digest: str) -> int:
        if bucket == 1 and not stopped:
            stopped.append(bucket)
            raise KeyboardInterrupt
        return commit(store, table, run, ds, bucket, digest)

    monkeypatch.setattr(type(warehouse.store), "commit_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_day(warehouse, D2, [STAGE])
    site.run(D2)
    assert site.origin(D2) == {user: None if user in CHANGED else D1 for user in LISTS}
    held = {row["user_id"]: row["bucket"] for row in site.rows(D2)}
    assert sorted(site.generated) == sorted(user for user in CHANGED if held[user] == 1)
    assert {held[user] for user in LISTS} == {0, 1}


def test_the_set_follows_what_everybody_dislikes_though_the_beams_are_carried_over(site: Site) -> None:
    site.ids(D2, "")
    site.contexts(D2, LISTS)
    site.run(D2)
    assert site.generated == []
    beams = site.open().store.read("negative_item_set_shard", days=[D2]).to_pylist()
    for ds, counts in ((D1, (1, 2, 3, 0)), (D2, (9, 2, 3, 4))):
        dislikes = {tuple(IDS[item]): n for item, n in zip("abcd", counts, strict=True)}
        for user in LISTS:
            own = {tuple(row["codes"]): row["log_prob"] for row in beams if row["user_id"] == user}
            last = min(own.values())
            scores = {
                codes: own.get(codes, last) + 0.7 * math.log1p(n)
                for codes, n in dislikes.items()
                if n or codes in own
            }
            found = [
                (tuple(row["codes"]), row["log_prob"]) for row in site.rows(ds) if row["user_id"] == user
            ]
            wanted = sorted(scores, key=lambda codes: -scores[codes])
            assert found == [(codes, own.get(codes, last)) for codes in wanted]


def drop_staging(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.open().store.drop_shards("negative_item_set_shard", D1)


def other_model(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.model = "generator-2"


def other_release(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negrec_core, "__version__", "99.0")


def late_contexts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.contexts(D1, {**LISTS, **CHANGED}, revision=2)


def late_ids(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that the earlier run did not know is put under a day before it."""
    site.ids(D0, "abcde", revision=2)


def new_id(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.ids(D2, "e", revision=2)


def nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


OTHER = f"ds={D1} had another model, release or settings, or its inputs were replaced since"


@pytest.mark.parametrize(
    ("change", "settings", "why"),
    [
        (other_model, [], OTHER),
        (other_release, [], OTHER),
        (nothing, ["generation.beam_width=60"], OTHER),
        (nothing, ["buckets=3"], OTHER),
        (late_contexts, [], OTHER),
        (late_ids, [], OTHER),
        (drop_staging, [], OTHER),
        (new_id, [], f"there are new semantic IDs since ds={D1}"),
        (nothing, ["generation.carry_over=false"], "generation.carry_over is off"),
    ],
)
def test_nothing_is_carried_over_where_a_full_run_might_differ(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Site, pytest.MonkeyPatch], None],
    settings: list[str],
    why: str,
) -> None:
    site.ids(D2, "")
    assert site.earlier(D2).ds == D1
    assert site.earlier(D1) == "there is no earlier run"
    change(site, monkeypatch)
    assert site.earlier(D2, *settings) == why


def test_a_new_id_has_all_users_generated(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.ids(D2, "e")
    site.contexts(D2, LISTS)
    with caplog.at_level(logging.INFO, "negrec"):
        site.run(D2)
    assert sorted(site.generated) == sorted(LISTS)
    said = rf"0 of 7 users \(0%\) carried over because there are new semantic IDs since ds={D1}$"
    assert any(re.search(said, line.message) for line in caplog.records)


def test_another_reason_is_another_context(site: Site) -> None:
    """A prompt that tells reasons would change with it."""
    site.ids(D2, "")
    site.contexts(D2, LISTS, reason="product")
    site.run(D2)
    assert set(LISTS) - set(site.generated) == {"nothing disliked"}
