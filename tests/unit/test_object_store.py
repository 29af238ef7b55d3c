"""A warehouse in an object store: the rules of a directory hold, and what goes wrong is one line."""

import contextlib
import datetime as dt
import json
import multiprocessing as mp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_stores import CARELESS, ObjectStore, environment, free_port
from typer.testing import CliRunner
from warehouses import DS, Context, Entry, publish, small_codebook, write_rows

from jobs.cli import app
from jobs.context import Warehouse
from jobs.doctor import examine
from negrec_core import storage
from negrec_core.artefacts import (
    MANIFEST,
    Manifest,
    list_versions,
    new_version,
    on_this_machine,
    open_version,
    seal,
)
from negrec_core.artefacts import publish as publish_model
from negrec_core.blocklist import BlockList
from negrec_core.config import load_config
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ArtefactError, ConfigError, ConflictError, InputError, MissingError
from negrec_core.exemptions import exempt
from negrec_core.generator import CODEBOOK
from negrec_core.schemas import TABLES
from negrec_core.storage import ObjectPath, Place, data_files, finish_run, located, place, walk
from negrec_core.vacuum import vacuum

D1, D2 = "2026-03-01", "2026-03-02"
DAY = "user_profile"
NOTHING = Provenance()
TODAY = dt.date(2026, 3, 11)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A store that is away is given up at once, and models are copied to a folder of the test."""
    monkeypatch.setattr(storage, "_OPTIONS", {"max_retries": "1", "retry_timeout": "2s"})
    monkeypatch.setenv("NEGREC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(object_store: ObjectStore) -> ObjectPath:
    found = place(f"{object_store.bucket()}/some/prefix")
    assert isinstance(found, ObjectPath)
    return found


@pytest.fixture
def store(root: ObjectPath) -> DeltaStore:
    store = DeltaStore(root)
    store._create(TABLES[DAY])  # one of many: requests take time
    return store


def profiles(*names: str) -> list[dict[str, str]]:
    return [{"user_id": name} for name in names]


def users(store: DeltaStore, **choice: int) -> list[tuple[str, str]]:
    rows = store.read(DAY, ["ds", "user_id"], **choice).to_pylist()
    return sorted((row["ds"], row["user_id"]) for row in rows)


# --- what names a place -------------------------------------------------------


def test_a_url_is_a_place_in_a_store_and_all_else_is_a_path(tmp_path: Path) -> None:
    assert place("s3://bucket/a/b/") == ObjectPath("s3://bucket", "a/b")
    assert place("gs://bucket") == ObjectPath("gs://bucket", "")
    azure = place("abfss://box@account.dfs.core.windows.net/a")
    assert str(azure / "b" / "c") == "abfss://box@account.dfs.core.windows.net/a/b/c"
    assert place(azure) is azure
    assert (place("s3://bucket") / "tables").name == "tables"
    assert place("warehouse") == Path.cwd() / "warehouse"
    assert place(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "url",
    ["s3a://b/a", "http://b/a", "s3://", "s3:///a", "s3://b/a b", "s3://b/a%20b", "s3://b/a?b", "s3://b/a#b"],
)
def test_a_url_that_cannot_be_used_is_one_clear_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^warehouse .*: (give a folder, or|write it as)") as raised:
        DeltaStore(url)
    assert "\n" not in str(raised.value)


def test_the_demo_wants_a_folder() -> None:
    result = CliRunner().invoke(app, ["--warehouse", "s3://bucket/w", "demo"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("s3://bucket/w: the demo works in a folder")


# --- the rules of the tables --------------------------------------------------


def test_what_is_written_is_read_back_and_replaced_by_days(store: DeltaStore, root: ObjectPath) -> None:
    assert store.exists(DAY)
    assert not store.exists("item")
    store.create_tables()
    store.create_tables()
    assert all(map(store.exists, TABLES))
    first = write_rows(store, DAY, profiles("b", "a"), D1)
    write_rows(store, DAY, profiles("c"), D2)
    write_rows(store, DAY, profiles("d"), D1, 2)
    assert users(store) == [(D1, "d"), (D2, "c")]
    assert users(store, version=first) == [(D1, "a"), (D1, "b")]
    assert store.revisions(DAY) == {D1: 2, D2: 1}
    (file,) = store.files(DAY, [D1], check=True)
    assert file.startswith(f"{root}/tables/{DAY}/run=")
    write_rows(store, DAY, [], D1, 3)
    assert users(store) == [(D2, "c")]
    assert store.revision(DAY, D1) == 3


def _write(root: Place, day: str, names: list[str], done: "mp.Queue[str]") -> None:
    store = DeltaStore(root)
    for revision, name in enumerate(names, 1):
        with contextlib.suppress(ConflictError):
            write_rows(store, DAY, profiles(name), day, revision)
            done.put(f"{day} {revision} {name}")


def test_of_writers_on_one_day_one_wins_each_revision_and_other_days_all_commit(
    store: DeltaStore, root: ObjectPath
) -> None:
    spawn = mp.get_context("spawn")
    done: mp.Queue[str] = spawn.Queue()
    work = [(D1, list("abcd")), (D1, list("efgh")), (D2, list("ijkl"))]
    writers = [spawn.Process(target=_write, args=(root, day, names, done)) for day, names in work]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    said = [done.get(timeout=10).split() for _ in range(8)]
    assert done.empty()
    assert sorted((day, revision) for day, revision, _ in said) == [
        (day, str(revision)) for day in (D1, D2) for revision in range(1, 5)
    ]
    last = {day: name for day, revision, name in said if revision == "4"}
    assert users(store) == sorted(last.items())
    # One version each: none was overwritten.
    assert store.version(DAY) == 8


def _create(root: Place) -> None:
    DeltaStore(root).create_tables()


def test_processes_that_create_at_once_make_each_table_once(root: ObjectPath) -> None:
    spawn = mp.get_context("spawn")
    makers = [spawn.Process(target=_create, args=(root,)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(120)
        assert maker.exitcode == 0
    assert {DeltaStore(root).version(table) for table in TABLES} == {0}


def test_a_file_that_was_cut_or_lost_is_found(store: DeltaStore) -> None:
    write_rows(store, DAY, profiles("a"), D1)
    (file,) = store.files(DAY)
    whole = place(file)
    assert isinstance(whole, ObjectPath)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    for look in (lambda: store.files(DAY, check=True), lambda: store.read(DAY)):
        with pytest.raises(InputError, match=rf"table {DAY}: .* of ds={D1} has .* bytes, not .*; restore"):
            look()
    whole.unlink()
    for look in (lambda: store.files(DAY, check=True), lambda: store.read(DAY)):
        with pytest.raises(InputError, match=rf"table {DAY}: .* of ds={D1} is gone; restore"):
            look()


def test_a_run_counts_when_it_was_ended_and_only_by_the_files_it_names(store: DeltaStore) -> None:
    write_rows(store, DAY, profiles("old"), D1)
    run = store.new_run(DAY)
    with pytest.raises(InputError, match="was never written; nothing was committed"):
        store.commit(DAY, run, {D1: 2}, NOTHING)
    for name in ("first", "again"):  # as a task of Spark that was tried again
        rows = pa.Table.from_pylist(profiles("new"), TABLES[DAY].body)
        files, key = located(run / f"ds={D1}/{name}.parquet")
        pq.write_table(rows, key, filesystem=files)
    with pytest.raises(InputError, match="was never written"):
        store.commit(DAY, run, {D1: 2}, NOTHING)
    assert walk(run) == []  # a run that is refused is deleted
    for name in ("first", "again"):
        files, key = located(run / f"ds={D1}/{name}.parquet")
        pq.write_table(rows, key, filesystem=files)
    finish_run(run, [f"ds={D1}/again.parquet"])
    assert [str(file) for file in data_files(DAY, run)] == [f"{run}/ds={D1}/again.parquet"]
    store.commit(DAY, run, {D1: 2}, NOTHING)
    assert users(store) == [(D1, "new")]


def test_a_bad_run_is_refused_and_deleted(store: DeltaStore) -> None:
    write_rows(store, DAY, profiles("old"), D1)
    before = {file.path for file in walk(store.path(DAY))}
    with pytest.raises(InputError, match="user_id=b is there 2 times"):
        write_rows(store, DAY, profiles("a", "b", "b"), D1, 2)
    with pytest.raises(ConflictError, match="already at revision 1"):
        write_rows(store, DAY, profiles("a"), D1, 1)
    assert {file.path for file in walk(store.path(DAY))} == before
    assert users(store) == [(D1, "old")]


def test_vacuum_deletes_what_no_recent_version_needs(store: DeltaStore) -> None:
    old = write_rows(store, DAY, profiles("a"), D1)
    write_rows(store, DAY, profiles("b"), D1, 2)
    store._create(TABLES["behavior_log"])  # without which it is no warehouse
    orphan = store.new_run(DAY) / f"ds={D1}" / "part-0.parquet"
    assert isinstance(orphan, ObjectPath)
    orphan.write_bytes(b"half")
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=8)
    before = {file.path for file in walk(store.root)}
    assert vacuum(store, 9, delete=True, now=later) == []
    (found,) = vacuum(store, 7, delete=False, now=later)
    assert (found.table, found.orphans, found.replaced) == (DAY, 1, 1)
    assert {file.path for file in walk(store.root)} == before
    assert vacuum(store, 7, delete=True, now=later) == [found]
    assert users(store) == [(D1, "b")]
    assert vacuum(store, 7, delete=True, now=later) == []
    with pytest.raises(InputError, match="is gone"):
        store.read(DAY, version=old)


# --- models -------------------------------------------------------------------


def save_codebook(root: Place, seed: int = 0) -> Manifest:
    path = new_version(root / "models", CODEBOOK)
    small_codebook(seed=seed).save(path)
    manifest = seal(path, parameters={"until": DS, "encoder": "minilm"}, metrics={}, inputs={})
    publish_model(root / "models", path)
    return manifest


def test_a_model_is_there_when_its_manifest_is_and_is_fetched_by_others(root: ObjectPath) -> None:
    models = root / "models"
    assert list_versions(models, CODEBOOK) == []
    unfinished = models / CODEBOOK / "20260101T000000000-000000" / "codebook.safetensors"
    assert isinstance(unfinished, ObjectPath)
    unfinished.write_bytes(b"")
    made = save_codebook(root)
    assert list_versions(models, CODEBOOK) == [made]
    here = on_this_machine(models)
    for other_machine in (False, True):
        if other_machine:
            shutil.rmtree(here)
        path, manifest = open_version(models, CODEBOOK, made.version)
        assert manifest == made
        assert path == here / CODEBOOK / made.version
        assert set(made.files) < {file.name for file in path.iterdir()}
    with pytest.raises(MissingError, match="never completed"):
        open_version(models, CODEBOOK, "20260101T000000000-000000")


def test_a_model_that_was_altered_in_the_store_is_refused(root: ObjectPath) -> None:
    made, models = save_codebook(root), root / "models"
    shutil.rmtree(on_this_machine(models))
    stored = models / CODEBOOK / made.version
    name = next(iter(made.files))
    whole = (stored / name).read_bytes()
    (stored / name).write_bytes(whole[:-1] + b"?")
    with pytest.raises(ArtefactError, match=f"{name} differs from its manifest"):
        open_version(models, CODEBOOK, made.version)
    (stored / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} is gone"):
        open_version(models, CODEBOOK, made.version)
    (stored / name).write_bytes(whole)
    assert open_version(models, CODEBOOK, made.version)[1] == made
    shutil.rmtree(on_this_machine(models))
    manifest = json.loads((stored / MANIFEST).read_bytes())
    manifest["files"] = {"../../../outside": made.files[name]}
    (stored / MANIFEST).write_bytes(json.dumps(manifest).encode())
    with pytest.raises(ArtefactError, match="outside of it"):
        open_version(models, CODEBOOK, made.version)


# --- the reader ---------------------------------------------------------------


def make_list(root: Place, codebook: str, revision: int = 1) -> DeltaStore:
    return publish(
        root,
        codebook,
        {"i1": (0, 1, 2), "i2": (3, 3, 3), "i3": (1, 1, 1)},
        {"u": [Entry((0, 1, 2), because="i3")], "v": [Entry((3, 3, 3)), Entry((1, 1, 1))]},
        contexts={"u": Context(["i3"], ["i2"], 1, 1), "w": Context([], ["i1"], 0, 1)},
        rates={"i1": 0.4},
        categories={"i1": "a/b", "i2": "c"},
        revision=revision,
    )


def served(blocks: BlockList) -> list[float]:
    return [float(score) for user in "uvwx" for score in blocks.scores(user, ["i1", "i2", "i3", "i4"])]


def test_the_reader_serves_from_a_store_what_it_serves_from_a_folder(
    root: ObjectPath, tmp_path: Path
) -> None:
    made = save_codebook(root)
    local = tmp_path / "warehouse"
    shutil.copytree(on_this_machine(root / "models"), local / "models")
    for where in (root, local):
        make_list(where, made.version)
    shutil.rmtree(tmp_path / "cache")  # a machine of its own
    here, there = (BlockList.open(str(where), today=TODAY) for where in (local, root))
    assert served(there) == served(here)
    assert there.allowed("u", ["i1", "i2"]) == here.allowed("u", ["i1", "i2"])
    assert not there.refresh()
    assert exempt(DeltaStore(root), ["u"], [], None, "test") == 1
    assert there.refresh_exemptions()
    assert there.allowed("u", ["i1", "i2"]) == ["i1", "i2"]
    make_list(root, made.version, 2)
    assert there.refresh()
    assert served(there) == served(here)


@pytest.fixture
def own_server(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A server that a test may stop."""
    server = ObjectStore(free_port())
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    with server:
        yield server


