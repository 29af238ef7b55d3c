"""Millions of names in arrays: a mapping from string to number without a Python object for each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_WORD = 8
_BITS = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_LENGTH = 0xD6E8FEB86659FD93
# Names of a table that a name may push on before the table is made larger; far more than chance asks for.
_ROUNDS = 200
_SPREAD = np.int64(_ODD - (1 << 64))


class StringIndex(Mapping[str, int]):
    """Distinct strings -> `first`, `first + 1`, ... in their order; never changed.

    Holds the strings as Arrow does, and 12 bytes for each: its hash, in ascending order, and its
    number. Looking one up takes a few microseconds.
    """

    def __init__(self, names: pa.Array, first: int = 0) -> None:
        """Index an Arrow array of distinct strings without nulls."""
        self._names = names.cast(pa.large_string())
        self._first = first
        self._offsets, self._data = _parts(self._names)
        hashes = _hashes(self._offsets, self._data)
        self._order = np.argsort(hashes).astype(np.int32)
        self._hashes = hashes[self._order]

    def __getitem__(self, name: str) -> int:
        number = self._find(name)
        if number < 0:
            raise KeyError(name)
        return number

    def get(self, name: str, default: Any = None) -> Any:
        """The number of a string, or `default`."""
        number = self._find(name)
        return default if number < 0 else number

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) >= 0

    def __iter__(self) -> Iterator[str]:
        return (name.as_py() for name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    def numbers_of(self, names: pa.ChunkedArray) -> np.ndarray:
        """The number of each of many strings, -1 for one that has none: int64 [n].

        Quickest where a chunk holds strings of the index in its order without gaps.
        """
        return np.concatenate([np.zeros(0, np.int64), *map(self._numbers_of, names.chunks)])

    def _numbers_of(self, names: pa.Array) -> np.ndarray:
        out = np.full(len(names), -1, np.int64)
        if not len(names) or not len(self):
            return out
        names = names.cast(pa.large_string())
        start = self._find(names[0].as_py())
        if start >= 0 and self._names.slice(start - self._first, len(names)).equals(names):
            return np.arange(start, start + len(names))
        hashes = _hashes(*_parts(names))
        place = np.minimum(self._hashes.searchsorted(hashes), len(self) - 1)
        there = np.flatnonzero(self._hashes[place] == hashes)
        number = self._order[place[there]]
        out[there] = number.astype(np.int64) + self._first
        same = pc.equal(self._names.take(pa.array(number)), names.take(pa.array(there)))
        # Two strings with one hash: of these the first was looked at.
        for row in there[~same.to_numpy(zero_copy_only=False)]:
            out[row] = self._find(names[row].as_py())
        return out

    def _find(self, name: str) -> int:
        text = name.encode("utf-8", "surrogatepass")
        wanted = _hash(text)
        place = int(self._hashes.searchsorted(np.uint64(wanted)))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            number = int(self._order[place])
            if self._data[self._offsets[number] : self._offsets[number + 1]] == text:
                return self._first + number
            place += 1
        return -1


class NameTable:
    """Distinct strings -> 0, 1, ... in their order, hundreds at a time; never changed.

    A dict waits for memory three times for each string; here the strings of a page are looked up together.
    Each is at one of two places (cuckoo hashing), so that two looks find any of them. They are told apart by
    Python's 64-bit hash alone, which is keyed anew in every process: a string that is not in a table of n is
    taken for one of them with a chance of n / 2**64.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """A table of distinct strings."""
        hashes = _keyed_hashes(names)
        # At most a quarter full, so that most are at their first place.
        bits = (4 * len(names)).bit_length()
        while (owners := _owners(hashes, bits)) is None:
            bits += 1
        self._bits = bits
        # Each place holds a hash and a number, side by side in memory; -1 where it is free.
        self._places = np.full((len(owners), 2), -1, np.int64)
        taken = np.flatnonzero(owners >= 0)
        self._places[taken] = np.column_stack([hashes[owners[taken]], owners[taken]])

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """The number of each string, -1 for one that is not in the table: int64 [n]."""
        hashes = _keyed_hashes(names)
        found = self._places.take(_first_place(hashes, self._bits), axis=0)
        out = found[:, 1]
        elsewhere = np.flatnonzero(found[:, 0] != hashes)
        left = hashes[elsewhere]
        found = self._places.take(_second_place(left, self._bits), axis=0)
        out[elsewhere] = np.where(found[:, 0] == left, found[:, 1], -1)
        return out


def _owners(hashes: np.ndarray, bits: int) -> np.ndarray | None:
    """Which name has each of `2**bits` places, -1 for none: int64. None if a name would be without."""
    choices = np.stack([_first_place(hashes, bits), _second_place(hashes, bits)])
    owners = np.full(1 << bits, -1)
    left, choice = np.arange(len(hashes)), np.zeros(len(hashes), np.int64)
    for _ in range(_ROUNDS):
        if not len(left):
            return owners
        places = choices[choice[left], left]
        before = owners[places]
        owners[places] = left  # of several that want a place the last has it
        there = owners[places] == left
        # One with the same hash could never be told from the one that has its place now.
        pushed = there & (before >= 0) & (hashes[before] != hashes[left])
        left = np.concatenate([left[~there], before[pushed]])
        choice[left] ^= 1
    return None


def _first_place(hashes: np.ndarray, bits: int) -> np.ndarray:
    return hashes & ((1 << bits) - 1)


def _second_place(hashes: np.ndarray, bits: int) -> np.ndarray:
    return (hashes * _SPREAD >> 32) & ((1 << bits) - 1)


def _keyed_hashes(names: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(hash, names), np.int64, len(names))


def _parts(names: pa.LargeStringArray) -> tuple[np.ndarray, memoryview]:
    """Where each string starts and ends in the text of all, int64 [n + 1], and that text."""
    _, offsets, data = names.buffers()
    starts = np.frombuffer(offsets or bytes(_WORD), np.int64)[names.offset : names.offset + len(names) + 1]
    return starts, memoryview(data or b"").cast("B")


def _hash(text: bytes) -> int:
    value = len(text) * _LENGTH & _BITS
    for start in range(0, len(text), _WORD):
        value = (value ^ int.from_bytes(text[start : start + _WORD], "little")) * _ODD & _BITS
        value ^= value >> 32
    return value


def _hashes(offsets: np.ndarray, data: memoryview) -> np.ndarray:
    """`_hash` of all strings at once, uint64 [n]."""
    lengths = np.diff(offsets)
    values = lengths.astype(np.uint64) * np.uint64(_LENGTH)
    padded = np.zeros(len(data) + _WORD, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    # The eight bytes that start at each byte.
    words = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))
    for start in range(0, int(lengths.max(initial=0)), _WORD):
        longer = np.flatnonzero(lengths > start)
        word = words[offsets[longer] + start]
        beyond = np.maximum(_WORD - (lengths[longer] - start), 0).astype(np.uint64)
        word &= np.uint64(_BITS) >> (np.uint64(8) * beyond)
        value = (values[longer] ^ word) * np.uint64(_ODD)
        values[longer] = value ^ value >> np.uint64(32)
    return values
