"""Importing a library without a package that it takes where it is, but that nothing here needs it to."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(package: str) -> Iterator[None]:
    """Inside, `package` cannot be imported, as if it were not installed; unless it is imported already.

    For statements at the top of a module: other threads cannot import it either.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyrefly: ignore[unsupported-operation]
    try:
        yield
    finally:
        del sys.modules[package]
