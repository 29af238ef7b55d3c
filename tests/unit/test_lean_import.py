"""A package that is hidden while another is imported."""

import sys

import pytest

from negrec_core.lean_import import without


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be imported, and one that takes it where it is there."""
    (tmp_path / "wished_for.py").write_text("")
    wish = "try:\n    import wished_for as got\nexcept ImportError:\n    got = None\n"
    (tmp_path / "wishes.py").write_text(wish)
    monkeypatch.syspath_prepend(tmp_path)
    yield "wished_for"
    for name in ("wished_for", "wishes"):
        sys.modules.pop(name, None)


def test_it_is_not_there_inside_and_there_again_after(package):
    with without(package):
        import wishes
    assert wishes.got is None
    import wished_for

    assert sys.modules[package] is wished_for


def test_what_is_imported_already_stays(package):
    import wished_for

    with without(package):
        import wishes
    assert wishes.got is wished_for


def test_it_is_there_again_after_an_error(package):
    with pytest.raises(ModuleNotFoundError), without(package):
        import wished_for
    import wished_for

    assert wished_for
