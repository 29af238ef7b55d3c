import copy
import datetime as dt
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from negrec_core.config import Config, load_config, overlay_path, read_yaml
from negrec_core.errors import ConfigError
from negrec_core.resources import resource

CONF = resource("conf")
OVERLAYS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base")


def settings_of(model, prefix=""):
    """Dotted name -> field of every setting, sections left out."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= settings_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def sections_of(model):
    sections = [
        field.annotation
        for field in model.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    return sections + [inner for section in sections for inner in sections_of(section)]


SETTINGS = settings_of(Config)


def value_of(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def overlay(folder, text, name="overlay.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------ the shipped files


def test_base_names_every_setting_and_nothing_else():
    tree = read_yaml(CONF / "base.yaml")

    def names(tree, prefix=""):
        for key, value in tree.items():
            dotted = prefix + key
            if isinstance(value, dict) and dotted not in SETTINGS:
                yield from names(value, f"{dotted}.")
            else:
                yield dotted

    assert sorted(names(tree)) == sorted(SETTINGS)


@pytest.mark.parametrize("dotted", SETTINGS)
def test_no_setting_has_a_hidden_default(dotted, monkeypatch):
    tree = copy.deepcopy(read_yaml(CONF / "base.yaml"))
    *sections, last = dotted.split(".")
    section = tree
    for part in sections:
        section = section[part]
    del section[last]
    monkeypatch.setattr("negrec_core.config.read_yaml", lambda path: tree)
    message = rf"(base\.yaml|configuration): {re.escape(dotted)}: field required$"
    with pytest.raises(ConfigError, match=message):
        load_config(environment={})


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_loads_and_changes_something(name):
    assert load_config([name], environment={}).digest() != load_config(environment={}).digest()


def test_every_setting_and_section_says_what_it_means():
    assert [name for name, field in SETTINGS.items() if not field.description] == []
    assert [section for section in sections_of(Config) if not section.__doc__] == []


# ------------------------------------------------------------------------------------- precedence


def test_later_sources_win(tmp_path):
    low = overlay(tmp_path, "swing: {top_k: 11, theta: 0.1}\nbuckets: 11", "low.yaml")
    high = overlay(tmp_path, "swing: {top_k: 12}", "high.yaml")
    environment = {"NEGREC_SET__SWING__TOP_K": "13", "PATH": "/bin"}
    base = load_config(environment={})

    def top_k(*args):
        return load_config(*args).swing.top_k

    assert base.swing.top_k not in (11, 12, 13, 14)
    assert top_k([low], (), {}) == 11
    assert top_k([high, low], (), {}) == 11
    assert top_k([low, high], (), {}) == 12
    assert top_k([low, high], (), environment) == 13
    assert top_k([low, high], ["swing.top_k=1", "swing.top_k=14"], environment) == 14
    # What a source does not name stays as it was.
    config = load_config([low, high], ["swing.top_k=14"], environment)
    assert (config.swing.theta, config.buckets) == (0.1, 11)
    assert config.swing.alpha1 == base.swing.alpha1


def test_the_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("NEGREC_SET__BLOCK_LIST__VALID_DAYS", "3")
    assert load_config().block_list.valid_days == 3


def test_values_are_yaml():
    config = load_config(
        settings=[
            "feedback.implicit.surfaces=[feed, search]",
            "codebook.codes_per_level=null",
            "spark.conf={spark.executor.memory: 4g}",
            "generator.warm_up.learning_rate=1e-4",
            "swing={top_k: 3}",
        ],
        environment={},
    )
    assert config.feedback.implicit.surfaces == ["feed", "search"]
    assert config.codebook.codes_per_level is None
    assert config.spark.conf["spark.executor.memory"] == "4g"
    assert config.generator.warm_up.learning_rate == 1e-4
    assert config.swing.top_k == 3
    assert config.swing.alpha1 == load_config(environment={}).swing.alpha1


def test_an_overlay_replaces_a_free_form_map_but_a_single_setting_does_not(tmp_path):
    base = load_config(environment={}).feedback.polarity
    mapped = overlay(tmp_path, "feedback: {polarity: {thumb_down: -1}}")
    assert load_config([mapped], environment={}).feedback.polarity == {"thumb_down": -1}
    one = load_config(settings=["feedback.polarity.click=0"], environment={}).feedback.polarity
    assert one == {**base, "click": 0}
    both = load_config([mapped], ["feedback.polarity.click=0"], {}).feedback.polarity
    assert both == {"thumb_down": -1, "click": 0}


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swing: {topk: 3}", "swing.topk: there is no such setting"),
        ("1: 2", "1: "),
        ("swing: {top_k: many}", "swing.top_k: .* integer.*, not 'many'"),
        ("swing: {top_k: 0}", "swing.top_k: .* greater than 0, not 0"),
        ("calibration: {days: 1.5}", "calibration.days: .* integer.*, not 1.5"),
        ("imports: {max_quarantined: 1.5}", "imports.max_quarantined: .* 1, not 1.5"),
        ("imports: {max_quarantined: .nan}", "imports.max_quarantined: .*, not nan"),
        ("anchors: maybe", "anchors: .*'end_of_day' or 'explicit', not 'maybe'"),
        ("feedback: {polarity: {like: 2}}", "feedback.polarity.like: .*-1, 0 or 1, not 2"),
        ("feedback: {implicit: {surfaces: [1]}}", "feedback.implicit.surfaces.0: .*, not 1"),
        ("timezone: Mars", "timezone: expected an IANA time zone such as .*, not 'Mars'"),
        ("swing: 5", "swing: expected a mapping of settings, not 5"),
        ("generator:", "generator: expected a mapping of settings, not None"),
        ("swing: {top_k: 0}\nbuckets: 0", "buckets: .* greater than 0, not 0 .and 1 more."),
    ],
)
def test_a_wrong_overlay_is_one_line_that_names_the_file(tmp_path, text, message):
    path = overlay(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{re.escape(path)}: {message}") as caught:
        load_config([path], environment={})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: [", " line 2: not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", " line 1: not valid YAML"),
        (b"- 1", ": expected a mapping of settings"),
        (b"", ": expected a mapping of settings"),
        (b"a: \xff\xfe", ": not UTF-8"),
        (None, ": cannot be read .No such file"),
    ],
)
def test_a_file_that_is_no_overlay_is_refused(tmp_path, content, message):
    path = tmp_path / "overlay.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}{message}") as caught:
        load_config([str(path)], environment={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "../pyproject", "datasets/demo", "", "base.yaml.bak"])
def test_an_unknown_overlay_is_refused_and_the_known_are_named(name):
    with pytest.raises(ConfigError, match=f"^overlay {name}: ") as caught:
        load_config([name], environment={})
    assert all(known in str(caught.value) for known in OVERLAYS)


def test_overlays_are_names_or_files():
    assert overlay_path("base") == CONF / "base.yaml"
    assert overlay_path("my/own.yml") == Path("my/own.yml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("swing.top_k", "write it as a.b=value"),
        ("=4", ".*; write it as a.b=value"),
        ("swing..top_k=4", ".*; write it as a.b=value"),
        ("swing.top_k=[1", "the value is not valid YAML"),
        ("swing.top_k=", "swing.top_k: .*, not None"),
        ("swing.topk=4", "swing.topk: there is no such setting"),
        ("no.such=4", "no: there is no such setting"),
        ("timezone.x=4", "timezone: .*, not {'x': 4}"),
        ("generation.set_size=51", "generation.set_size: .*more than generation.beam_width, which is 50"),
        ("generation.engine=tpu", "generation.engine: .*'torch' or 'vllm', not 'tpu'"),
    ],
)
def test_a_wrong_setting_names_the_option(setting, message):
    with pytest.raises(ConfigError, match=f"^--set {re.escape(setting)}: {message}"):
        load_config(settings=[setting], environment={})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NEGREC_SET__SWING__TOP_K", "many", "swing.top_k: .*, not 'many'"),
        ("NEGREC_SET__SWING__TOPK", "4", "swing.topk: there is no such setting"),
        ("NEGREC_SET__SWING__TOP_K", "{", "the value is not valid YAML"),
        ("NEGREC_SET__", "4", "a part of the name is empty"),
    ],
)
def test_a_wrong_variable_names_it(variable, value, message):
    with pytest.raises(ConfigError, match=f"^environment {variable}: {message}"):
        load_config(environment={variable: value})


def test_the_source_blamed_is_the_last_that_set_the_value(tmp_path):
    path = overlay(tmp_path, "swing: {top_k: 0}")
    good = load_config([path], ["swing.top_k=2"], {})
    assert good.swing.top_k == 2
    with pytest.raises(ConfigError, match=r"^environment NEGREC_SET__SWING__TOP_K:"):
        load_config([path], (), {"NEGREC_SET__SWING__TOP_K": "-1"})


# ----------------------------------------------------------------------------------- what it gives


def test_the_digest_follows_the_values_not_their_source(tmp_path):
    base = load_config(environment={})
    path = overlay(tmp_path, yaml.safe_dump({"swing": {"top_k": 7}}))
    changed = load_config([path], environment={})
    assert changed.digest() == load_config(settings=["swing.top_k=7"], environment={}).digest()
    assert changed.digest() != base.digest()
    assert load_config(environment={}).digest() == base.digest()


@pytest.mark.parametrize(
    ("zone", "ds", "end"),
    [
        ("UTC", "2026-01-31", "2026-01-31T23:59:59.999999"),
        ("Asia/Shanghai", "2026-01-31", "2026-01-31T15:59:59.999999"),
        # The clocks go forward on 29 March and back on 25 October.
        ("Europe/Berlin", "2026-03-28", "2026-03-28T22:59:59.999999"),
        ("Europe/Berlin", "2026-03-29", "2026-03-29T21:59:59.999999"),
        ("Europe/Berlin", "2026-10-25", "2026-10-25T22:59:59.999999"),
    ],
)
def test_a_day_ends_at_midnight_of_its_zone(zone, ds, end):
    config = load_config(settings=[f"timezone={zone}"], environment={})
    assert config.end_of_day(ds) == dt.datetime.fromisoformat(end).replace(tzinfo=dt.UTC)
