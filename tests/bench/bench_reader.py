"""The block list reader: seconds to load, memory per user, time of a page, requests while lists are swapped.

    python tests/bench/bench_reader.py [--quick] [--users 1000000] [--items 100000] [--seconds 30]
        [--warehouse DIR]

The list is made of arrays: 20 entries, 6 dislikes, 14 likes and 8 categories per user. `--warehouse`
keeps it for the next time.
"""

import argparse
import contextlib
import datetime as dt
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Read when numpy is loaded: products this small are slower on several threads, and wait for them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Table, median_of, resident_mib

from negrec_core.artefacts import new_version, seal
from negrec_core.block_score import FEATURES
from negrec_core.blocklist import BlockList
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.generator import CODEBOOK
from negrec_core.schemas import TABLES
from negrec_core.semantic_ids import load_semantic_ids

DS, TODAY = "2026-03-10", dt.date(2026, 3, 11)
ENTRIES, DISLIKES, LIKES, CATEGORIES = 20, 6, 14, 8
BUCKETS, CODES, FACTORS = 16, 128, 8
DIM = 32  # `codebook.latent_dim` as it is by default
PAGE, ROUNDS = 500, 5
COUNTED = 15_000  # about as long as a page


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--users", type=int, default=1_000_000)
    arguments.add_argument("--items", type=int, default=100_000)
    arguments.add_argument("--seconds", type=float, default=30)
    arguments.add_argument("--warehouse", type=Path)
    options = arguments.parse_args()
    if options.quick:
        options.users, options.items, options.seconds = 20_000, 10_000, 5
    with contextlib.ExitStack() as stack:
        root = options.warehouse or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (root / "tables").is_dir():
            begin = time.perf_counter()
            _make(root, options.users, options.items)
            print(f"made a list of {options.users:,} users in {time.perf_counter() - begin:.0f} s")
        _load_and_ask(root, options.users, options.items)
        _swap(root, options.users, options.items, options.seconds)


def _load_and_ask(root: Path, users: int, items: int) -> None:
    before = resident_mib()
    seconds = []
    for _ in range(3):
        blocks = None
        gc.collect()
        begin = time.perf_counter()
        blocks = BlockList.open(root, today=TODAY)
        seconds.append(time.perf_counter() - begin)
    assert blocks is not None
    gc.collect()
    held = resident_mib() - before
    table = Table("reader", f"{users:,} users x {ENTRIES} entries, {items:,} items")
    table.add("load", f"{median_of(seconds):.2f} s", f"median of 3, first {seconds[0]:.2f} s")
    table.add("memory", f"{held:.0f} MiB", f"{held * 2**20 / users:.0f} bytes per user, items included")
    rng = np.random.default_rng(0)
    rounds = []
    for _ in range(ROUNDS):
        took_ms = []
        for _ in range(2000):
            user = f"user {rng.integers(users):09d}"
            page = [f"item {n:07d}" for n in _popular(rng, items, PAGE)]
            begin = time.perf_counter()
            blocks.allowed(user, page)
            between = time.perf_counter()
            sum(range(COUNTED))
            took_ms.append((1000 * (between - begin), 1000 * (time.perf_counter() - between)))
        rounds.append(np.percentile(took_ms, (50, 99), axis=0))
    (page_p50, count_p50), (page_p99, count_p99) = np.median(rounds, axis=0)
    note = f"random users, one thread; medians of {ROUNDS} rounds of 2,000 pages"
    table.add(f"page of {PAGE}", f"p50 {page_p50:.3f} ms, p99 {page_p99:.3f} ms", note)
    note = "after each page: what neighbours on the machine do to work that hardly touches memory"
    table.add(f"sum of {COUNTED:,} numbers", f"p50 {count_p50:.3f} ms, p99 {count_p99:.3f} ms", note)
    table.print()


