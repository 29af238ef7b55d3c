import dataclasses
import datetime as dt
import inspect
import logging
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from warehouses import DS, PLAIN_SCORE, Context, Entry, publish, save_codebook, score_row, small_codebook
from warehouses import write_rows as write

from jobs.block_list import unpublish
from jobs.context import Warehouse
from negrec_core import blocklist
from negrec_core.block_score import FEATURES, BlockScore
from negrec_core.blocklist import BlockList, load_block_score, load_snapshot, newest_list
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ArtefactError, InputError, MissingError, NegrecError
from negrec_core.exemptions import Exemptions, end_exemption, exempt
from negrec_core.generator import CODEBOOK
from negrec_core.snapshot import Snapshot, load_published

TODAY = dt.date(2026, 3, 11)
CODEBOOK_OF_TESTS = small_codebook()
ITEMS = {f"item {a}{b}{c}": (a, b, c) for a in range(4) for b in range(4) for c in range(4) if a + b != 3}
# One category in two, one without a second part, and items without any.
CATEGORIES = {
    item: ("Toys/Games", "Toys/Dolls", "Books")[sum(codes) % 3]
    for item, codes in ITEMS.items()
    if codes[0] != 1
}
RATES = {item: (sum(codes) - 4) / 3 for item, codes in ITEMS.items() if codes[2] != 0}
ENTRIES = {
    "ann": [
        Entry((0, 1, 2), -0.1, "item 010", "store"),
        Entry((3, 3, 3), -1.0),
        Entry((2, 0, 1), -4.0, "item 200", None),
    ],
    "bob": [Entry((1, 1, 1), -0.5, "item 333", "product")],
    "zoé": [Entry((0, 0, 0), -2.0), Entry((0, 0, 1), -2.5), Entry((0, 1, 2), -3.0)],
}
# Neither "unknown" item has an ID; "item 010" twice counts twice.
CONTEXTS = {
    "ann": Context(["item 010", "unknown 1", "item 200", "item 010"], ["item 333"], 9, 2),
    "carl": Context(["item 111", "item 330"], ["unknown 2"], 4, 0),
    "dora": Context([], ["item 000", "item 322"], 0, 3),
    "zoé": Context(["item 001"], [], 1, 30),
}
USERS = [*ENTRIES, "carl", "dora", "nobody"]
# One is judged in the log and in no catalogue: no ID, but a rate and a taste.
PAGE = [*ITEMS, "no ID", "no such item"]
RATES["no ID"] = 1.5

_RNG = np.random.default_rng(4)
# Some items and users have none; a user of `CONTEXTS` without entries has one.
ITEM_TASTES = {item: _RNG.normal(size=2).tolist() for item in [*list(ITEMS)[:-1], "no ID"]}
USER_TASTES = {
    user: _RNG.normal(size=1 + CODEBOOK_OF_TESTS.dim + 1).tolist()
    for user in sorted({*ENTRIES, *CONTEXTS})[1:]
}


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory):
    root = tmp_path_factory.mktemp("warehouse")
    manifest = save_codebook(root, CODEBOOK_OF_TESTS)
    publish(
        root,
        manifest.version,
        ITEMS,
        ENTRIES,
        rates=RATES,
        contexts=CONTEXTS,
        item_tastes=ITEM_TASTES,
        user_tastes=USER_TASTES,
        categories=CATEGORIES,
    )
    return root


@pytest.fixture(scope="module")
def blocks(warehouse):
    return BlockList.open(warehouse, today=TODAY)


@pytest.fixture
def copy(warehouse, tmp_path):
    """A warehouse that a test may change, and the version of its codebook."""
    root = tmp_path / "warehouse"
    shutil.copytree(warehouse, root)
    (version,) = (path.name for path in (root / "models" / CODEBOOK).iterdir())
    return root, version


def same_category(one, other, depth):
    """Whether two items' category paths are equal, down to a depth."""
    paths = [CATEGORIES[item].split("/")[:depth] for item in (one, other) if item in CATEGORIES]
    return len(paths) == 2 and paths[0] == paths[1]


