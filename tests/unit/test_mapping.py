"""Mappings are checked when they are read: each mistake is one line that names its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from negrec_core.errors import ConfigError, MissingError
from negrec_core.mapping import Condition, LogMapping, choose_variant, load_mapping
from negrec_core.resources import resource

EVENTS: dict[str, Any] = {
    "files": "events.csv",
    "format": "csv",
    "columns": {"user_id": "u", "item_id": "i", "event_time": "t"},
    "action_rules": [{"action": "like", "column": "stars", "at_least": 4}],
}
ITEMS = {"files": "items.csv", "format": "csv", "columns": {"item_id": "i"}}


def mapping_file(folder: Path, **changes: Any) -> Path:
    """A valid mapping with some keys of its events changed; None removes a key."""
    events = {key: value for key, value in (EVENTS | changes).items() if value is not None}
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump({"about": "a test", "variants": [{"events": events}]}))
    return path


@pytest.mark.parametrize("name", ["demo", "kuairand", "movielens", "steam"])
def test_shipped_mappings_are_valid(name: str) -> None:
    mapping = load_mapping(resource("conf", "datasets", f"{name}.yaml"))

    for variant in mapping.variants:
        assert variant.events.actions()
        assert {"user_id", "item_id", "event_time"} <= variant.events.columns.keys()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"columns": {"user_id": "u", "item_id": "i"}}, "events.columns lacks event_time"),
        ({"columns": EVENTS["columns"] | {"price": "p"}}, "events.columns has unknown price"),
        ({"columns": EVENTS["columns"] | {"action": "a"}}, "events.columns has unknown action"),
        ({"columns": EVENTS["columns"] | {"user_id": {"template": "none"}}}, "names no column"),
        ({"columns": EVENTS["columns"] | {"user_id": {}}}, "either template or flags"),
        ({"columns": EVENTS["columns"] | {"user_id": {"template": "{a"}}}, "variants.0.events"),
        ({"replace": {"reason": {"a": "b"}}}, "replace names reason, which columns does not"),
        ({"action_rules": None}, "either action_column with action_names, or action_rules"),
        ({"action_column": "a", "action_names": {"x": "like"}}, "action_column with action_names"),
        ({"action_rules": None, "action_column": "a"}, "action_column with action_names"),
        ({"action_rules": [{"action": "like", "at_least": 4}]}, "names no column"),
        ({"files": "/etc/events.csv"}, "inside it"),
        ({"files": "../events.csv"}, "inside it"),
        ({"separator": ""}, "separator"),
        ({"encoding": "klingon"}, "encoding"),
        ({"format": "xls"}, "format"),
        ({"time_unit": "minutes"}, "time_unit"),
        ({"colour": "red"}, "there is no such setting"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    path = mapping_file(tmp_path, **changes)

    with pytest.raises(ConfigError) as caught:
        load_mapping(path)

    message = str(caught.value)
    assert str(path) in message
    assert complaint in message
    assert "\n" not in message
    assert len(message) < 400


def test_columns_that_a_mapping_reads(tmp_path: Path) -> None:
    path = mapping_file(
        tmp_path,
        columns=EVENTS["columns"] | {"reason": {"template": "{a}: {b}"}, "surface": {"flags": ["c"]}},
        keep_when=[{"column": "d"}],
        action_rules=[{"action": "exposure"}, {"action": "like", "column": "e", "equals": True}],
    )

    source = load_mapping(path).variants[0].events

    assert source.source_columns() == set("uit") | set("abcde")
    assert source.actions() == {"exposure", "like"}


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "yes"])
def test_a_condition_keeps_the_type_of_its_value(value: object) -> None:
    found = Condition.model_validate({"column": "c", "equals": value}).equals

    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)
    assert isinstance(found, str) == isinstance(value, str)


def variants(*files: str, items: bool = False) -> LogMapping:
    entities = [{"events": EVENTS | {"files": file}} | ({"items": ITEMS} if items else {}) for file in files]
    return LogMapping.model_validate({"about": "a test", "variants": entities})


def test_the_first_variant_whose_files_exist_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("u,i,t,stars\n")
    (tmp_path / "c.csv").write_text("u,i,t,stars\n")

    chosen = choose_variant(variants("a.csv", "b.csv", "c.csv"), tmp_path)

    assert chosen.events.files == "b.csv"


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "b.csv").write_text("u,i,t,stars\n")

    with pytest.raises(MissingError, match=r"no event files a\.csv or empty\.csv"):
        choose_variant(variants("a.csv", "empty.csv"), tmp_path)
    with pytest.raises(MissingError, match=r"no event files b\.csv"):
        choose_variant(variants("b.csv"), tmp_path / "b.csv")
    with pytest.raises(MissingError, match=r"no files items\.csv, which the mapping reads"):
        choose_variant(variants("b.csv", items=True), tmp_path)
