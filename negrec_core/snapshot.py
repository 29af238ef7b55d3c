"""One published block list in memory, with everything that scoring needs.

All reads of a list are pinned to the table versions recorded in its commit, so a list is never
mixed with newer rates or IDs.
"""

import datetime as dt
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import DeltaError

from negrec_core.block_score import FEATURES, BlockScore, Items, Tally, features
from negrec_core.codebook import Codebook, check_codes
from negrec_core.delta import DeltaStore
from negrec_core.errors import ArtefactError, InputError, MissingError
from negrec_core.generator import CODEBOOK, open_codebook
from negrec_core.items import load_categories, load_item_tastes
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.storage import Place, parquet_file, store_problem
from negrec_core.string_index import NameTable, StringIndex

log = logging.getLogger("negrec")

_INPUTS = (
    "block_score",
    "item_semantic_id",
    "item_rate",
    "item_taste",
    "user_context",
    "user_taste",
    "item",
)
_ENTRY_STRINGS = ("user_id", "because_item_id", "reason_class")
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Published:
    """A list in the warehouse.

    Attributes:
        ds: its log date.
        revision: its revision.
        version: Delta version of `block_list` that was looked at.
        expires_on: first day on which the list no longer holds: that of its first entry to expire.
    """

    ds: str
    revision: int
    version: int
    expires_on: dt.date


