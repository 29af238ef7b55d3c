"""Resources are found in a checkout and in an installed tree; the wheel itself: test_packaging."""

from pathlib import Path

import pytest

from negrec_core import resources
from negrec_core.errors import MissingError
from negrec_core.resources import resource

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package folder in place of the real one."""
    folder = tmp_path / "site" / "negrec_core"
    folder.mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", folder)
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_checkout_files_and_folders_are_found() -> None:
    assert resource("conf", "lock", "cpu.txt") == REPO / "conf/lock/cpu.txt"
    assert resource("conf") == REPO / "conf"


def test_wheel_resources_win_over_a_folder_beside_the_package(package: Path) -> None:
    write(package.parent / "sql" / "item.sql", "another package's")
    write(package / "_resources" / "sql" / "item.sql", "ours")
    assert resource("sql", "item.sql").read_text() == "ours"


def test_wheel_never_falls_back_to_a_folder_beside_the_package(package: Path) -> None:
    write(package.parent / "sql" / "item.sql", "another package's")
    (package / "_resources" / "sql").mkdir(parents=True)
    with pytest.raises(MissingError, match=r"no sql/item\.sql"):
        resource("sql", "item.sql")


def test_repository_root_is_used_without_wheel_resources(package: Path) -> None:
    write(package.parent / "conf" / "models" / "tiny.yaml", "root")
    assert resource("conf", "models", "tiny.yaml").read_text() == "root"


def test_missing_file_names_its_neighbours_in_one_line(package: Path) -> None:
    write(package.parent / "conf" / "models" / "tiny.yaml", "")
    write(package.parent / "conf" / "models" / "small.yaml", "")
    with pytest.raises(MissingError) as raised:
        resource("conf", "models", "huge.yaml")
    message = str(raised.value)
    assert "conf/models/huge.yaml" in message
    assert "there are: small.yaml, tiny.yaml" in message
    assert "\n" not in message


def test_missing_folder_is_one_clear_line_too(package: Path) -> None:
    with pytest.raises(MissingError, match=r"no conf/a/b\.yaml .* install negrec again"):
        resource("conf", "a", "b.yaml")


@pytest.mark.parametrize("parts", [("..", "pyproject.toml"), ("a", "..", "..", "x"), ("/etc",)])
def test_parts_cannot_lead_out(parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="outside conf/"):
        resource("conf", *parts)


def test_kind_is_checked() -> None:
    with pytest.raises(ValueError, match="sql, conf"):
        resource("jobs", "cli.py")
