"""A sample of users: what they disliked, what is predicted and why, what happened next."""

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.block_list import judged_exposures
from jobs.context import JobContext, run_sql
from jobs.report.figures import feedback_after, made_from, require
from jobs.report.markup import Element, el, named, table
from negrec_core.errors import MissingError
from negrec_core.generator import CODEBOOK
from negrec_core.items import load_items
from negrec_core.semantic_ids import load_semantic_ids

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SHOWN = 8


@dataclass(frozen=True)
class Entry:
    """A predicted semantic ID of a user.

    Attributes:
        rank, score: as published.
        titles: of the items that have the ID.
        because: title of the past dislike nearest to it.
        similarity: cosine to that.
        reason: class of the reason given with it.
    """

    rank: int
    score: float
    titles: list[str]
    because: str | None
    similarity: float | None
    reason: str | None


@dataclass(frozen=True)
class Event:
    """Something a user liked or disliked: title, when, reason class, whether the list blocks it."""

    title: str
    category: str
    when: dt.datetime
    reason: str | None = None
    liked: bool = False
    blocked: bool = False


@dataclass(frozen=True)
class User:
    """One user of the sample, with the newest dislikes, the first entries, and what came next."""

    user_id: str
    disliked: list[Event]
    n_disliked: int
    entries: list[Entry]
    n_entries: int
    later: list[Event]
    n_later: int


def sample_of_users(ctx: JobContext, n: int) -> list[User]:
    """Users with a list, by the hash of their id; of those with later feedback where there is any."""
    from pyspark.sql import functions as F

    require(ctx, "block_list")
    listed = ctx.read("block_list", [ctx.ds])
    try:
        after = feedback_after(ctx)
    except MissingError:
        after = ctx.empty("feedback").select("user_id", "item_id", "event_time", "polarity")
    users = listed.select("user_id").distinct()
    in_order = [F.xxhash64(F.lit("report"), F.col("user_id")), F.col("user_id")]
    chosen: list[str] = []
    for frame in (users.join(after, "user_id", "left_semi"), users):
        if not chosen:
            chosen = [row["user_id"] for row in frame.orderBy(*in_order).limit(n).collect()]

    def theirs(frame: "DataFrame", *columns: str) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {user: [] for user in chosen}
        for row in frame.where(F.col("user_id").isin(chosen)).select("user_id", *columns).collect():
            found[row["user_id"]].append(row)
        return found

    contexts = theirs(ctx.read("user_context", [ctx.ds]), "negatives", "n_negatives")
    entries = theirs(
        listed, "rank", "codes", "score", "because_item_id", "because_similarity", "reason_class"
    )
    later = theirs(after, "item_id", "event_time", "polarity")
    blocked = _blocked_of(
        ctx, {user: sorted({row["item_id"] for row in rows}) for user, rows in later.items()}
    )
    first = {user: sorted(rows, key=lambda row: row["rank"])[:_SHOWN] for user, rows in entries.items()}
    by_codes = _items_of(ctx, {tuple(row["codes"]) for rows in first.values() for row in rows})
    items = load_items(ctx.store, ctx.ds, columns=["title", "category"]).to_pydict()
    row_of = {item: row for row, item in enumerate(items["item_id"])}

    def told(item: str) -> str:
        row = row_of.get(item)
        return item if row is None else items["title"][row] or item

    def kind(item: str) -> str:
        row = row_of.get(item)
        return "" if row is None else items["category"][row] or ""

    return [
        User(
            user,
            [
                Event(told(e["item_id"]), kind(e["item_id"]), e["event_time"], e["reason_class"])
                for row in contexts[user]
                for e in (row["negatives"] or [])[:_SHOWN]
            ],
            sum(row["n_negatives"] or 0 for row in contexts[user]),
            [
                Entry(
                    row["rank"],
                    row["score"],
                    [told(item) for item in by_codes.get(tuple(row["codes"]), [])],
                    row["because_item_id"] and told(row["because_item_id"]),
                    row["because_similarity"],
                    row["reason_class"],
                )
                for row in first[user]
            ],
            len(entries[user]),
            [
                Event(
                    told(row["item_id"]),
                    kind(row["item_id"]),
                    row["event_time"],
                    liked=row["polarity"] > 0,
                    blocked=row["item_id"] in blocked[user],
                )
                for row in sorted(later[user], key=lambda row: (row["event_time"], row["item_id"]))[
                    : 2 * _SHOWN
                ]
            ],
            len(later[user]),
        )
        for user in chosen
    ]


