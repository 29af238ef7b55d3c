"""Finds the SQL and configuration files that travel with negrec.

In a wheel they lie inside the package, in `negrec_core/_resources`; in a checkout (editable
install) they lie in the repository root.
"""

from pathlib import Path

from negrec_core.errors import MissingError

KINDS = ("sql", "conf")

_PACKAGE = Path(__file__).resolve().parent


def resource(kind: str, *parts: str) -> Path:
    """Path of a file or folder of negrec, e.g. `resource("conf", "models", "tiny.yaml")`.

    Raises MissingError if there is no such file, naming those beside it, and ValueError for a
    `kind` other than "sql" and "conf" or for parts that lead out of that folder.
    """
    if kind not in KINDS:
        raise ValueError(f"resource kind is one of {', '.join(KINDS)}, not {kind!r}")
    base = _root() / kind
    path = base.joinpath(*parts)
    if not path.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"{'/'.join(parts)} is outside {kind}/")
    if not path.exists():
        raise MissingError(f"negrec has no {kind}/{'/'.join(parts)} (looked in {base}); {_neighbours(path)}")
    return path


def _root() -> Path:
    """Folder that holds `sql` and `conf`."""
    installed = _PACKAGE / "_resources"
    return installed if installed.is_dir() else _PACKAGE.parent


def _neighbours(path: Path) -> str:
    """What to choose from instead of a file that is not there."""
    if not path.parent.is_dir():
        return "install negrec again if it should be there"
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    return f"there are: {', '.join(names) or 'none'}"
