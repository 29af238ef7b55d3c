"""What all cells of the ablation share, and the chains of training steps that they are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from negrec_core.config import Config, load_config
from train.ablation.variants import AS_GRPO, COLLABORATIVE, PLAIN, TIMES_DISLIKED, TITLES, Step
from train.tables import DATASETS

# Every seed's models start with tokens for titles, whether they learn to translate or not.
_OVERLAY = "conrec"
_NO_SETTINGS = (COLLABORATIVE, TIMES_DISLIKED, *TITLES)


@dataclass(frozen=True)
class Grid:
    """What all cells share.

    Attributes:
        work: folder of the trained steps and, under `cells`, of the results.
        preset: of conf/models.
        settings: a.b=value, on top of the data set's overlays.
        users: most judged users; 0: all.
        title_updates: most updates of title-based models; -1: three epochs.
    """

    work: Path
    preset: str
    settings: tuple[str, ...]
    users: int
    title_updates: int = -1

    def config(self, dataset: str, settings: Sequence[str] = ()) -> Config:
        """The configuration of a data set with settings on top."""
        overlays = next(d.config for d in DATASETS if d.name == dataset)
        own = (f"generator.preset={self.preset}", *self.settings)
        base = load_config([overlays, _OVERLAY], own, {})
        stages = base.generator.grpo.stages
        updates = sum(stage.steps for stage in stages)
        last = stages[-1]
        plain = f"generator.grpo.stages=[{{context: {last.context}, kl: {last.kl}, steps: {updates}}}]"
        named = {PLAIN: plain, AS_GRPO: f"generator.warm_up.max_steps={updates}"}
        chosen = [named.get(s, s) for s in settings if s not in _NO_SETTINGS]
        return load_config([overlays, _OVERLAY], [*own, *chosen], {})


@dataclass(frozen=True)
class Link:
    """A chain up to one of its steps, on one data set with one seed: what a worker does at once."""

    dataset: str
    warehouse: Path
    seed: int
    settings: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def before(self) -> "Link":
        """The chain without its last step."""
        return replace(self, steps=self.steps[:-1])


@dataclass(frozen=True)
class Trained:
    """What became of a link.

    Attributes:
        version: of the trained step in `models/training`.
        measured: per step of the chain, its name and the metrics of its manifest.
        figures: figure -> value and resamples, where the link is a whole variant.
        seconds: what judging took.
        error: why there is nothing.
    """

    version: str
    measured: list[dict[str, Any]]
    figures: dict[str, list[float]]
    seconds: float
    error: str = ""
