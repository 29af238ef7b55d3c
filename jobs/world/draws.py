"""Small array functions that every part of the world uses."""

from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


def numbered(prefix: str, first: int, count: int, width: int) -> pa.Array:
    """Names of `count` things from number `first` on, zero-padded to `width` digits."""
    return pa.array([f"{prefix}{number:0{width}d}" for number in range(first, first + count)])


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def happens(rng: np.random.Generator, probability: Array | float, n: int) -> Array:
    """[n] True with the given probabilities."""
    return rng.random(n) < probability


def starts(group: Array) -> Array:
    """[n] True where a new group starts; equal groups stand together."""
    return np.concatenate([[True], group[1:] != group[:-1]])[: len(group)]


def contains(keys: Array, wanted: Array) -> Array:
    """Which of `wanted` are in the sorted `keys`."""
    if not len(keys):
        return np.zeros(wanted.shape, dtype=bool)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: Array = keys[place] == wanted
    return found
