"""The configuration: pydantic models filled from YAML.

Order of precedence, lowest first: `conf/base.yaml`, the overlays named by `--config`, environment
variables `NEGREC_SET__A__B=value`, `--set a.b=value`. A wrong key or value is one line that says
where it came from and what was expected.
"""

import datetime as dt
import hashlib
import os
import zoneinfo
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from negrec_core.errors import ConfigError
from negrec_core.resources import resource

_ENV_PREFIX = "NEGREC_SET__"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImplicitConfig(_Model):
    """Which skips count as dislikes: the G-UBS candidate filter (DESIGN section 4)."""

    enabled: bool = Field(description="whether judged skips enter `feedback`")
    max_play_rate: Share = Field(description="a skip played less than this share of its length")
    max_play_ms: Positive | None = Field(description="and less than this long; null: no such limit")
    max_gap_seconds: Positive | None = Field(
        description="the user acted this shortly before and after it; null where the log is a"
        " sample, in which neighbouring events are missing"
    )
    min_item_views: int = Field(ge=0, description="items played fewer times by then are left out")
    surfaces: list[str] | None = Field(description="surfaces on which it holds; null: all")
    weight: Share = Field(description="weight of such a dislike; an explicit one has 1")


class FeedbackConfig(_Model):
    """How logged actions become dislikes and likes."""

    polarity: dict[str, Literal[-1, 0, 1]] = Field(
        description="action -> -1 dislike, +1 like, 0 neither; an action not named here is an error"
    )
    reasons: dict[str, str] = Field(
        description="the site's wording -> reason class; class `dropped` is not negative interest"
    )
    other_reason: str = Field(description="reason class of a wording that `reasons` does not name")
    implicit: ImplicitConfig


class SwingConfig(_Model):
    """The Swing graph (DESIGN section 4)."""

    alpha1: float = Field(ge=0, description="a1, smoothing of the user weight")
    alpha2: float = Field(gt=0, description="a2, smoothing of the intersection")
    theta: float = Field(ge=0, description="exponent of the user weight")
    min_common_users: int = Field(ge=0, description="pairs with no more common users are cut")
    top_k: Positive = Field(description="neighbours kept per item")
    max_users_per_item: Positive = Field(description="cap of users looked at per item")
    max_items_per_user: Positive = Field(description="cap of items looked at per user")
    max_edges_in_memory: Positive = Field(
        description="above it rows are shuffled by anchor item instead of shared as files"
    )


class ContextConfig(_Model):
    """What of a user's past a prompt may hold."""

    max_negatives: Positive = Field(description="most recent dislikes kept")
    max_positives: int = Field(ge=0, description="most recent likes kept")


class LabelConfig(_Model):
    """Future labels (DESIGN section 4)."""

    horizon_days: Positive = Field(description="length of the label window, days")
    expansion: int = Field(ge=0, description="Swing neighbours added per future negative")


class CodebookConfig(_Model):
    """Semantic IDs (DESIGN section 5)."""

    encoder: str = Field(description="`minilm`, or a Hugging Face text model directory or name")
    image_encoder: str | None = Field(
        description="null: text alone; `opennsfw`, or a Hugging Face vision or CLIP-like model directory"
        " or name"
    )
    image_weight: float = Field(
        gt=0, lt=1, description="share of the image in the likeness of two items that have one"
    )
    trainer: Literal["rqvae", "residual_kmeans"] = Field(description="how codewords are found")
    levels: Positive = Field(description="codes in a semantic ID")
    codes_per_level: Positive | None = Field(description="null: chosen from the catalogue's size")
    latent_dim: Positive = Field(description="length of a codeword")
    epochs: Positive = Field(description="passes over the catalogue")
    unique_ids: bool = Field(
        description="move items whose ID is taken to the nearest free one, in one pass; off for"
        " catalogues of many millions"
    )
    max_collision_rate: Share = Field(description="release gate: share of items that share an ID")
    max_dead_share: Share = Field(description="release gate: share of a level's codes without item")


class _TrainingConfig(_Model):
    epochs: float = Field(gt=0, description="passes over the samples")
    max_steps: int = Field(description="-1: no limit")
    batch_size: Positive = Field(description="samples in one step")
    learning_rate: float = Field(gt=0, description="at its highest, after the warm-up")


class TranslationConfig(_TrainingConfig):
    """Semantic ID to title, and title to semantic ID (DESIGN section 7, 1)."""


