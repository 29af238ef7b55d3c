"""Stage `item_graph`: the Swing graph from negative feedback (DESIGN section 4)."""

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather
from pyarrow import parquet as pq

from jobs.anchors import visible
from jobs.context import JobContext
from jobs.objects import read_objects, write_objects
from negrec_core.config import SwingConfig
from negrec_core.storage import ObjectPath, Place, data_files, delete_folder

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from negrec_core.swing import SwingParams

log = logging.getLogger("negrec")

_BATCH_ROWS = 100_000


def item_graph(dislikes: "DataFrame", settings: SwingConfig, shared: Place) -> "DataFrame":
    """Swing neighbours of every item: (item_id, neighbor_id, score, rank).

    Up to `max_edges_in_memory` distinct (user, item) pairs every executor maps one index into
    memory and takes a share of its items; beyond that, users' rows are shuffled to the items they
    hold. Both give the same graph. From an object store nothing can be mapped, so there it is always
    the second.

    Args:
        dislikes: (user_id, item_id) of negative feedback; repeats are ignored.
        settings: parameters of the formula.
        shared: an empty directory that driver and executors can read and write. The frame returned
            reads from it.
    """
    from negrec_core.swing import SwingParams

    params = SwingParams(**settings.model_dump(exclude={"max_edges_in_memory"}))
    pairs = _stored(dislikes.select("user_id", "item_id").distinct(), shared / "pairs")
    if isinstance(shared, Path) and pairs.count() <= settings.max_edges_in_memory:
        return _graph_by_index(pairs.sparkSession, shared, params)
    return _graph_by_shuffle(pairs, shared, params)


def _stored(frame: "DataFrame", path: Place) -> "DataFrame":
    """Write an intermediate result that is used more than once, and read it back."""
    if isinstance(path, ObjectPath):
        from pyspark.sql.pandas.types import to_arrow_schema

        schema = to_arrow_schema(frame.schema)
        write_objects(frame, path, schema)
        return read_objects(frame.sparkSession, list(map(str, data_files("item_graph", path))), schema)
    frame.write.parquet(str(path))
    return frame.sparkSession.read.schema(frame.schema).parquet(str(path))


def _report_caps(capped: int, total: int) -> None:
    if capped:
        log.info(
            "item_graph: %d of %d items have more users or busier users than the caps; their"
            " sums use a sample",
            capped,
            total,
        )


# --- one index for all executors


def _graph_by_index(spark: "SparkSession", shared: Path, params: "SwingParams") -> "DataFrame":
    """The graph from `shared/pairs`, indexed by the driver."""
    from negrec_core.swing import balanced_ranges, build_index, save_index, stable_hash64

    user_numbers, users = _numbered(shared / "pairs", "user_id")
    item_numbers, items = _numbered(shared / "pairs", "item_id")
    index = build_index(
        user_numbers,
        item_numbers,
        stable_hash64(users.to_pylist()),
        stable_hash64(items.to_pylist()),
        params,
    )
    _report_caps(len(index.capped_items), index.n_items)
    save_index(index, shared / "index")
    feather.write_feather(pa.table({"item_id": items}), str(shared / "items.feather"))
    ranges = balanced_ranges(index, spark.sparkContext.defaultParallelism * 4)
    parts = max(1, len(ranges))
    return spark.range(0, len(ranges), numPartitions=parts).mapInArrow(
        _edges_of_ranges(ranges, shared, params),
        "item_id string, neighbor_id string, score double, rank int",
    )


def _numbered(path: Path, column: str) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """Numbers of a stored column in the order of its ids: equal scores rank the lower id first."""
    ids = pq.read_table(path, columns=[column])[column]
    distinct = pc.unique(ids).sort()
    return pc.index_in(ids, distinct).to_numpy(), distinct


