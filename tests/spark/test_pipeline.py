"""The whole pipeline on a small world: from a log to a published list, and all that may go wrong."""

import datetime as dt
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
import pytest
from disks import SmallDisk
from java_classes import java_options
from killed_driver import drive
from object_stores import ObjectStore
from other_readers import plain_rows, read_by_duckdb, read_by_log
from pyspark.sql import SparkSession
from typer.testing import CliRunner
from warehouses import save_codebook, small_codebook

import jobs.daily
import jobs.negative_item_set
from jobs.block_list import block_list_task, load_catalogue
from jobs.cli import app
from jobs.context import JobContext, Warehouse
from jobs.gates import ACCEPTABLE
from jobs.import_log import import_log
from jobs.pipeline import DAILY_STAGES, TRAINING_STAGES, run_day, run_range, run_stage, stale
from jobs.world import WorldSettings, generate
from negrec_core.artefacts import MANIFEST
from negrec_core.blocklist import BlockList
from negrec_core.codebook import Codebook
from negrec_core.config import Config, load_config
from negrec_core.delta import DeltaStore, Provenance, day_range
from negrec_core.errors import (
    ArtefactError,
    ConflictError,
    GateError,
    InputError,
    MissingError,
    NegrecError,
)
from negrec_core.generator import CODEBOOK, GENERATOR, newest, open_generator
from negrec_core.mapping import load_mapping
from negrec_core.metrics import Estimate
from negrec_core.progress import silent
from negrec_core.resources import resource
from negrec_core.schemas import TABLES
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.set_order import ANYBODY
from negrec_core.storage import ObjectPath, folders, upload, walk
from negrec_core.trie import Trie
from train.codebook import train_codebook
from train.evaluate import evaluate
from train.generator import train_generator
from train.ours import generation_score

# Drivers are forked from a process that has imported most of what they need.
DRIVERS = mp.get_context("forkserver")
DRIVERS.set_forkserver_preload(["jobs.cli", "jobs.pipeline", "numba", "pyspark.sql", "sklearn.linear_model"])

# Read by torch in Spark's workers: threads that wait must not take the cores of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

WORLD = WorldSettings(users=150, items=300, days=21, seed=3)
REPO = Path(__file__).resolve().parents[2]
LAST = WORLD.start + dt.timedelta(days=WORLD.days - 1)
DS = (LAST - dt.timedelta(days=7)).isoformat()
WEEK_BEFORE = (LAST - dt.timedelta(days=14)).isoformat()
NEXT_DAY = (LAST - dt.timedelta(days=6)).isoformat()
SETTINGS = (
    "swing.min_common_users=1",
    "codebook.epochs=3",
    "codebook.max_collision_rate=1",
    "codebook.max_dead_share=1",
    "generator.preset=tiny",
    "generator.warm_up.max_steps=20",
    "generator.warm_up.batch_size=16",
    "generation.beam_width=24",
    "generation.set_size=8",
    # Each engine's process takes seconds to import torch.
    "generation.parallelism=1",
    "calibration.held_out_share=0.5",
    "calibration.days=7",
)
OPTIONS = ["--config", "demo", *(part for setting in SETTINGS for part in ("--set", setting))]
# The labels of a week ago need the graph of that day, which the site has not.
NEXT_STAGES = [stage for stage in DAILY_STAGES if stage != "future_feedback"]
# A score that is fitted on so few users differs from day to day.
MAKE_NEXT_DAY = ["--ds", NEXT_DAY, "--stages", ",".join(NEXT_STAGES), "--accept", "score_drift"]
# Digits to which a column is the same when it is made again.
CLOSE = {
    "item_graph": {"score": 9},
    "item_rate": {"log_odds": 9},
    "negative_item_set": {"log_prob": 3},
    "block_score": dict.fromkeys(
        (
            "coefficients",
            "intercept",
            "threshold",
            "likes_blocked",
            "dislikes_blocked",
            "set_weights",
            "prior_log_odds",
        ),
        3,
    ),
    "block_list": {"log_prob": 3, "score": 3, "because_similarity": 3},
}
SEED = 5
KILLS_A_DAY = 30


@dataclass(frozen=True)
class Site:
    """A warehouse with all tables of `DS`; `fork` copies it, so that a test may change it."""

    root: Path
    config: Config
    spark: SparkSession

    def open(self) -> Warehouse:
        warehouse = Warehouse(self.root, self.config)
        warehouse.spark = self.spark  # the one of all tests
        return warehouse

    def fork(self, root: Path) -> "Site":
        shutil.copytree(self.root, root)
        return replace(self, root=root)


class NoSpark(Warehouse):
    """A warehouse that may not start Spark."""

    @property
    def spark(self) -> SparkSession:
        raise AssertionError("Spark was started")


@pytest.fixture(scope="module")
def errors_on_the_way() -> dict[str, NegrecError]:
    """What was raised while the site was being built, where a step had not been done yet."""
    return {}