class AlignmentConfig(_TrainingConfig):
    """Which of four items the user rejected (DESIGN section 7, 2)."""

    lora_rank: Positive = Field(description="rank of the adapter that is trained and then merged")
    min_rejections: Positive = Field(description="a target was rejected at least this often before")
    prefix_levels: int = Field(
        ge=0,
        description="rejections of items that share this many codes count together; 0: of the item alone",
    )
    max_per_item: Positive = Field(description="most samples with the same target")


class WarmUpConfig(_TrainingConfig):
    """Next-negative supervised fine-tuning (DESIGN section 7, 3)."""

    like_weight: Share = Field(
        description="weight of the likes in a context as targets of training; a dislike's is 1"
    )
    event_dropout: Share = Field(description="chance of an event to be left out of a training context")
    shuffle_share: Share = Field(description="chance of a training context to be put in random order")


class GrpoStageConfig(_Model):
    """One stage of progressive GRPO."""

    context: Literal["recent_negatives", "negatives", "both"] = Field(
        description="what of the past the prompt shows: recent dislikes, all dislikes, likes too"
    )
    kl: float = Field(ge=0, description="weight of the divergence from the model at the stage's start")
    steps: Positive = Field(description="updates")


class GrpoConfig(_Model):
    """Progressive GRPO (DESIGN section 7, 4)."""

    stages: list[GrpoStageConfig] = Field(description="in order")
    scheme: Literal["a", "b", "c", "d", "e"] = Field(description="reward scheme, DESIGN section 7")
    gamma: float = Field(ge=0, description="penalty for nearness to what the user likes next")
    rewarded: Literal["next", "horizon", "expanded"] = Field(
        description="what it is good to come near: the next dislike, all of the horizon, or those and their"
        " Swing neighbours"
    )
    group_size: int = Field(ge=2, description="semantic IDs drawn per prompt")
    prompts: Positive = Field(description="prompts in one step")
    rollouts: Literal["distinct", "independent"] = Field(
        description="draw a group without replacement (Gumbel top-k) or with it"
    )
    learning_rate: float = Field(gt=0, description="at its highest, after the warm-up")
    recent_days: Positive = Field(description="what counts as recent")
    augment_above: Share = Field(
        description="between stages, samples whose best predictions come this near (cosine) to a"
        " future like are seen once more"
    )


class GeneratorConfig(_Model):
    """Training of the generator: a curriculum of steps, each starting from the one before."""

    preset: str = Field(description="name of a file in conf/models")
    prompt: str = Field(description="name of a file in conf/prompts")
    prompt_tokens: Positive = Field(description="longest prompt; older events are cut first")
    context: Literal["both", "negatives"] = Field(
        description="what of a user's past the generator is told: dislikes and likes, or dislikes alone"
    )
    steps: list[Literal["translation", "alignment", "warm_up", "grpo"]] = Field(
        description="of the curriculum, in order"
    )
    samples_per_user: Positive = Field(description="most training anchors of one user, latest first")
    checkpoint_steps: Positive = Field(description="updates between two checkpoints")
    tracking: Literal["none", "mlflow"] = Field(
        description="where else the curves go; mlflow reads its own environment, MLFLOW_TRACKING_URI first"
    )
    translation: TranslationConfig
    alignment: AlignmentConfig
    warm_up: WarmUpConfig
    grpo: GrpoConfig


class GpuConfig(_Model):
    """GPU executors of beam search, asked for by stage-level scheduling on a cluster."""

    per_engine: int = Field(
        ge=0,
        description="GPUs of one engine, which then has an executor of one core to itself; 0: engines run"
        " on the same executors as everything else",
    )
    memory_overhead: str | None = Field(
        description="memory of such an executor beside its heap, as 16g; null: that of any executor"
    )
    discovery_script: str = Field(
        description="path on the executors of Spark's GPU discovery script; YARN and Kubernetes need it"
    )
    vendor: str = Field(description="Kubernetes only: prefix of the GPU resource")


