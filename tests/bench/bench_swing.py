"""The Swing kernel beside a Spark SQL join over user pairs and beside a kernel that merges users' rows.

    python tests/bench/bench_swing.py [--quick] [--edges 1000000 10000000 50000000]

The three give the same edges, which is checked. `--edges` are the sizes at which the kernel's growth
and memory are measured; each runs in a process of its own.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba as nb
import numpy as np
from common import Table, medians

from negrec_core.swing import InteractionIndex, SwingParams, balanced_ranges, build_index, swing_range

PARAMS = SwingParams(top_k=50, max_users_per_item=2000, max_items_per_user=1000)
# The baselines know no caps.
UNCAPPED = SwingParams(top_k=50, max_users_per_item=1 << 30, max_items_per_user=1 << 30)
THREADS = 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--edges", type=int, nargs="+", default=[1_000_000, 10_000_000, 50_000_000])
    options = arguments.parse_args()
    _against_spark(6_000 if options.quick else 40_000, rounds=1 if options.quick else 2)
    _against_merging(20_000 if options.quick else 100_000, rounds=1 if options.quick else 3)
    sizes = [100_000, 400_000] if options.quick else options.edges
    for edges in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(_growth, (edges,))


def draw(edges: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int, int]:
    """About `edges` (user, item) pairs: 20 of a user, 200 of an item, few items are popular.

    Two in three items are of the user's own circle, of 200 items, so that pairs of items share users.
    """
    rng = np.random.default_rng(seed)
    n_users, n_items = max(50, edges // 20), max(20, edges // 200)
    circle = min(n_items, 200)
    users = rng.integers(n_users, size=edges, dtype=np.int32)
    popular = rng.random(edges, np.float32) ** 2
    own = users % (n_items // circle) * circle + (circle * popular).astype(np.int32)
    items = np.where(rng.random(edges, np.float32) < 2 / 3, own, (n_items * popular).astype(np.int32))
    return users, np.minimum(items, n_items - 1).astype(np.int32), n_users, n_items


def index_of(
    users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, params: SwingParams
) -> InteractionIndex:
    keys = np.random.default_rng(1)
    top = np.iinfo(np.uint64).max
    return build_index(
        users,
        items,
        keys.integers(top, size=n_users, dtype=np.uint64),
        keys.integers(top, size=n_items, dtype=np.uint64),
        params,
    )


def kernel(index: InteractionIndex, params: SwingParams, threads: int = 1) -> int:
    """The number of all edges by the kernel."""
    with ThreadPoolExecutor(threads) as pool:
        ranges = balanced_ranges(index, 1 if threads == 1 else 4 * threads)
        return sum(len(found.score) for found in pool.map(lambda r: swing_range(index, *r, params), ranges))


def _against_merging(edges: int, rounds: int) -> None:
    index = index_of(*draw(edges), UNCAPPED)
    n = int(index.user_ptr[-1])
    ours, theirs = swing_range(index, 0, index.n_items, UNCAPPED), merging(index)
    np.testing.assert_allclose(np.sort(ours.score), np.sort(theirs), rtol=1e-9)
    seconds = medians({"kernel": lambda: kernel(index, UNCAPPED), "merging": lambda: merging(index)}, rounds)
    table = Table("swing", f"{n:,} edges, one thread")
    table.add("kernel", f"{seconds['kernel']:.2f} s")
    ratio = seconds["merging"] / seconds["kernel"]
    table.add("merge-intersect kernel", f"{seconds['merging']:.2f} s", f"{ratio:.0f} times the kernel's")
    table.print()


def merging(index: InteractionIndex) -> np.ndarray:
    """Scores of all edges, by intersecting the sorted rows of every two users of an item."""
    rows = np.concatenate([np.sort(part) for part in np.split(index.user_items, index.user_ptr[1:-1])])
    weight = (np.diff(index.user_ptr) + PARAMS.alpha1) ** -PARAMS.theta
    return _merge_all(
        index.user_ptr,
        rows,
        index.item_ptr,
        index.item_users,
        weight,
        PARAMS.alpha2,
        PARAMS.min_common_users,
        PARAMS.top_k,
    )


@nb.njit(cache=True)
def _merge_all(  # type: ignore[no-untyped-def]
    user_ptr, rows, item_ptr, item_users, weight, alpha2, min_common, top_k
):
    n_items = item_ptr.size - 1
    score, common = np.zeros(n_items), np.zeros(n_items, np.int32)
    out = [0.0 for _ in range(0)]
    for i in range(n_items):
        users = item_users[item_ptr[i] : item_ptr[i + 1]]
        if users.size <= min_common:
            continue
        score[:] = 0
        common[:] = 0
        for u in users:
            for j in rows[user_ptr[u] : user_ptr[u + 1]]:
                common[j] += 1
        for a in range(users.size):
            for b in range(a + 1, users.size):
                u, v = users[a], users[b]
                overlap = 0
                x, y = user_ptr[u], user_ptr[v]
                while x < user_ptr[u + 1] and y < user_ptr[v + 1]:
                    if rows[x] == rows[y]:
                        overlap += 1
                        x += 1
                        y += 1
                    elif rows[x] < rows[y]:
                        x += 1
                    else:
                        y += 1
                if overlap < 2:
                    continue
                part = 2 * weight[u] * weight[v] / (overlap + alpha2)
                x, y = user_ptr[u], user_ptr[v]
                while x < user_ptr[u + 1] and y < user_ptr[v + 1]:
                    if rows[x] == rows[y]:
                        score[rows[x]] += part
                        x += 1
                        y += 1
                    elif rows[x] < rows[y]:
                        x += 1
                    else:
                        y += 1
        found = [0.0 for _ in range(0)]
        for j in range(n_items):
            if j != i and common[j] > min_common and score[j] > 0:
                found.append(score[j] / np.sqrt(item_ptr[j + 1] - item_ptr[j]))
        found.sort()
        for k in range(max(0, len(found) - top_k), len(found)):
            out.append(found[k])
    return np.array(out)


_PAIR_JOIN = """
WITH weight AS (
  SELECT user, power(count(*) + {alpha1}, -{theta}) AS w FROM edges GROUP BY user
), pairs AS (
  SELECT a.user AS u, b.user AS v, a.item AS i
  FROM edges a JOIN edges b ON a.item = b.item AND a.user < b.user
), overlap AS (
  SELECT u, v, collect_list(i) AS items FROM pairs GROUP BY u, v HAVING count(*) > 1
), part AS (
  SELECT o.items, 2 * wu.w * wv.w / (size(o.items) + {alpha2}) AS part
  FROM overlap o JOIN weight wu ON wu.user = o.u JOIN weight wv ON wv.user = o.v
), both AS (
  SELECT i, explode(items) AS j, part FROM (SELECT explode(items) AS i, items, part FROM part)
), summed AS (
  SELECT i, j, sum(part) AS total FROM both WHERE i != j GROUP BY i, j
  HAVING count(*) >= {min_common} * ({min_common} + 1) / 2
), ranked AS (
  SELECT s.i, s.j, s.total / sqrt(n.users) AS score,
         row_number() OVER (PARTITION BY s.i ORDER BY s.total / sqrt(n.users) DESC, s.j) AS rank
  FROM summed s JOIN (SELECT item, count(*) AS users FROM edges GROUP BY item) n ON n.item = s.j
)
SELECT i, j, score FROM ranked WHERE rank <= {top_k}
"""


def _against_spark(edges: int, rounds: int) -> None:
    import pandas as pd

    from jobs.spark import open_session
    from negrec_core.config import load_config

    index = index_of(*draw(edges), UNCAPPED)
    n = int(index.user_ptr[-1])
    spark = open_session(load_config(environment={}).spark, "UTC", progress=False)
    users = np.repeat(np.arange(index.n_users), np.diff(index.user_ptr))
    frame = spark.createDataFrame(pd.DataFrame({"user": users, "item": index.user_items})).cache()
    frame.count()
    frame.createOrReplaceTempView("edges")
    query = _PAIR_JOIN.format(
        alpha1=PARAMS.alpha1,
        alpha2=PARAMS.alpha2,
        theta=PARAMS.theta,
        min_common=PARAMS.min_common_users,
        top_k=PARAMS.top_k,
    )

    def joined() -> Any:
        return spark.sql(query).toPandas()

    ours = swing_range(index, 0, index.n_items, UNCAPPED)
    np.testing.assert_allclose(np.sort(joined()["score"]), np.sort(ours.score), rtol=1e-9)
    seconds = medians({"kernel": lambda: kernel(index, UNCAPPED, THREADS), "join": joined}, rounds)
    spark.stop()
    table = Table("swing", f"{n:,} edges, {THREADS} threads")
    table.add("kernel", f"{seconds['kernel']:.3f} s")
    ratio = seconds["join"] / seconds["kernel"]
    table.add("Spark SQL pair join, local[2]", f"{seconds['join']:.1f} s", f"{ratio:.0f} times the kernel's")
    table.print()


def _growth(edges: int) -> None:
    users, items, n_users, n_items = draw(edges)
    kernel(index_of(*draw(2000), PARAMS), PARAMS)  # compiled, or loaded
    begin = time.perf_counter()
    index = index_of(users, items, n_users, n_items, PARAMS)
    built = time.perf_counter() - begin
    begin = time.perf_counter()
    found = kernel(index, PARAMS, THREADS)
    took = time.perf_counter() - begin
    kept = int(np.square(index.item_kept, dtype=np.int64).sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table = Table("swing", f"{int(index.user_ptr[-1]):,} edges, {THREADS} threads")
    table.add("index", f"{built:.1f} s", f"{n_users:,} users, {n_items:,} items")
    table.add(
        "kernel",
        f"{took:.1f} s",
        f"{1e9 * took / kept:.2f} ns for each of {kept:.2e} squared kept degrees; {found:,} neighbours",
    )
    table.add("peak memory", f"{peak:.2f} GiB", "the drawn log included")
    table.print()


if __name__ == "__main__":
    main()