def score_by_loop(user, item):
    """The block score from the tables' rows, one number at a time."""

    def unit(codes):
        words = (w[c] for w, c in zip(CODEBOOK_OF_TESTS.codewords, codes, strict=True))
        total = sum(word.astype(float) for word in words)
        return total / math.sqrt(sum(x * x for x in total))

    own = ENTRIES.get(user, [])
    cosines = [float(unit(e.codes) @ unit(ITEMS[item])) if item in ITEMS else 0.0 for e in own]
    weights = [math.exp(e.log_prob) for e in own]
    context = CONTEXTS.get(user, Context())
    prior = 1 / (1 + math.exp(-PLAIN_SCORE.prior_log_odds))
    parts = [
        max(cosines, default=0.0),
        sum(w * c for w, c in zip(weights, cosines, strict=True)) / (sum(weights) or 1.0),
        RATES.get(item, PLAIN_SCORE.prior_log_odds),
        math.log((context.n_negatives + 5 * prior) / (context.n_positives + 5 * (1 - prior))),
    ]
    for depth in (None, 1):
        bad, good = (
            sum(item in ITEMS and same_category(past, item, depth) for past in items)
            for items in (context.negatives, context.positives)
        )
        parts.append(math.log((bad + 5 * prior) / (good + 5 * (1 - prior))))
    own, *factors = ITEM_TASTES.get(item, [PLAIN_SCORE.prior_log_odds, 0.0])
    weights = USER_TASTES.get(user, [0.0] * (1 + CODEBOOK_OF_TESTS.dim + 1))
    vector = [*(unit(ITEMS[item]) if item in ITEMS else [0.0] * CODEBOOK_OF_TESTS.dim), *factors]
    parts += [
        own + sum(w * x for w, x in zip(weights[1:], vector, strict=True)),
        weights[0],
        not any(weights),
    ]
    odds = PLAIN_SCORE.intercept + sum(
        float(c) * p for c, p in zip(PLAIN_SCORE.coefficients, parts, strict=True)
    )
    return 1 / (1 + math.exp(-odds)), cosines


# ------------------------------------------------------------------------------ scores and reasons


def test_scores_equal_a_plain_loop(blocks):
    for user in USERS:
        expected = [score_by_loop(user, item)[0] for item in PAGE]
        np.testing.assert_allclose(blocks.scores(user, PAGE), expected, atol=1e-6)
    assert blocks.scores("ann", []).shape == (0,)


def test_why_names_the_nearest_prediction_and_adds_up(blocks):
    for user in USERS:
        for item in PAGE:
            why, (score, cosines) = blocks.why(user, item), score_by_loop(user, item)
            assert why.score == pytest.approx(score, abs=1e-6)
            odds = sum(why.contributions.values()) + PLAIN_SCORE.intercept
            assert 1 / (1 + math.exp(-odds)) == pytest.approx(why.score)
            assert tuple(why.contributions) == FEATURES
            if user not in ENTRIES:
                assert (why.rank, why.because_item_id, why.reason_class) == (None, None, None)
                assert (why.blocked, why.similarity) == (False, 0)
                continue
            entry = ENTRIES[user][why.rank - 1]
            assert cosines[why.rank - 1] == pytest.approx(max(cosines), abs=1e-6)
            assert why.similarity == pytest.approx(max(cosines), abs=1e-6)
            assert (why.because_item_id, why.reason_class) == (entry.because, entry.reason)
            assert why.blocked == (why.score >= PLAIN_SCORE.threshold)


def test_rows_may_lie_in_any_order_and_ranks_may_have_gaps(copy, blocks):
    root, _ = copy
    store = DeltaStore(root)
    rows = [row for row in store.read("block_list").to_pylist() if row["rank"] != 2]
    rows = sorted(rows, key=lambda row: (-row["rank"], row["user_id"]))
    # Buckets are separate files, which the order of users does not follow.
    for number, row in enumerate(rows):
        row["bucket"] = number % 3
    provenance = store.commit_of("block_list", DS).provenance
    write(store, "block_list", rows, DS, 2, provenance)
    shuffled = BlockList.open(root, today=TODAY)
    for user in ("ann", "zoé"):
        span = shuffled.snapshot.span(shuffled.snapshot.row_of(user))
        assert shuffled.snapshot.ranks[span].tolist() == [1, 3]
        first, _, third = ENTRIES[user]
        assert shuffled.snapshot.because[span.start].as_py() == first.because
        assert shuffled.snapshot.because[span.stop - 1].as_py() == third.because
        assert shuffled.snapshot.log_probs[span].tolist() == pytest.approx([first.log_prob, third.log_prob])
    item = next(item for item, codes in ITEMS.items() if codes == (2, 0, 1))
    assert shuffled.why("ann", item).rank == 3
    np.testing.assert_allclose(shuffled.scores("bob", PAGE), blocks.scores("bob", PAGE))


def test_data_files_without_rows_hold_nothing(copy, blocks):
    root, _ = copy
    store = DeltaStore(root)
    inputs = store.commit_of("block_list", DS).provenance.inputs
    for table in ("user_context", "block_list"):
        commit = store.commit_of(table, DS)
        run = store.new_run(table)
        for file in map(Path, store.files(table, [DS])):
            # Its rows, and beside them, in their bucket and in another one, none.
            for place, rows in ((file.parent.name, None), (file.parent.name, 0), ("bucket=7", 0)):
                target = run / f"ds={DS}" / place / f"{rows}-{file.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pq.ParquetFile(file).read().slice(0, rows), target)
        names = {**inputs, "user_context": store.version("user_context")} if table == "block_list" else {}
        provenance = dataclasses.replace(commit.provenance, inputs=names)
        store.commit(table, run, {DS: 2}, provenance)
    again = BlockList.open(root, today=TODAY)
    assert again.snapshot.revision == 2
    for user in USERS:
        np.testing.assert_array_equal(again.scores(user, PAGE), blocks.scores(user, PAGE))