@pytest.fixture(scope="module")
def site(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, errors_on_the_way: dict[str, NegrecError]
) -> Site:
    folder = tmp_path_factory.mktemp("site")
    generate(WORLD, folder / "log", silent)
    built = Site(folder / "warehouse", load_config(["demo"], SETTINGS, {}), spark)
    warehouse = built.open()
    warehouse.store.create_tables()
    import_log(warehouse, folder / "log", load_mapping(resource("conf", "datasets", "demo.yaml")))
    run_range(warehouse, day_range(WORLD.start, LAST), ["feedback"])

    def refused(*stages: str) -> None:
        before = table_versions(warehouse.store)
        with pytest.raises(NegrecError) as raised:
            run_day(warehouse, DS, stages)
        assert table_versions(warehouse.store) == before, stages
        errors_on_the_way[stages[0]] = raised.value

    for stage in ("future_feedback", "item_semantic_id", "negative_item_set", "block_list"):
        refused(stage)
    run_day(warehouse, WEEK_BEFORE, ["item_graph"])
    train_codebook(
        warehouse.store, warehouse.models, warehouse.media, built.config, DS, seed=SEED, progress=silent
    )
    run_day(warehouse, DS, ["item_semantic_id", "training_next_negative"])
    train_generator(warehouse.store, warehouse.models, built.config, DS, seed=SEED, progress=silent)
    results = run_day(warehouse, DS)
    skipped = {"feedback", "item_semantic_id"}
    assert [r.stage for r in results] == list(DAILY_STAGES)
    assert {r.stage for r in results if not r.ran} == skipped
    return built


@pytest.fixture
def fork(site: Site, tmp_path: Path) -> Site:
    return site.fork(tmp_path / "warehouse")


def table_versions(store: DeltaStore) -> dict[str, int]:
    return {table: store.version(table) for table in TABLES}


def rows_of(store: DeltaStore, table: str, ds: str = DS) -> list[dict[str, Any]]:
    """Rows of a day in key order."""
    rows = store.read(table, days=[ds]).to_pylist()
    rows.sort(key=lambda row: tuple(str(row[name]).zfill(40) for name in TABLES[table].key))
    return rows


def test_every_table_of_the_day_holds_rows_as_declared(site: Site) -> None:
    store = site.open().store
    for name in (*DAILY_STAGES, "training_next_negative", "negative_item_set_shard"):
        rows = store.read(name, days=[DS])
        assert rows.num_rows, name
        assert set(rows.schema.names) == set(TABLES[name].schema.names), name
        keys = rows.select([*TABLES[name].key]).to_pylist()
        assert len({repr(key) for key in keys}) == len(keys), name
        for column in TABLES[name].key:
            assert rows[column].null_count == 0, (name, column)


def test_a_commit_says_what_it_was_made_from(site: Site) -> None:
    warehouse = site.open()
    generator = open_generator(warehouse.models, DS)
    made = warehouse.store.commit_of("negative_item_set", DS).provenance
    assert made.models == {
        GENERATOR: generator.manifest.version,
        CODEBOOK: generator.codebook_manifest.version,
    }
    assert {"user_context", "item_semantic_id"} <= made.inputs.keys()
    assert made.config_digest == site.config.digest()
    listed = warehouse.store.commit_of("block_list", DS).provenance
    assert {"negative_item_set", "block_score", "item_rate", "item_semantic_id"} <= listed.inputs.keys()


def test_predictions_are_legal_new_and_ranked_without_gaps(site: Site) -> None:
    store = site.open().store
    rows = rows_of(store, "negative_item_set")
    version = rows[0]["codebook_version"]
    ids = load_semantic_ids(store, version, DS)
    legal = {tuple(codes) for codes in ids.codes.tolist()}
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_user.setdefault(row["user_id"], []).append(row)
    known = {
        row["user_id"]: {
            tuple(ids.codes[ids.index[event["item_id"]]])
            for event in row["negatives"]
            if event["item_id"] in ids.index
        }
        for row in rows_of(store, "user_context")
    }
    beams: dict[str, dict[tuple[int, ...], float]] = {}
    for row in rows_of(store, "negative_item_set_shard"):
        beams.setdefault(row["user_id"], {})[tuple(row["codes"])] = row["log_prob"]
    assert set(by_user) == {*known, ANYBODY} == set(beams)
    known[ANYBODY] = set()
    assert any(known.values())
    n_beams = 0
    for own in by_user.values():
        own.sort(key=lambda row: row["rank"])
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
        assert len(own) == site.config.generation.set_size
        codes = [tuple(row["codes"]) for row in own]
        assert len(set(codes)) == len(codes)
        assert set(codes) <= legal
        assert not set(codes) & known[own[0]["user_id"]]
        found = beams[own[0]["user_id"]]
        for row in own:
            # Of what no beam found, the generator thinks no better than of the last beam.
            assert row["log_prob"] == found.get(tuple(row["codes"]), min(found.values()))
            assert row["log_prob"] <= 0
        n_beams += len(found.keys() & set(codes))
    assert n_beams > 0


def test_the_list_keeps_every_prediction_and_says_why(site: Site) -> None:
    store = site.open().store
    listed, predicted = rows_of(store, "block_list"), rows_of(store, "negative_item_set")
    predicted = [row for row in predicted if row["user_id"] != ANYBODY]
    named = ("user_id", "rank", "codes", "log_prob")
    assert [[row[n] for n in named] for row in listed] == [[row[n] for n in named] for row in predicted]
    expires = dt.date.fromisoformat(DS) + dt.timedelta(days=site.config.block_list.valid_days + 1)
    disliked = {
        row["user_id"]: {n["item_id"]: n["reason_class"] for n in row["negatives"]}
        for row in rows_of(store, "user_context")
    }
    for row in listed:
        assert 0 <= row["score"] <= 1
        assert row["expires_on"] == expires
        past = disliked[row["user_id"]]
        assert (row["because_item_id"] is None) == (not past)
        if past:
            assert row["reason_class"] == past[row["because_item_id"]]


