"""One published block list in memory, with everything that scoring needs.

All reads of a list are pinned to the table versions recorded in its commit, so a list is never
mixed with newer rates or IDs.
"""

import datetime as dt
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import DeltaError

from negrec_core.block_score import FEATURES, BlockScore, Items, Tally, features
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore
from negrec_core.errors import ArtefactError, InputError, MissingError
from negrec_core.generator import CODEBOOK, open_codebook
from negrec_core.items import load_categories
from negrec_core.semantic_ids import load_semantic_ids

log = logging.getLogger("negrec")

_INPUTS = ("block_score", "item_semantic_id", "item_rate", "user_context", "item")


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
class History:
    """Past items of every user, those of one user after those of another.

    Attributes:
        starts: int64 [users + 1]; the items of user row r are `rows[starts[r]:starts[r + 1]]`.
        rows: row of `Snapshot.catalogue` of each item, int32 [items].
    """

    starts: np.ndarray
    rows: np.ndarray

    def of(self, user_row: int) -> np.ndarray:
        """Rows int32 [m] of one user's items."""
        return self.rows[self.starts[user_row] : self.starts[user_row + 1]]


@dataclass(frozen=True, eq=False)
class Tallies:
    """Feedback by category of every user, laid out as `History`.

    Attributes:
        starts: int64 [users + 1].
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
        users: user id -> row, for users that have entries; these are the first rows.
        others: user id -> row, for users with a context but without entries; these follow.
        starts: int64 [users + 1]; the entries of user row r are `starts[r]:starts[r + 1]`.
        user_log_odds: smoothed, float64 [users + others + 1]; the last is the prior.
        disliked: past dislikes of [users + others + 1]; the last has none.
        liked: past likes of the same.
        tallies: feedback by category of the same.
        entries: row of `sid_unit` of each entry, int32 [entries].
        ranks: rank of each entry, int32 [entries].
        log_probs: float32 [entries].
        because: nearest past dislike of each entry, dictionary array of strings.
        reasons: reason class of each entry, dictionary array of strings.
        items: item id -> row of `catalogue` and `item_log_odds`.
        catalogue: items + 1; the last is one of which nothing is known.
        item_log_odds: float64 [items + 1]; the last is the prior.
        sid_unit: unit embeddings of the distinct predicted IDs, float32 [n, dim].
    """

    ds: str
    revision: int
    expires_on: dt.date
    score: BlockScore
    users: dict[str, int]
    others: dict[str, int]
    starts: np.ndarray
    user_log_odds: np.ndarray
    disliked: History
    liked: History
    tallies: Tallies
    entries: np.ndarray
    ranks: np.ndarray
    log_probs: np.ndarray
    because: pa.DictionaryArray
    reasons: pa.DictionaryArray
    items: dict[str, int]
    catalogue: Items
    item_log_odds: np.ndarray
    sid_unit: np.ndarray

    def features(self, user_id: str, item_ids: Sequence[str]) -> np.ndarray:
        """Block-score features [n, F] of items for a user."""
        rows = np.fromiter(map(self.items.get, item_ids, repeat(-1)), np.intp, len(item_ids))
        span = self.span(user_id)
        user = self._row_of(user_id)
        return features(
            self.catalogue.take(rows),
            self.sid_unit[self.entries[span]],
            self.log_probs[span],
            self.catalogue.unit[self.disliked.of(user)],
            self.catalogue.unit[self.liked.of(user)],
            self.tallies.of(user),
            self.item_log_odds[rows],
            float(self.user_log_odds[user]),
            self.score.prior_log_odds,
            self.score.pseudo_events,
        )

    def span(self, user_id: str) -> slice:
        """Where the entries of a user are; empty for a user without any."""
        row = self.users.get(user_id)
        return slice(0, 0) if row is None else slice(*self.starts[row : row + 2].tolist())

    def _row_of(self, user_id: str) -> int:
        """Row of a user; that of a user of whom nothing is known is the last."""
        row = self.users.get(user_id)
        return self.others.get(user_id, len(self.user_log_odds) - 1) if row is None else row


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
            expiries = _column(store.files("block_list", [day], version), "expires_on")
        expires_on = pc.min(expiries).as_py()
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


def load_snapshot(warehouse: Path | str, today: dt.date) -> Snapshot:
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
        return _read_snapshot(store, found)


@contextmanager
def reading(which: str) -> Iterator[None]:
    """Turn what reading damaged or missing files raises into one line."""
    try:
        yield
    except (OSError, pa.ArrowException, DeltaError) as error:
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
    # Column by column: the whole table would take twice the memory.
    files = store.files("block_list", [ds], found.version)
    names, starts, order = _grouped(_column(files, "user_id"), _column(files, "rank"))
    categories = load_categories(store, ds, ids.items, inputs["item"])
    others, user_log_odds, disliked, liked, tallies = _contexts(
        store.files("user_context", [ds], inputs["user_context"]),
        names,
        ids.items,
        categories.numbers,
        score,
    )
    try:
        item_unit = codebook.unit(ids.codes)
        entries, sid_unit = _distinct(_column(files, "codes", order), codebook)
    except InputError as error:
        raise ArtefactError(
            f"block list ds={ds}: codebook {models[CODEBOOK]} is not the one of its IDs ({error});"
            " restore that codebook"
        ) from None
    return Snapshot(
        ds=ds,
        revision=found.revision,
        expires_on=found.expires_on,
        score=score,
        users={name: row for row, name in enumerate(names)},
        others={name: row for row, name in enumerate(others, len(names))},
        starts=starts,
        user_log_odds=user_log_odds,
        disliked=disliked,
        liked=liked,
        tallies=tallies,
        entries=entries,
        ranks=_column(files, "rank", order).to_numpy(),
        log_probs=_column(files, "log_prob", order).to_numpy(),
        because=_column(files, "because_item_id", order).dictionary_encode().combine_chunks(),
        reasons=_column(files, "reason_class", order).dictionary_encode().combine_chunks(),
        items=ids.index,
        catalogue=Items(item_unit, categories.of_items).with_unknown(),
        item_log_odds=np.array([*(log_odds.get(item, prior) for item in ids.items), prior]),
        sid_unit=sid_unit,
    )


