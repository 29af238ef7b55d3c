"""Which partitions were made from rows that have been replaced since."""

import datetime as dt
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from negrec_core.delta import Commit, DeltaStore
from negrec_core.generator import CODEBOOK

# Here the rows of several codebooks lie side by side, and a commit adds to those of one alone.
_BY_CODEBOOK = "item_semantic_id"


@dataclass(frozen=True)
class Stale:
    """A partition that should be made again.

    Attributes:
        table: its table.
        ds: its day.
        source: a table that it was made from.
        source_ds: a day of that table which it read, and which was replaced or is itself stale.
        revision: that day's revision now.
    """

    table: str
    ds: str
    source: str
    source_ds: str
    revision: int


def stale_partitions(store: DeltaStore, stages: Sequence[str]) -> list[Stale]:
    """What was made from an older revision than there is now, at first or at second hand.

    A partition is stale if a day that it read was committed after it was read, or is stale itself. A list
    that was withdrawn was made from nothing, and is not. Semantic IDs of another codebook than the one
    that a partition was made with are none of its business.

    Args:
        store: the Delta tables.
        stages: tables that are made from others, each after those that it reads.

    Returns:
        In the order in which to make them again.
    """

    @functools.cache
    def newest(table: str, codebook: str | None = None) -> dict[str, Commit]:
        return _newest_commits(store, table, codebook)

    days = sorted({ds for stage in stages for ds in newest(stage)})
    found: dict[tuple[str, str], Stale] = {}
    for ds in days:
        for stage in stages:
            commit = newest(stage).get(ds)
            if commit is None:
                continue
            for source, version in commit.provenance.inputs.items():
                if source == stage or not store.exists(source):
                    continue
                first, last = _window(ds, commit, source)
                codebook = commit.provenance.models.get(CODEBOOK) if source == _BY_CODEBOOK else None
                for day, made in newest(source, codebook).items():
                    changed = made.version > version or (source, day) in found
                    if first <= day <= last and changed and (stage, ds) not in found:
                        found[stage, ds] = Stale(stage, ds, source, day, made.days[day])
    return list(found.values())


def _newest_commits(store: DeltaStore, table: str, codebook: str | None) -> dict[str, Commit]:
    """Day -> the commit that it holds; with a codebook: the newest that is not of another one."""
    found: dict[str, Commit] = {}
    for commit in store.commits(table) if store.exists(table) else ():
        if codebook is None or commit.provenance.models.get(CODEBOOK, codebook) == codebook:
            for day in commit.days:
                found.setdefault(day, commit)
    return found


def _window(ds: str, commit: Commit, source: str) -> tuple[str, str]:
    """First and last day of `source` that the partition `ds` of a commit was made from."""
    first, last = commit.provenance.windows.get(source, (0, 0))
    day = dt.date.fromisoformat(ds)
    return (
        "" if first is None else (day + dt.timedelta(days=first)).isoformat(),
        (day + dt.timedelta(days=last or 0)).isoformat(),
    )
