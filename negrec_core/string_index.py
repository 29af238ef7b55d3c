"""Millions of names in arrays: a mapping from string to number without a Python object for each."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

_WORD = 8
_BITS = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_LENGTH = 0xD6E8FEB86659FD93


class StringIndex(Mapping[str, int]):
    """Distinct strings -> `first`, `first + 1`, ... in their order; never changed.

    Holds the strings as Arrow does, and 12 bytes for each: its hash, in ascending order, and its
    number. Looking one up takes a few microseconds.
    """

    def __init__(self, names: pa.Array, first: int = 0) -> None:
        """Index an Arrow array of distinct strings without nulls."""
        self._names = names.cast(pa.large_string())
        self._first = first
        _, offsets, data = self._names.buffers()
        n, skipped = len(self._names), self._names.offset
        self._offsets = np.frombuffer(offsets or bytes(_WORD), np.int64)[skipped : skipped + n + 1]
        self._data = memoryview(data or b"").cast("B")
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