class GenerationConfig(_Model):
    """Batch beam search."""

    engine: Literal["torch", "vllm"] = Field(description="what runs the generator")
    beam_width: Positive = Field(description="beams kept at each level; wider finds likelier IDs")
    set_size: Positive = Field(description="semantic IDs predicted per user, at most `beam_width`")
    popular_ids: int = Field(
        ge=0,
        description="so many IDs disliked most often, and so many disliked most often lately, may be"
        " predicted beside the beams",
    )
    recent_days: Positive = Field(description="what lately means, days before the anchor")
    rare_places: int = Field(ge=0, description="places of a set kept for IDs that hardly anybody disliked")
    rare_from: int = Field(ge=0, description="past dislikes of a user from which these places are kept")
    dtype: Literal["float32", "bfloat16"] = Field(
        description="number format of the generator; bfloat16 is slow on a CPU that lacks instructions for it"
    )
    pad_prompts_to: Positive = Field(
        description="prompts are padded on the left to a multiple of this; vLLM: its KV block size"
    )
    batch_users: Positive = Field(description="users in one call of the engine")
    parallelism: Positive = Field(description="engines at once, one executor process each")
    gpus: GpuConfig
    engine_options: dict[str, Any] = Field(description="passed to the engine as they are")
    carry_over: bool = Field(
        description="users whose prompt is that of the newest earlier run keep its set; false: all are"
        " generated"
    )

    @field_validator("set_size")
    @classmethod
    def _within_the_beam(cls, value: int, info: ValidationInfo) -> int:
        width = info.data.get("beam_width", value)
        if value > width:
            raise ValueError(f"{value} is more than generation.beam_width, which is {width}")
        return value


class CalibrationConfig(_Model):
    """The block score and its threshold (DESIGN section 8)."""

    held_out_share: Share = Field(description="share of users never trained on, kept for calibration")
    days: Positive = Field(description="length of the held-back feedback, days")
    max_users: Positive = Field(description="most users in one calibration")
    max_likes_blocked: Share = Field(description="the published threshold blocks at most this share")
    rate_pseudo_events: float = Field(gt=0, description="smoothing of item and user rates")


class TasteConfig(_Model):
    """What each user's feedback says about other items (DESIGN section 8)."""

    factors: int = Field(ge=0, description="learnt factors of an item beside its embedding")
    user_penalty: float = Field(gt=0, description="ridge penalty of a user's own log odds")
    item_penalty: float = Field(gt=0, description="ridge penalty of an item's own log odds")
    content_penalty: float = Field(gt=0, description="ridge penalty of a user's weights of the embedding")
    factor_penalty: float = Field(gt=0, description="ridge penalty of the factors of users and items")
    neutral: Share | None = Field(
        description="what part of a dislike it is that an item was shown and got no feedback; null: nothing"
    )
    sweeps: Positive = Field(description="rounds of solving for users and items in turn")
    max_events: Positive = Field(
        description="about how many judged items of sampled users items are fitted to"
    )


class BlockListConfig(_Model):
    """What is published."""

    valid_days: Positive = Field(description="days an entry holds after ds")
    min_page_share: Share = Field(description="`allowed` never leaves less than this share of a page")


class GatesConfig(_Model):
    """Gates before publishing (DESIGN section 10)."""

    min_users_covered: Share = Field(description="share of the users of the list before that are still in it")
    min_entries_per_user: Share = Field(
        description="mean entries per user, as a share of generation.set_size"
    )
    max_likes_blocked: Share = Field(description="share of the likes of ds that the list would block")
    max_category_blocked: Share = Field(
        description="share of the exposures of ds in any one top category that it would block"
    )
    min_category_exposures: Positive = Field(description="categories with fewer exposures are not judged")
    max_score_drift: float = Field(
        ge=0, description="population stability index of the entries' scores against the list before"
    )
    max_users: Positive = Field(description="likes and exposures are those of about so many users")


class ImportConfig(_Model):
    """Reading logs."""

    max_quarantined: Share = Field(description="above this share of malformed rows, nothing is imported")


class SparkConfig(_Model):
    """The Spark session of `negrec`; under spark-submit the cluster's settings win."""

    master: str | None = Field(description="null: what spark-submit says")
    driver_memory: str = Field(description="heap of the driver, as 2g")
    driver_java_options: str = Field(description="further options of the driver's JVM")
    shuffle_partitions: Positive = Field(description="partitions after a shuffle")
    conf: dict[str, str] = Field(description="further Spark properties")


