"""Gates before publishing: what a new block list must keep to (DESIGN section 10)."""

import datetime as dt
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from jobs.context import JobContext, log, read_files
from negrec_core.errors import ConfigError, GateError
from negrec_core.schemas import GATE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row

# A list with an illegal ID could not be loaded by a reader, so that gate cannot be overridden.
ILLEGAL = "illegal_ids"
ACCEPTABLE = ("users_covered", "entries_per_user", "likes_blocked", "category_blocked", "score_drift")
_AT_LEAST, _AT_MOST = "at least", "at most"
_DECILES = [n / 10 for n in range(1, 10)]


@dataclass(frozen=True)
class Gate:
    """One gate, judged.

    Attributes:
        name: what `--accept` calls it.
        value: what was measured; None where there was nothing to measure by, which passes.
        bound: whether the limit is the least or the most allowed.
        limit: what the value is held against.
        note: what the value is of.
    """

    name: str
    value: float | None
    bound: str
    limit: float
    note: str

    @property
    def passed(self) -> bool:
        if self.value is None:
            return True
        return self.value >= self.limit if self.bound == _AT_LEAST else self.value <= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: {self.note}"
        return f"{self.name} {self.value:.4g} ({self.bound} {self.limit:.4g}; {self.note})"


def check_acceptable(names: Collection[str]) -> None:
    """Raise ConfigError if a name is none of a gate that may be accepted."""
    for name in names:
        if name == ILLEGAL:
            raise ConfigError(
                f"gate {ILLEGAL} cannot be accepted: no reader could load the list; run the stage"
                " negative_item_set again with --force"
            )
        if name not in ACCEPTABLE:
            raise ConfigError(f"gate {name}: unknown; there are {', '.join(ACCEPTABLE)}")


def judge(
    ctx: JobContext, entries: "DataFrame", judged_by_list: Callable[["DataFrame"], "DataFrame"]
) -> list[Gate]:
    """Judge a list that is not published yet.

    Args:
        ctx: the run of the stage `block_list`.
        entries: rows of the new list.
        judged_by_list: (user_id, item_id, liked) -> (item_id, liked, blocked) by the new list.
    """
    n_users = entries.select("user_id").distinct().count()
    gates = [
        *_against(_list_before(ctx), entries, ctx),
        _entries_per_user(entries, n_users, ctx),
        *_blocked(ctx, judged_by_list, n_users),
    ]
    illegal = float(entries.where("score IS NULL").count())
    return [*gates, Gate(ILLEGAL, illegal, _AT_MOST, 0.0, "entries that are no item's ID")]


def require_passed(ctx: JobContext, gates: Sequence[Gate]) -> None:
    """Record the gates in the table `gate`, whatever they say, and stop if one failed.

    Raises:
        GateError: a gate failed that is not in `ctx.accept`; names all that failed.
    """
    failed = [gate for gate in gates if not gate.passed]
    accepted = [gate.name for gate in failed if gate.name in ctx.accept]
    revision = ctx.store.revision("gate", ctx.ds) + 1
    held = ctx.store.read("gate", days=[ctx.ds]).to_pylist()
    rows = [row for row in held if row["revision"] != ctx.revision]
    for gate in gates:
        judged = {"passed": gate.passed, "accepted": gate.name in accepted}
        rows.append({**asdict(gate), **judged, "revision": ctx.revision, "ds": ctx.ds})
    frame = pa.Table.from_pylist(rows, GATE.schema)
    ctx.store.write_arrow("gate", frame, {ctx.ds: revision}, ctx.provenance())
    log.info("gates of ds=%s: %s", ctx.ds, "; ".join(map(str, gates)))
    refused = [gate for gate in failed if gate.name not in accepted]
    if refused:
        override = " ".join(f"--accept {gate.name}" for gate in refused if gate.name in ACCEPTABLE)
        raise GateError(
            f"block_list ds={ctx.ds}: {len(refused)} of {len(gates)} gates failed:"
            f" {', '.join(map(str, refused))}; nothing was published, the list before stays; mend the"
            f" cause{f', or publish all the same with {override}' if override else ''}"
        )
    ctx.use_accepted(accepted)


def population_stability_index(before: np.ndarray, after: np.ndarray) -> float:
    """sum((p - q) ln(p / q)) over bins; 0 for equal shares, over 0.25 is commonly called a shift.

    Half a row is added to every bin, so that an empty one gives a large value and no infinite one.

    Args:
        before: rows in each bin, [bins].
        after: the same.
    """
    p, q = (counts + 0.5 for counts in (before, after))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def _list_before(ctx: JobContext) -> "DataFrame | None":
    """Rows of the newest list of an earlier day that still holds on `ds`."""
    first = dt.date.fromisoformat(ctx.ds) - dt.timedelta(days=ctx.config.block_list.valid_days)
    days = [day for day in ctx.store.days("block_list") if first.isoformat() <= day < ctx.ds]
    if not days:
        return None
    # Not through `ctx.read`: a list is held against this one, it is not made from it.
    return read_files(ctx.spark, ctx.store, "block_list", ctx.store.files("block_list", days[-1:]))


