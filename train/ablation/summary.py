"""From finished cells to one file per data set and preset, which `train.report` shows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.ablation.variants import VARIANTS
from train.summary import over_seeds
from train.tables import DATASETS


def summarise(folder: Path, out: Path) -> None:
    """Write one file per data set and preset from the cells in a folder: rows in the order of `VARIANTS`.

    Figures are those of `train.summary`; a difference is to the row above, over the seeds that both have.
    """
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    for dataset, preset in sorted({(cell["dataset"], cell["preset"]) for cell in cells}):
        own = [cell for cell in cells if (cell["dataset"], cell["preset"]) == (dataset, preset)]
        by_variant: dict[str, list[dict[str, Any]]] = {}
        for cell in own:
            by_variant.setdefault(cell["variant"], []).append(cell)
        names = [variant.name for variant in VARIANTS]
        order = sorted(by_variant, key=lambda name: (names.index(name.split("@")[0]), name))
        content = {
            "dataset": dataset,
            "title": next(d.title for d in DATASETS if d.name == dataset),
            "preset": preset,
            "generator": by_variant[order[0]][0]["generator"],
            "rows": [_summary(by_variant[name], by_variant) for name in order],
        }
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        (out / f"{dataset}-{preset}.json").write_text(text, encoding="utf-8")


def _summary(own: list[dict[str, Any]], all_: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    first = own[0]
    judged = {cell["seed"]: cell for cell in own if not cell["error"]}
    above = {cell["seed"]: cell for cell in all_.get(first["above"], []) if not cell["error"]}
    both = sorted(judged.keys() & above.keys())
    some = next(iter(judged.values()), first)
    return {
        **{name: first[name] for name in ("variant", "title", "above", "users")},
        "seeds": sorted(judged),
        "figures": {
            figure: over_seeds([np.array(cell["figures"][figure]) for cell in judged.values()])
            for figure in some["figures"]
        },
        "difference": {
            figure: over_seeds(
                [
                    np.subtract(judged[seed]["figures"][figure], above[seed]["figures"][figure])
                    for seed in both
                ]
            )
            for figure in some["figures"]
            if both and figure in above[both[0]]["figures"]
        },
        "steps": [
            {
                "step": step["step"],
                "measured": {
                    name: _mean([cell["measured"][n][name] for cell in judged.values()])
                    for name in step
                    if all(isinstance(c["measured"][n].get(name), int | float) for c in judged.values())
                },
            }
            for n, step in enumerate(some["measured"] if judged else [])
        ],
        "judging_seconds": _mean([cell["seconds"] for cell in judged.values()]) if judged else None,
        "errors": {str(cell["seed"]): cell["error"] for cell in own if cell["error"]},
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)
