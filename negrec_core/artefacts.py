"""Versioned model directories: `<root>/<name>/<version>/`, completed by `manifest.json`.

The manifest is written last, so its presence is the completion mark (DESIGN section 3). It holds
the SHA-256 of every file; a directory without a manifest, or whose files differ from it, is not a
model.
"""

import datetime as dt
import hashlib
import json
import os
import re
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from negrec_core.errors import ArtefactError, MissingError

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


def new_version(root: str | os.PathLike[str], name: str) -> Path:
    """Create and return an empty directory for a new version of `name`; `seal` completes it."""
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
    path = Path(root) / name / f"{stamp}-{uuid.uuid4().hex[:6]}"
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


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a version directory without looking at the other files.

    Raises:
        MissingError: there is no manifest, so the directory was never completed.
        ArtefactError: the manifest is not readable as one.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return Manifest(**raw)
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


def list_versions(root: str | os.PathLike[str], name: str) -> list[Manifest]:
    """All complete versions of `name` under `root`, oldest first; not those in the making."""
    base = Path(root) / name
    if not base.is_dir():
        return []
    complete = [path for path in base.iterdir() if (path / MANIFEST).is_file()]
    return sorted((read_manifest(path) for path in complete), key=lambda m: m.version)


def open_version(root: str | os.PathLike[str], name: str, version: str) -> tuple[Path, Manifest]:
    """Directory and manifest of one complete version, after checking every file's digest.

    Raises:
        MissingError: no such version, or it was never completed.
        ArtefactError: not a version name, or a file is missing, added or altered since `seal`.
    """
    if not _VERSION.fullmatch(version):
        raise ArtefactError(f"model {name}: {version!r} is not a version name")
    path = Path(root) / name / version
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