def _against(before: "DataFrame | None", entries: "DataFrame", ctx: JobContext) -> Iterator[Gate]:
    """What is judged by the list before."""
    from pyspark.sql import functions as F

    limits = ctx.config.gates
    if before is None:
        note = f"passed, there is no list of the {ctx.config.block_list.valid_days} days before"
        yield Gate("users_covered", None, _AT_LEAST, limits.min_users_covered, note)
        yield Gate("score_drift", None, _AT_MOST, limits.max_score_drift, note)
        return
    which = f"of the list of {before.select(F.max('ds')).collect()[0][0]}"
    users = before.select("user_id").distinct()
    n_before = users.count()
    kept = users.join(entries, "user_id", "left_semi").count()
    yield Gate(
        "users_covered",
        kept / n_before,
        _AT_LEAST,
        limits.min_users_covered,
        f"{kept:,} of {n_before:,} users {which}",
    )
    edges = sorted(set(before.approxQuantile("score", _DECILES, 0.001)))
    both = before.select("score", F.lit(0).alias("after")).unionByName(
        entries.select("score", F.lit(1).alias("after"))
    )
    counts = np.zeros((2, len(edges) + 1))
    over = sum((F.when(F.col("score") > edge, 1).otherwise(0) for edge in edges), F.lit(0))
    for row in both.groupBy("after", over.alias("bin")).count().collect():
        counts[row["after"], row["bin"]] = row["count"]
    drift = population_stability_index(*counts)
    note = f"index against the scores {which}"
    yield Gate("score_drift", drift, _AT_MOST, limits.max_score_drift, note)


def _entries_per_user(entries: "DataFrame", n_users: int, ctx: JobContext) -> Gate:
    most = ctx.config.generation.set_size
    mean = entries.count() / n_users if n_users else 0.0
    limit = ctx.config.gates.min_entries_per_user * most
    return Gate(
        "entries_per_user", mean, _AT_LEAST, limit, f"mean of {n_users:,} users, {most} are asked for"
    )


def blocked_by_category(
    ctx: JobContext, judged_by_list: Callable[["DataFrame"], "DataFrame"], n_users: int
) -> "list[Row]":
    """What a list would do to the exposures and likes of `ds` of about `gates.max_users` users.

    Args:
        ctx: the day.
        judged_by_list: (user_id, item_id, liked) -> (item_id, liked, blocked) by the list.
        n_users: users who have a list.

    Returns:
        Per top category, None for items without one: category, n (exposures, likes among them), blocked,
        likes, likes_blocked.
    """
    from pyspark.sql import functions as F

    shown = _day(ctx, "behavior_log").select("user_id", "item_id").distinct()
    liked = _day(ctx, "feedback").where("polarity = 1").select("user_id", "item_id").distinct()
    exposures = shown.withColumn("liked", F.lit(False)).unionByName(liked.withColumn("liked", F.lit(True)))
    exposures = (
        of_some_users(ctx, exposures, n_users)
        .groupBy("user_id", "item_id")
        .agg(F.max("liked").alias("liked"))
    )
    top = F.substring_index("category", "/", 1)
    days = [day for day in ctx.store.days("item") if day <= ctx.ds]
    items = read_files(ctx.spark, ctx.store, "item", ctx.store.files("item", days))
    categories = items.groupBy("item_id").agg(F.max_by(top, "ds").alias("category"))
    counted: list[Row] = (
        judged_by_list(exposures)
        .join(categories, "item_id", "left")
        .groupBy("category")
        .agg(
            F.count("*").alias("n"),
            F.count_if("blocked").alias("blocked"),
            F.count_if("liked").alias("likes"),
            F.count_if(F.col("liked") & F.col("blocked")).alias("likes_blocked"),
        )
        .collect()
    )
    return counted


def _blocked(
    ctx: JobContext, judged_by_list: Callable[["DataFrame"], "DataFrame"], n_users: int
) -> Iterator[Gate]:
    """What the list would do to the likes and the exposures of the last day."""
    limits = ctx.config.gates
    counts = blocked_by_category(ctx, judged_by_list, n_users)
    likes, likes_blocked = (sum(row[name] for row in counts) for name in ("likes", "likes_blocked"))
    yield Gate(
        "likes_blocked",
        likes_blocked / likes if likes else None,
        _AT_MOST,
        limits.max_likes_blocked,
        f"{likes_blocked:,} of {likes:,} likes" if likes else f"passed, there are no likes on {ctx.ds}",
    )
    judged = [row for row in counts if row["category"] and row["n"] >= limits.min_category_exposures]
    worst = max(judged, key=lambda row: (row["blocked"] / row["n"], row["category"]), default=None)
    yield Gate(
        "category_blocked",
        worst["blocked"] / worst["n"] if worst else None,
        _AT_MOST,
        limits.max_category_blocked,
        f"{worst['category']}, {worst['blocked']:,} of {worst['n']:,} exposures"
        if worst
        else f"passed, no category has {limits.min_category_exposures} exposures on {ctx.ds}",
    )


def _day(ctx: JobContext, table: str) -> "DataFrame":
    return read_files(ctx.spark, ctx.store, table, ctx.store.files(table, [ctx.ds]))


def of_some_users(ctx: JobContext, rows: "DataFrame", n_users: int) -> "DataFrame":
    """Rows of about `gates.max_users` of `n_users` users, chosen by hash."""
    from pyspark.sql import functions as F

    share = min(1.0, ctx.config.gates.max_users / max(n_users, 1))
    place = F.pmod(F.xxhash64(F.lit("gates"), F.col("user_id")), F.lit(1_000_000))
    return rows.where(place < round(share * 1_000_000))