def _column(files: Sequence[str], name: str, order: np.ndarray | None = None) -> pa.ChunkedArray:
    """One column of data files (a path for a part of it), one after another; `order` rearranges rows."""
    parts = [pq.ParquetFile(file).read(columns=[name]) for file in files]
    column = pa.concat_tables(parts).column(0)
    return column if order is None else column.take(pa.array(order))


def _grouped(
    user_ids: pa.ChunkedArray, ranks: pa.ChunkedArray
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Users, where the entries of each start (int64 [users + 1]), and the order by user and rank.

    The order is None where rows are in it already: as published they are, and strings are slow to
    sort.
    """
    users = user_ids.dictionary_encode().combine_chunks()
    row = users.indices.to_numpy().astype(np.int64)
    starts = _starts(np.bincount(row))
    row <<= 32
    row += ranks.to_numpy()
    order = np.argsort(row) if (row[1:] <= row[:-1]).any() else None
    return users.dictionary.to_pylist(), starts, order


def _distinct(codes: pa.ChunkedArray, codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """Row int32 [n] of each ID among the distinct ones, and the unit embeddings of those."""
    lengths = pc.unique(pc.list_value_length(codes)).to_pylist()
    if lengths != [codebook.levels]:
        raise InputError(f"IDs of {lengths} codes where it has {codebook.levels} levels")
    flat = pc.list_flatten(codes).to_numpy().reshape(-1, codebook.levels)
    row = np.zeros(len(flat), np.int64)
    for level in range(codebook.levels):
        # Numbering the prefixes anew at each level keeps the keys small, however many levels.
        keys = pa.array((row << 32) + flat[:, level]).dictionary_encode()
        row = keys.indices.to_numpy().astype(np.int64)
    some_entry = np.empty(len(keys.dictionary), np.int64)
    some_entry[row] = np.arange(len(row))
    return row.astype(np.int32), codebook.unit(flat[some_entry])


def _contexts(
    files: Sequence[str],
    listed: list[str],
    items: list[str],
    category_numbers: dict[str, tuple[int, int]],
    score: BlockScore,
) -> tuple[list[str], np.ndarray, History, History, Tallies]:
    """What `user_context` knows: other users than the listed; log odds, dislikes, likes and tallies of all.

    Rows are those of `Snapshot`: the listed users, the others, and one for a user who is not known.
    """
    if not files:
        starts, empty = np.zeros(len(listed) + 2, np.int64), np.zeros(0, np.int32)
        nothing = History(starts, empty)
        no_tally = Tallies(starts, np.zeros((0, 2), np.int32), empty, empty)
        return [], np.full(len(listed) + 1, score.prior_log_odds), nothing, nothing, no_tally
    users = _column(files, "user_id")
    row = pc.index_in(pa.array(listed, users.type), users)
    other = pc.indices_nonzero(pc.invert(pc.is_in(users, pa.array(listed, users.type))))
    # A null index takes a null: no counts and no items.
    order = pa.concat_arrays([row, other.cast(pa.int32()), pa.nulls(1, pa.int32())])
    counts = [
        _column(files, name).take(order).fill_null(0).to_numpy() for name in ("n_negatives", "n_positives")
    ]
    known = pa.array(items, pa.string())
    return (
        users.take(other).to_pylist(),
        score.user_log_odds(*counts),
        # Only the ids: the lists' times and reasons are most of their size.
        _history(_column(files, "negatives.list.element.item_id"), known, order),
        _history(_column(files, "positives.list.element.item_id"), known, order),
        _tallies(_column(files, "categories"), category_numbers, order),
    )


def _history(lists: pa.ChunkedArray, known: pa.Array, order: pa.Array) -> History:
    """The items of lists that have an ID, as rows among the known; lists in the given order."""
    whole = lists.combine_chunks()
    row = pc.index_in(pc.struct_field(pc.list_flatten(whole), "item_id"), known)
    owner = pc.list_parent_indices(whole).filter(row.is_valid()).to_numpy()
    starts = _starts(np.bincount(owner, minlength=len(whole)))
    ordered = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), row.drop_null()).take(order)
    lengths = pc.list_value_length(ordered).fill_null(0)
    return History(_starts(lengths.to_numpy()), pc.list_flatten(ordered).to_numpy())


def _tallies(lists: pa.ChunkedArray, numbers: dict[str, tuple[int, int]], order: pa.Array) -> Tallies:
    """Lists of category counts in the given order; a category that no item has any more gets -1."""
    ordered = lists.combine_chunks().take(order)
    counts = pc.list_flatten(ordered)
    paths = pc.struct_field(counts, "category").dictionary_encode()
    of_path = np.array([numbers.get(path, (-1, -1)) for path in paths.dictionary.to_pylist()], np.int32)
    negatives, positives = (
        pc.struct_field(counts, name).to_numpy() for name in ("n_negatives", "n_positives")
    )
    starts = _starts(pc.list_value_length(ordered).fill_null(0).to_numpy())
    return Tallies(starts, of_path.reshape(-1, 2)[paths.indices.to_numpy()], negatives, positives)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where lists of these lengths start in one row after another, and the end: int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
