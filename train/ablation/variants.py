"""The rows of the ablation: which steps with which settings, and what each is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# Settings that are no a.b=value; `Grid.config` says what they stand for.
PLAIN, AS_GRPO = "plain", "as_grpo"
COLLABORATIVE = "collaborative"
TIMES_DISLIKED, TITLES = "times_disliked", ("tallrec", "instructrec")
_NEXT = "generator.grpo.rewarded=next"


@dataclass(frozen=True)
class Step:
    """One training of a chain.

    Attributes:
        name: of `train.generator.STEPS`.
        settings: a.b=value, on top of the data set's; `plain` is one stage of GRPO for as many updates as
            all stages have, `as_grpo` as many updates as GRPO makes.
    """

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        name: in file names and on the command line.
        title: in the report.
        steps: the chain; without any, what `settings` names: the items disliked most often, or a
            title-based model, which needs a preset that can read.
        above: the row that it is compared with.
        settings: a.b=value, of all its steps; `collaborative` takes IDs of `train.collaborative`.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    above: str = ""
    settings: tuple[str, ...] = ()


_TRANSLATION, _ALIGNMENT, WARM_UP = Step("translation"), Step("alignment"), Step("warm_up")
_MORE = Step("warm_up", (AS_GRPO,))
_NEGATIVES = ("generator.context=negatives",)
_UP_TO_WARM_UP = (_TRANSLATION, _ALIGNMENT, WARM_UP)
_ALIGNED_LAST = (_TRANSLATION, WARM_UP, _ALIGNMENT)


def _grpo(scheme: str, *settings: str) -> Step:
    return Step("grpo", (f"generator.grpo.scheme={scheme}", *settings))


VARIANTS = (
    Variant("times-disliked", "times disliked, for reference", (), settings=(TIMES_DISLIKED,)),
    Variant("tallrec", "TALLRec's task, by titles", (), settings=TITLES[:1]),
    Variant("instructrec", "InstructRec's task, by titles", (), settings=TITLES[1:]),
    Variant("warm-up", "warm-up alone (TIGER's task)", (WARM_UP,)),
    Variant("translation", "+ translation (LC-Rec's tasks)", (_TRANSLATION, WARM_UP), "warm-up"),
    Variant("alignment", "+ item-level alignment", _UP_TO_WARM_UP, "translation"),
    Variant(
        "grpo-next", "+ progressive GRPO, next dislike", (*_UP_TO_WARM_UP, _grpo("a", _NEXT)), "alignment"
    ),
    Variant("grpo-a", "+ future dislikes (scheme a)", (*_UP_TO_WARM_UP, _grpo("a")), "grpo-next"),
    Variant("grpo-c", "+ penalty of future likes (scheme c)", (*_UP_TO_WARM_UP, _grpo("c")), "grpo-a"),
    Variant("grpo-b", "scheme b", (*_UP_TO_WARM_UP, _grpo("b")), "grpo-c"),
    Variant("grpo-d", "scheme d", (*_UP_TO_WARM_UP, _grpo("d")), "grpo-c"),
    Variant("grpo-e", "scheme e", (*_UP_TO_WARM_UP, _grpo("e")), "grpo-c"),
    Variant("grpo-plain", "plain GRPO (scheme c)", (*_UP_TO_WARM_UP, _grpo("c", PLAIN)), "grpo-c"),
    Variant("more-warm-up", "more warm-up instead of GRPO", (*_UP_TO_WARM_UP, _MORE), "alignment"),
    Variant("warm-up-negatives", "warm-up alone, dislikes alone", (WARM_UP,), "warm-up", _NEGATIVES),
    Variant(
        "translation-negatives",
        "LC-Rec's tasks, dislikes alone",
        (_TRANSLATION, WARM_UP),
        "translation",
        _NEGATIVES,
    ),
    Variant("collaborative", "IDs from co-occurrence (P5-CID)", (WARM_UP,), "warm-up", (COLLABORATIVE,)),
    Variant("aligned-last", "alignment after the warm-up", _ALIGNED_LAST, "alignment"),
    Variant("forget-warm-up", "then more warm-up", (*_ALIGNED_LAST, _MORE), "aligned-last"),
    Variant("forget-plain", "then plain GRPO", (*_ALIGNED_LAST, _grpo("c", PLAIN)), "aligned-last"),
    Variant("forget-grpo", "then progressive GRPO", (*_ALIGNED_LAST, _grpo("c")), "aligned-last"),
)

LADDER = ("times-disliked", "warm-up", "translation", "alignment", "grpo-next", "grpo-a", "grpo-c")


def without_steps(variants: Sequence[Variant], steps: Sequence[str]) -> list[Variant]:
    """Variants without some steps; of those that are then the same, the first stands for all."""
    same: dict[tuple[Any, ...], str] = {}
    stands_for: dict[str, str] = {}
    found = []
    for variant in variants:
        left = tuple(step for step in variant.steps if step.name not in steps)
        first = same.setdefault((left, variant.settings), variant.name)
        stands_for[variant.name] = first
        if first == variant.name:
            found.append(replace(variant, steps=left, above=stands_for.get(variant.above, variant.above)))
    return found


def has_grpo(variant: Variant) -> bool:
    return any(step.name == "grpo" for step in variant.steps)


def with_rate(variant: Variant, rate: str) -> Variant:
    """A variant whose GRPO learns at `rate`, beside others; what it is compared with does, too."""
    above = next((other for other in VARIANTS if other.name == variant.above), None)
    setting = f"generator.grpo.learning_rate={rate}"
    return replace(
        variant,
        name=f"{variant.name}@{rate}",
        title=f"{variant.title}, at {rate}",
        above=f"{variant.above}@{rate}" if above and has_grpo(above) else variant.above,
        steps=tuple(
            replace(step, settings=(*step.settings, setting)) if step.name == "grpo" else step
            for step in variant.steps
        ),
    )