@dataclass(frozen=True, eq=False)
class Tallies:
    """Feedback by category of every user, that of one user after that of another.

    Attributes:
        starts: int64 [users + 1]; that of user row r is from `starts[r]` to `starts[r + 1]`.
        categories: numbers of category and top category, int32 [n, 2].
        negatives: dislikes, int32 [n].
        positives: likes, int32 [n].
    """

    starts: np.ndarray
    categories: np.ndarray
    negatives: np.ndarray
    positives: np.ndarray

    def of(self, user_row: int) -> Tally:
        """The tally of one user."""
        span = slice(*self.starts[user_row : user_row + 2].tolist())
        return Tally(self.categories[span], self.negatives[span], self.positives[span])


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One published list with all that scoring needs; never changed, so readers need no locks.

    Attributes:
        ds: log date of the list.
        revision: its revision.
        expires_on: first day on which it no longer holds.
        score: the calibrated block score.
        codebook: quantiser of the IDs.
        users: user id -> row, for users that have entries; these are the first rows.
        others: user id -> row, for users with a context but without entries; these follow.
        starts: int64 [users + 1]; the entries of user row r are `starts[r]:starts[r + 1]`.
        user_log_odds: smoothed, float64 [users + others + 1]; the last is the prior.
        tallies: feedback by category of [users + others + 1]; the last has none.
        tastes: weights of the same, float32 [users + others + 1, 1 + dim + factors]; the last are 0.
        codes: semantic ID of each entry, unsigned [entries, D].
        ranks: rank of each entry, int32 [entries].
        log_probs: float32 [entries].
        because: nearest past dislike of each entry, strings, as dictionaries.
        reasons: reason class of each entry, the same.
        items: item id -> row of `catalogue` and `item_log_odds`, those without a semantic ID after those
            with one; -1, the last, if it is not known.
        catalogue: items + 1; the last is one of which nothing is known.
        item_log_odds: float64 [items + 1]; the last is the prior.
    """

    ds: str
    revision: int
    expires_on: dt.date
    score: BlockScore
    codebook: Codebook
    users: Mapping[str, int]
    others: Mapping[str, int]
    starts: np.ndarray
    user_log_odds: np.ndarray
    tallies: Tallies
    tastes: np.ndarray
    codes: np.ndarray
    ranks: np.ndarray
    log_probs: np.ndarray
    because: pa.ChunkedArray
    reasons: pa.ChunkedArray
    items: NameTable
    catalogue: Items
    item_log_odds: np.ndarray

    def row_of(self, user_id: str) -> int:
        """Row of a user; the last for one who is not known. Those with entries are below `len(users)`."""
        row = self.users.get(user_id, -1)
        return row if row >= 0 else self.others.get(user_id, len(self.user_log_odds) - 1)

    def features(self, user: int, item_ids: Sequence[str]) -> np.ndarray:
        """Block-score features [n, F] of items for the user of a row."""
        rows, span = self.items.rows(item_ids), self.span(user)
        return features(
            self.catalogue.take(rows),
            self.entry_units(span),
            self.log_probs[span],
            self.tallies.of(user),
            self.tastes[user],
            self.item_log_odds.take(rows),
            float(self.user_log_odds[user]),
            self.score.prior_log_odds,
            self.score.pseudo_events,
        )

    def span(self, user: int) -> slice:
        """Where the entries of the user of a row are; empty for a user without any."""
        if user >= len(self.users):
            return slice(0, 0)
        return slice(int(self.starts[user]), int(self.starts[user + 1]))

    def entry_units(self, span: slice) -> np.ndarray:
        """Unit embeddings of the predicted IDs of some entries, float32 [n, dim]."""
        return self.codebook.unit(self.codes[span], checked=True)  # by `_codes_of`


def newest_list(store: DeltaStore, today: dt.date) -> Published:
    """The list with the newest log date up to `today` that has rows and has not expired.

    Raises:
        MissingError: there is none.
        InputError: a list cannot be read.
    """
    handle = store.handle("block_list")
    version = handle.version()
    held = {partition["ds"] for partition in handle.partitions()}
    days = sorted((day for day in held if day <= today.isoformat()), reverse=True)
    later = ""
    if len(days) < len(held):
        later = f"ds={max(held)} is dated after today, {today}, and not used"
        log.warning("block list %s", later)
    expired = {}
    for day in days:
        with reading(f"ds={day}"):
            files = store.files("block_list", [day], version)
            expiries = _in_parallel(lambda file: pc.min(_read(file, ["expires_on"])[0]).as_py(), files)
        expires_on = min(filter(None, expiries), default=None)
        if expires_on is None:
            continue
        if expires_on > today:
            commit = store.commit_of("block_list", day, version)
            return Published(day, commit.days[day], version, expires_on)
        expired[day] = expires_on
    if not expired:
        raise MissingError(
            f"table block_list: nothing was published in {store.root} up to {today}"
            f"{f' ({later})' if later else ''}; run `negrec run`"
        )
    raise MissingError(
        f"table block_list: the newest list, ds={max(expired)}, expired on"
        f" {expired[max(expired)]}; run `negrec run` for a newer day"
    )


def load_snapshot(warehouse: Place | str, today: dt.date) -> Snapshot:
    """Load the newest valid list with the tables that its commit names, at their versions.

    Raises:
        MissingError, ArtefactError, InputError: as `BlockList.open`.
    """
    store = DeltaStore(warehouse)
    return load_published(store, newest_list(store, today))


def load_block_score(store: DeltaStore, ds: str, version: int) -> tuple[BlockScore, dict[str, str]]:
    """A day's block score as of a version of its table, and the models that it was fitted with.

    Raises:
        MissingError: that day has none at that version.
        ArtefactError: it was fitted on other features.
    """
    rows = store.read("block_score", days=[ds], version=version).to_pylist()
    if not rows:
        raise MissingError(f"table block_score: no row of ds={ds}; run the stage block_score")
    row = rows[0]
    if tuple(row["features"]) != FEATURES:
        raise ArtefactError(
            f"table block_score: ds={ds} was fitted on {', '.join(row['features'])}, this version"
            f" of negrec computes {', '.join(FEATURES)}; run the stage block_score again"
        )
    score = BlockScore(
        np.array(row["coefficients"]),
        row["intercept"],
        row["threshold"],
        row["prior_log_odds"],
        row["pseudo_events"],
    )
    return score, dict(store.commit_of("block_score", ds, version).provenance.models)


def load_published(store: DeltaStore, found: Published) -> Snapshot:
    """Load a list that `newest_list` found; raises as `BlockList.open`."""
    with reading(f"ds={found.ds}, revision {found.revision}"):
        snapshot = _read_snapshot(store, found)
    # What reading took beside it, as much again, would otherwise stay with Arrow.
    pa.default_memory_pool().release_unused()
    return snapshot


@contextmanager
def reading(which: str) -> Iterator[None]:
    """Turn what reading damaged or missing files raises into one line."""
    try:
        yield
    except (OSError, pa.ArrowException, DeltaError) as error:
        if problem := store_problem(error):
            raise problem from None
        # delta-rs colours its messages.
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        raise InputError(
            f"block list {which}: a table of it cannot be read ({reason}); restore the file, or"
            " publish again with --force"
        ) from None


def _read_snapshot(store: DeltaStore, found: Published) -> Snapshot:
    ds = found.ds
    provenance = store.commit_of("block_list", ds, found.version).provenance
    inputs, models = provenance.inputs, provenance.models
    absent = [name for name in _INPUTS if name not in inputs] + [CODEBOOK] * (CODEBOOK not in models)
    if absent:
        raise ArtefactError(
            f"block list ds={ds}: its commit does not name the version of {', '.join(absent)};"
            " publish again with --force"
        )
    score, _ = load_block_score(store, ds, inputs["block_score"])
    codebook, _ = open_codebook(store.root / "models", models[CODEBOOK])
    ids = load_semantic_ids(store, models[CODEBOOK], ds, inputs["item_semantic_id"])
    if not ids.items:
        raise MissingError(
            f"table item_semantic_id: no item known on ds={ds} has an ID under codebook"
            f" {models[CODEBOOK]}; run the stage item_semantic_id"
        )
    rates = store.read("item_rate", ["item_id", "log_odds"], days=[ds], version=inputs["item_rate"])
    log_odds = dict(zip(rates["item_id"].to_pylist(), rates["log_odds"].to_pylist(), strict=True))
    prior = score.prior_log_odds
    files = store.files("block_list", [ds], found.version)
    try:
        item_unit = codebook.unit(ids.codes)
        entries = _read_entries(files, codebook)
    except InputError as error:
        raise ArtefactError(
            f"block list ds={ds}: codebook {models[CODEBOOK]} is not the one of its IDs ({error});"
            " restore that codebook"
        ) from None
    users = StringIndex(entries.users)
    items, item_tastes = load_item_tastes(store, ds, ids.items, inputs["item_taste"], prior)
    categories = load_categories(store, ds, items, inputs["item"])
    others, user_log_odds, tallies = _contexts(
        store.files("user_context", [ds], inputs["user_context"]), users, categories.numbers, score
    )
    catalogue = Items.of(item_unit, categories.of_items, item_tastes).with_unknown(prior)
    files = store.files("user_taste", [ds], inputs["user_taste"])
    tastes = _tastes(files, users, others, catalogue.vectors.shape[1])
    return Snapshot(
        ds=ds,
        revision=found.revision,
        expires_on=found.expires_on,
        score=score,
        codebook=codebook,
        users=users,
        others=others,
        starts=entries.starts,
        user_log_odds=user_log_odds,
        tallies=tallies,
        tastes=tastes,
        codes=entries.codes,
        ranks=entries.ranks,
        log_probs=entries.log_probs,
        because=entries.because,
        reasons=entries.reasons,
        items=NameTable(items),
        catalogue=catalogue,
        item_log_odds=np.array([*(log_odds.get(item, prior) for item in items), prior]),
    )


@dataclass(frozen=True, eq=False)
class _Entries:
    """The entries of a list or of one file; attributes as those of `Snapshot`.

    Attributes:
        users: strings: whose the entries from `starts[r]` to `starts[r + 1]` are.
    """

    users: pa.StringArray
    starts: np.ndarray
    codes: np.ndarray
    ranks: np.ndarray
    log_probs: np.ndarray
    because: pa.ChunkedArray
    reasons: pa.ChunkedArray


def _read_entries(files: Sequence[str], codebook: Codebook) -> _Entries:
    """All entries, by user and rank; InputError for an ID that the codebook does not have."""
    footers = _in_parallel(lambda file: parquet_file(file).metadata, files)
    ends = np.cumsum([footer.num_rows for footer in footers], dtype=np.int64)
    n = int(ends[-1]) if len(ends) else 0
    codes = np.empty((n, codebook.levels), np.min_scalar_type(max(codebook.code_counts) - 1))
    ranks, log_probs = np.empty(n, np.int32), np.empty(n, np.float32)

    def fill(file: str, footer: pq.FileMetaData, end: int) -> tuple[pa.Array, np.ndarray, pa.Table]:
        """Users, one for every run of rows, lengths of the runs, and the strings."""
        columns = [*_ENTRY_STRINGS, "codes", "rank", "log_prob"]
        rows = _read(file, columns, _ENTRY_STRINGS, footer)
        here = slice(end - len(rows), end)
        codes[here] = _codes_of(rows["codes"].combine_chunks(), codebook)
        ranks[here] = rows["rank"]
        log_probs[here] = rows["log_prob"]
        users = rows["user_id"].unify_dictionaries().combine_chunks()
        row = users.indices.to_numpy()
        first = np.flatnonzero(np.append(True, row[1:] != row[:-1])[: len(row)])
        return (
            users.dictionary.take(pa.array(row[first])),
            np.diff(first, append=len(row)),
            rows.select(["because_item_id", "reason_class"]),
        )

    parts = _in_parallel(lambda part: fill(*part), list(zip(files, footers, ends.tolist(), strict=True)))
    runs = pa.concat_arrays([users for users, _, _ in parts]).dictionary_encode()
    lengths = np.concatenate([lengths for _, lengths, _ in parts])
    strings = pa.concat_tables([table for _, _, table in parts])
    whole = _Entries(
        runs.dictionary,
        _starts(lengths),
        codes,
        ranks,
        log_probs,
        strings["because_item_id"],
        strings["reason_class"],
    )
    rising = ranks[1:] > ranks[:-1]
    rising[whole.starts[1:-1] - 1] = True  # from one user to the next
    if len(runs.dictionary) == len(runs) and rising.all():
        return whole  # as published it is in order
    row = np.repeat(runs.indices.to_numpy(), lengths)
    order = np.lexsort((ranks, row))
    taken = pa.array(order)
    return _Entries(
        whole.users,
        _starts(np.bincount(row)),
        codes[order],
        ranks[order],
        log_probs[order],
        whole.because.unify_dictionaries().take(taken),
        whole.reasons.unify_dictionaries().take(taken),
    )


def _codes_of(lists: pa.ListArray, codebook: Codebook) -> np.ndarray:
    """Codes int32 [n, D]; InputError for those that the codebook does not have."""
    if not (pc.list_value_length(lists).to_numpy(zero_copy_only=False) == codebook.levels).all():
        raise InputError(f"IDs of other lengths where it has {codebook.levels} levels")
    codes: np.ndarray = pc.list_flatten(lists).to_numpy().reshape(-1, codebook.levels)
    largest = [codes[:, level].max(initial=0) for level in range(codebook.levels)]
    if codes.min(initial=0) < 0 or (np.array(largest) >= codebook.code_counts).any():
        check_codes(codes, codebook.code_counts)  # names the row; too slow for all lists
    return codes


def _in_parallel(make: Callable[[_Value], _Result], values: Sequence[_Value]) -> list[_Result]:
    """What is made of each value, one on each core at a time; Arrow and numpy let threads do so."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(make, values))


