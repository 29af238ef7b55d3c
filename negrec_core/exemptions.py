"""Exemptions: users for whom nothing is blocked, and items that are never blocked.

They undo a block at once, without a new list: the reader looks at them apart from it.
"""

import contextlib
import datetime as dt
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ConflictError, MissingError
from negrec_core.schemas import EXEMPTION

USER, ITEM = "user", "item"
_ATTEMPTS = 10
_Rows = list[dict[str, Any]]
# Rows now -> rows then, the days that differ, how many users and items were changed.
_Change = Callable[[_Rows], tuple[_Rows, set[str], int]]


@dataclass(frozen=True)
class Exemptions:
    """Who and what is exempt.

    Attributes:
        users: user ids.
        items: item ids.
        version: Delta version of the table; -1 without a table.
    """

    users: frozenset[str] = frozenset()
    items: frozenset[str] = frozenset()
    version: int = -1


def load_exemptions(store: DeltaStore, known: Exemptions | None = None) -> Exemptions:
    """The exemptions of a warehouse; `known` itself if nothing changed since it was loaded.

    A warehouse made before there was such a table has none; one that is away keeps those known.
    """
    if not store.exists("exemption"):
        return known or Exemptions()
    version = store.version("exemption")
    if known and known.version == version:
        return known
    ids: dict[str, set[str]] = {USER: set(), ITEM: set()}
    for row in store.read("exemption", version=version).to_pylist():
        ids[row["kind"]].add(row["id"])
    return Exemptions(frozenset(ids[USER]), frozenset(ids[ITEM]), version)


def exempt(
    store: DeltaStore, users: Collection[str], items: Collection[str], note: str | None, code_version: str
) -> int:
    """Add users and items; the number that were not exempt before.

    Raises:
        ConflictError: others changed the table at the same time, again and again.
    """
    today = dt.datetime.now(dt.UTC).date().isoformat()
    wanted = _keys(users, items)

    def change(rows: _Rows) -> tuple[_Rows, set[str], int]:
        new = wanted - {(row["kind"], row["id"]) for row in rows}
        added = [{"kind": kind, "id": name, "note": note, "ds": today} for kind, name in sorted(new)]
        return rows + added, {today} if new else set(), len(new)

    return _change(store, change, code_version)


def end_exemption(
    store: DeltaStore, users: Collection[str], items: Collection[str], code_version: str
) -> int:
    """Remove users and items; their number.

    Raises:
        MissingError: one of them is not exempt; nothing was removed.
        ConflictError: others changed the table at the same time, again and again.
    """
    gone = _keys(users, items)

    def change(rows: _Rows) -> tuple[_Rows, set[str], int]:
        absent = sorted(gone - {(row["kind"], row["id"]) for row in rows})
        if absent:
            names = ", ".join(f"{kind} {name}" for kind, name in absent)
            raise MissingError(f"{names}: not exempt; `negrec exempt list` shows who and what is")
        kept = [row for row in rows if (row["kind"], row["id"]) not in gone]
        days = {row["ds"] for row in rows if (row["kind"], row["id"]) in gone}
        return kept, days, len(gone)

    return _change(store, change, code_version)


def _keys(users: Collection[str], items: Collection[str]) -> set[tuple[str, str]]:
    return {(USER, name) for name in users} | {(ITEM, name) for name in items}


def _change(store: DeltaStore, change: _Change, code_version: str) -> int:
    """Rewrite the days that a change touches; anew if another writer was first."""
    for _ in range(_ATTEMPTS):
        # Looked up before the rows are read: what is committed in between fails the commit.
        revisions = store.revisions("exemption")
        rows, days, count = change(store.read("exemption").to_pylist())
        if not days:
            return count
        frame = pa.Table.from_pylist([row for row in rows if row["ds"] in days], EXEMPTION.schema)
        raised = {day: revisions.get(day, 0) + 1 for day in days}
        with contextlib.suppress(ConflictError):
            store.write_arrow("exemption", frame, raised, Provenance(code_version=code_version))
            return count
    raise ConflictError(
        f"table exemption: {_ATTEMPTS} changes in a row lost against other writers; run it again"
    )