def test_tastes_move_the_score_of_users_without_entries_too(blocks):
    """The users have no prediction: what tells their items apart is what they judged before."""
    without = sorted({*CONTEXTS} - {*ENTRIES})
    own = [blocks.why(user, "item 111").contributions["taste"] for user in (*without, "nobody")]
    assert len(set(own)) == len(own) > 1
    assert blocks.allowed("carl", PAGE) == PAGE


def test_each_user_has_the_taste_of_the_table(blocks):
    snapshot = blocks.snapshot
    rows = {**snapshot.users, **snapshot.others}
    assert sorted(rows) == sorted({*ENTRIES, *CONTEXTS})
    assert sorted(rows.values()) == list(range(len(rows)))
    width = snapshot.tastes.shape[1]
    for user, row in rows.items():
        np.testing.assert_allclose(snapshot.tastes[row], USER_TASTES.get(user, [0.0] * width), rtol=1e-6)
    assert not snapshot.tastes[len(rows)].any()


def test_contexts_may_be_absent_or_hold_null_lists(copy):
    root, version = copy
    publish(root, version, ITEMS, ENTRIES, rates=RATES, revision=2)
    without = BlockList.open(root, today=TODAY).scores("ann", PAGE)
    publish(root, version, ITEMS, ENTRIES, rates=RATES, revision=3, contexts={"ann": Context()})
    assert (BlockList.open(root, today=TODAY).scores("ann", PAGE) == without).all()
    store = DeltaStore(root)
    rows = [{"user_id": "ann", "n_negatives": 0, "n_positives": 0}]
    republish(store, {"user_context": write(store, "user_context", rows, DS, 4)}, 4)
    assert (BlockList.open(root, today=TODAY).scores("ann", PAGE) == without).all()


# ---------------------------------------------------------------------------------- filtering pages

pages = st.lists(st.sampled_from(PAGE), max_size=25)
page_shares = st.sampled_from([0.0, 0.07, 0.1, 1 / 3, 0.5, 1.0]) | st.floats(0, 1)
thresholds = st.sampled_from([0.0, 1.0, 1.1]) | st.floats(0, 1)


def with_settings(blocks, threshold, share):
    return BlockList("unused", blocks.snapshot, threshold, share, TODAY)


@given(st.sampled_from(USERS), pages, page_shares, thresholds)
def test_allowed_keeps_order_and_a_share_of_the_page(blocks, user, page, share, threshold):
    ours = with_settings(blocks, threshold, share)
    allowed = ours.allowed(user, page)
    rest = iter(page)
    assert all(any(item == other for other in rest) for item in allowed)
    if user not in ENTRIES:
        assert allowed == page
        return
    assert len(allowed) >= share * len(page) - 1e-9
    scores = dict(zip(page, ours.scores(user, page).tolist(), strict=True))
    under = [item for item in page if scores[item] < threshold]
    if len(under) >= share * len(page) - 1e-9:
        assert allowed == under
        return
    # The page is filled up with the least likely, to the share and no further.
    assert len(allowed) == math.ceil(share * len(page) - 1e-9)
    left_out = list(page)
    for item in allowed:
        left_out.remove(item)
    assert max(scores[item] for item in allowed) <= min((scores[item] for item in left_out), default=1.0)


@given(st.sampled_from(USERS), pages, page_shares, thresholds, thresholds)
def test_a_higher_threshold_blocks_no_more(blocks, user, page, share, one, other):
    low, high = sorted((one, other))
    strict = with_settings(blocks, low, share).allowed(user, page)
    rest = iter(with_settings(blocks, high, share).allowed(user, page))
    assert all(any(item == kept for kept in rest) for item in strict)


def test_the_published_threshold_is_used_unless_another_is_given(warehouse, blocks):
    assert blocks.threshold == PLAIN_SCORE.threshold
    assert 0 < len(blocks.allowed("ann", PAGE)) < len(PAGE)
    none = BlockList.open(warehouse, threshold=1.5, today=TODAY)
    assert none.threshold == 1.5
    assert none.allowed("ann", PAGE) == PAGE
    everything = BlockList.open(warehouse, threshold=0.0, min_page_share=0.0, today=TODAY)
    assert everything.allowed("ann", PAGE) == []
    assert not none.why("ann", PAGE[0]).blocked
    assert everything.why("ann", PAGE[0]).blocked