def _read(
    file: str,
    columns: Sequence[str],
    as_dictionaries: Sequence[str] = (),
    footer: pq.FileMetaData | None = None,
) -> pa.Table:
    """Columns of a data file (a path for a part of one), some strings as dictionaries."""
    opened = parquet_file(file, read_dictionary=list(as_dictionaries), metadata=footer)
    return opened.read(columns=list(columns), use_threads=False)


def _contexts(
    files: Sequence[str],
    listed: StringIndex,
    category_numbers: dict[str, tuple[int, int]],
    score: BlockScore,
) -> tuple[StringIndex, np.ndarray, Tallies]:
    """What `user_context` knows: other users than the listed; log odds and tallies of all.

    Rows are those of `Snapshot`: the listed users, the others, and one for a user who is not known.
    """
    columns = ["user_id", "n_negatives", "n_positives", "categories"]
    paths = ["categories.list.element.category"]
    parts = _in_parallel(lambda file: _read(file, columns, paths), files)
    if not sum(part.num_rows for part in parts):
        starts, empty = np.zeros(len(listed) + 2, np.int64), np.zeros(0, np.int32)
        no_tally = Tallies(starts, np.zeros((0, 2), np.int32), empty, empty)
        nobody = StringIndex(pa.array([], pa.string()), len(listed))
        return nobody, np.full(len(listed) + 1, score.prior_log_odds), no_tally
    contexts = pa.concat_tables(parts)
    users = contexts["user_id"]
    row = _rows_of(users, [listed])
    others = StringIndex(users.filter(pa.array(row < 0)).combine_chunks(), len(listed))
    # Where the context of each row is; that of a listed user may be missing, and the last is nobody's.
    order = np.full(len(listed) + len(others) + 1, -1)
    order[row[row >= 0]] = np.flatnonzero(row >= 0)
    order[len(listed) : -1] = np.flatnonzero(row < 0)
    counts = []
    for name in ("n_negatives", "n_positives"):
        count = contexts[name].fill_null(0).to_numpy()
        counts.append(np.where(order >= 0, count[order], 0))
    tallies = _tallies(contexts["categories"], category_numbers, order)
    return others, score.user_log_odds(*counts), tallies


