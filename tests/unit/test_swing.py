"""Swing against loops over the formula, and the properties that caps and ranges must keep."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Log, Scores, SwingOracle, make_log, random_log

from negrec_core import swing
from negrec_core.errors import ArtefactError, ConfigError, InputError, MissingError
from negrec_core.swing import InteractionIndex, SwingEdges, SwingParams

UNCAPPED = SwingParams(min_common_users=1, top_k=1000)
CAPPED = replace(UNCAPPED, max_users_per_item=3, max_items_per_user=4)


def graph(log: Log, params: SwingParams) -> SwingEdges:
    index = swing.build_index(*log, params)
    return swing.swing_range(index, 0, index.n_items, params)


def as_scores(edges: SwingEdges) -> Scores:
    keys = zip(edges.item.tolist(), edges.neighbor.tolist(), strict=True)
    return dict(zip(keys, edges.score.tolist(), strict=True))


def assert_same(left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    """Equal arrays of equal types, bit for bit."""
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@st.composite
def logs(draw: st.DrawFn) -> Log:
    n_users, n_items = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    edge = st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1))
    return make_log(draw(st.lists(edge, max_size=90)), n_users, n_items)


some_params = st.builds(
    SwingParams,
    alpha1=st.sampled_from([0.0, 5.0]),
    alpha2=st.sampled_from([0.0, 1.0, 2.5]),
    theta=st.sampled_from([0.0, 0.3, 1.0]),
    min_common_users=st.integers(0, 5),
    top_k=st.just(1000),
    max_users_per_item=st.sampled_from([1, 2, 3, 5, 1000]),
    max_items_per_user=st.sampled_from([1, 2, 3, 5, 1000]),
)


# --- the numbers


def test_formula_by_hand() -> None:
    # w = 1/2 for users 0 and 1, who share two items: 2 ordered pairs * 1/4 / (2 + 1) = 1/6.
    log = make_log([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)], 3, 2)
    edges = graph(log, SwingParams(alpha1=0, alpha2=1, theta=1, min_common_users=1))
    assert edges.item.tolist() == [0, 1]
    assert edges.neighbor.tolist() == [1, 0]
    assert edges.rank.tolist() == [1, 1]
    np.testing.assert_allclose(edges.score, [1 / 6 / 2**0.5, 1 / 6 / 3**0.5], rtol=1e-14)


def test_default_needs_more_than_five_common_users() -> None:
    def both_items(n_users: int) -> Log:
        return make_log([(u, i) for u in range(n_users) for i in range(2)], n_users, 2)

    assert len(graph(both_items(5), SwingParams()).item) == 0
    assert len(graph(both_items(6), SwingParams()).item) == 2


@settings(deadline=None, max_examples=200)
@given(logs(), some_params)
def test_equals_oracle(log: Log, params: SwingParams) -> None:
    expected = SwingOracle(log, params).scores()
    found = as_scores(graph(log, params))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "params",
    [
        SwingParams(),
        UNCAPPED,
        SwingParams(max_users_per_item=12, max_items_per_user=12),
        replace(UNCAPPED, max_users_per_item=9, max_items_per_user=9),
    ],
)
def test_equals_oracle_on_a_larger_log(params: SwingParams) -> None:
    log = random_log(7, 100, 40, 1200)
    expected = SwingOracle(log, params).scores()
    found = as_scores(graph(log, params))
    assert len(expected) > 100
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(logs(), st.integers(1, 4))
def test_top_k_is_the_head_of_the_whole_ranking(log: Log, top_k: int) -> None:
    whole = graph(log, UNCAPPED)
    order = np.lexsort((whole.neighbor, -whole.score, whole.item))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    head = whole.rank <= top_k
    expected = SwingEdges(*(column[head] for column in whole))
    assert_same(graph(log, replace(UNCAPPED, top_k=top_k)), expected)


def test_equal_scores_rank_the_lower_item_first() -> None:
    log = make_log([(u, i) for u in range(4) for i in range(6)], 4, 6)
    edges = graph(log, replace(UNCAPPED, top_k=3))
    assert edges.neighbor.reshape(6, 3).tolist() == [[j for j in range(6) if j != i][:3] for i in range(6)]
    assert edges.rank.reshape(6, 3).tolist() == [[1, 2, 3]] * 6


# --- what must not matter


@settings(deadline=None)
@given(logs(), some_params, st.integers(0, 2**32 - 1))
def test_numbering_order_and_repeats_do_not_matter(log: Log, params: SwingParams, seed: int) -> None:
    users, items, user_keys, item_keys = log
    rng = np.random.default_rng(seed)
    new_user, new_item = rng.permutation(len(user_keys)), rng.permutation(len(item_keys))
    mix = rng.permutation(np.tile(np.arange(len(users)), 2))
    renumbered = (
        new_user[users[mix]],
        new_item[items[mix]],
        user_keys[np.argsort(new_user)],
        item_keys[np.argsort(new_item)],
    )
    expected = {
        (int(new_item[i]), int(new_item[j])): score for (i, j), score in as_scores(graph(log, params)).items()
    }
    assert as_scores(graph(renumbered, params)) == expected


@settings(deadline=None)
@given(logs(), some_params, st.lists(st.integers(0, 8), max_size=4))
def test_ranges_do_not_matter(log: Log, params: SwingParams, cuts: list[int]) -> None:
    index = swing.build_index(*log, params)
    bounds = sorted([0, *(min(c, index.n_items) for c in cuts), index.n_items])
    parts = [swing.swing_range(index, start, stop, params) for start, stop in pairwise(bounds)]
    joined = tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
    assert_same(joined, graph(log, params))


@settings(deadline=None)
@given(logs(), some_params)
def test_a_higher_threshold_only_removes_edges(log: Log, params: SwingParams) -> None:
    low = as_scores(graph(log, params))
    high = as_scores(graph(log, replace(params, min_common_users=params.min_common_users + 1)))
    assert high.items() <= low.items()


# --- caps


@settings(deadline=None)
@given(logs())
def test_caps_that_nothing_reaches_change_nothing(log: Log) -> None:
    loose = replace(UNCAPPED, max_users_per_item=12, max_items_per_user=8)
    index = swing.build_index(*log, loose)
    assert index.capped_items.size == index.capped_users.size == 0
    assert_same(graph(log, loose), graph(log, UNCAPPED))


@settings(deadline=None)
@given(logs(), some_params)
def test_capped_items_and_users_are_reported(log: Log, params: SwingParams) -> None:
    oracle = SwingOracle(log, params)
    index = swing.build_index(*log, params)
    assert index.capped_items.tolist() == sorted(
        i for i, row in oracle.users_of.items() if len(oracle.kept_users[i]) < len(row)
    )
    assert index.capped_users.tolist() == sorted(
        u for u, row in oracle.items_of.items() if len(row) > params.max_items_per_user
    )


def test_threshold_weights_and_popularity_use_the_whole_log() -> None:
    # Six users share items 0 and 1; three of them are kept: six ordered pairs instead of thirty.
    log = make_log([(u, i) for u in range(6) for i in range(2)], 6, 2)
    params = SwingParams(alpha1=0, alpha2=1, theta=1, min_common_users=5, max_users_per_item=3)
    np.testing.assert_allclose(graph(log, params).score, [6 / 4 / 3 / 6**0.5] * 2, rtol=1e-14)


def test_a_capped_anchor_keeps_the_order_of_its_neighbours() -> None:
    # Neighbour 1 shares all users of anchor 0 and has as many others, neighbour 2 shares half.
    edges = [(u, i) for u in range(200) for i in (0, 1)]
    edges += [(u, 2) for u in range(0, 200, 2)] + [(u, 1) for u in range(200, 400)]
    log = make_log(edges, 400, 3)
    for cap in (40, 1000):
        found = graph(log, replace(UNCAPPED, max_users_per_item=cap))
        assert found.neighbor[found.item == 0].tolist() == [1, 2]


# --- one anchor at a time


@settings(deadline=None)
@given(logs(), some_params, st.integers(1, 10))
def test_anchor_rows_equal_the_index(log: Log, params: SwingParams, top_k: int) -> None:
    params = replace(params, top_k=top_k)
    oracle = SwingOracle(log, params)
    item_keys = log[3]
    parts = []
    for i in range(len(item_keys)):
        sample = oracle.kept_users.get(i, [])
        rows = [sorted(oracle.kept_items[u]) for u in sample]
        items = [j for row in rows for j in row]
        rest = {j: len(oracle.users_of.get(i, set()) & row) for j, row in oracle.users_of.items()}
        for j in items:
            rest[j] -= 1
        others = [j for j, count in rest.items() if count > 0]
        parts.append(
            swing.swing_anchor_rows(
                i,
                np.cumsum([0, *map(len, rows)]),
                np.array(items, dtype=np.int64),
                np.array([len(oracle.users_of[j]) for j in items], dtype=np.int64),
                np.array([len(oracle.items_of[u]) for u in sample], dtype=np.int64),
                np.array(others, dtype=np.int64),
                np.array([rest[j] for j in others], dtype=np.int64),
                params,
            )
        )
    joined = tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
    assert_same(joined, graph(log, params))


@pytest.mark.parametrize(("anchor", "row_items"), [(7, [5, 9, 5, 9]), (9, [5, 9, 5, 8]), (10, [5, 9, 5, 9])])
def test_anchor_rows_without_the_anchor_are_refused(anchor: int, row_items: list[int]) -> None:
    with pytest.raises(InputError, match=f"anchor {anchor}: a row does not hold it"):
        swing.swing_anchor_rows(
            anchor,
            row_ptr=np.array([0, 2, 4]),
            row_items=np.array(row_items),
            row_item_users=np.array([4, 4, 4, 4]),
            user_degrees=np.array([2, 2]),
            rest_items=np.array([], dtype=np.int64),
            rest_users=np.array([], dtype=np.int64),
            params=UNCAPPED,
        )


# --- ranges of equal work


@settings(deadline=None)
@given(logs(), some_params, st.integers(1, 12))
def test_balanced_ranges_cover_everything_once(log: Log, params: SwingParams, parts: int) -> None:
    index = swing.build_index(*log, params)
    ranges = swing.balanced_ranges(index, parts)
    assert 1 <= len(ranges) <= parts
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(index.n_items))
    assert all(start < stop for start, stop in ranges)
    work = index.item_kept.astype(int) ** 2 + 1
    for start, stop in ranges:
        assert work[start:stop].sum() <= work.sum() / parts + work.max()


# --- edges of the input


def test_empty_log() -> None:
    empty = np.array([], dtype=np.int64)
    for n_users, n_items in ((0, 0), (3, 0), (0, 3), (3, 4)):
        log = make_log([], n_users, n_items)
        index = swing.build_index(*log, UNCAPPED)
        assert (index.n_users, index.n_items) == (n_users, n_items)
        edges = graph(log, UNCAPPED)
        assert [len(column) for column in edges] == [0, 0, 0, 0]
        bounds = [i for r in swing.balanced_ranges(index, 3) for i in range(*r)]
        assert bounds == list(range(n_items))
    start = np.zeros(1, dtype=np.int64)
    rows = swing.swing_anchor_rows(3, start, empty, empty, empty, empty, empty, UNCAPPED)
    assert_same(rows, edges)


def test_one_user_makes_no_edge() -> None:
    log = make_log([(0, i) for i in range(5)], 1, 5)
    assert len(graph(log, replace(UNCAPPED, min_common_users=0)).item) == 0


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        ([0, 1], [0], "2 users for 1 items"),
        ([0, 2], [0, 0], r"user index outside 0\.\.1"),
        ([0, 0], [0, -1], r"item index outside 0\.\.2"),
    ],
)
def test_wrong_logs_are_refused(users: list[int], items: list[int], message: str) -> None:
    _, _, user_keys, item_keys = make_log([], 2, 3)
    with pytest.raises(InputError, match=message):
        swing.build_index(np.array(users), np.array(items), user_keys, item_keys, UNCAPPED)


@pytest.mark.parametrize(
    "wrong",
    [{"alpha1": -1.0}, {"alpha2": float("nan")}, {"theta": -0.1}, {"min_common_users": -1}]
    + [{name: 0} for name in ("top_k", "max_users_per_item", "max_items_per_user")],
)
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"swing.{next(iter(wrong))} is"):
        SwingParams(**wrong)  # type: ignore[arg-type]


def test_range_must_fit_the_index() -> None:
    index = swing.build_index(*random_log(1, 9, 5, 30), UNCAPPED)
    for start, stop in ((-1, 3), (0, 6), (4, 3)):
        with pytest.raises(ValueError, match="of 5"):
            swing.swing_range(index, start, stop, UNCAPPED)
    with pytest.raises(ConfigError, match="built with caps"):
        swing.swing_range(index, 0, 5, CAPPED)


# --- files


def test_saved_index_is_the_same(tmp_path: Path) -> None:
    index = swing.build_index(*random_log(2, 60, 20, 500), CAPPED)
    swing.save_index(index, tmp_path / "a" / "index")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["index"]
    loaded = swing.load_index(tmp_path / "a" / "index")
    assert_same(loaded, index)
    assert isinstance(loaded.item_users.base, np.memmap)
    assert not any(array.flags.writeable for array in (*index, *loaded))
    assert len(swing.swing_range(loaded, 0, 20, CAPPED).item) > 0
    assert_same(swing.swing_range(loaded, 0, 20, CAPPED), swing.swing_range(index, 0, 20, CAPPED))
    with pytest.raises(OSError, match="index"):
        swing.save_index(index, tmp_path / "a" / "index")


def test_saved_empty_index_is_the_same(tmp_path: Path) -> None:
    index = swing.build_index(*make_log([], 2, 3), UNCAPPED)
    swing.save_index(index, tmp_path / "index")
    assert_same(swing.load_index(tmp_path / "index"), index)


def test_broken_index_is_refused(tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        swing.save_index(index, tmp_path / name)
        return tmp_path / name

    index: InteractionIndex = swing.build_index(*random_log(3, 60, 20, 500), UNCAPPED)
    path = saved("missing")
    (path / "item_ptr.npy").unlink()
    with pytest.raises(MissingError, match=r"no item_ptr\.npy"):
        swing.load_index(path)

    path = saved("cut")
    content = (path / "item_users.npy").read_bytes()
    (path / "item_users.npy").write_bytes(content[:-4])
    with pytest.raises(ArtefactError, match=r"item_users\.npy is not readable"):
        swing.load_index(path)

    path = saved("pickled")
    np.save(path / "user_items.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtefactError, match=r"user_items\.npy is not readable"):
        swing.load_index(path)

    path = saved("mixed")
    np.save(path / "item_users.npy", index.item_users[:-1])
    with pytest.raises(ArtefactError, match="do not fit together"):
        swing.load_index(path)


def test_stable_hash_never_changes() -> None:
    assert swing.stable_hash64(["", "user-1", "ü"]).tolist() == [
        13020603013274838756,
        9863422088627006618,
        3976460501203677525,
    ]
    assert swing.stable_hash64([]).tolist() == []
    assert swing.stable_hash64([]).dtype == np.uint64