def _blocked_of(ctx: JobContext, pages: dict[str, list[str]]) -> dict[str, set[str]]:
    """Which items of each user's page the list blocks."""
    from pyspark.sql import functions as F

    pages = {user: items for user, items in pages.items() if items}
    found: dict[str, set[str]] = {user: set() for user in pages}
    if not pages:
        return found
    frames, task = made_from(ctx)
    frames["predicted"] = frames["predicted"].where(F.col("user_id").isin(list(pages)))
    shown = [(user, item, False) for user, items in pages.items() for item in items]
    exposures = ctx.spark.createDataFrame(shown, "user_id string, item_id string, liked boolean")
    judged = judged_exposures(run_sql(ctx.spark, "block_list", frames), exposures, task)
    for row in judged.where("blocked").collect():
        found[row["user_id"]].add(row["item_id"])
    return found


def _items_of(ctx: JobContext, wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
    """Items under each of some semantic IDs."""
    made = ctx.store.commit_of("block_list", ctx.ds).provenance
    ids = load_semantic_ids(ctx.store, made.models[CODEBOOK], ctx.ds, made.inputs["item_semantic_id"])
    found: dict[tuple[int, ...], list[str]] = {}
    for item, codes in zip(ids.items, map(tuple, ids.codes.tolist()), strict=True):
        if codes in wanted:
            found.setdefault(codes, []).append(item)
    return found


def user_card(user: User) -> Element:
    """What the page shows of one user."""
    disliked = table(
        f"Disliked, most recent first ({len(user.disliked)} of {user.n_disliked:,})",
        ["item", "when", "reason"],
        [[_item(e), f"{e.when:%m-%d}", named(e.reason or "")] for e in user.disliked],
        "tnt",
    )
    predicted = table(
        f"Predicted to be rejected, and why ({len(user.entries)} of {user.n_entries:,} entries)",
        ["item, and the past dislike that is nearest to it", "score"],
        [[_predicted(e), "–" if e.score is None else f"{e.score:.2f}"] for e in user.entries],
        "tn",
    )
    if user.later:
        later = table(
            f"What happened next ({len(user.later)} of {user.n_later:,})",
            ["item", "when", "it was", "blocked"],
            [
                [
                    _item(e),
                    f"{e.when:%m-%d}",
                    "liked" if e.liked else "disliked",
                    el("span", "yes", class_="bad" if e.liked else "good") if e.blocked else "no",
                ]
                for e in user.later
            ],
            "tntt",
        )
    else:
        later = el("p", "What happened next: no feedback after this day yet.", class_="absent")
    parts = el("div", disliked, predicted, later, class_="sides")
    return el("article", el("h3", "User ", named(user.user_id)), parts, class_="user")


def _item(event: Event) -> Element:
    """Title and, below it, category."""
    return el("span", named(event.title), el("small", named(event.category)) if event.category else None)


def _predicted(entry: Entry) -> Element:
    """Titles of the items under an ID and, below them, why it is predicted."""
    more = len(entry.titles) - 2
    titles = named("; ".join(entry.titles[:2]) + (f" (+{more})" if more > 0 else ""))
    if entry.because is None:
        return el("span", titles)
    why = f", similarity {entry.similarity:.2f}" + (", reason " if entry.reason else "")
    return el(
        "span", titles, el("small", "because of ", named(entry.because), why, named(entry.reason or ""))
    )