def _tastes(files: Sequence[str], listed: StringIndex, others: StringIndex, width: int) -> np.ndarray:
    """Weights of users, the listed, then the others, and of one who is not known: float32 [n, width].

    Raises:
        ArtefactError: weights of another width.
    """
    out = np.zeros((len(listed) + len(others) + 1, width), np.float32)

    def fill(file: str) -> None:
        rows = _read(file, ["user_id", "weights"])
        if not len(rows):
            return
        weights = np.concatenate([pc.list_flatten(chunk).to_numpy() for chunk in rows["weights"].chunks])
        if len(weights) != len(rows) * width:
            raise ArtefactError(
                f"table user_taste: weights of {len(weights) // len(rows)} numbers where its items have"
                f" {width}; run the stage user_taste again with --force"
            )
        place = _rows_of(rows["user_id"], [listed, others])
        known = place >= 0
        out[place[known]] = weights.reshape(-1, width)[known]

    _in_parallel(fill, files)
    return out


def _rows_of(users: pa.ChunkedArray, indices: Sequence[StringIndex]) -> np.ndarray:
    """The number of each user in the index that has it, -1 for one in none: int64 [n]."""
    out = np.full(len(users), -1)
    for index in indices:
        left = np.flatnonzero(out < 0)
        if len(left):
            out[left] = index.numbers_of(users if len(left) == len(users) else users.take(pa.array(left)))
    return out


