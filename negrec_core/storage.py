"""Where a warehouse lies: a directory, or a prefix of an object store.

Object stores are spoken to by delta-rs alone, for data files as for commits, so that one set of
environment variables (`AWS_*`, ...) holds for both and no secret passes through negrec. An object is
whole when it appears, but there are no directories and no renaming.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake.fs import DeltaStorageHandler

from negrec_core.errors import ConfigError, InputError, MissingError

_SCHEMES = ("s3", "gs", "abfss")
# Of the log's paths delta-rs encodes some characters twice.
_KEY = re.compile(r"[A-Za-z0-9._/=-]*")
# Of a request; by delta-rs's own a store that does not answer is noticed after minutes.
_OPTIONS = {"max_retries": "100", "retry_timeout": "30s", "connect_timeout": "10s", "timeout": "60s"}
_THREADS = 16
_CHUNK = 1 << 20
_WRITTEN = "_written.json"
_LAST_CLOSE_SECONDS = 0.2


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A place in an object store, with as much of pathlib's interface as a warehouse needs.

    Attributes:
        store: scheme and bucket, as s3://bucket.
        key: names below it, joined by /.
    """

    store: str
    key: str

    def __str__(self) -> str:
        return f"{self.store}/{self.key}" if self.key else self.store

    def __truediv__(self, name: str | PurePosixPath) -> "ObjectPath":
        return ObjectPath(self.store, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.store, self.key.rpartition("/")[0])

    def read_bytes(self) -> bytes:
        with filesystem(self.store).open_input_file(self.key) as stream:
            return bytes(stream.read())

    def write_bytes(self, content: bytes) -> None:
        _write(self, io.BytesIO(content))

    def unlink(self) -> None:
        filesystem(self.store).delete_file(self.key)


Place = Path | ObjectPath


@dataclass(frozen=True)
class Stored:
    """A file that is there.

    Attributes:
        path: where.
        below: the same, from the folder that was looked through.
        size: in bytes.
        modified: when it was last written, milliseconds since 1970.
    """

    path: Place
    below: PurePosixPath
    size: int
    modified: int


def place(root: Place | str) -> Place:
    """The place that a path or a URL names.

    Raises:
        ConfigError: a URL of another kind of store, without a bucket, or with odd characters.
    """
    if isinstance(root, ObjectPath):
        return root
    if "://" not in str(root):
        return Path(root).absolute()
    url = urlsplit(str(root))
    known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
    if url.scheme not in _SCHEMES:
        raise ConfigError(f"warehouse {root}: give a folder, or a URL that begins with one of {known}")
    key = url.path.strip("/")
    if not url.netloc or url.query or url.fragment or "//" in key or not _KEY.fullmatch(key):
        raise ConfigError(
            f"warehouse {root}: write it as {url.scheme}://bucket/prefix, of letters, digits and . _ - ="
        )
    _wait_at_exit()
    return ObjectPath(f"{url.scheme}://{url.netloc}", key)


@functools.lru_cache
def _wait_at_exit() -> None:
    """Give Arrow's threads the time to close what they have read, as `folder_files` says."""
    atexit.register(time.sleep, _LAST_CLOSE_SECONDS)


def below(path: Place, folder: Place) -> PurePosixPath:
    """A place from a folder that it is in."""
    return PurePosixPath(str(path)[len(str(folder)) + 1 :])


def delta_options(path: Place) -> dict[str, str] | None:
    """Storage options for delta-rs; credentials it takes from the environment."""
    return dict(_OPTIONS) if isinstance(path, ObjectPath) else None


@functools.lru_cache
def filesystem(store: str) -> pa_fs.FileSystem:
    """The objects of one bucket, for Arrow."""
    return pa_fs.PyFileSystem(DeltaStorageHandler(f"{store}/", options=_OPTIONS))


def located(path: Place | str) -> tuple[pa_fs.FileSystem | None, str]:
    """File system and name of a file, as functions of Arrow take them; None: this machine's."""
    if "://" not in str(path):
        return None, str(path)
    found = place(path)
    assert isinstance(found, ObjectPath)
    return filesystem(found.store), found.key


def folder_files(folder: Place) -> pa_fs.FileSystem | None:
    """A folder of this machine as a file system of Arrow, of which delta-rs takes its own for None.

    That one calls Python from Arrow's threads, and a process that ends while one of them still closes a
    file is aborted (about one in ten that read many small files and end).
    """
    return pa_fs.SubTreeFileSystem(str(folder), pa_fs.LocalFileSystem()) if isinstance(folder, Path) else None


def parquet_file(path: Place | str, **options: Any) -> pq.ParquetFile:
    """Open a data file."""
    files, name = located(path)
    # Each read of an object takes a request; neighbouring columns are taken together.
    return pq.ParquetFile(name, filesystem=files, pre_buffer=files is not None, **options)


