"""Disks that fill up."""

import contextlib
from pathlib import Path


class SmallDisk:
    """A file system of its own that can be filled up, so that writes fail as on a full disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)