def _tallies(lists: pa.ChunkedArray, numbers: dict[str, tuple[int, int]], order: np.ndarray) -> Tallies:
    """Lists of category counts in the given order; a category that no item has any more gets 0."""
    categories, negatives, positives = [], [], []
    for chunk in lists.chunks:
        counts = pc.list_flatten(chunk)
        paths = pc.struct_field(counts, "category")
        of_path = np.array(
            [numbers.get(path, (0, 0)) for path in paths.dictionary.to_pylist()], np.int32
        ).reshape(-1, 2)
        categories.append(of_path.take(paths.indices.to_numpy(), axis=0))
        negatives.append(pc.struct_field(counts, "n_negatives").to_numpy())
        positives.append(pc.struct_field(counts, "n_positives").to_numpy())
    columns = [np.concatenate(parts) for parts in (categories, negatives, positives)]
    starts = _list_starts(lists)
    if np.array_equal(order[:-1], np.arange(len(lists))):
        # As tables are published, users are in the same order in all.
        return Tallies(np.append(starts, starts[-1]), *columns)
    starts, place = _reordered(starts, order)
    return Tallies(starts, *(column.take(place, axis=0) for column in columns))


def _list_starts(lists: pa.ChunkedArray) -> np.ndarray:
    """Where each list starts among the elements of all, and the end: int64 [n + 1]."""
    return _starts(pc.list_value_length(lists).fill_null(0).to_numpy())


def _reordered(starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists that begin at `starts`, in another order; -1 stands for an empty one.

    Returns:
        Where they start then, int64 [n + 1], and where each of their elements is now, int64 [elements].
    """
    lengths = np.diff(starts, append=starts[-1:])[order]
    after = _starts(lengths)
    place = np.repeat(starts[order] - after[:-1], lengths)
    place += np.arange(after[-1])
    return after, place


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where lists of these lengths start in one row after another, and the end: int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