def _swap(root: Path, users: int, items: int, seconds: float) -> None:
    """16 threads ask, each every few milliseconds, while the list is swapped for another one every second."""
    blocks = BlockList.open(root, today=TODAY)
    rng = np.random.default_rng(1)
    asked = [
        (f"user {rng.integers(users):09d}", [f"item {n:07d}" for n in rng.integers(items, size=50)])
        for _ in range(64)
    ]
    expected = [blocks.allowed(*request) for request in asked]
    done, failures, counts, swaps = threading.Event(), [], [0] * 16, [0]

    def ask(reader: int) -> None:
        number = reader
        while not done.wait(0.004):
            request = number % len(asked)
            try:
                if blocks.allowed(*asked[request]) != expected[request]:
                    failures.append("a wrong answer")
            except Exception as error:
                failures.append(repr(error))
            counts[reader] += 1
            number += 1

    def swap() -> None:
        store = DeltaStore(root)
        while not done.wait(1):
            try:
                _republish(store)
                blocks.refresh(TODAY)
                swaps[0] += 1
            except Exception as error:
                failures.append(f"a swap: {error!r}")

    threads = [threading.Thread(target=ask, args=(reader,)) for reader in range(16)]
    threads.append(threading.Thread(target=swap))
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    done.set()
    for thread in threads:
        thread.join()
    table = Table("reader, swapped", f"16 threads, {users:,} users, {seconds:.0f} s")
    table.add("requests", f"{sum(counts):,}", f"{sum(counts) / seconds:.0f} per second, pages of 50")
    table.add("swaps", f"{swaps[0]}", "a second after the one before; a swap loads the whole list")
    table.add("wrong or failed", f"{len(failures)}", ", ".join(sorted(set(failures))[:3]) or "none")
    table.print()
    if failures:
        sys.exit(1)


def _republish(store: DeltaStore) -> None:
    """The same list as a new revision: its files are linked, not written again."""
    version = store.version("block_list")
    commit = store.commit_of("block_list", DS, version)
    run = store.new_run("block_list")
    for file in map(Path, store.files("block_list", [DS])):
        place = run.joinpath(*file.parts[-3:])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(file)
    store.commit("block_list", run, {DS: commit.days[DS] + 1}, commit.provenance)