def test_reader_and_list_agree_on_items_of_a_listed_id(site: Site) -> None:
    """Where an ID belongs to one item, the entry's score is the reader's score of that item."""
    store = site.open().store
    blocks = BlockList.open(site.root, today=dt.date.fromisoformat(DS))
    version = store.commit_of("block_list", DS).provenance.models[CODEBOOK]
    ids = load_semantic_ids(store, version, DS)
    owners: dict[tuple[int, ...], list[str]] = {}
    for item, codes in zip(ids.items, ids.codes.tolist(), strict=True):
        owners.setdefault(tuple(codes), []).append(item)
    compared = 0
    for row in rows_of(store, "block_list")[::7]:
        items = owners[tuple(row["codes"])]
        scores = blocks.scores(row["user_id"], items)
        assert ((scores >= 0) & (scores <= 1)).all()
        if len(items) == 1:
            compared += 1
            assert row["score"] == pytest.approx(float(scores[0]), abs=1e-5)
            why = blocks.why(row["user_id"], items[0])
            assert why.blocked == (why.score >= blocks.threshold)
    assert compared > 50


def test_others_read_every_table_as_delta_rs_does(site: Site) -> None:
    store = site.open().store
    rows = {name: plain_rows(store.read(name), table.schema.names) for name, table in TABLES.items()}
    for name, expected in rows.items():
        assert plain_rows(read_by_log(store, name), TABLES[name].schema.names) == expected, name
    for name, found in read_by_duckdb(store).items():
        assert plain_rows(found, TABLES[name].schema.names) == rows[name], name


def test_a_second_run_does_nothing_and_starts_no_spark(site: Site) -> None:
    warehouse = NoSpark(site.root, site.config)
    before = table_versions(warehouse.store)
    results = run_day(warehouse, DS)
    assert [(r.stage, r.revision, r.ran) for r in results] == [(name, 1, False) for name in DAILY_STAGES]
    results = run_range(warehouse, day_range(WORLD.start, LAST), ["feedback"])
    assert not any(r.ran for r in results)
    assert table_versions(warehouse.store) == before


def test_force_makes_a_second_revision_of_the_same_rows(fork: Site) -> None:
    warehouse = fork.open()
    stages = ("item_rate", "user_context", "item_semantic_id")
    before = {name: rows_of(warehouse.store, name) for name in stages}
    results = run_day(warehouse, DS, stages, force=True)
    assert {(r.stage, r.revision, r.ran) for r in results} == {(name, 2, True) for name in stages}
    assert {name: rows_of(warehouse.store, name) for name in stages} == before
    assert warehouse.store.revision("block_list", DS) == 1


