"""The reader under load: many threads ask while lists are published and swapped."""

import datetime as dt
import os
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from warehouses import DS, publish, save_codebook

from negrec_core.blocklist import BlockList
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore
from negrec_core.schemas import TABLES

THREADS = 16
SWAPS = 4
TODAY = dt.date(2026, 3, 11)
# Codewords at right angles: an item is like the predicted ID that is its own, and like no other.
ITEMS = {f"item {n}": (n, 0) for n in range(4)}
CODEBOOK = Codebook((), (np.eye(4, dtype=np.float32), np.zeros((1, 4), np.float32)))


def expected(user: int, revision: int) -> list[str]:
    """The page without the one item that this revision blocks for a user."""
    return [item for n, item in enumerate(ITEMS) if n != (user + revision) % 4]


def entries(users: int, revision: int) -> pa.Table:
    """One entry for every user; whose it is shows in what it blocks, and so does the revision."""
    number = np.arange(users)
    codes = np.stack([(number + revision) % 4, np.zeros(users, int)], 1).astype(np.int32)
    columns = {
        "user_id": pa.array([f"user {n:07}" for n in range(users)]),
        "rank": pa.array(np.ones(users, np.int32)),
        "codes": pa.ListArray.from_arrays(np.arange(0, 2 * users + 1, 2, np.int32), codes.ravel()),
        "log_prob": pa.array(np.full(users, -1, np.float32)),
        "expires_on": pa.array(np.full(users, np.datetime64("2026-03-18"))),
        "bucket": pa.array((number % 4).astype(np.int32)),
        "ds": pa.array([DS] * users),
    }
    schema = TABLES["block_list"].schema
    return pa.table([columns.get(f.name, pa.nulls(users, f.type)) for f in schema], schema)


@pytest.fixture
def published(tmp_path: Path, list_users: int) -> DeltaStore:
    """A list of `list_users` users at revision 5; `run 0` to `run 3` have the files of revisions modulo 4."""
    version = save_codebook(tmp_path, CODEBOOK).version
    store = publish(tmp_path, version, ITEMS, {})
    made = store.commit_of("block_list", DS).provenance
    for revision in range(2, 6):
        store.write_arrow("block_list", entries(list_users, revision), {DS: revision}, made)
        (file, *_) = store.files("block_list", [DS])
        shutil.copytree(Path(file).parents[2], tmp_path / f"run {revision % 4}", copy_function=os.link)
    return store


def publish_again(store: DeltaStore, revision: int) -> None:
    run = store.new_run("block_list")
    shutil.copytree(store.root / f"run {revision % 4}", run, copy_function=os.link)
    store.commit("block_list", run, {DS: revision}, store.commit_of("block_list", DS).provenance)


def test_no_answer_is_wrong_and_no_request_fails_while_lists_are_swapped_every_second(
    published: DeltaStore, list_users: int
) -> None:
    blocks = BlockList.open(published.root, min_page_share=0, today=TODAY)
    done = threading.Event()
    wrong: list[object] = []
    calls = [0] * THREADS

    def ask(thread: int) -> None:
        draw = random.Random(thread)
        try:
            # A thread that never pauses would keep the interpreter from all others.
            while not done.wait(0.002):
                user = draw.randrange(list_users)
                before = blocks.snapshot.revision
                answer = blocks.allowed(f"user {user:07}", list(ITEMS))
                after = blocks.snapshot.revision
                # A call takes one list, of those that were in use while it ran.
                if all(answer != expected(user, revision) for revision in range(before, after + 1)):
                    wrong.append((user, before, after, answer))
                calls[thread] += 1
        except Exception as error:
            wrong.append(error)

    def refresh() -> None:
        try:
            while not done.wait(0.1):
                blocks.refresh()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(THREADS)]
    threads.append(threading.Thread(target=refresh))
    first = blocks.snapshot.revision
    seen = {first}
    for thread in threads:
        thread.start()
    try:
        for revision in range(first + 1, first + 1 + SWAPS):
            publish_again(published, revision)
            swapped = time.monotonic() + 1
            while not wrong and (blocks.snapshot.revision < revision or time.monotonic() < swapped):
                time.sleep(0.01)
            seen.add(blocks.snapshot.revision)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert seen == set(range(first, first + 1 + SWAPS))
    assert len(blocks.snapshot.users) == list_users
    assert min(calls) > 0
    print(f"{sum(calls)} requests of {THREADS} threads, {list_users} users, {SWAPS} swaps")