def _make(root: Path, users: int, items: int) -> None:
    rng = np.random.default_rng(0)
    store = DeltaStore(root)
    store.create_tables()
    path = new_version(root / "models", CODEBOOK)
    words = tuple(rng.normal(size=(CODES, DIM)).astype(np.float32) for _ in range(3))
    Codebook((), words).save(path)
    manifest = seal(path, parameters={"until": DS, "encoder": "none"}, metrics={}, inputs={})
    models = {CODEBOOK: manifest.version}
    item_ids = pa.array([f"item {n:07d}" for n in range(items)])
    paths = pa.array([f"Top {n % 20}/Sub {n}" for n in range(400)])
    codes = rng.integers(CODES, size=(items, 3)).astype(np.int32)
    inputs = {
        "item_semantic_id": _write(
            store,
            "item_semantic_id",
            models,
            [
                {
                    "codebook_version": _constant(manifest.version, items),
                    "item_id": item_ids,
                    "codes": _lists(pa.array(codes.ravel()), 3),
                }
            ],
        ),
        "item": _write(
            store,
            "item",
            models,
            [{"item_id": item_ids, "category": paths.take(pa.array(rng.integers(400, size=items)))}],
        ),
        "item_rate": _write(
            store,
            "item_rate",
            models,
            [{"item_id": item_ids, "log_odds": pa.array(rng.normal(-1, 1, items))}],
        ),
        "item_taste": _write(
            store,
            "item_taste",
            models,
            [
                {
                    "item_id": item_ids,
                    "log_odds": pa.array(rng.normal(-1, 1, items)),
                    "factors": _lists(pa.array(rng.normal(0, 0.3, items * FACTORS)), FACTORS),
                }
            ],
        ),
        "block_score": _write(store, "block_score", models, [_score()]),
    }
    per_bucket = -(-users // BUCKETS)
    spans = [range(first, min(first + per_bucket, users)) for first in range(0, users, per_bucket)]
    inputs["user_context"] = _write(
        store, "user_context", models, (_contexts(span, item_ids, paths, rng) for span in spans)
    )
    inputs["user_taste"] = _write(store, "user_taste", models, (_tastes(span, rng) for span in spans))
    entries = (_entries(span, item_ids, codes, rng) for span in spans)
    _write(store, "block_list", models, entries, inputs)
    assert len(load_semantic_ids(store, manifest.version, DS).items) == items


def _score() -> dict[str, pa.Array]:
    weights = [4.0, 2.0, 0.5, 0.5, 0.3, 0.2, 0.4, 0.3, 0.1]
    return {
        "features": pa.array([list(FEATURES)]),
        "coefficients": pa.array([weights]),
        "intercept": pa.array([-2.0]),
        "threshold": pa.array([0.5]),
        "prior_log_odds": pa.array([-1.0]),
        "pseudo_events": pa.array([5.0]),
    }


def _contexts(
    span: range, item_ids: pa.Array, paths: pa.Array, rng: np.random.Generator
) -> dict[str, pa.Array]:
    def events(each: int) -> pa.Array:
        n = len(span) * each
        moments = rng.integers(1_700_000_000, 1_770_000_000, size=n) * 1_000_000
        fields = {
            "item_id": item_ids.take(pa.array(_popular(rng, len(item_ids), n))),
            "event_time": pa.array(moments).cast(pa.timestamp("us", tz="UTC")),
            "reason_class": _constant("quality", n),
        }
        return _lists(pa.StructArray.from_arrays(list(fields.values()), list(fields)), each)

    n = len(span) * CATEGORIES
    counts = {
        "category": paths.take(pa.array(rng.integers(len(paths), size=n))),
        "n_negatives": pa.array(rng.integers(5, size=n).astype(np.int32)),
        "n_positives": pa.array(rng.integers(5, size=n).astype(np.int32)),
    }
    return {
        "user_id": pa.array([f"user {user:09d}" for user in span]),
        "negatives": events(DISLIKES),
        "positives": events(LIKES),
        "n_negatives": pa.array(rng.integers(20, size=len(span)).astype(np.int32)),
        "n_positives": pa.array(rng.integers(60, size=len(span)).astype(np.int32)),
        "categories": _lists(pa.StructArray.from_arrays(list(counts.values()), list(counts)), CATEGORIES),
    }


def _tastes(span: range, rng: np.random.Generator) -> dict[str, pa.Array]:
    width = 1 + DIM + FACTORS
    weights = rng.normal(0, 0.3, len(span) * width).astype(np.float32)
    return {
        "user_id": pa.array([f"user {user:09d}" for user in span]),
        "weights": _lists(pa.array(weights), width),
    }


def _entries(
    span: range, item_ids: pa.Array, codes: np.ndarray, rng: np.random.Generator
) -> dict[str, pa.Array]:
    n = len(span) * ENTRIES
    picked = rng.integers(len(codes), size=n)
    users = pa.array([f"user {user:09d}" for user in span])
    # An entry comes from one of the user's few dislikes.
    disliked = _popular(rng, len(codes), len(span) * DISLIKES).reshape(-1, DISLIKES)
    because = np.take_along_axis(disliked, rng.integers(DISLIKES, size=(len(span), ENTRIES)), 1)
    return {
        "user_id": users.take(pa.array(np.repeat(np.arange(len(span)), ENTRIES))),
        "rank": pa.array(np.tile(np.arange(1, ENTRIES + 1, dtype=np.int32), len(span))),
        "codes": _lists(pa.array(codes[picked].ravel()), 3),
        "score": pa.array(rng.random(n, dtype=np.float32)),
        "log_prob": pa.array(-10 * rng.random(n, dtype=np.float32)),
        "because_item_id": item_ids.take(pa.array(because.ravel())),
        "because_similarity": pa.array(rng.random(n, dtype=np.float32)),
        "reason_class": _constant("quality", n),
        "expires_on": _constant(dt.date(2026, 3, 18), n),
    }


def _write(
    store: DeltaStore,
    table: str,
    models: dict[str, str],
    parts: list[dict[str, pa.Array]] | Iterator[dict[str, pa.Array]],
    inputs: dict[str, int] | None = None,
) -> int:
    declared = TABLES[table]
    run = store.new_run(table)
    for bucket, columns in enumerate(parts):
        n = len(next(iter(columns.values())))
        arrays = [columns.get(field.name, pa.nulls(n)).cast(field.type) for field in declared.body]
        place = run / f"ds={DS}"
        if "bucket" in declared.partition_by:
            place /= f"bucket={bucket}"
        place.mkdir(parents=True, exist_ok=True)
        # As Spark is told to write them.
        pq.write_table(
            pa.table(arrays, schema=declared.body),
            place / "part-0.parquet",
            compression="zstd",
            dictionary_pagesize_limit=8 << 20,
        )
    return store.commit(table, run, {DS: 1}, Provenance(inputs or {}, models))


def _popular(rng: np.random.Generator, items: int, n: int) -> np.ndarray:
    """Numbers of items, few of which are popular."""
    return (items * rng.random(n) ** 3).astype(np.int64)


def _lists(values: pa.Array, each: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, each, dtype=np.int32)), values)


def _constant(value: object, n: int) -> pa.Array:
    return pa.array([value]).take(pa.array(np.zeros(n, np.int64)))


if __name__ == "__main__":
    main()
