import json
import os

import pytest

from negrec_core.artefacts import (
    MANIFEST,
    list_versions,
    new_version,
    open_version,
    read_manifest,
    seal,
)
from negrec_core.errors import ArtefactError, MissingError


def make(root, name="model", files=None):
    path = new_version(root, name)
    for file, content in (files or {"weights.safetensors": b"abc", "sub/notes.json": b"{}"}).items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(content)
    seal(path, parameters={"k": 4}, metrics={"loss": 0.5}, inputs={"item": 3})
    return path


def test_what_was_sealed_is_read_back(tmp_path):
    path = make(tmp_path)
    opened, manifest = open_version(tmp_path, "model", path.name)
    assert opened == path
    assert (manifest.name, manifest.version) == ("model", path.name)
    assert (manifest.parameters, manifest.metrics) == ({"k": 4}, {"loss": 0.5})
    assert manifest.inputs == {"item": 3}
    assert set(manifest.files) == {"weights.safetensors", "sub/notes.json"}
    assert read_manifest(path) == manifest
    assert list(path.glob(".*")) == []


def test_equal_files_have_equal_digests(tmp_path):
    one, same = make(tmp_path), make(tmp_path)
    other = make(tmp_path, files={"weights.safetensors": b"abd", "sub/notes.json": b"{}"})
    moved = make(tmp_path, files={"weights": b"abc", "sub/notes.json": b"{}"})
    digests = [read_manifest(path).digest for path in (one, same, other, moved)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_versions_are_listed_oldest_first_and_only_when_complete(tmp_path):
    assert list_versions(tmp_path, "model") == []
    made = [make(tmp_path).name for _ in range(3)]
    unfinished = new_version(tmp_path, "model")
    (unfinished / "weights.safetensors").write_bytes(b"abc")
    make(tmp_path, "other")
    assert [manifest.version for manifest in list_versions(tmp_path, "model")] == sorted(made)
    assert len(set(made)) == 3


def test_an_unsealed_directory_is_not_a_model(tmp_path):
    path = new_version(tmp_path, "model")
    (path / "weights.safetensors").write_bytes(b"abc")
    with pytest.raises(MissingError, match=f"model/{path.name}: no manifest.json .* never completed"):
        open_version(tmp_path, "model", path.name)
    with pytest.raises(MissingError, match=r"no manifest\.json"):
        open_version(tmp_path, "model", "20200101T000000000-abcdef")


def test_the_manifest_comes_last_and_in_one_piece(tmp_path, monkeypatch):
    path = new_version(tmp_path, "model")
    (path / "weights.safetensors").write_bytes(b"abc")

    def die(descriptor):
        raise KeyboardInterrupt

    # Killed after the manifest's bytes, before it has its name.
    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        seal(path, parameters={}, metrics={}, inputs={})
    assert not (path / MANIFEST).exists()
    assert list_versions(tmp_path, "model") == []
    with pytest.raises(MissingError, match="never completed"):
        open_version(tmp_path, "model", path.name)
    monkeypatch.undo()
    seal(path, parameters={}, metrics={}, inputs={})
    _, manifest = open_version(tmp_path, "model", path.name)
    assert set(manifest.files) == {"weights.safetensors"}


def altered(path):
    (path / "weights.safetensors").write_bytes(b"abX")


def cut(path):
    (path / "weights.safetensors").write_bytes(b"ab")


def removed(path):
    (path / "weights.safetensors").unlink()


def renamed(path):
    (path / "weights.safetensors").rename(path / "aaa")


def added(path):
    (path / "sub" / "zzz.bin").write_bytes(b"")


def added_manifest(path):
    (path / "sub" / MANIFEST).write_bytes(b"{}")


def added_partial(path):
    (path / "weights.partial").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (altered, "weights.safetensors"),
        (cut, "weights.safetensors"),
        (removed, "weights.safetensors"),
        (renamed, "aaa"),
        (added, "sub/zzz.bin"),
        (added_manifest, "sub/manifest.json"),
        (added_partial, "weights.partial"),
    ],
)
def test_a_changed_directory_is_refused_and_the_file_named(tmp_path, change, file):
    path = make(tmp_path)
    change(path)
    with pytest.raises(ArtefactError, match=f"model/{path.name}: {file} differs from its manifest"):
        open_version(tmp_path, "model", path.name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "x", "more": 1}'])
def test_an_unreadable_manifest_is_refused(tmp_path, text):
    path = make(tmp_path)
    (path / MANIFEST).write_text(text)
    with pytest.raises(ArtefactError, match=r"manifest\.json is not readable") as caught:
        open_version(tmp_path, "model", path.name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtefactError, match=r"manifest\.json is not readable"):
        list_versions(tmp_path, "model")


def test_a_manifest_cannot_claim_another_digest(tmp_path):
    path = make(tmp_path)
    raw = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**raw, "digest": "0" * 64}))
    with pytest.raises(ArtefactError, match=r"manifest\.json was altered"):
        open_version(tmp_path, "model", path.name)


@pytest.mark.parametrize(
    "version", ["", ".", "..", "../model/x", "a/b", "/etc", "a\\b", "a\n", "-a", "a b", "\0"]
)
def test_a_version_is_a_plain_name(tmp_path, version):
    with pytest.raises(ArtefactError, match="is not a version name"):
        open_version(tmp_path, "model", version)