class Config(_Model):
    """All settings of negrec."""

    timezone: str = Field(description="IANA time zone of the log date")
    buckets: Positive = Field(description="user buckets per day, the shards of generation")
    window_days: Positive = Field(description="trailing window of feedback")
    anchors: Literal["end_of_day", "explicit"] = Field(
        description="explicit: one anchor per user, from the table `anchor`"
    )
    media_root: str = Field(
        description="folder that a relative `item.media_uri` starts from; itself within the warehouse"
        " unless absolute"
    )
    imports: ImportConfig
    feedback: FeedbackConfig
    swing: SwingConfig
    context: ContextConfig
    labels: LabelConfig
    codebook: CodebookConfig
    generator: GeneratorConfig
    generation: GenerationConfig
    taste: TasteConfig
    calibration: CalibrationConfig
    block_list: BlockListConfig
    gates: GatesConfig
    spark: SparkConfig

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        if value not in zoneinfo.available_timezones():
            raise ValueError("expected an IANA time zone such as UTC or Asia/Shanghai")
        return value

    def digest(self) -> str:
        """Digest of the effective settings, recorded in every commit."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def end_of_day(self, ds: str) -> dt.datetime:
        """The anchor of a daily run: last microsecond of the log date `ds`, as a UTC time."""
        zone = zoneinfo.ZoneInfo(self.timezone)
        following = dt.date.fromisoformat(ds) + dt.timedelta(days=1)
        midnight = dt.datetime.combine(following, dt.time(), zone)
        return midnight.astimezone(dt.UTC) - dt.timedelta(microseconds=1)


def load_config(
    overlays: Sequence[str] = (),
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Read `conf/base.yaml`, overlays (names in conf/ or YAML files), environment, settings.

    Raises:
        ConfigError: an unknown overlay, key or value; the message names its source.
    """
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in ("base", *overlays):
        file = overlay_path(name)
        _merge(tree, read_yaml(file), str(file), origin)
    for variable, value in sorted((os.environ if environment is None else environment).items()):
        if variable.startswith(_ENV_PREFIX):
            path = variable.removeprefix(_ENV_PREFIX).lower().split("__")
            _set(tree, path, value, f"environment {variable}", origin)
    for setting in settings:
        dotted, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as a.b=value")
        _set(tree, dotted.split("."), value, f"--set {setting}", origin)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(validation_line(error, "configuration", origin)) from None


def overlay_path(name: str) -> Path:
    """Path of an overlay: a file if it looks like one, else a name in conf/.

    Raises:
        ConfigError: conf/ has no overlay of that name.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {path.stem: path for path in resource("conf").glob("*.yaml")}
    if name not in known:
        raise ConfigError(
            f"overlay {name}: conf/ has {', '.join(sorted(known.keys() - {'base'})) or 'none'};"
            " choose one of these, or give the path of a YAML file"
        )
    return known[name]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping; ConfigError names the file and the line that is wrong."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return tree


def validation_line(error: ValidationError, what: str, origin: Mapping[str, str]) -> str:
    """One line for the first problem of a pydantic error: where it is, what was expected."""
    first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        message = "there is no such setting"
    elif first["type"] == "model_type":
        message = "expected a mapping of settings"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    given = "" if first["type"] in ("missing", "extra_forbidden") else f", not {first['input']!r}"
    source = next((origin[key] for key in _prefixes(dotted) if key in origin), origin.get("", what))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{source}: {dotted}: {message}{given}{more}"


def _prefixes(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _set(tree: dict[str, Any], path: list[str], text: str, source: str, origin: dict[str, str]) -> None:
    """Set one value by its path; unlike an overlay it leaves the rest of a free-form map alone."""
    if not all(path):
        raise ConfigError(f"{source}: a part of the name is empty; write it as a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{source}: the value is not valid YAML") from None
    for depth, part in enumerate(path[:-1], 1):
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
            origin[".".join(path[:depth])] = source
        tree = tree[part]
    _merge(tree, {path[-1]: value}, source, origin, ".".join(path[:-1]))


# Free-form maps are replaced whole: an overlay that lists its own actions does not inherit others.
_WHOLE = {"feedback.polarity", "feedback.reasons", "generation.engine_options"}


def _merge(
    tree: dict[str, Any], over: dict[str, Any], source: str, origin: dict[str, str], at: str = ""
) -> None:
    for key, value in over.items():
        dotted = f"{at}.{key}" if at else str(key)
        origin[dotted] = source
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and dotted not in _WHOLE:
            _merge(tree[key], value, source, origin, dotted)
        else:
            tree[key] = value
