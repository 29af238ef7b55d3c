"""Deletes the files that no version of a table within the retention needs (DESIGN section 9).

delta-rs's own vacuum does not see what a killed writer left. Here a data file goes if it is not in the
table now, was not in it at any time since the retention began, is not read by a published list, and is
itself older than the retention. What a writer is working on is younger than that.
"""

import datetime as dt
import json
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from negrec_core.delta import DeltaStore
from negrec_core.errors import ConfigError
from negrec_core.schemas import TABLES
from negrec_core.storage import Place, Stored, delete_files, delete_folder, folders, walk

STAGING = {"negative_item_set_shard": "negative_item_set"}
# Of a stage that was killed; the stage removes its own.
_TEMPORARY = ".swing-"


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
    temporary = [store.root / name for name in folders(store.root) if name.startswith(_TEMPORARY)]
    temporary = [path for path in temporary if _newest(path) < cutoff]
    files = [file for path in temporary for file in walk(path)]
    found.append(Vacuumed("", len(files), 0, sum(file.size for file in files), []))
    if delete:
        for path in temporary:
            delete_folder(path)
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
    root = store.path(table)
    staging = _old_staging(store, table, cutoff)
    if delete:
        for ds in staging:
            store.drop_shards(table, ds)
    # In this order: what is replaced between the two is still among the first.
    kept = {file for version in (*pinned, None) for file in store.files(table, version=version)}
    removed = _removed(root)
    kept |= {str(root / path) for path, when in removed.items() if when >= cutoff}
    runs: dict[str, list[Stored]] = {name: [] for name in folders(root) if name.startswith("run=")}
    for file in walk(root):
        if file.below.parts[0] in runs:
            runs[file.below.parts[0]].append(file)
    orphans = replaced = size = 0
    for run, files in runs.items():
        committed = any(path.startswith(f"{run}/") for path in removed) or any(
            file.startswith(f"{root / run}/") for file in kept
        )
        if not committed and _newest(root / run) >= cutoff:
            continue  # its writer may still be at work
        needed = {file.below for file in files if str(file.path) in kept or file.modified >= cutoff * 1000}
        data = [file for file in files if file.below.suffix == ".parquet" and file.below.name[0] != "."]
        gone = [file for file in data if file.below not in needed]
        if len(gone) < len(data):
            marks = {file.below.with_name(f".{file.below.name}.crc") for file in gone}
            files = gone + [file for file in files if file.below in marks]
        elif needed:
            continue
        size += sum(file.size for file in files)
        if committed:
            replaced += len(gone)
        else:
            orphans += len(gone)
        if delete:
            delete_files([file.path for file in files])
            if not walk(root / run):
                delete_folder(root / run)
    return Vacuumed(table, orphans, replaced, size, staging)


def _old_staging(store: DeltaStore, table: str, cutoff: float) -> list[str]:
    """Days of a staging table that were last written before the cutoff and whose result is committed."""
    if table not in STAGING:
        return []
    young = {str(file.path) for file in walk(store.path(table)) if file.modified >= cutoff * 1000}
    return [
        ds
        for ds in store.days(table)
        if store.revision(STAGING[table], ds) and young.isdisjoint(store.files(table, [ds]))
    ]


def _removed(root: Place) -> dict[str, float]:
    """Path below the table -> when it was last taken out of it, seconds; of all commits in the log."""
    entries = [file.path for file in walk(root / "_delta_log") if file.below.suffix == ".json"]
    with ThreadPoolExecutor(8) as pool:
        contents = pool.map(lambda entry: entry.read_bytes(), entries)
    found: dict[str, float] = {}
    for line in (line for content in contents for line in content.splitlines()):
        remove = json.loads(line).get("remove")
        if remove:
            path = urllib.parse.unquote(remove["path"])
            found[path] = max(found.get(path, 0.0), remove["deletionTimestamp"] / 1000)
    return found


def _newest(folder: Place) -> float:
    """When anything of a folder was last written, seconds."""
    if isinstance(folder, Path):
        return max(_times(folder), default=0.0)
    return max((file.modified / 1000 for file in walk(folder)), default=0.0)


def _times(path: Path) -> Iterator[float]:
    for one in (path, *path.rglob("*")):
        try:
            yield one.stat().st_mtime
        except FileNotFoundError:  # a writer at work renames its files
            yield float("inf")
