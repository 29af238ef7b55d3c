"""How a site's files become `behavior_log`, `item` and `user_profile`: the mapping, read from YAML.

`negrec import log SRC --mapping FILE` takes any such file; the named imports are the mappings
shipped in conf/datasets. See conf/datasets/demo.yaml for a commented example.
"""

import string
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from negrec_core.config import read_yaml, validation_line
from negrec_core.errors import ConfigError, MissingError
from negrec_core.schemas import TABLES

ENTITY_TABLES = {"events": "behavior_log", "items": "item", "users": "user_profile"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Condition(_Model):
    """A test of one column: the value is there, and all given bounds hold."""

    column: str
    equals: str | float | bool | None = None
    one_of: list[str] | None = None
    at_least: float | None = None
    at_most: float | None = None


class ActionRule(Condition):
    """A row on which the condition holds makes one event of this action."""

    action: str
    column: str = Field(default="", description="empty: every row")

    @model_validator(mode="after")
    def _bounds_need_a_column(self) -> "ActionRule":
        bounds = (self.equals, self.one_of, self.at_least, self.at_most)
        if not self.column and any(bound is not None for bound in bounds):
            raise ValueError("the rule has a bound but names no column")
        return self


class Derived(_Model):
    """A value made from several columns."""

    template: str | None = Field(
        default=None, description="text with {column} places; no value where all of them are empty"
    )
    flags: list[str] | None = Field(
        default=None, description="names of the columns that hold 1 or true, joined by a comma"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "Derived":
        if (self.template is None) == (self.flags is None):
            raise ValueError("give either template or flags")
        if not self.columns():
            raise ValueError("names no column")
        return self

    def columns(self) -> list[str]:
        """The source columns that the value is made from."""
        if self.flags is not None:
            return self.flags
        return [name for _, name in self.pieces() if name]

    def pieces(self) -> list[tuple[str, str | None]]:
        """The template as (literal text, column that follows it, or None at the end)."""
        parsed = string.Formatter().parse(self.template or "")
        return [(literal, name) for literal, name, _, _ in parsed]


class Source(_Model):
    """One kind of file.

    `columns` maps our column to a source column, or to a value derived from several.
    """

    files: str = Field(description="file or glob, relative to the source folder")
    format: Literal["csv", "jsonl", "parquet"]
    separator: str = Field(default=",", min_length=1)
    encoding: Literal["UTF-8", "ISO-8859-1"] = "UTF-8"
    quote: str = Field(
        default='"', max_length=1, description="around CSV values that hold a separator; empty: none is"
    )
    multiline: bool = Field(
        default=False, description="quoted CSV values may hold line breaks; a file is then one task"
    )
    names: list[str] | None = Field(default=None, description="column names of a CSV without header")
    nulls: list[str] = Field(
        default=["", "NaN", "\\N"], description="texts that mean no value; numbers of Parquet have none"
    )
    columns: dict[str, str | Derived]
    replace: dict[str, dict[str, str]] = Field(
        default={}, description="our column -> literal text to replace -> by what"
    )
    time_unit: Literal["s", "ms", "us", "iso"] = Field(
        default="iso",
        description="numbers since 1970, or text such as 2026-01-31T12:00:00Z; text that names no"
        " zone is in the configured time zone",
    )
    keep_when: list[Condition] = Field(default=[], description="other rows are left out on purpose")

    @field_validator("files")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not value or path.is_absolute() or ".." in path.parts:
            raise ValueError("write it relative to the source folder, and inside it")
        return value

    @model_validator(mode="after")
    def _replaces_what_it_maps(self) -> "Source":
        absent = self.replace.keys() - self.columns.keys()
        if absent:
            raise ValueError(f"replace names {', '.join(sorted(absent))}, which columns does not")
        return self

    def source_columns(self) -> set[str]:
        """All columns of the file that the mapping reads."""
        used = {rule.column for rule in self.keep_when}
        for spec in self.columns.values():
            used.update(spec.columns() if isinstance(spec, Derived) else [spec])
        return used


class EventSource(Source):
    """Event files: the action is a column's value, or follows from rules."""

    action_column: str | None = None
    action_names: dict[str, str] = Field(default={}, description="the site's value -> our action")
    action_rules: list[ActionRule] = Field(default=[], description="each rule that holds is one event")

    @model_validator(mode="after")
    def _one_way(self) -> "EventSource":
        by_column = self.action_column is not None
        if by_column == bool(self.action_rules) or by_column != bool(self.action_names):
            raise ValueError("give either action_column with action_names, or action_rules")
        return self

    def source_columns(self) -> set[str]:
        used = super().source_columns() | {rule.column for rule in self.action_rules if rule.column}
        return used | ({self.action_column} if self.action_column else set())

    def actions(self) -> set[str]:
        """All actions that the mapping can make."""
        return {rule.action for rule in self.action_rules} | set(self.action_names.values())


class Variant(_Model):
    """One format of a data set."""

    events: EventSource
    items: Source | None = None
    users: Source | None = None

    @model_validator(mode="after")
    def _maps_our_columns(self) -> "Variant":
        for entity, source in self.sources().items():
            declared = TABLES[ENTITY_TABLES[entity]]
            # The action is not one column's value: it has settings of its own.
            absent = set(declared.key) - {"action"} - source.columns.keys()
            unknown = source.columns.keys() - (set(declared.body.names) - {"action"})
            if absent:
                raise ValueError(f"{entity}.columns lacks {', '.join(sorted(absent))}")
            if unknown:
                raise ValueError(f"{entity}.columns has unknown {', '.join(sorted(unknown))}")
        return self

    def sources(self) -> dict[str, Source]:
        """The sources that the variant has, by entity: events, items, users."""
        given = {"events": self.events, "items": self.items, "users": self.users}
        return {entity: source for entity, source in given.items() if source is not None}


class LogMapping(_Model):
    """A site's mapping.

    An archive is a log delivered whole: all of it goes to one partition, the day of its last event,
    and event times keep the order inside. Anything else is a daily log.
    """

    about: str
    archive: bool = False
    known_malformed: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of rows that is known to be malformed in what the site delivers; allowed"
        " even where imports.max_quarantined is lower",
    )
    variants: list[Variant] = Field(min_length=1, description="the first whose event files exist")


def load_mapping(path: Path) -> LogMapping:
    """Read and check a mapping file; ConfigError names the key that is wrong."""
    try:
        return LogMapping.model_validate(read_yaml(path))
    except ValidationError as error:
        for found in error.errors():
            if found["type"] == "value_error":
                # A check across keys: its input is a whole section, too long to repeat.
                where = ".".join(str(part) for part in found["loc"])
                raise ConfigError(f"{path}: {where}: {found['ctx']['error']}") from None
        raise ConfigError(validation_line(error, str(path), {})) from None


def choose_variant(mapping: LogMapping, folder: Path) -> Variant:
    """The first variant whose event files exist in `folder`.

    Raises:
        MissingError: there is none, or the item or user files that it names are not there.
    """
    for variant in mapping.variants:
        if find_files(folder, variant.events):
            for source in variant.sources().values():
                if not find_files(folder, source):
                    raise MissingError(
                        f"{folder}: no files {source.files}, which the mapping reads beside"
                        f" {variant.events.files}; add them or take them out of the mapping"
                    )
            return variant
    expected = " or ".join(v.events.files for v in mapping.variants)
    raise MissingError(f"{folder}: no event files {expected}; give the folder that holds them")


def find_files(folder: Path, source: Source) -> list[Path]:
    """The files of a source in a folder, by name; empty ones hold no rows and are left out."""
    return sorted(p for p in folder.glob(source.files) if p.is_file() and p.stat().st_size)
