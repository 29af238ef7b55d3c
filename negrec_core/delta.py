"""The one Delta module: how tables are created, committed and read (DESIGN section 9).

Data files are written first, by Spark executors or by Arrow, into a run directory
`<table>/run=<id>/<partition columns>/`; then the driver checks them and replaces whole partitions
in one transaction. delta-rs records transaction ids but does not enforce them, so that is done
here: a partition has a revision, recorded as transaction `negrec.<table>.<ds>`, and a commit must
raise it.
"""

import contextlib
import datetime as dt
import json
import logging
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds_
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from negrec_core.delta_files import MEND_FILE, check_schema, checked_files
from negrec_core.errors import ConfigError, ConflictError, InputError, MissingError, NegrecError
from negrec_core.schemas import TABLES, Table
from negrec_core.storage import (
    Place,
    delete_folder,
    delta_options,
    finish_run,
    folder_files,
    located,
    place,
    size_problems,
    store_errors,
)

log = logging.getLogger("negrec")

_COMMIT_ATTEMPTS = 10
_CHECKPOINT_INTERVAL = 100
# Spark reads these in a path as patterns, delta-rs as escapes.
_PATTERN_CHARACTERS = frozenset("*?[]{}%\\")


@dataclass(frozen=True)
class Provenance:
    """What a commit's metadata records about how its rows came to be (DESIGN section 9, rule 8).

    Attributes:
        inputs: table -> Delta version it was read at.
        windows: table -> first and last day of it that a partition was made from, in days after the
            partition's `ds`; the first may be None, for all. A table not named here: `ds` alone.
        models: model name -> version used.
        config_digest: digest of the effective configuration.
        code_version: version of negrec.
        accepted: gates that failed and were accepted.
    """

    inputs: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    config_digest: str = ""
    code_version: str = ""
    windows: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    accepted: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True)
class Commit:
    """One commit of day partitions, as its metadata tells it.

    Attributes:
        version: Delta version of the table after it.
        days: the `ds` that it replaced -> their revision.
        provenance: where the rows came from.
    """

    version: int
    days: dict[str, int]
    provenance: Provenance