def walk(folder: Place) -> list[Stored]:
    """All files below a folder, by name; none where it does not exist."""
    if isinstance(folder, Path):
        found = []
        for file in sorted(folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # a writer at work renames its files
                if file.is_file():
                    stat = file.stat()
                    below = PurePosixPath(file.relative_to(folder))
                    found.append(Stored(file, below, stat.st_size, stat.st_mtime_ns // 1_000_000))
        return found
    selector = pa_fs.FileSelector(folder.key, allow_not_found=True, recursive=True)
    infos = filesystem(folder.store).get_file_info(selector)
    files = sorted((info for info in infos if info.type == pa_fs.FileType.File), key=lambda info: info.path)
    return [
        Stored(
            ObjectPath(folder.store, info.path),
            PurePosixPath(info.path).relative_to(folder.key),
            info.size,
            info.mtime_ns // 1_000_000,
        )
        for info in files
    ]


def folders(folder: Place) -> list[str]:
    """Names of the folders in a folder; none where it does not exist."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    selector = pa_fs.FileSelector(folder.key, allow_not_found=True)
    infos = filesystem(folder.store).get_file_info(selector)
    return sorted(info.base_name for info in infos if info.type == pa_fs.FileType.Directory)


def size_problems(files: Sequence[Place | str], sizes: Iterable[int]) -> list[str | None]:
    """What is wrong with data files that the log says have so many bytes; None: nothing."""
    if files and located(files[0])[0]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(_size_problem, files, sizes))
    return list(map(_size_problem, files, sizes))


def _size_problem(path: Place | str, size: int) -> str | None:
    try:
        found, _ = size_and_time(path)
    except FileNotFoundError:
        return "is gone"
    return None if found == size else f"has {found:,} bytes, not {size:,}"


def size_and_time(path: Place | str) -> tuple[int, int]:
    """Bytes of a file, and when it was last written, milliseconds since 1970.

    Raises:
        FileNotFoundError: it is not there.
    """
    files, name = located(path)
    if not files:
        stat = os.stat(name)
        return stat.st_size, stat.st_mtime_ns // 1_000_000
    info = files.get_file_info(name)
    if info.type != pa_fs.FileType.File:
        raise FileNotFoundError(f"{path} is not there")
    return info.size, info.mtime_ns // 1_000_000


def delete_folder(folder: Place) -> None:
    """Delete a folder with all in it, as far as that is possible."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        delete_files([file.path for file in walk(folder)])


def delete_files(files: Sequence[Place]) -> None:
    """Delete files."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda file: file.unlink(), files))


def upload(source: Path, target: ObjectPath) -> None:
    """Copy a file of this machine to an object store."""
    with source.open("rb") as content:
        _write(target, content)


def download(source: ObjectPath, target: Path) -> None:
    """Copy an object to this machine; FileNotFoundError where there is none."""
    with filesystem(source.store).open_input_stream(source.key) as content, target.open("wb") as out:
        shutil.copyfileobj(content, out, _CHUNK)


def _write(target: ObjectPath, content: BinaryIO) -> None:
    # Through a larger buffer of Arrow: delta-rs takes nothing but bytes, and Arrow makes those of what it
    # has buffered alone.
    with filesystem(target.store).open_output_stream(target.key, buffer_size=4 * _CHUNK) as out:
        shutil.copyfileobj(content, out, _CHUNK)


# --- runs: directories that a writer fills before the commit


def finish_run(run: Place, names: Sequence[str] | None = None) -> None:
    """Say which files of a run count; before that a run in an object store is not there.

    A directory needs no such mark: there files get their name when they are whole and wanted. An object
    has its name at once, also that of a task of Spark that is tried again.

    Args:
        run: the run.
        names: its data files, relative to it; default: all.
    """
    if isinstance(run, ObjectPath):
        found = [str(file.below) for file in walk(run)] if names is None else names
        (run / _WRITTEN).write_bytes(json.dumps(sorted(found)).encode())


def data_files(table: str, run: Place) -> list[Place]:
    """The data files of a run directory; not what Spark hides by a leading `_` or `.`.

    Raises:
        InputError: it was never written.
    """
    never = InputError(f"table {table}: {run} was never written; nothing was committed")
    if isinstance(run, ObjectPath):
        try:
            return [run / name for name in json.loads((run / _WRITTEN).read_bytes())]
        except FileNotFoundError:
            raise never from None
    if not run.is_dir():
        raise never
    return sorted(
        file
        for file in run.rglob("*.parquet")
        if not any(part.startswith(("_", ".")) for part in below(file, run).parts)
    )


# --- what goes wrong


@contextlib.contextmanager
def store_errors(where: Place | str = "") -> Iterator[None]:
    """Raise MissingError, one line, where an object store cannot be used."""
    try:
        yield
    except OSError as error:
        problem = store_problem(error, where)
        if problem:
            raise problem from None
        raise


def store_problem(error: BaseException, where: Place | str = "") -> MissingError | None:
    """The one line for an object store that cannot be used; None: the error is of another kind.

    delta-rs says over many lines, in colours, what failed within what.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    # A range that is not there is a file that was cut.
    of_store = "Generic (S3|GCS|MicrosoftAzure) error|lacked (the necessary privileges|valid authentication)"
    if not re.search(of_store, text) or "InvalidRange" in text:
        return None
    answer = re.search(r"<Code>(\w+)</Code>(?:\s*<Message>(.*?)</Message>)?", text, re.DOTALL)
    # Spark's stack trace may follow.
    parts = [part.strip().partition("\n")[0] for part in text.split("↳")]
    if answer:
        reason = " ".join(": ".join(filter(None, answer.groups())).split())
    elif "169.254.169.254" in text or "metadata.google.internal" in text:
        reason = "there are no credentials in the environment, and this machine has none of its own"
    else:
        reason = next((part for part in reversed(parts) if part), "no reason given")
    asked = re.search(r"Error performing \w+ (https?://[^/\s]+/?[^/?\s]*)", text)
    named = str(where) or (asked.group(1) if asked else "the object store")
    return MissingError(
        f"{named}: the object store cannot be used ({reason}); check the URL, the environment's settings and"
        " credentials (conf/cluster.md names them), and the network"
    )
