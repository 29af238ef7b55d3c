"""The Swing graph by a shared index against the oracle, and by shuffle against the first."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from oracles import Log, SwingOracle, make_log, random_log
from pyspark.sql import DataFrame

from jobs.context import spark_schema
from jobs.item_graph import item_graph
from negrec_core.config import SwingConfig
from negrec_core.swing import SwingParams

Frame = Callable[..., DataFrame]
Edge = tuple[str, str, float, int]

LOG = random_log(7, 100, 40, 1200)
UNCAPPED = SwingParams(min_common_users=2)
# Neither a user's nor an item's row is whole for most of the log.
CAPPED = replace(UNCAPPED, max_users_per_item=9, max_items_per_user=8)
BY_INDEX, BY_SHUFFLE = 10**6, 1


def config(params: SwingParams, max_edges_in_memory: int) -> SwingConfig:
    return SwingConfig(**asdict(params), max_edges_in_memory=max_edges_in_memory)


def dislikes(frame: Frame, log: Log) -> DataFrame:
    """The log with the ids that its hash orders were made of; `item-10` comes before `item-2`."""
    users, items, _, _ = log
    pairs = zip(users.tolist(), items.tolist(), strict=True)
    return frame("feedback", [{"user_id": f"user-{u}", "item_id": f"item-{i}"} for u, i in pairs])


def edges(graph: DataFrame) -> list[Edge]:
    rows = graph.toArrow().to_pydict()
    return sorted(zip(*(rows[c] for c in ("item_id", "neighbor_id", "score", "rank")), strict=True))


def ranked(scores: dict[tuple[str, str], float]) -> Iterator[tuple[str, str, int]]:
    """Edges with their ranks: by falling score, then rising id."""
    rank: dict[str, int] = defaultdict(int)
    for item, neighbor in sorted(scores, key=lambda pair: (-scores[pair], pair)):
        rank[item] += 1
        yield item, neighbor, rank[item]


@pytest.mark.parametrize("params", [UNCAPPED, CAPPED], ids=["uncapped", "capped"])
def test_index_equals_oracle(frame: Frame, tmp_path: Path, params: SwingParams) -> None:
    found = edges(item_graph(dislikes(frame, LOG), config(params, BY_INDEX), tmp_path))
    oracle = SwingOracle(LOG, params).scores()
    expected = {(f"item-{i}", f"item-{j}"): score for (i, j), score in oracle.items()}
    scores = {(item, neighbor): score for item, neighbor, score, _ in found}
    assert len(expected) > 500
    assert scores == pytest.approx(expected, rel=1e-12)
    assert [(i, j, rank) for i, j, _, rank in found] == sorted(ranked(scores))


@pytest.mark.parametrize(
    "params",
    [
        UNCAPPED,
        replace(UNCAPPED, max_users_per_item=9, top_k=5),
        replace(CAPPED, min_common_users=5),
    ],
    ids=["uncapped", "users capped", "both capped"],
)
def test_shuffle_equals_index(
    frame: Frame, tmp_path: Path, params: SwingParams, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="negrec")
    log = dislikes(frame, LOG)
    by_index = edges(item_graph(log, config(params, BY_INDEX), tmp_path / "index"))
    reported = caplog.messages.copy()
    caplog.clear()
    assert len(by_index) > 100
    assert edges(item_graph(log, config(params, BY_SHUFFLE), tmp_path / "shuffle")) == by_index
    assert caplog.messages == reported


@pytest.mark.parametrize("route", [BY_INDEX, BY_SHUFFLE])
def test_repeats_do_not_matter_and_the_lower_id_wins_ties(frame: Frame, tmp_path: Path, route: int) -> None:
    log = dislikes(frame, make_log([(u, i) for u in range(3) for i in range(11)], 3, 11))
    settings = config(replace(UNCAPPED, top_k=3), route)
    found = edges(item_graph(log.union(log), settings, tmp_path))
    assert [(i, j, rank) for i, j, _, rank in found if i in ("item-10", "item-9")] == [
        ("item-10", "item-0", 1),
        ("item-10", "item-1", 2),
        ("item-10", "item-2", 3),
        ("item-9", "item-0", 1),
        ("item-9", "item-1", 2),
        ("item-9", "item-10", 3),
    ]
    # Six ordered pairs of users with 11 items each, 11 of them common.
    score = 6 * (11 + 5) ** -0.6 / (11 + 1) / 3**0.5
    assert [s for _, _, s, _ in found] == pytest.approx([score] * 33, rel=1e-12)


@pytest.mark.parametrize(
    ("pairs", "route"), [([], BY_INDEX), ([(0, 0), (1, 1)], BY_SHUFFLE)], ids=["index", "shuffle"]
)
def test_no_neighbours_give_an_empty_table_of_the_declared_columns(
    frame: Frame, tmp_path: Path, pairs: list[tuple[int, int]], route: int
) -> None:
    log = dislikes(frame, make_log(pairs, 2, 2))
    graph = item_graph(log, config(UNCAPPED, route), tmp_path)
    declared = spark_schema("item_graph", body_only=True)
    assert [(f.name, f.dataType) for f in graph.schema] == [(f.name, f.dataType) for f in declared]
    assert edges(graph) == []


def test_capped_items_are_reported(frame: Frame, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    oracle = SwingOracle(LOG, CAPPED)
    capped = [i for i, row in oracle.users_of.items() if len(oracle.kept_users[i]) < len(row)]
    assert 0 < len(capped) < len(oracle.users_of)
    caplog.set_level(logging.INFO, logger="negrec")
    item_graph(dislikes(frame, LOG), config(UNCAPPED, BY_INDEX), tmp_path / "uncapped")
    assert not caplog.messages
    item_graph(dislikes(frame, LOG), config(CAPPED, BY_INDEX), tmp_path / "capped")
    (message,) = caplog.messages
    assert f"{len(capped)} of {len(oracle.users_of)} items" in message


def test_the_number_of_distinct_pairs_chooses_the_route(frame: Frame, tmp_path: Path) -> None:
    log = dislikes(frame, make_log([(u, i) for u in range(4) for i in range(3)], 4, 3))
    item_graph(log.union(log), config(UNCAPPED, 12), tmp_path / ".fits")
    assert (tmp_path / ".fits" / "index").exists()
    item_graph(log, config(UNCAPPED, 11), tmp_path / "exceeds")
    assert not (tmp_path / "exceeds" / "index").exists()
