"""Versioned model directories: `<root>/<name>/<version>/`, completed by `manifest.json`.

The manifest is written last, so its presence is the completion mark (DESIGN section 3). It holds
the SHA-256 of every file; a directory without a manifest, or whose files differ from it, is not a
model.

In an object store the directories have the same names; `publish` copies them there, and whoever opens
one has a copy of it on his own machine.
"""

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from negrec_core.errors import ArtefactError, MissingError
from negrec_core.storage import ObjectPath, Place, download, folders, store_errors, upload

MANIFEST = "manifest.json"
_PARTIAL = f".{MANIFEST}.partial"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Manifest:
    """What a complete model directory says of itself.

    Attributes:
        name: model family, for example `codebook` or `generator`.
        version: directory name; versions sort by creation time.
        created_at: UTC time of completion, ISO 8601.
        digest: SHA-256 over the sorted `files` entries; two equal digests are the same model.
        files: relative path -> SHA-256.
        parameters: what it was made with, enough to make it again.
        metrics: what was measured when it was made.
        inputs: Delta table -> version it was made from.
    """

    name: str
    version: str
    created_at: str
    digest: str
    files: dict[str, str]
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)


def on_this_machine(models: Place) -> Path:
    """The directory of the model versions itself; of those in an object store, that of their copies.

    Copies are in `NEGREC_CACHE`, by default ~/.cache/negrec. What is trained is made there too.
    """
    if isinstance(models, Path):
        return models
    cache = Path(os.environ.get("NEGREC_CACHE") or Path.home() / ".cache" / "negrec")
    return cache / models.store.replace("://", "/") / models.key


def new_version(root: Place, name: str) -> Path:
    """Create and return an empty directory for a new version of `name`.

    `seal` completes it; where the models are in an object store, `publish` follows.
    """
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    path = on_this_machine(root) / name / f"{stamp}-{uuid.uuid4().hex[:6]}"
    path.mkdir(parents=True)
    return path


def seal(
    path: Path,
    *,
    parameters: dict[str, Any],
    metrics: dict[str, Any],
    inputs: dict[str, int],
) -> Manifest:
    """Digest every file of `path` and write its manifest: from then on it is a complete model."""
    files = _digests(path)
    manifest = Manifest(
        name=path.parent.name,
        version=path.name,
        created_at=dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        digest=_digest_of(files),
        files=files,
        parameters=parameters,
        metrics=metrics,
        inputs=inputs,
    )
    partial = path / _PARTIAL
    with partial.open("w", encoding="utf-8") as out:
        json.dump(asdict(manifest), out, indent=1, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path / MANIFEST)
    return manifest


def publish(root: Place, path: Path) -> None:
    """Copy a sealed version to an object store, its manifest last; in a directory it is there already.

    Raises:
        MissingError: the object store cannot be used.
    """
    if isinstance(root, ObjectPath):
        with store_errors(root):
            for file in [*read_manifest(path).files, MANIFEST]:
                upload(path / file, root / path.parent.name / path.name / file)


def read_manifest(path: Place) -> Manifest:
    """Read the manifest of a version directory without looking at the other files.

    Raises:
        MissingError: there is no manifest, so the directory was never completed.
        ArtefactError: the manifest is not readable as one.
    """
    try:
        with store_errors(path):
            return Manifest(**json.loads((path / MANIFEST).read_bytes()))
    except FileNotFoundError:
        raise MissingError(
            f"model {path.parent.name}/{path.name}: no {MANIFEST} in {path}; it was never"
            " completed, train it again"
        ) from None
    except (ValueError, TypeError) as error:
        raise ArtefactError(
            f"model {path.parent.name}/{path.name}: {MANIFEST} is not readable ({error});"
            " delete the directory and train it again"
        ) from None


def list_versions(root: Place, name: str) -> list[Manifest]:
    """All complete versions of `name` under `root`, oldest first; not those in the making."""
    complete = []
    with store_errors(root):
        for version in folders(root / name):
            with contextlib.suppress(MissingError):
                complete.append(read_manifest(root / name / version))
    return complete


def fetched(root: Place, name: str, version: str) -> Path:
    """Directory on this machine that holds a complete version, which is copied here where it is not.

    Raises:
        MissingError: no such version, or it was never completed.
        ArtefactError: a file in the object store is not that of the manifest.
    """
    source, path = root / name / version, on_this_machine(root) / name / version
    if isinstance(source, Path):
        return path
    manifest = read_manifest(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one machine wait for one of them to copy.
    with (path.parent / f".{version}.lock").open("w") as lock, store_errors(root):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / MANIFEST).is_file() and read_manifest(path) == manifest:
            return path
        shutil.rmtree(path, ignore_errors=True)
        for file, digest in manifest.files.items():
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise ArtefactError(f"model {name}/{version}: {file} in its {MANIFEST} is outside of it")
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                download(source / file, path / file)
            except FileNotFoundError:
                raise ArtefactError(
                    f"model {name}/{version}: {source / file} is gone; train it again"
                ) from None
            if _sha256(path / file) != digest:
                raise ArtefactError(
                    f"model {name}/{version}: {source / file} differs from its manifest; restore it or train"
                    " again"
                )
        download(source / MANIFEST, path / MANIFEST)
    return path


def open_version(root: Place, name: str, version: str) -> tuple[Path, Manifest]:
    """Directory and manifest of one complete version, after checking every file's digest.

    In an object store the directory is that of a copy on this machine.

    Raises:
        MissingError: no such version, or it was never completed.
        ArtefactError: not a version name, or a file is missing, added or altered since `seal`.
    """
    if not _VERSION.fullmatch(version):
        raise ArtefactError(f"model {name}: {version!r} is not a version name")
    path = fetched(root, name, version)
    manifest = read_manifest(path)
    if manifest.digest != _digest_of(manifest.files):
        raise ArtefactError(
            f"model {name}/{version}: {MANIFEST} was altered, its digest is not that of its files;"
            " restore it or train again"
        )
    found = _digests(path)
    for file in sorted(found.keys() | manifest.files.keys()):
        if found.get(file) != manifest.files.get(file):
            raise ArtefactError(
                f"model {name}/{version}: {file} differs from its manifest; the directory was"
                " altered or cut, restore it or train again"
            )
    return path, manifest


def _digests(path: Path) -> dict[str, str]:
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    return {name: _sha256(files[name]) for name in sorted(files.keys() - {MANIFEST, _PARTIAL})}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