def test_the_default_page_share_is_the_configured_one():
    default = inspect.signature(BlockList.open).parameters["min_page_share"].default
    assert default == load_config(environment={}).block_list.min_page_share


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_page_share_out_of_range_is_refused(warehouse, share):
    with pytest.raises(InputError, match="min_page_share"):
        BlockList.open(warehouse, min_page_share=share, today=TODAY)


# ------------------------------------------------------------------------------- which list is used


def test_the_newest_list_that_holds_is_opened(copy):
    root, version = copy
    for ds, expires in (("2026-03-08", "2026-03-20"), ("2026-03-12", "2026-03-13")):
        publish(root, version, ITEMS, ENTRIES, ds=ds, expires_on=dt.date.fromisoformat(expires))
    store = DeltaStore(root)

    def opened(day):
        return newest_list(store, dt.date.fromisoformat(f"2026-03-{day:02d}")).ds

    assert opened(8) == opened(9) == "2026-03-08"
    assert opened(10) == opened(11) == "2026-03-10"
    assert opened(12) == "2026-03-12"
    # The newest has expired while older ones still hold.
    assert opened(13) == opened(17) == "2026-03-10"
    assert opened(18) == opened(19) == "2026-03-08"
    with pytest.raises(MissingError, match="newest list, ds=2026-03-12, expired on 2026-03-13"):
        opened(20)
    with pytest.raises(MissingError, match="nothing was published"):
        opened(7)


def test_a_list_of_a_later_day_is_refused_with_a_reason_and_the_old_one_stays(copy, caplog):
    root, version = copy
    blocks = BlockList.open(root, today=TODAY)
    served = blocks.snapshot
    publish(root, version, ITEMS, {"dora": ENTRIES["bob"]}, ds="2027-01-01")
    with caplog.at_level(logging.WARNING, "negrec"):
        assert not blocks.refresh()
    assert blocks.snapshot is served
    assert f"ds=2027-01-01 is dated after today, {TODAY}, and not used" in caplog.text
    with pytest.raises(MissingError, match="ds=2027-01-01 is dated after today, 2026-03-01, and not used"):
        newest_list(DeltaStore(root), dt.date(2026, 3, 1))
    # On its day it is as good as any.
    assert blocks.refresh(today=dt.date(2027, 1, 1))