def test_when_the_store_goes_away_the_old_list_is_served_and_one_line_says_so(
    own_server: ObjectStore,
) -> None:
    root = place(f"{own_server.bucket()}/w")
    made = save_codebook(root)
    store = make_list(root, made.version)
    blocks = BlockList.open(root, today=TODAY)
    before = served(blocks)
    own_server.stop()
    attempts = {
        "refresh": blocks.refresh,
        "refresh_exemptions": blocks.refresh_exemptions,
        "open": lambda: BlockList.open(root, today=TODAY),
        "write": lambda: write_rows(store, DAY, profiles("a"), D1),
        "read": lambda: store.read(DAY),
        "create": store.create_tables,
        "models": lambda: open_version(root / "models", CODEBOOK, made.version),
        "vacuum": lambda: vacuum(store, 7, delete=True),
    }
    for name, attempt in attempts.items():
        with pytest.raises(MissingError, match=r"the object store cannot be used \(.*refused") as raised:
            attempt()
        assert str(raised.value).isprintable(), name
        assert "not-to-be-told" not in str(raised.value)
        assert str(raised.value).startswith("s3://negrec-"), name
    assert served(blocks) == before


def test_a_bucket_that_is_not_there_and_credentials_that_are_not_are_one_line(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingError, match=r"^s3://no-such-bucket-here/w: .*NoSuchBucket") as raised:
        DeltaStore("s3://no-such-bucket-here/w").create_tables()
    assert str(raised.value).isprintable()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # In place of a cloud's own service, which gives credentials to its machines.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(MissingError, match=r"^s3://some-bucket/w: the object store cannot be used") as raised:
        DeltaStore("s3://some-bucket/w").exists(DAY)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Kernel error -> The operation lacked the necessary privileges to complete for path w/item\n"
            " \x1b[31m↳\x1b[0m Error performing GET http://127.0.0.1:8333/bucket/w - Server returned\n"
            " \x1b[31m↳\x1b[0m 403 Forbidden\n"
            " \x1b[31m↳\x1b[0m <Error><Code>SignatureDoesNotMatch</Code><Message>It is\nwrong</Message>",
            "/bucket: the object store cannot be used (SignatureDoesNotMatch: It is wrong)",
        ),
        (
            "Generic GCS error\n ↳ Error performing POST http://metadata.google.internal/token in 3s",
            "there are no credentials in the environment",
        ),
        (
            "org.apache.spark.PythonException: OSError: Generic S3 error\n \x1b[31m↳\x1b[0m error\n"
            " \x1b[31m↳\x1b[0m Connection refused (os error 111)\n\n\tat org.apache.spark.BasePythonRunner",
            "cannot be used (Connection refused (os error 111)); check",
        ),
        ("Generic S3 error ↳ 416 ↳ <Error><Code>InvalidRange</Code></Error>", None),
        ("Generic LocalFileSystem error: Wanted range starting at 0", None),
        ("[Errno 13] Permission denied: '/w'", None),
    ],
)
def test_what_a_store_answers_becomes_one_line(text: str, said: str | None) -> None:
    problem = storage.store_problem(OSError(text))
    if said is None:
        assert problem is None
    else:
        assert said in str(problem)
        assert str(problem).isprintable()


def test_doctor_looks_at_the_store(
    object_store: ObjectStore, root: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = save_codebook(root)
    make_list(root, made.version)

    def findings(where: Place) -> dict[str, tuple[bool, str]]:
        warehouse = Warehouse(where, load_config([], [], {}))
        return {found.check: (found.ok, found.text) for found in examine(warehouse)}

    found = findings(root)
    assert found["store"] == (
        True,
        f"{root} can be read and written; of two writers at once one always failed, as it must",
    )
    assert found["block_list"][0]
    assert "no generator" in found["models"][1]
    assert not any(".doctor" in str(file.path) for file in walk(root))
    careless = place(f"{object_store.bucket(CARELESS)}/w")
    DeltaStore(careless)._create(TABLES[DAY])
    ok, text = findings(careless)["store"]
    assert not ok
    assert "two writers at once both committed" in text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(found)