class DeltaStore:
    """The Delta tables under one warehouse, a directory or a prefix of an object store.

    Every method opens the table afresh: a delta-rs handle does not advance by itself. Where the
    warehouse is in an object store, MissingError says that it cannot be used.

    Raises:
        ConfigError: the path or URL holds a character that Spark or delta-rs misreads.
    """

    def __init__(self, root: Place | str) -> None:
        self.root = place(root)
        odd = sorted(_PATTERN_CHARACTERS.intersection(str(self.root)))
        if odd:
            raise ConfigError(
                f"warehouse {self.root}: a path with {' '.join(odd)} cannot be used; choose another"
            )

    def path(self, table: str) -> Place:
        return self.root / "tables" / table

    def create_tables(self) -> None:
        """Create all missing tables; safe to repeat, and safe when several processes start at once."""
        for table in TABLES.values():
            if not self.exists(table.name):
                self._create(table)

    def _create(self, table: Table) -> None:
        path = self.path(table.name)
        try:
            DeltaTable.create(
                str(path),
                table.schema,
                partition_by=list(table.partition_by),
                description=table.about,
                # The log holds the provenance and the versions that were pinned, and by default its
                # entries go after 30 days.
                configuration={"delta.enableExpiredLogCleanup": "false"},
                storage_options=delta_options(path),
                # Tried again, the second of two creations would succeed too, as a version of its own.
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except DeltaError:
            if not self.exists(table.name):
                raise

    def handle(self, table: str, version: int | None = None) -> DeltaTable:
        """Open a table at its newest or at a given version.

        Raises:
            MissingError: the table was never created, or has no such version.
            InputError: its log is damaged, or its schema is not the declared one.
        """
        path = self.path(table)
        try:
            with store_errors(self.root):
                handle = DeltaTable(str(path), version=version, storage_options=delta_options(path))
        except TableNotFoundError:
            raise MissingError(
                f"table {table}: not found under {self.root}; give the warehouse with --warehouse,"
                " or import a log first"
            ) from None
        except DeltaError as error:
            if version is not None and version > self.version(table):
                raise MissingError(
                    f"table {table}: there is no version {version} yet under {self.root}; read another"
                ) from error
            raise self._damaged_log(table, error) from None
        declared = TABLES[table]
        check_schema(
            table,
            f"{self.path(table)} was made by another release of negrec; use that release, or import the log"
            " into a new --warehouse with this one",
            pa.schema(handle.schema().to_arrow()),
            declared.schema,
        )
        return handle

    def _damaged_log(self, table: str, error: DeltaError) -> InputError:
        # A backtrace without names follows the first line.
        reason = "".join(filter(str.isprintable, str(error).partition("\n")[0]))
        return InputError(
            f"table {table}: its log cannot be read ({reason}); restore {self.path(table)}/_delta_log"
            " from a copy"
        )

    def version(self, table: str) -> int:
        """Newest Delta version of a table."""
        return self.handle(table).version()

    def revision(self, table: str, ds: str) -> int:
        """Revision of the partition `ds`: 0 if it was never committed (an empty one counts)."""
        return self.handle(table).transaction_version(_app_id(table, ds)) or 0

    def revisions(self, table: str) -> dict[str, int]:
        """The `ds` values that were ever committed, empty ones too -> their revisions."""
        found: dict[str, int] = {}
        for commit in self.commits(table):
            found = commit.days | found
        return found

    def exists(self, table: str) -> bool:
        """Whether the table was created."""
        path = self.path(table)
        with store_errors(self.root):
            return DeltaTable.is_deltatable(str(path), storage_options=delta_options(path))

    def days(self, table: str) -> list[str]:
        """The `ds` values that hold rows, ascending."""
        return sorted({p["ds"] for p in self.handle(table).partitions()})

    def require(self, table: str, days: Iterable[str], hint: str) -> None:
        """Raise MissingError, naming the first, if any of the days was never committed."""
        handle = self.handle(table)
        for day in days:
            if not handle.transaction_version(_app_id(table, day)):
                raise MissingError(f"table {table}: no partition ds={day}; {hint}")

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        *,
        days: Sequence[str] | None = None,
        version: int | None = None,
    ) -> pa.Table:
        """Read columns of the given `ds` partitions (all by default) into memory.

        Raises:
            InputError: a data file is gone or damaged.
        """
        wanted = None if days is None else pc.field("ds").isin(pa.array(days, pa.string()))
        dataset = self.handle(table, version).to_pyarrow_dataset(filesystem=folder_files(self.path(table)))
        try:
            with store_errors(self.root):
                return dataset.to_table(columns=None if columns is None else list(columns), filter=wanted)
        except (OSError, pa.ArrowException) as error:
            self.files(table, days, version, check=True)  # names the file, if it is gone or cut
            reason = " ".join(str(error).split())
            raise InputError(f"table {table}: a data file cannot be read ({reason}); {MEND_FILE}") from None

    def files(
        self,
        table: str,
        days: Iterable[str] | None = None,
        version: int | None = None,
        *,
        check: bool = False,
    ) -> list[str]:
        """Absolute paths or URLs of the live data files of the given `ds` partitions (all by default).

        Raises:
            InputError: `check` is set, and one of them is gone or has not the size that it was committed
                with. Spark says so late and at length, and takes an empty file for no rows.
        """
        wanted = None if days is None else set(days)
        actions = pa.table(self.handle(table, version).get_add_actions(flatten=True))
        if not actions.num_rows:  # then there is no column partition.ds either
            return []
        columns = (actions[name].to_pylist() for name in ("path", "partition.ds", "size_bytes"))
        rows = [row for row in zip(*columns, strict=True) if wanted is None or row[1] in wanted]
        root = self.path(table)
        files = [str(root / urllib.parse.unquote(path)) for path, _, _ in rows]
        if check:
            problems = size_problems(files, [size for _, _, size in rows])
            for (path, ds, _), problem in zip(rows, problems, strict=True):
                if problem:
                    raise InputError(f"table {table}: {path} of ds={ds} {problem}; {MEND_FILE}")
        return files

    def commits(self, table: str, limit: int | None = None) -> list[Commit]:
        """Commits of day partitions, newest first, among the last `limit` entries of the log.

        Raises:
            InputError: an entry is damaged.
        """
        newest = self.version(table)
        # delta-rs counts versions from the newest, which it looks up apart from the log: a commit in between
        # would shift them all.
        while True:
            before = newest
            try:
                entries = self.handle(table).history(limit)
            except DeltaError as error:
                raise self._damaged_log(table, error) from None
            newest = self.version(table)
            if newest == before:
                break
        return [
            Commit(
                entry["version"],
                json.loads(entry["negrec.days"]),
                Provenance(**json.loads(entry["negrec.provenance"])),
            )
            for entry in entries
            if "negrec.days" in entry
        ]

    def commit_of(self, table: str, ds: str, version: int | None = None) -> Commit:
        """The commit that the partition `ds` holds, as of a table version (default: the newest).

        Raises:
            MissingError: the partition was never committed.
        """
        for commit in self.commits(table):
            if ds in commit.days and (version is None or commit.version <= version):
                return commit
        raise MissingError(f"table {table}: no partition ds={ds}; run the job for that day")

    def new_run(self, table: str) -> Place:
        """A run directory that does not exist yet, for one write of `table`."""
        return self.path(table) / f"run={uuid.uuid4().hex[:16]}"

    def write_arrow(
        self, table: str, rows: pa.Table, revisions: Mapping[str, int], provenance: Provenance
    ) -> int:
        """Write rows held in memory, sorted by key, and commit them; see `commit`."""
        declared = TABLES[table]
        ordered = rows.select(declared.schema.names).cast(declared.schema)
        if declared.key:
            ordered = ordered.sort_by([(name, "ascending") for name in declared.key])
        run = self.new_run(table)
        files, name = located(run)
        try:
            with store_errors(self.root):
                if isinstance(run, Path):
                    run.mkdir(parents=True)
                ds_.write_dataset(
                    ordered,
                    name,
                    filesystem=files,
                    format="parquet",
                    partitioning=ds_.partitioning(
                        pa.schema([declared.schema.field(n) for n in declared.partition_by]), flavor="hive"
                    ),
                    max_partitions=1 << 20,
                    use_threads=False,  # threads would lose the order
                )
                finish_run(run)
        except BaseException:
            delete_folder(run)  # on a full disk, what is there already is in the way
            raise
        return self.commit(table, run, revisions, provenance)

    def commit(self, table: str, run: Place, revisions: Mapping[str, int], provenance: Provenance) -> int:
        """Check the files of a run directory and replace whole `ds` partitions by them, atomically.

        A run that is not committed is deleted.

        Args:
            table: table name.
            run: directory named by `new_run` and filled by the writer, who ends with `finish_run`; may
                hold no data file.
            revisions: every `ds` that is replaced -> its new revision, which must exceed the old.
            provenance: recorded in the commit.

        Returns:
            The Delta version of the commit.

        Raises:
            InputError: a file is cut, has another schema, another partition, or a bad key.
            ConflictError: another writer committed one of these partitions since.
        """
        if not revisions:
            raise ValueError("a commit replaces at least one ds")
        for ds in revisions:
            _check_day(table, ds)
        metadata = {
            "negrec.days": json.dumps(dict(sorted(revisions.items()))),
            "negrec.provenance": json.dumps(asdict(provenance), sort_keys=True),
        }
        transactions = {_app_id(table, ds): revision for ds, revision in revisions.items()}
        return self._replace(table, run, list(revisions), None, transactions, metadata)

    def shard_done(self, table: str, ds: str, bucket: int, digest: str) -> bool:
        """Whether the shard (`ds`, `bucket`) holds what was made from inputs with this digest."""
        handle = self.handle(table)
        shard = f"{_app_id(table, ds)}.{bucket}"
        # Equal counts: no commit with another digest came after the one with this.
        count = handle.transaction_version(shard)
        return count is not None and handle.transaction_version(f"{shard}.{digest}") == count

    def commit_shard(self, table: str, run: Place, ds: str, bucket: int, digest: str) -> int:
        """Replace one (`ds`, `bucket`) of a staging table; `shard_done` is true from then on.

        Raises:
            InputError: as `commit`, or a file of another bucket.
            ConflictError: another writer committed this shard at the same time.
        """
        _check_day(table, ds)
        shard = f"{_app_id(table, ds)}.{bucket}"
        count = (self.handle(table).transaction_version(shard) or 0) + 1
        return self._replace(table, run, [ds], bucket, {shard: count, f"{shard}.{digest}": count}, {})

    def drop_shards(self, table: str, ds: str) -> int:
        """Empty a day of a staging table; none of its shards that hold rows is done from then on.

        Raises:
            ConflictError: another writer committed one of them at the same time.
        """
        handle = self.handle(table)
        buckets = {part["bucket"] for part in handle.partitions() if part["ds"] == ds}
        shards = [f"{_app_id(table, ds)}.{bucket}" for bucket in buckets]
        transactions = {shard: (handle.transaction_version(shard) or 0) + 1 for shard in shards}
        run = self.new_run(table)
        if isinstance(run, Path):
            run.mkdir()
        finish_run(run)
        return self._replace(table, run, [ds], None, transactions, {})

    def _replace(
        self,
        table: str,
        run: Place,
        days: list[str],
        bucket: int | None,
        transactions: dict[str, int],
        metadata: dict[str, str],
    ) -> int:
        declared = TABLES[table]
        self.handle(table)  # before the run could be blamed for a missing table
        filters: list[tuple[str, str, Any]] = [("ds", "in", days)]
        try:
            with store_errors(self.root):
                adds = checked_files(declared, run, days)
            if bucket is not None:
                filters.append(("bucket", "=", str(bucket)))
                if any(add.partition_values["bucket"] != str(bucket) for add in adds):
                    raise InputError(
                        f"table {table}: {run.name} holds other buckets than {bucket}; nothing was committed"
                    )
            with store_errors(self.root):
                return self._commit(declared, adds, filters, transactions, metadata)
        except Exception:
            # A run that was committed before must stay, whatever is wrong with this commit.
            with contextlib.suppress(NegrecError):
                if not any(file.startswith(f"{run}/") for file in self.files(table)):
                    delete_folder(run)
            raise

    def _commit(
        self,
        declared: Table,
        adds: Sequence[AddAction],
        filters: list[tuple[str, str, Any]],
        transactions: dict[str, int],
        metadata: dict[str, str],
    ) -> int:
        actions: list[AddAction | RemoveAction] = list(adds)
        properties = CommitProperties(
            custom_metadata=metadata,
            max_commit_retries=0,
            app_transactions=[Transaction(*transaction) for transaction in transactions.items()],
        )
        for attempt in range(_COMMIT_ATTEMPTS):
            # The check and the commit use one handle: whatever is committed between the two makes
            # this handle stale, and a stale handle always fails here, also for other partitions.
            handle = self.handle(declared.name)
            _check_revisions(declared.name, handle, transactions)
            try:
                handle.create_write_transaction(
                    actions,
                    "overwrite",
                    handle.schema(),
                    list(declared.partition_by),
                    filters,
                    commit_properties=properties,
                    # After a commit nothing may fail it any more.
                    post_commithook_properties=PostCommitHookProperties(
                        create_checkpoint=False, cleanup_expired_logs=False
                    ),
                )
            except CommitFailedError:
                time.sleep(0.02 * 2**attempt)
                continue
            version = handle.version() + 1
            if version % _CHECKPOINT_INTERVAL == 0:
                self._checkpoint(declared.name)
            return version
        raise ConflictError(
            f"table {declared.name}: {_COMMIT_ATTEMPTS} commits in a row lost against other"
            " writers; run it again when fewer write at once"
        )

    def _checkpoint(self, table: str) -> None:
        try:
            self.handle(table).create_checkpoint()
        except (DeltaError, OSError) as error:
            log.warning("table %s: no checkpoint was written (%s); reading gets slower", table, error)


def day_range(start: dt.date, end: dt.date) -> list[str]:
    """ISO days from `start` to `end`, both included."""
    return [(start + dt.timedelta(days=n)).isoformat() for n in range((end - start).days + 1)]


def _app_id(table: str, ds: str) -> str:
    return f"negrec.{table}.{ds}"


def _check_day(table: str, ds: str) -> None:
    try:
        iso = dt.date.fromisoformat(ds).isoformat()
    except ValueError:
        iso = None
    if ds != iso:
        raise InputError(f"table {table}: ds={ds} is not a date such as 2026-01-31")


def _check_revisions(table: str, handle: DeltaTable, transactions: Mapping[str, int]) -> None:
    for app_id, revision in transactions.items():
        current = handle.transaction_version(app_id) or 0
        if current >= revision:
            raise ConflictError(
                f"table {table}: {app_id.removeprefix(_app_id(table, ''))} is already at revision"
                f" {current}, this write has {revision}; another run committed it,"
                " see `negrec status`"
            )
