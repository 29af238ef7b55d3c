"""Deletes the files that no version of a table within the retention needs (DESIGN section 9).

delta-rs's own vacuum does not see what a killed writer left. Here a data file goes if it is not in the
table now, was not in it at any time since the retention began, is not read by a published list, and is
itself older than the retention. What a writer is working on is younger than that.
"""

import datetime as dt
import json
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from negrec_core.delta import DeltaStore
from negrec_core.errors import ConfigError
from negrec_core.schemas import TABLES

STAGING = {"negative_item_set_shard": "negative_item_set"}
# Of a stage that was killed; the stage removes its own.
_TEMPORARY = ".swing-*"


@dataclass(frozen=True)
class Vacuumed:
    """What went, or would go, of one table.

    Attributes:
        table: its name; empty for temporary directories of the warehouse.
        orphans: files that were never committed, of writers that failed.
        replaced: files of versions before the retention.
        size: bytes of both.
        staging: days whose staging partition went; their files follow after the retention.
    """

    table: str
    orphans: int
    replaced: int
    size: int
    staging: list[str]


def vacuum(store: DeltaStore, days: int, *, delete: bool, now: dt.datetime | None = None) -> list[Vacuumed]:
    """Delete what no version of the last `days` days needs; safe beside writers and readers.

    The newest version of every table stays, and so do all versions that a published list was made from.

    Args:
        store: the Delta tables.
        days: the retention, at least 1: it must exceed the time from a writer's first file to its
            commit.
        delete: False only looks.
        now: the present; for tests.

    Returns:
        One for each table of which anything goes, and one for temporary directories.

    Raises:
        ConfigError: a retention under a day.
        MissingError: there are no tables here.
    """
    if days < 1:
        raise ConfigError(f"a retention of {days} days: give at least 1, or a running write may lose files")
    store.handle("behavior_log")  # a mistyped path would have nothing to delete either
    cutoff = (now or dt.datetime.now(dt.UTC)).timestamp() - days * 86_400
    pinned = _pinned(store)
    found = [_vacuum_table(store, table, cutoff, pinned.get(table, set()), delete) for table in TABLES]
    temporary = [path for path in store.root.glob(_TEMPORARY) if _newest(path) < cutoff]
    files = [file for path in temporary for file in _files(path)]
    found.append(Vacuumed("", len(files), 0, sum(file.stat().st_size for file in files), []))
    if delete:
        for path in temporary:
            shutil.rmtree(path)
    return [one for one in found if one.orphans or one.replaced or one.staging]


def _pinned(store: DeltaStore) -> dict[str, set[int]]:
    """Table -> versions that the lists which are published now were made from."""
    versions: dict[str, set[int]] = {}
    if not store.exists("block_list"):
        return versions
    held = set(store.days("block_list"))
    for commit in store.commits("block_list"):
        if held.intersection(commit.days):
            held -= commit.days.keys()
            for table, version in commit.provenance.inputs.items():
                versions.setdefault(table, set()).add(version)
    return versions


def _vacuum_table(store: DeltaStore, table: str, cutoff: float, pinned: set[int], delete: bool) -> Vacuumed:
    if not store.exists(table):
        return Vacuumed(table, 0, 0, 0, [])
    staging = _old_staging(store, table, cutoff)
    if delete:
        for ds in staging:
            store.drop_shards(table, ds)
    root = store.path(table)
    # In this order: what is replaced between the two is still among the first.
    kept = {file for version in (*pinned, None) for file in store.files(table, version=version)}
    removed = _removed(root)
    kept |= {str(root / path) for path, when in removed.items() if when >= cutoff}
    orphans = replaced = size = 0
    for run in sorted(root.glob("run=*")):
        committed = any(path.startswith(f"{run.name}/") for path in removed) or any(
            file.startswith(f"{run}/") for file in kept
        )
        if not committed and _newest(run) >= cutoff:
            continue  # its writer may still be at work
        files = _files(run)
        needed = {file for file in files if str(file) in kept or file.stat().st_mtime >= cutoff}
        data = [file for file in files if file.suffix == ".parquet" and not file.name.startswith(".")]
        gone = [file for file in data if file not in needed]
        if any(file in needed for file in data):
            files = [other for file in gone for other in (file, file.with_name(f".{file.name}.crc"))]
            files = [file for file in files if file.exists()]
        elif needed:
            continue
        size += sum(file.stat().st_size for file in files)
        if committed:
            replaced += len(gone)
        else:
            orphans += len(gone)
        if delete:
            for file in files:
                file.unlink()
            if not _files(run):
                shutil.rmtree(run)
    return Vacuumed(table, orphans, replaced, size, staging)


def _old_staging(store: DeltaStore, table: str, cutoff: float) -> list[str]:
    """Days of a staging table that were last written before the cutoff and whose result is committed."""
    if table not in STAGING:
        return []
    return [
        ds
        for ds in store.days(table)
        if store.revision(STAGING[table], ds)
        and all(Path(file).stat().st_mtime < cutoff for file in store.files(table, [ds]))
    ]


def _removed(root: Path) -> dict[str, float]:
    """Path below the table -> when it was last taken out of it, seconds; of all commits in the log."""
    found: dict[str, float] = {}
    for entry in sorted((root / "_delta_log").glob("*.json")):
        for line in entry.read_text(encoding="utf-8").splitlines():
            remove = json.loads(line).get("remove")
            if remove:
                path = urllib.parse.unquote(remove["path"])
                found[path] = max(found.get(path, 0.0), remove["deletionTimestamp"] / 1000)
    return found


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def _newest(path: Path) -> float:
    """When anything of a directory was last written, seconds."""
    return max(_times(path), default=0.0)


def _times(path: Path) -> Iterator[float]:
    for one in (path, *path.rglob("*")):
        try:
            yield one.stat().st_mtime
        except FileNotFoundError:  # a writer at work renames its files
            yield float("inf")