def test_a_list_that_is_half_written_is_not_there_yet(copy):
    """Whole files of which no commit knows, one that is cut, and a log entry that has no name yet."""
    root, _ = copy
    store = DeltaStore(root)
    blocks = BlockList.open(root, today=TODAY)
    served = blocks.snapshot
    (whole, *_) = map(Path, store.files("block_list", [DS]))
    run = store.new_run("block_list") / "ds=2026-03-11" / "bucket=1"
    run.mkdir(parents=True)
    shutil.copy(whole, run / "whole.parquet")
    (run / "cut.parquet").write_bytes(whole.read_bytes()[:99])
    log = store.path("block_list") / "_delta_log"
    entry = (log / f"{1:020}.json").read_bytes()
    (log / f"_commit_{2:020}.json.tmp").write_bytes(entry[: len(entry) // 2])
    assert not blocks.refresh()
    assert blocks.snapshot is served
    assert BlockList.open(root, today=TODAY).snapshot.ds == DS


def test_a_list_without_entries_counts_as_absent(copy):
    root, version = copy
    publish(root, version, ITEMS, {}, ds="2026-03-11")
    assert newest_list(DeltaStore(root), TODAY).ds == DS
    publish(root, version, ITEMS, {}, ds=DS, revision=2)
    with pytest.raises(MissingError, match="nothing was published"):
        BlockList.open(root, today=TODAY)


def test_a_warehouse_without_lists_is_refused(tmp_path):
    with pytest.raises(MissingError, match="table block_list: not found"):
        BlockList.open(tmp_path, today=TODAY)
    DeltaStore(tmp_path).create_tables()
    with pytest.raises(MissingError, match=r"nothing was published .*; run `negrec run`"):
        BlockList.open(tmp_path, today=TODAY)


def test_an_expired_list_blocks_nothing(warehouse, monkeypatch):
    day = TODAY
    monkeypatch.setattr(blocklist, "_utc_today", lambda: day)
    blocks = BlockList.open(warehouse)
    blocked = next(item for item in PAGE if blocks.why("ann", item).blocked)
    assert blocks.allowed("ann", PAGE) != PAGE
    day = blocks.snapshot.expires_on - dt.timedelta(days=1)
    assert blocks.allowed("ann", PAGE) != PAGE
    day = blocks.snapshot.expires_on
    with pytest.raises(MissingError, match="expired"):
        blocks.refresh()
    assert blocks.allowed("ann", PAGE) == PAGE
    assert not blocks.why("ann", blocked).blocked
    assert blocks.scores("ann", PAGE).shape == (len(PAGE),)


def test_what_a_list_was_made_with_stays_with_it(copy, blocks):
    """Later rates, counts, IDs and scores do not reach a list that was published before them."""
    root, version = copy
    store = DeltaStore(root)
    write(store, "item_rate", [{"item_id": item, "log_odds": 9.0} for item in ITEMS], DS, 2)
    write(store, "user_context", [{"user_id": "ann", "n_negatives": 99, "n_positives": 0}], DS, 2)
    write(store, "block_score", [score_row(dataclasses.replace(PLAIN_SCORE, intercept=7.0))], DS, 2)
    new_id = {"codebook_version": version, "item_id": "no such item", "codes": (0, 0, 0)}
    write(store, "item_semantic_id", [new_id], DS, 2)
    write(store, "item_semantic_id", [new_id], "2026-03-09", 1)
    again = BlockList.open(root, today=TODAY)
    for user in USERS:
        assert (again.scores(user, PAGE) == blocks.scores(user, PAGE)).all()


def test_a_list_found_is_the_one_loaded_though_another_is_published_meanwhile(copy):
    root, version = copy
    store = DeltaStore(root)
    found = newest_list(store, TODAY)
    publish(root, version, ITEMS, {"dora": ENTRIES["bob"]}, revision=2, score=HIGH)
    snapshot = load_published(store, found)
    assert (snapshot.revision, set(snapshot.users)) == (1, set(ENTRIES))
    assert snapshot.score.threshold == PLAIN_SCORE.threshold


# ------------------------------------------------------------------------------------- refreshing


def test_refresh_swaps_to_a_new_day_and_a_new_revision(copy):
    root, version = copy
    blocks = BlockList.open(root, today=TODAY)
    assert not blocks.refresh()
    publish(root, version, ITEMS, {"dora": ENTRIES["bob"]}, revision=2)
    assert blocks.refresh()
    assert (blocks.snapshot.ds, blocks.snapshot.revision) == (DS, 2)
    assert list(blocks.snapshot.users) == ["dora"]
    publish(root, version, ITEMS, ENTRIES, ds="2026-03-11")
    publish(root, version, ITEMS, ENTRIES, ds="2026-03-12")
    assert blocks.refresh()
    assert not blocks.refresh()
    assert blocks.snapshot.ds == "2026-03-11"
    assert blocks.refresh(today=dt.date(2026, 3, 12))
    assert blocks.snapshot.ds == "2026-03-12"


def break_codebook_file(root, version):
    file = root / "models" / CODEBOOK / version / "codebook.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")


def drop_codebook(root, version):
    shutil.rmtree(root / "models" / CODEBOOK / version)


def smaller_codebook(root, version):
    replace_codebook(root, version, small_codebook((4, 2, 4)))


def flatter_codebook(root, version):
    replace_codebook(root, version, small_codebook((4, 4)))


def replace_codebook(root, version, other):
    drop_codebook(root, version)
    made = save_codebook(root, other)
    folder = root / "models" / CODEBOOK
    (folder / made.version).rename(folder / version)


def cut_data_file(root, version):
    path = Path(DeltaStore(root).files("user_context", [DS])[0])
    path.write_bytes(path.read_bytes()[:50])


def drop_data_file(root, version):
    Path(DeltaStore(root).files("block_list", [DS])[0]).unlink()


def cut_log(root, version):
    (log,) = (DeltaStore(root).path("block_list") / "_delta_log").glob(f"{1:020}.json")
    log.write_bytes(log.read_bytes()[:200])


def other_features(root, version):
    store = DeltaStore(root)
    row = {**score_row(PLAIN_SCORE), "features": ["similarity"], "coefficients": [1.0]}
    republish(store, {"block_score": write(store, "block_score", [row], DS, 2)})


def no_score(root, version):
    store = DeltaStore(root)
    republish(store, {"block_score": write(store, "block_score", [], DS, 2)})


def no_ids(root, version):
    store = DeltaStore(root)
    republish(store, {"item_semantic_id": write(store, "item_semantic_id", [], DS, 2)})


def vanished_version(root, version):
    republish(DeltaStore(root), {"item_rate": 99})


def nameless_inputs(root, version):
    store = DeltaStore(root)
    rows = store.read("block_list").to_pylist()
    write(store, "block_list", rows, DS, 2, Provenance({"item_rate": 1}))


def test_tastes_of_another_width_are_refused(copy):
    root, _ = copy
    store = DeltaStore(root)
    rows = [{"user_id": "ann", "weights": [0.1, 0.2]}]
    republish(store, {"user_taste": write(store, "user_taste", rows, DS, 2)})
    with pytest.raises(ArtefactError, match="user_taste: weights of 2 numbers where its items have 10"):
        BlockList.open(root, today=TODAY)


def republish(store, inputs, revision=2):
    """The same entries again, said to be made from other versions of some tables."""
    old = store.commit_of("block_list", DS).provenance
    rows = store.read("block_list").to_pylist()
    write(store, "block_list", rows, DS, revision, Provenance({**old.inputs, **inputs}, old.models))


DAMAGE = {
    break_codebook_file: (ArtefactError, r"codebook/.* codebook.safetensors differs"),
    drop_codebook: (MissingError, r"no manifest.json"),
    smaller_codebook: (ArtefactError, r"is not the one of its IDs .* restore that codebook"),
    flatter_codebook: (ArtefactError, r"is not the one of its IDs .* restore that codebook"),
    cut_data_file: (InputError, r"block list ds=2026-03-10, revision 1: a table of it cannot be"),
    drop_data_file: (InputError, r"block list ds=2026-03-10: a table of it cannot be read"),
    cut_log: (InputError, r"table block_list: its log cannot be read"),
    other_features: (ArtefactError, r"was fitted on similarity, this version of negrec computes"),
    no_score: (MissingError, r"table block_score: no row of ds=2026-03-10"),
    no_ids: (MissingError, r"table item_semantic_id: no item known on ds=2026-03-10"),
    vanished_version: (MissingError, r"table item_rate: there is no version 99"),
    nameless_inputs: (
        ArtefactError,
        r"block_score, item_semantic_id, item_taste, user_context, user_taste, item, codebook",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_clear_line_and_the_old_list_stays(copy, damage):
    root, version = copy
    damage(root, version)
    kind, message = DAMAGE[damage]
    with pytest.raises(kind, match=message) as caught:
        BlockList.open(root, today=TODAY)
    assert str(caught.value).isprintable()
    # A service that holds an older list keeps it.
    served = load_snapshot_of_an_older_list(root, version)
    blocks = BlockList(root, served, None, 0.5, TODAY)
    before = blocks.scores("ann", PAGE)
    with pytest.raises(NegrecError, match=message):
        blocks.refresh()
    assert blocks.snapshot is served
    assert (blocks.scores("ann", PAGE) == before).all()
    assert blocks.allowed("ann", PAGE) != PAGE


def load_snapshot_of_an_older_list(root, version):
    other = root.parent / "older"
    manifest = save_codebook(other, CODEBOOK_OF_TESTS)
    publish(other, manifest.version, ITEMS, ENTRIES, ds="2026-03-09")
    return load_snapshot(other, TODAY)


def test_refresh_recovers_once_the_damage_is_repaired(copy):
    root, version = copy
    blocks = BlockList.open(root, today=TODAY)
    publish(root, "no-such-codebook", ITEMS, ENTRIES, ds="2026-03-11")
    for _ in range(2):
        with pytest.raises(MissingError, match="no-such-codebook"):
            blocks.refresh()
    publish(root, version, ITEMS, ENTRIES, ds="2026-03-11", revision=2)
    assert blocks.refresh()
    assert (blocks.snapshot.ds, blocks.snapshot.revision) == ("2026-03-11", 2)


# --------------------------------------------------------------------------------------------- undo


def with_jobs(root):
    return Warehouse(root, load_config(environment={}))


def test_a_withdrawn_list_gives_way_to_the_day_before_and_then_to_none(copy):
    root, version = copy
    publish(root, version, ITEMS, {"ann": ENTRIES["ann"]}, ds="2026-03-11")
    today = dt.date(2026, 3, 12)
    blocks = BlockList.open(root, today=today)
    assert blocks.snapshot.ds == "2026-03-11"
    assert unpublish(with_jobs(root), "2026-03-11")
    assert not unpublish(with_jobs(root), "2026-03-11")
    assert blocks.refresh()
    assert blocks.snapshot.ds == DS
    assert blocks.allowed("bob", PAGE) != PAGE
    blocked = next(item for item in PAGE if blocks.why("bob", item).blocked)
    assert unpublish(with_jobs(root), DS)
    for _ in range(2):
        with pytest.raises(MissingError, match="nothing was published"):
            blocks.refresh()
        assert blocks.allowed("bob", PAGE) == PAGE
        assert not blocks.why("bob", blocked).blocked
    with pytest.raises(MissingError):
        BlockList.open(root, today=today)
    publish(root, version, ITEMS, ENTRIES, revision=3)
    assert blocks.refresh()
    assert blocks.why("bob", blocked).blocked


def test_a_withdrawn_list_blocks_nothing_though_the_one_before_is_damaged(copy):
    root, version = copy
    publish(root, version, ITEMS, ENTRIES, ds="2026-03-11")
    blocks = BlockList.open(root, today=TODAY)
    drop_data_file(root, version)
    unpublish(with_jobs(root), "2026-03-11")
    with pytest.raises(InputError, match="cannot be read"):
        blocks.refresh()
    assert blocks.allowed("ann", PAGE) == PAGE


def test_a_list_and_its_exemptions_stay_while_the_warehouse_is_away(copy):
    root, _ = copy
    exempt(DeltaStore(root), ["bob"], [], None, "1")
    blocks = BlockList.open(root, today=TODAY)
    root.rename(root.with_name("away"))
    with pytest.raises(NegrecError):
        blocks.refresh()
    assert blocks.allowed("ann", PAGE) != PAGE
    assert blocks.allowed("bob", PAGE) == PAGE


def test_only_days_that_were_published_are_withdrawn(copy):
    root, _ = copy
    before = DeltaStore(root).version("block_list")
    with pytest.raises(MissingError, match="table block_list: no partition ds=2026-03-01"):
        unpublish(with_jobs(root), "2026-03-01")
    assert DeltaStore(root).version("block_list") == before


@given(
    st.sampled_from(USERS),
    pages,
    page_shares,
    st.sets(st.sampled_from(PAGE)),
    st.sets(st.sampled_from(USERS)),
)
def test_what_is_exempt_is_never_blocked(blocks, user, page, share, items, users):
    ours = BlockList("unused", blocks.snapshot, 0.3, share, TODAY, Exemptions(users, items))
    allowed = ours.allowed(user, page)
    if user in users or user not in ENTRIES:
        assert allowed == page
    rest = iter(page)
    assert all(any(item == other for other in rest) for item in allowed)
    assert [i for i in allowed if i in items] == [i for i in page if i in items]
    plain = with_settings(blocks, 0.3, 0.0)
    for item in set(page):
        why = ours.why(user, item)
        assert why.exempt == ("user" if user in users else "item" if item in items else None)
        assert why.blocked == (plain.why(user, item).blocked and why.exempt is None)
    # An exemption costs no other item its place but where the page's share is kept.
    if share == 0 and user not in users:
        others = [item for item in page if item not in items]
        assert [i for i in allowed if i not in items] == plain.allowed(user, others)
    assert len(allowed) >= share * len(page) - 1e-9


def test_exemptions_hold_at_the_next_look_without_a_new_list(copy):
    root, _ = copy
    store = DeltaStore(root)
    blocks = BlockList.open(root, min_page_share=0, today=TODAY)
    blocked = [item for item in PAGE if blocks.why("ann", item).blocked]
    assert not blocks.refresh_exemptions()
    assert exempt(store, ["bob"], blocked[:1], "a complaint", "1") == 2
    assert blocks.refresh_exemptions()
    assert not blocks.refresh_exemptions()
    assert blocks.allowed("bob", PAGE) == PAGE
    assert blocks.why("bob", PAGE[0]).exempt == "user"
    assert [item for item in PAGE if blocks.why("ann", item).blocked] == blocked[1:]
    assert set(blocks.allowed("ann", blocked)) == {blocked[0]}
    end_exemption(store, [], blocked[:1], "1")
    assert not blocks.refresh()  # the list is the same; the exemptions are looked at all the same
    assert blocks.allowed("ann", blocked) == []
    assert BlockList.open(root, today=TODAY).allowed("bob", PAGE) == PAGE


def test_a_warehouse_without_the_table_has_no_exemptions(copy):
    root, _ = copy
    shutil.rmtree(DeltaStore(root).path("exemption"))
    blocks = BlockList.open(root, today=TODAY)
    assert not blocks.refresh_exemptions()
    assert blocks.allowed("ann", PAGE) != PAGE


def test_exemptions_that_cannot_be_read_are_one_line_and_those_known_hold_on(copy):
    root, _ = copy
    store = DeltaStore(root)
    exempt(store, ["ann"], [], None, "1")
    blocks = BlockList.open(root, today=TODAY)
    exempt(store, ["bob"], [], None, "1")
    Path(store.files("exemption")[0]).unlink()
    for look in (blocks.refresh, blocks.refresh_exemptions):
        with pytest.raises(InputError, match=r"table exemption: .* is gone; restore the file") as caught:
            look()
        assert str(caught.value).isprintable()
    assert blocks.allowed("ann", PAGE) == PAGE


# Two kinds of list that agree on what to block, but whose scores and thresholds must not be mixed:
# one's scores lie all under the other's threshold.
LOW = BlockScore(np.array([0.4, *[0.0] * 8]), -3.0, 1 / (1 + math.exp(2.7)), -1.0, 5.0)
HIGH = BlockScore(np.array([0.4, *[0.0] * 8]), 3.0, 1 / (1 + math.exp(-3.3)), -1.0, 5.0)
SAME = next(item for item, codes in ITEMS.items() if codes == (1, 1, 1))
FAR = min(ITEMS, key=lambda item: score_by_loop("bob", item)[1])


@pytest.fixture
def swapping(copy):
    root, version = copy
    publish(root, version, ITEMS, ENTRIES, score=LOW, revision=2)
    return root, version


def test_a_call_sees_one_list_though_it_is_swapped_meanwhile(swapping, monkeypatch):
    root, version = swapping
    blocks = BlockList.open(root, min_page_share=0, today=TODAY)
    publish(root, version, ITEMS, ENTRIES, score=HIGH, revision=3)
    original = Snapshot.features

    def features_then_swap(snapshot, user, item_ids):
        found = original(snapshot, user, item_ids)
        blocks.refresh()
        return found

    monkeypatch.setattr(Snapshot, "features", features_then_swap)
    assert blocks.allowed("bob", [SAME, FAR]) == [FAR]
    assert blocks.snapshot.revision == 3
    publish(root, version, ITEMS, ENTRIES, score=LOW, revision=4)
    assert blocks.why("bob", SAME).blocked
    assert blocks.snapshot.revision == 4
    publish(root, version, ITEMS, ENTRIES, score=HIGH, revision=5)
    assert not blocks.why("bob", FAR).blocked


def test_requests_go_on_while_lists_are_published_and_swapped(swapping):
    root, version = swapping
    blocks = BlockList.open(root, min_page_share=0, today=TODAY)
    done, wrong, calls = threading.Event(), [], [0, 0]

    def ask(reader):
        while not done.wait(0.001):
            snapshot = blocks.snapshot
            scores = blocks.scores("bob", [SAME, FAR])
            if blocks.allowed("bob", [SAME, FAR]) != [FAR] or not blocks.why("bob", SAME).blocked:
                wrong.append("mixed lists")
            if snapshot is blocks.snapshot and (scores >= blocks.threshold).tolist() != [1, 0]:
                wrong.append("scores of another list")
            calls[reader] += 1

    def refresh():
        while not done.wait(0.01):
            blocks.refresh()

    threads = [threading.Thread(target=ask, args=(reader,)) for reader in range(2)]
    threads += [threading.Thread(target=refresh) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = set()
    try:
        for revision in range(3, 7):
            publish(root, version, ITEMS, ENTRIES, score=(LOW, HIGH)[revision % 2], revision=revision)
            while blocks.snapshot.revision != revision and all(t.is_alive() for t in threads):
                time.sleep(0.005)
            seen.add(blocks.snapshot.revision)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert seen == set(range(3, 7))
    assert min(calls) > 0


# -------------------------------------------------------------------------------------- the tables


def test_the_block_score_of_a_version_is_read_back(copy):
    root, version = copy
    store = DeltaStore(root)
    first = store.version("block_score")
    write(store, "block_score", [score_row(HIGH)], DS, 2, Provenance(models={CODEBOOK: "other"}))
    score, models = load_block_score(store, DS, first)
    assert (score.intercept, score.threshold) == (PLAIN_SCORE.intercept, PLAIN_SCORE.threshold)
    assert score.coefficients.tolist() == PLAIN_SCORE.coefficients.tolist()
    assert models == {CODEBOOK: version}
    score, models = load_block_score(store, DS, store.version("block_score"))
    assert (score.intercept, models) == (HIGH.intercept, {CODEBOOK: "other"})


def test_ids_of_many_levels_are_told_apart(tmp_path):
    """Seven levels of 1,000 codes: more IDs than 64 bits can number."""
    codebook = small_codebook((1000,) * 7, dim=4)
    manifest = save_codebook(tmp_path, codebook)
    codes = np.random.default_rng(0).integers(1000, size=(50, 7))
    codes[1] = codes[0]
    codes[2, :6] = codes[0, :6]
    codes[3, 1:] = codes[0, 1:]
    rows = [tuple(row) for row in codes.tolist()]
    items = {f"i{n:02d}": row for n, row in enumerate(rows)}
    publish(tmp_path, manifest.version, items, {"ann": [Entry(row) for row in rows]})
    snapshot = load_snapshot(tmp_path, TODAY)
    np.testing.assert_array_equal(snapshot.codes, codes)
    np.testing.assert_array_equal(
        snapshot.entry_units(snapshot.span(snapshot.row_of("ann"))), codebook.unit(codes)
    )


def test_the_reader_needs_no_pandas(warehouse):
    """pyarrow imports pandas where it is there; a ranking service may do without."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'pandas':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import datetime as dt\n"
        "from negrec_core.blocklist import BlockList\n"
        f"blocks = BlockList.open({str(warehouse)!r}, today=dt.date(2026, 3, 11))\n"
        "print(blocks.allowed('bob', ['item 111', 'item 333']))\n"
        "print({'torch', 'pyspark', 'transformers', 'numba'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "set()"