@pytest.fixture(scope="module")
def next_day(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site with the next day's tables too, which spark-submit has made undisturbed."""
    fork = site.fork(tmp_path_factory.mktemp("next_day") / "warehouse")
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    job = Path(jobs.daily.__file__)
    options = ["--warehouse", str(fork.root), *OPTIONS, *MAKE_NEXT_DAY]
    done = subprocess.run(
        [str(submit), "--master", "local[1]", "--driver-java-options", java_options(), str(job), *options],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return fork


def test_spark_submit_makes_the_list_of_the_next_day(next_day: Site) -> None:
    store = next_day.open().store
    listed = {row["user_id"] for row in rows_of(store, "block_list", NEXT_DAY)}
    assert listed == {row["user_id"] for row in rows_of(store, "user_context", NEXT_DAY)}
    assert listed


def make_day(root: Path, folder: Path, *death: Any) -> bool:
    """`negrec run` in a process of its own that kills itself as `death` says; see killed_driver.py.

    Returns:
        Whether it was killed; else it came to its end.
    """
    quick = (
        f"spark.driver_java_options={java_options()}",
        "spark.driver_memory=1g",
        # One core, so that one worker alone imports torch.
        "spark.master=local[1]",
        "spark.shuffle_partitions=1",
        # Plans of a few rows: neither worth compiling nor worth planning again from stage to stage.
        "spark.conf={spark.sql.codegen.wholeStage: 'false', spark.sql.codegen.factoryMode: NO_CODEGEN,"
        " spark.sql.adaptive.enabled: 'false'}",
    )
    arguments = ["--warehouse", str(root), *OPTIONS, *(part for one in quick for part in ("--set", one))]
    arguments += ["run", *MAKE_NEXT_DAY]
    # Whoever is killed does not clear up.
    environment = {"SPARK_LOCAL_DIRS": str(folder / "spark"), "PYTHONPATH": str(REPO)}
    driver = DRIVERS.Process(target=drive, args=(death, arguments, folder, environment))
    driver.start()
    try:
        driver.join(300)
    finally:
        if driver.exitcode is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()[-3000:]
    return driver.exitcode != 0


def deaths(draw: random.Random, kills: int, writes: int) -> Iterator[tuple[int, float, str]]:
    """Where in a day's writes drivers die, in order: a step, seconds after it, and who dies with the driver.

    A write has four steps; see killed_driver.py.
    """
    for step in sorted(draw.sample(range(1, 4 * writes + 1), kills)):
        # At once, within a commit (it takes some milliseconds), or somewhere in the stage that follows.
        moments = [0.0, draw.uniform(0, 0.01), draw.uniform(0, 2)]
        # In the last writes the day might be done before.
        seconds = draw.choice(moments if step < 4 * (writes - 3) else moments[:2])
        yield step, seconds, draw.choice(["alone", "group"])


def test_drivers_killed_again_and_again_make_the_day_as_if_undisturbed(
    site: Site, next_day: Site, tmp_path: Path, kills: int
) -> None:
    shares = [kills]
    if kills > KILLS_A_DAY:
        # Two at once: a driver that starts has work for little more than one core.
        shares = [kills // 2, kills - kills // 2]
    with ThreadPoolExecutor(len(shares)) as pool:
        chains = [
            pool.submit(make_days, share, site, next_day, tmp_path / f"chain {share} {n}")
            for n, share in enumerate(shares)
        ]
        for chain in chains:
            chain.result()


def make_days(kills: int, site: Site, next_day: Site, folder: Path) -> None:
    """Make the next day in one warehouse after another, until so many drivers were killed."""
    folder.mkdir()
    today = dt.date.fromisoformat(NEXT_DAY)
    draw = random.Random(folder.name)
    shards = [f"negrec.negative_item_set_shard.{NEXT_DAY}.{bucket}" for bucket in range(site.config.buckets)]
    # Of every stage but `feedback`, which is there, of every shard, and of the gates.
    writes = len(NEXT_STAGES[1:]) + len(shards) + 1
    killed = days = 0
    while killed < kills:
        days += 1
        root = folder / f"day {days}"
        store = site.fork(root).open().store
        for step, *how in deaths(draw, min(KILLS_A_DAY, kills - killed), writes):
            # A driver starts again behind the last stage or shard that was committed.
            staging = store.handle("negative_item_set_shard")
            done = sum(store.revision(stage, NEXT_DAY) > 0 for stage in NEXT_STAGES[1:])
            done += sum(staging.transaction_version(shard) == 1 for shard in shards)
            if not make_day(root, folder, max(1, step - 4 * done), *how):
                break
            killed += 1
            published = store.revision("block_list", NEXT_DAY)
            assert BlockList.open(root, today=today).snapshot.ds == (NEXT_DAY if published else DS)
        else:
            assert not make_day(root, folder, 0, 0, "alone")
        assert BlockList.open(root, today=today).snapshot.ds == NEXT_DAY
        for stage in NEXT_STAGES:
            made = [commit.days[NEXT_DAY] for commit in store.commits(stage) if NEXT_DAY in commit.days]
            assert made == [1], stage
            assert_close(
                plain(rows_of(store, stage, NEXT_DAY)),
                plain(rows_of(next_day.open().store, stage, NEXT_DAY)),
                CLOSE.get(stage, {}),
            )
        # No shard that was done is generated a second time.
        staging = store.handle("negative_item_set_shard")
        assert [staging.transaction_version(shard) for shard in shards] == [1] * len(shards)
        shutil.rmtree(root)


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the curve of a block score, whose points are many and near each other."""
    return [{name: value for name, value in row.items() if name != "curve"} for row in rows]


def test_evaluation_judges_the_list_by_the_week_after(site: Site) -> None:
    figures = evaluate(site.root, site.config, DS, seed=SEED)
    assert figures.illegal == 0
    assert figures.listed == len({row["user_id"] for row in rows_of(site.open().store, "block_list")})
    assert figures.dislikes > 0
    assert figures.likes > 0
    methods = ["negrec", "similarity alone", "generation alone", "random"]
    assert [row.method for row in figures.rows][:4] == methods
    assert figures.candidates.users > 0
    assert 0 < figures.coverage["top-1"]["next"].value <= figures.coverage["top-1"]["horizon"].value
    for row in figures.rows:
        for name in ("blocked at 1 %", "blocked at 5 %", "AUC", "AUC within user", "candidate accuracy"):
            figure = row.figures[name]
            assert 0 <= figure.low <= figure.high <= 1, (row.method, name)
        assert row.figures["blocked at 1 %"].value <= row.figures["blocked at 5 %"].value
    assert evaluate(site.root, site.config, DS, seed=SEED).rows == figures.rows


def test_generation_scores_ids_as_beam_search_did(site: Site) -> None:
    store = site.open().store
    item = {tuple(row["codes"]): row["item_id"] for row in rows_of(store, "item_semantic_id")}
    predicted = rows_of(store, "negative_item_set_shard", DS)[:500]
    pairs = pd.DataFrame(
        {
            "user_id": [row["user_id"] for row in predicted] + ["nobody", predicted[0]["user_id"]],
            "item_id": [item[tuple(row["codes"])] for row in predicted] + [item[max(item)], "no such item"],
        }
    )
    score = generation_score(store, site.root / "models", site.config.generation, DS)
    found = score(pairs)
    np.testing.assert_allclose(found[:-2], [row["log_prob"] for row in predicted], atol=1e-4)
    assert -np.inf < found[-2] < 0
    assert found[-1] == -np.inf


def test_commands_show_the_site(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    common = ["--warehouse", str(site.root), *OPTIONS]

    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*common, *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    status = shown("status")
    for text in (DS, "block_list", open_generator(site.root / "models", DS).manifest.version):
        assert text in status
    entry = rows_of(site.open().store, "block_list")[0]
    assert entry["user_id"] in shown("inspect", entry["user_id"], "--on", DS)
    item = rows_of(site.open().store, "item_semantic_id")[0]["item_id"]
    assert item in shown("filter", entry["user_id"], item, "no such item")
    assert "nothing to do" in shown("run", "--ds", DS)
    out = tmp_path / "figures.json"
    assert "negrec minus" in shown("evaluate", "--ds", DS, "--out", str(out))
    found = json.loads(out.read_text())
    assert found["illegal"] == 0
    rows = pq.read_table(out.with_suffix(".parquet")).to_pylist()
    draws = {(row["method"], row["figure"]): row["draws"] for row in rows}
    assert draws.keys() == {(row["method"], figure) for row in found["rows"] for figure in row["figures"]}
    of_ours = found["rows"][0]["figures"]["blocked at 5 %"]
    assert asdict(Estimate.of(np.array(draws["negrec", "blocked at 5 %"]))) == pytest.approx(of_ours)


def test_errors_before_the_site_was_complete(site: Site, errors_on_the_way: dict[str, NegrecError]) -> None:
    expected = {
        "future_feedback": f"table item_graph: no partition ds={WEEK_BEFORE}; run `negrec backfill",
        "item_semantic_id": f"run `negrec train codebook --until {DS}`",
        "negative_item_set": f"run `negrec train generator --until {DS}`",
        "block_list": f"table negative_item_set: no partition ds={DS}; run `negrec backfill",
    }
    assert errors_on_the_way.keys() == expected.keys()
    for stage, message in expected.items():
        error = errors_on_the_way[stage]
        assert isinstance(error, MissingError)
        assert message in str(error)
        assert "\n" not in str(error)


def test_a_day_without_a_log_or_a_model_or_a_future_is_one_line(site: Site) -> None:
    warehouse = site.open()
    before = table_versions(warehouse.store)
    after_log = (LAST + dt.timedelta(days=1)).isoformat()
    attempts: Mapping[str, Callable[[], object]] = {
        f"table behavior_log: no partition ds={after_log}; import": lambda: run_day(warehouse, after_log),
        f"train generator --until {WEEK_BEFORE}": lambda: run_day(
            warehouse, WEEK_BEFORE, ["negative_item_set"]
        ),
        f"table block_list: no entries for ds={NEXT_DAY}": lambda: evaluate(
            site.root, site.config, NEXT_DAY, seed=1
        ),
    }
    for message, attempt in attempts.items():
        with pytest.raises(MissingError) as raised:
            attempt()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    assert table_versions(warehouse.store) == before


def other_codebook(root: Path) -> None:
    """Another codebook under the version that the generator was trained on."""
    folder = root / "models" / CODEBOOK
    version = newest(root / "models", CODEBOOK, DS).version
    other = save_codebook(root, small_codebook(), DS).version
    shutil.rmtree(folder / version)
    (folder / other).rename(folder / version)


def corrupt_weights(root: Path) -> None:
    generator = root / "models" / GENERATOR / newest(root / "models", GENERATOR, DS).version
    (file,) = generator.glob("*.safetensors")
    raw = file.read_bytes()
    file.write_bytes(raw[:-4] + bytes(255 - byte for byte in raw[-4:]))


def lost_manifest(root: Path) -> None:
    (root / "models" / GENERATOR / newest(root / "models", GENERATOR, DS).version / MANIFEST).unlink()


def day_file(root: Path, table: str, ds: str) -> Path:
    return Path(DeltaStore(root).files(table, [ds])[0])


def cut_file(root: Path) -> None:
    file = day_file(root, "feedback", NEXT_DAY)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_file(root: Path) -> None:
    day_file(root, "feedback", NEXT_DAY).write_bytes(b"")


def spoilt_footer(root: Path) -> None:
    file = day_file(root, "feedback", NEXT_DAY)
    file.write_bytes(file.read_bytes()[:-40] + bytes(40))


def spoilt_pages(root: Path) -> None:
    """As long as before and with its footer, but what is between was overwritten."""
    file = day_file(root, "feedback", NEXT_DAY)
    whole = file.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    file.write_bytes(whole[:4] + b"\xff" * (len(whole) - footer - 4) + whole[-footer:])


def lost_file(root: Path) -> None:
    day_file(root, "feedback", NEXT_DAY).unlink()


def nothing(root: Path) -> None:
    pass


FAULTS: list[tuple[Callable[[Path], None], str, type[NegrecError], str]] = [
    (cut_file, "user_context", InputError, rf"table feedback: .* of ds={NEXT_DAY} has .* bytes, not .*"),
    (empty_file, "item_rate", InputError, rf"table feedback: .* of ds={NEXT_DAY} has 0 bytes, not .*"),
    (lost_file, "item_graph", InputError, f"table feedback: .* of ds={NEXT_DAY} is gone; restore"),
    (spoilt_footer, "user_context", InputError, rf"user_context ds={NEXT_DAY}: /.*\.parquet cannot be read"),
    (spoilt_pages, "item_rate", InputError, rf"item_rate ds={NEXT_DAY}: /.*\.parquet cannot be read"),
    (nothing, "block_list", MissingError, f"table negative_item_set: no partition ds={NEXT_DAY}; run"),
    (corrupt_weights, "item_semantic_id", ArtefactError, r"generator/.*safetensors differs from its"),
    (lost_manifest, "negative_item_set", MissingError, f"run `negrec train generator --until {NEXT_DAY}`"),
    (other_codebook, "negative_item_set", ArtefactError, "train the generator again"),
]


@pytest.mark.parametrize(
    ("damage", "stage", "kind", "message"), FAULTS, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_fault_is_one_clear_line_and_yesterdays_list_is_served(
    fork: Site, damage: Callable[[Path], None], stage: str, kind: type[NegrecError], message: str
) -> None:
    warehouse = fork.open()
    today = dt.date.fromisoformat(NEXT_DAY)
    served = BlockList.open(fork.root, today=today)
    user = rows_of(warehouse.store, "block_list")[0]["user_id"]
    page = sorted(row["item_id"] for row in rows_of(warehouse.store, "item_rate"))[:20]
    scores = served.scores(user, page)
    before = table_versions(warehouse.store)
    damage(fork.root)
    with pytest.raises(kind, match=message) as raised:
        run_day(warehouse, NEXT_DAY, [stage])
    assert str(raised.value).isprintable()
    assert table_versions(warehouse.store) == before
    assert not served.refresh(today=today)
    # A service that starts now gets it too, as long as the codebook of its IDs is there.
    for blocks in [served] if damage is other_codebook else [served, BlockList.open(fork.root, today=today)]:
        assert blocks.snapshot.ds == DS
        assert (blocks.scores(user, page) == scores).all()


def test_on_a_full_disk_a_stage_is_one_clear_line_and_yesterdays_list_is_served(
    site: Site, small_disk: SmallDisk
) -> None:
    """What is there before stays readable without a byte to spare; with room the same run goes on."""
    full = site.fork(small_disk.root / "warehouse")
    warehouse = full.open()
    today = dt.date.fromisoformat(NEXT_DAY)
    served = BlockList.open(full.root, today=today)
    stages = ["item_rate", "user_context", "item_semantic_id", "block_score", "negative_item_set"]
    run_day(warehouse, NEXT_DAY, stages[:1])
    before, files = table_versions(warehouse.store), all_files(full.root)
    for stage in stages[1:]:
        small_disk.fill()
        with pytest.raises(MissingError, match=f"{stage} ds={NEXT_DAY}: No space left on device") as raised:
            run_day(warehouse, NEXT_DAY, stages)
        assert str(raised.value).isprintable()
        assert table_versions(warehouse.store) == before
        assert all_files(full.root) == files
        assert not served.refresh(today=today)
        assert BlockList.open(full.root, today=today).snapshot.ds == DS
        small_disk.make_room()
        (result,) = run_day(warehouse, NEXT_DAY, [stage])
        assert result.ran
        before, files = table_versions(warehouse.store), all_files(full.root)
    assert [result.ran for result in run_day(warehouse, NEXT_DAY, stages)] == [False] * 5


def all_files(root: Path) -> set[Path]:
    return {path for path in (root / "tables").rglob("*") if path.is_file()}


def test_another_codebook_under_the_generators_version_is_refused(fork: Site) -> None:
    warehouse = fork.open()
    other_codebook(fork.root)
    before = table_versions(warehouse.store)
    for stage in ("item_semantic_id", "negative_item_set", "block_score"):
        with pytest.raises(ArtefactError, match="train the generator again"):
            run_day(warehouse, DS, [stage], force=True)
    assert table_versions(warehouse.store) == before


def test_an_illegal_prediction_is_not_published(fork: Site) -> None:
    warehouse = fork.open()
    rows = warehouse.store.read("negative_item_set", days=[DS])
    legal = {tuple(c) for c in rows["codes"].to_pylist()}
    known = {tuple(r["codes"]) for r in rows_of(warehouse.store, "item_semantic_id")}
    first, second, third = np.array(sorted(legal | known)).max(0) + 1
    illegal = next(
        [a, b, c]
        for a in range(first)
        for b in range(second)
        for c in range(third)
        if (a, b, c) not in legal | known
    )
    changed = rows.to_pylist()
    # The set of anybody, which comes first, is in no list.
    next(row for row in changed if row["user_id"] != ANYBODY)["codes"] = illegal
    table = pa.Table.from_pylist(changed, TABLES["negative_item_set"].schema)
    made = warehouse.store.commit_of("negative_item_set", DS).provenance
    warehouse.store.write_arrow("negative_item_set", table, {DS: 2}, made)
    before = table_versions(warehouse.store)
    with pytest.raises(GateError, match=r"illegal_ids 1 \(at most 0") as raised:
        run_day(warehouse, DS, ["block_list"], force=True, accept=ACCEPTABLE)
    assert "\n" not in str(raised.value)
    assert table_versions(warehouse.store) == before | {"gate": before["gate"] + 1}


def test_generation_goes_on_with_the_shards_that_are_left(
    fork: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse = fork.open()
    before = rows_of(warehouse.store, "negative_item_set")
    commit_shard, search = DeltaStore.commit_shard, jobs.negative_item_set.generate
    committed: list[int] = []
    searched: list[int] = []

    def stopping(store: DeltaStore, table: str, run: Path, ds: str, bucket: int, digest: str) -> int:
        if len(committed) == 2:
            raise ConflictError("the machine went away")
        committed.append(bucket)
        return commit_shard(store, table, run, ds, bucket, digest)

    def counting(*arguments: Any) -> Any:
        searched.append(1)
        return search(*arguments)

    monkeypatch.setattr(jobs.negative_item_set, "generate", counting)
    monkeypatch.setattr(DeltaStore, "commit_shard", stopping)
    version = warehouse.store.version("negative_item_set")
    with pytest.raises(ConflictError):
        run_stage("negative_item_set", JobContext(warehouse, DS, 2))
    assert committed == [0, 1]
    assert warehouse.store.version("negative_item_set") == version
    searched.clear()
    monkeypatch.setattr(DeltaStore, "commit_shard", commit_shard)
    told: list[tuple[int, int]] = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    run_stage("negative_item_set", JobContext(warehouse, DS, 2, progress))
    assert len(searched) == fork.config.buckets - 2
    assert told == [(n, fork.config.buckets) for n in range(1, fork.config.buckets + 1)]
    after = rows_of(warehouse.store, "negative_item_set")
    assert [row["user_id"] for row in after] == [row["user_id"] for row in before]
    same = np.mean([a["codes"] == b["codes"] for a, b in zip(after, before, strict=True)])
    assert same > 0.99  # two IDs with equal probabilities may change places


def test_who_is_carried_over_has_what_the_model_gives_anew(fork: Site) -> None:
    warehouse = fork.open()
    none_new = TABLES["item_semantic_id"].schema.empty_table()
    warehouse.store.write_arrow("item_semantic_id", none_new, {NEXT_DAY: 1}, Provenance())
    run_day(warehouse, NEXT_DAY, ["user_context", "item_rate", "block_score", "negative_item_set"])
    found = rows_of(warehouse.store, "negative_item_set", NEXT_DAY)
    before = {row["user_id"]: row for row in rows_of(warehouse.store, "user_context")}
    same = {
        row["user_id"]
        for row in rows_of(warehouse.store, "user_context", NEXT_DAY)
        if row["user_id"] in before
        and all(row[name] == before[row["user_id"]][name] for name in ("negatives", "positives"))
    }
    users = {row["user_id"] for row in found}
    assert 0.1 < len(same) / len(users) < 0.9
    assert {row["user_id"] for row in found if row["carried_from"] == DS} == same
    assert {row["user_id"] for row in found if row["carried_from"] is None} == users - same
    assert ANYBODY in users
    fresh = replace(fork, config=load_config(["demo"], [*SETTINGS, "generation.carry_over=false"], {})).open()
    run_day(fresh, NEXT_DAY, ["negative_item_set"], force=True)
    anew = rows_of(warehouse.store, "negative_item_set", NEXT_DAY)
    assert {row["carried_from"] for row in anew} == {None}
    hidden = {"codes": None, "carried_from": None}
    assert_close([{**row, **hidden} for row in found], [{**row, **hidden} for row in anew], {"log_prob": 4})
    equal = np.mean([a["codes"] == b["codes"] for a, b in zip(found, anew, strict=True)])
    assert equal > 0.99  # two IDs with equal probabilities may change places


def add_rows(store: DeltaStore, table: str, ds: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to a day as a late import would: the day is replaced."""
    held = store.read(table, days=[ds]).to_pylist()
    frame = pa.Table.from_pylist([*held, *rows], TABLES[table].schema)
    store.write_arrow(table, frame, {ds: store.revision(table, ds) + 1}, Provenance())


def new_items(ds: str, store: DeltaStore) -> list[dict[str, Any]]:
    """Items that came on a day: two of the same text as an old one, two of another."""
    old = store.read("item").to_pylist()[0]
    created = dt.datetime.fromisoformat(ds).replace(hour=1, tzinfo=dt.UTC)
    same = [{**old, "item_id": f"same {n}", "created_at": created, "ds": ds} for n in (1, 2)]
    other = [{**row, "item_id": f"new {n}", "title": "Garden hose"} for n, row in enumerate(same)]
    return [*same, *other]


def test_new_items_get_ids_and_old_ones_keep_theirs(fork: Site) -> None:
    warehouse = fork.open()
    store = warehouse.store
    version = newest(warehouse.models, CODEBOOK, DS).version
    before = load_semantic_ids(store, version, NEXT_DAY)
    added = new_items(NEXT_DAY, store)
    # An old item's text changes: its ID does not.
    renamed = {**added[-1], "item_id": before.items[0]}
    add_rows(store, "item", NEXT_DAY, [*added, renamed])
    run_day(warehouse, NEXT_DAY, ["item_semantic_id"])
    written = {row["item_id"] for row in rows_of(store, "item_semantic_id", NEXT_DAY)}
    assert {row["item_id"] for row in added} <= written
    assert not written & set(before.items)
    after = load_semantic_ids(store, version, NEXT_DAY)
    rows = [after.index[item] for item in before.items]
    assert (after.codes[rows] == before.codes).all()
    trie = Trie.build(after.codes, open_generator(warehouse.models, DS).codebook.code_counts)
    assert (trie.find(after.codes) >= 0).all()


def test_an_earlier_day_run_later_has_the_ids_of_the_later(fork: Site) -> None:
    """A day that is backfilled after a later one must not be left without IDs."""
    warehouse = fork.open()
    store = warehouse.store
    version = newest(warehouse.models, CODEBOOK, DS).version
    given = load_semantic_ids(store, version, DS)
    empty = TABLES["item_semantic_id"].schema.empty_table()
    moved = store.read("item_semantic_id", days=[DS])
    moved = moved.set_column(moved.schema.get_field_index("ds"), "ds", pa.array([NEXT_DAY] * len(moved)))
    store.write_arrow("item_semantic_id", empty, {DS: 2}, Provenance())
    store.write_arrow("item_semantic_id", moved, {NEXT_DAY: 1}, Provenance())
    run_day(warehouse, DS, ["item_semantic_id"], force=True)
    found = load_semantic_ids(store, version, DS)
    assert found.items == given.items
    assert (found.codes == given.codes).all()


def test_training_anew_outdates_nothing_and_takes_the_newest_codebook(
    fork: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Warehouse, "spark", fork.spark)
    warehouse = fork.open()
    assert stale(warehouse) == []
    before = rows_of(warehouse.store, "item_semantic_id")

    def train(*arguments: str) -> None:
        command = ["--warehouse", str(fork.root), *OPTIONS, "train", *arguments, "--until", DS]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0

    train("generator", "--seed", "8")
    assert warehouse.store.revision("item_semantic_id", DS) == 1
    first = open_generator(warehouse.models, DS)
    train("codebook", "--seed", "8")
    train("generator", "--seed", "8")
    second = open_generator(warehouse.models, DS)
    assert second.codebook_manifest.version == newest(warehouse.models, CODEBOOK, DS).version
    assert second.codebook_manifest.version != first.codebook_manifest.version
    after = rows_of(warehouse.store, "item_semantic_id")
    named = {row["item_id"] for row in after if row["codebook_version"] != first.codebook_manifest.version}
    assert named == {row["item_id"] for row in before}
    assert [row for row in after if row in before] == before
    assert stale(warehouse) == []
    # The next day has the new model and all its IDs.
    run_day(
        warehouse, NEXT_DAY, [stage for stage in NEXT_STAGES if stage not in ("item_graph", "block_list")]
    )
    made = warehouse.store.commit_of("negative_item_set", NEXT_DAY).provenance.models
    assert made == {GENERATOR: second.manifest.version, CODEBOOK: second.codebook_manifest.version}


def test_the_future_reaches_nothing(fork: Site) -> None:
    """Poisoned events and items after the day leave everything made for the day as it was."""
    warehouse = fork.open()
    store = warehouse.store
    run_day(warehouse, DS, TRAINING_STAGES, force=True)
    exact = ("feedback", "user_context", "item_rate", "item_taste", "user_taste", *TRAINING_STAGES)
    rounded = {name: CLOSE[name] for name in ("item_graph", "negative_item_set", "block_list")}

    def artefacts() -> dict[str, list[dict[str, Any]]]:
        found = {name: rows_of(store, name) for name in exact}
        return found | {name: rows_of(store, name) for name in rounded}

    before = artefacts()
    codewords = Codebook.load(
        warehouse.models / CODEBOOK / newest(warehouse.models, CODEBOOK, DS).version
    ).codewords
    users = sorted({row["user_id"] for row in before["user_context"]})
    items = sorted({row["item_id"] for row in before["item_rate"]})
    time = dt.datetime.fromisoformat(NEXT_DAY).replace(tzinfo=dt.UTC)
    poison = [
        {"user_id": user, "item_id": item, "event_time": time, "bucket": 0, "ds": NEXT_DAY}
        for n, user in enumerate(users)
        for item in items[n % 10 :: 10]
    ]
    add_rows(store, "item", NEXT_DAY, new_items(NEXT_DAY, store))
    add_rows(store, "behavior_log", NEXT_DAY, [{**row, "action": "dislike"} for row in poison])
    marks = {"polarity": -1, "source": "explicit", "weight": 1.0}
    seen = {(r["user_id"], r["item_id"], r["event_time"]) for r in rows_of(store, "feedback", NEXT_DAY)}
    fresh = [r for r in poison if (r["user_id"], r["item_id"], r["event_time"]) not in seen]
    add_rows(store, "feedback", NEXT_DAY, [{**row, **marks} for row in fresh])
    run_day(warehouse, NEXT_DAY, ["item_semantic_id"])
    forced = (*DAILY_STAGES, *TRAINING_STAGES)
    run_day(warehouse, DS, [name for name in forced if name != "future_feedback"], force=True)
    after = artefacts()
    for name in exact:
        assert after[name] == before[name], name
    for name, digits in rounded.items():
        assert_close(after[name], before[name], digits)
    trained = train_codebook(
        store, warehouse.models, warehouse.media, fork.config, DS, seed=SEED, progress=silent
    )
    again = Codebook.load(warehouse.models / CODEBOOK / trained.version).codewords
    for one, other in zip(again, codewords, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def assert_close(after: list[dict[str, Any]], before: list[dict[str, Any]], digits: dict[str, int]) -> None:
    """Equal rows but for rounding."""
    assert len(after) == len(before)
    for one, other in zip(after, before, strict=True):
        for name, value in other.items():
            if name in digits and value is not None:
                assert one[name] == pytest.approx(value, abs=2 * 10 ** -digits[name]), (name, other)
            else:
                assert one[name] == value, (name, other)


def test_a_day_in_an_object_store_equals_that_in_a_folder(site: Site, object_store: ObjectStore) -> None:
    """From the log to the list, in a copy of the folder."""
    warehouse = Warehouse(f"{object_store.bucket()}/site", site.config)
    warehouse.spark = site.spark
    assert isinstance(warehouse.root, ObjectPath)
    for name in ("tables", f"models/{CODEBOOK}", f"models/{GENERATOR}"):
        for file in walk(site.root / name):
            assert isinstance(file.path, Path)
            upload(file.path, warehouse.root / name / file.below)
    here = site.open()
    versions = table_versions(here.store)
    assert table_versions(warehouse.store) == versions
    assert not any(result.ran for result in run_day(warehouse, DS))
    # Of the others nothing is written or read in another way, and requests take time.
    stages = ["feedback", "item_graph", "item_semantic_id", "user_taste", "negative_item_set", "block_list"]
    assert all(result.ran for result in run_day(warehouse, DS, stages, force=True))
    for table in stages:
        assert warehouse.store.revision(table, DS) == 2
        assert_close(rows_of(warehouse.store, table), rows_of(here.store, table), CLOSE.get(table, {}))
    assert folders(warehouse.root) == ["models", "tables"]  # nothing temporary is left
    today = dt.date.fromisoformat(DS) + dt.timedelta(days=1)
    there, local = (BlockList.open(root, today=today) for root in (warehouse.root, site.root))
    user = next(iter(local.snapshot.users))
    items = site.open().store.read("item_semantic_id", ["item_id"])["item_id"].to_pylist()
    np.testing.assert_allclose(there.scores(user, items), local.scores(user, items), atol=1e-3)


def test_the_catalogue_of_the_list_ignores_later_items(site: Site) -> None:
    """`load_catalogue` sees the items of its day alone."""
    warehouse = site.open()
    made = warehouse.store.commit_of("block_list", DS).provenance
    catalogue = load_catalogue(block_list_task(warehouse, DS, made.inputs))
    ids = load_semantic_ids(warehouse.store, made.models[CODEBOOK], DS)
    assert catalogue.index == ids.index
    assert len(catalogue.log_odds) == catalogue.trie.n_ids