def _edges_of_ranges(
    ranges: list[tuple[int, int]], shared: Path, params: "SwingParams"
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def edges(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from negrec_core.swing import load_index, swing_range

        index = load_index(shared / "index")
        names = feather.read_table(str(shared / "items.feather"))["item_id"].combine_chunks()
        for batch in batches:
            for which in batch["id"].to_pylist():
                start, stop = ranges[which]
                found = swing_range(index, start, stop, params)
                for at in range(0, len(found.item), _BATCH_ROWS):
                    item, neighbor, score, rank = (c[at : at + _BATCH_ROWS] for c in found)
                    yield pa.record_batch(
                        {
                            "item_id": names.take(pa.array(item)),
                            "neighbor_id": names.take(pa.array(neighbor)),
                            "score": score,
                            "rank": rank,
                        }
                    )

    return edges


# --- rows shuffled to the items


def _graph_by_shuffle(pairs: "DataFrame", shared: Place, params: "SwingParams") -> "DataFrame":
    """The graph without anything that one machine must hold.

    An anchor gets the kept rows of its kept users (in all the sum of |I(u)|^2 within the caps), and
    of what the caps leave out only how many users it shares with each item.
    """
    from pyspark.sql import functions as F

    items = _stored(_numbered_items(pairs), shared / "items")
    users = _stored(_rows_by_user(pairs, items), shared / "users")
    edges = _stored(_cap(users, params), shared / "edges")
    _report_caps(edges.where("NOT kept").select("item").distinct().count(), items.count())
    graph = (
        _kept_rows(edges, users, params)
        .groupBy("anchor")
        .cogroup(_rest(edges, users, params).groupBy("anchor"))
        .applyInArrow(_edges_of_anchor(params), "anchor int, neighbor int, score double, rank int")
    )
    anchors = items.select(F.col("item").alias("anchor"), "item_id")
    neighbors = items.select(F.col("item").alias("neighbor"), F.col("item_id").alias("neighbor_id"))
    named = graph.join(anchors, "anchor").join(neighbors, "neighbor")
    return named.select("item_id", "neighbor_id", "score", "rank")


def _numbered_items(pairs: "DataFrame") -> "DataFrame":
    """(item_id, item, n_users, place): numbers in the order of the ids, |U(i)|, hash order."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    return (
        pairs.groupBy("item_id")
        .agg(F.count("*").cast("int").alias("n_users"))
        .withColumn("item", F.row_number().over(Window.orderBy("item_id")))
        .withColumn("place", _place("item_id"))
    )


def _rows_by_user(pairs: "DataFrame", items: "DataFrame") -> "DataFrame":
    """(user_id, place, row): hash order, and (item, n_users) of I(u) in the items' hash order."""
    from pyspark.sql import functions as F

    entries = F.sort_array(F.collect_list(F.struct("place", "item", "n_users")))
    return (
        pairs.join(items, "item_id")
        .groupBy("user_id")
        .agg(F.transform(entries, lambda entry: entry.dropFields("place")).alias("row"))
        .withColumn("place", _place("user_id"))
    )


def _cap(users: "DataFrame", params: "SwingParams") -> "DataFrame":
    """(item, n_users, user_id, busy, kept) of every pair.

    `busy`: the user has more items than the cap. `kept`: the item's sums take the user in.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    in_hash_order = Window.partitionBy("item").orderBy("dropped", "place")
    kept = ~F.col("dropped") & (F.row_number().over(in_hash_order) <= params.max_users_per_item)
    return (
        users.withColumn("busy", F.size("row") > params.max_items_per_user)
        .select("user_id", "place", "busy", F.posexplode("row").alias("at", "entry"))
        .withColumn("dropped", F.col("at") >= params.max_items_per_user)
        .select("user_id", "place", "busy", "dropped", "entry.*")
        .select("item", "n_users", "user_id", "busy", kept.alias("kept"))
    )


def _kept_rows(edges: "DataFrame", users: "DataFrame", params: "SwingParams") -> "DataFrame":
    """(anchor, place, degree, items, item_users): one row per kept user of an anchor."""
    from pyspark.sql import functions as F

    head = F.slice("row", 1, params.max_items_per_user)
    rows = users.select(
        "user_id",
        "place",
        F.size("row").alias("degree"),
        head["item"].alias("items"),
        head["n_users"].alias("item_users"),
    )
    # No pair of items has more common users than either item has users.
    return (
        edges.where(F.col("kept") & (F.col("n_users") > params.min_common_users))
        .select(F.col("item").alias("anchor"), "user_id")
        .join(rows, "user_id")
        .drop("user_id")
    )


def _rest(edges: "DataFrame", users: "DataFrame", params: "SwingParams") -> "DataFrame":
    """(anchor, item, common): how many users the two share outside the anchor's kept rows."""
    from pyspark.sql import functions as F

    frequent = F.col("n_users") > params.min_common_users
    tail = F.slice("row", params.max_items_per_user + 1, F.size("row"))
    left_out = F.when(F.col("kept"), tail).otherwise(F.col("row"))
    return (
        edges.where(frequent & (~F.col("kept") | F.col("busy")))
        .select(F.col("item").alias("anchor"), "user_id", "kept")
        .join(users, "user_id")
        .select("anchor", F.explode(left_out).alias("entry"))
        .select("anchor", "entry.*")
        .where(frequent)
        .groupBy("anchor", "item")
        .agg(F.count("*").cast("int").alias("common"))
    )


def _place(ids: str) -> "Column":
    """Place of the ids in a column in hash order: `stable_hash64` made signed, order kept."""
    from pyspark.sql.functions import arrow_udf

    def signed(ids: pa.Array) -> pa.Array:
        from negrec_core.swing import stable_hash64

        return pa.array((stable_hash64(ids.to_pylist()) ^ np.uint64(1 << 63)).view(np.int64))

    # The declared overloads do not know that the kind of a function is read off its type hints.
    return arrow_udf(signed, "long")(ids)  # pyrefly: ignore[no-matching-overload]


def _edges_of_anchor(
    params: "SwingParams",
) -> Callable[[tuple[Any, ...], pa.Table, pa.Table], pa.Table]:
    def edges(key: tuple[Any, ...], rows: pa.Table, rest: pa.Table) -> pa.Table:
        from negrec_core.swing import swing_anchor_rows

        rows = rows.sort_by("place").combine_chunks()
        lengths = pc.list_value_length(rows["items"]).to_numpy()
        found = swing_anchor_rows(
            key[0].as_py(),
            np.concatenate([[0], np.cumsum(lengths)]),
            pc.list_flatten(rows["items"]).to_numpy(),
            pc.list_flatten(rows["item_users"]).to_numpy(),
            rows["degree"].to_numpy(),
            rest["item"].to_numpy(),
            rest["common"].to_numpy(),
            params,
        )
        return pa.table(dict(zip(("anchor", "neighbor", "score", "rank"), found, strict=True)))

    return edges


def run(ctx: JobContext) -> None:
    dislikes = visible(ctx, ctx.read_window("feedback")).where("polarity = -1")
    # Under the warehouse, because executors on other machines must see it.
    shared = ctx.store.root / f".swing-{uuid.uuid4().hex[:8]}"
    if isinstance(shared, Path):
        shared.mkdir(mode=0o700, parents=True)
    try:
        ctx.write("item_graph", item_graph(dislikes, ctx.config.swing, shared))
    finally:
        delete_folder(shared)
