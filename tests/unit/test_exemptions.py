"""Who and what is exempt: the table equals a set, whoever changes it at the same time."""

import multiprocessing as mp
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negrec_core.delta import DeltaStore, Provenance
from negrec_core.errors import ConflictError, MissingError
from negrec_core.exemptions import Exemptions, end_exemption, exempt, load_exemptions
from negrec_core.schemas import EXEMPTION

names = st.sets(st.sampled_from(["a", "b", "é 7", "user"]))


@settings(max_examples=15)
@given(st.lists(st.tuples(st.booleans(), names, names), max_size=5))
def test_any_changes_equal_a_set(fresh: Path, tmp_path_factory, changes) -> None:
    root = tmp_path_factory.mktemp("model") / "warehouse"
    shutil.copytree(fresh, root)
    store = DeltaStore(root)
    held: set[tuple[str, str]] = set()
    for add, users, items in changes:
        named = {("user", u) for u in users} | {("item", i) for i in items}
        if add:
            assert exempt(store, users, items, "why", "1") == len(named - held)
            held |= named
        elif named <= held:
            assert end_exemption(store, users, items, "1") == len(named)
            held -= named
        else:
            with pytest.raises(MissingError, match="not exempt"):
                end_exemption(store, users, items, "1")
        found = load_exemptions(store)
        assert {("user", u) for u in found.users} | {("item", i) for i in found.items} == held
        assert load_exemptions(store, found) is found


def test_an_exemption_from_another_day_can_be_ended(store: DeltaStore) -> None:
    for ds, names in (("2026-01-01", "ab"), ("2026-01-02", "c")):
        rows = [{"kind": "user", "id": name, "ds": ds} for name in names]
        store.write_arrow("exemption", pa.Table.from_pylist(rows, EXEMPTION.schema), {ds: 1}, Provenance())
    assert exempt(store, ["a", "c"], [], None, "1") == 0
    assert end_exemption(store, ["a", "c"], [], "1") == 2
    assert load_exemptions(store).users == {"b"}
    assert exempt(store, ["a"], [], "again", "1") == 1
    assert load_exemptions(store).users == {"a", "b"}


def _exempt(root: Path, names: list[str]) -> int:
    return sum(exempt(DeltaStore(root), [name], [], None, "1") for name in names)


def test_changes_by_processes_at_once_are_all_kept(store: DeltaStore) -> None:
    """Each rewrites the same day; whoever loses reads it again."""
    parts = [[f"{n} {k}" for k in range(3)] for n in range(3)]
    with ProcessPoolExecutor(3, mp.get_context("spawn")) as pool:
        assert list(pool.map(_exempt, [store.root] * 3, parts)) == [3] * 3
    assert load_exemptions(store).users == {name for part in parts for name in part}


def test_a_change_that_always_loses_gives_up_and_changes_nothing(
    store: DeltaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> int:
        raise ConflictError("another was first")

    monkeypatch.setattr(DeltaStore, "write_arrow", lose)
    with pytest.raises(ConflictError, match="10 changes in a row lost"):
        exempt(store, ["a"], [], None, "1")
    assert load_exemptions(store) == Exemptions(version=0)
