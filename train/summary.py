"""From the cells of a data set, one for each seed, to the file in `train/results` that the report shows.

A figure is the mean over seeds. Its interval is over users: of the mean over seeds in each resample, which is
the same of all seeds; so is that of a difference. `spread` is the standard deviation over seeds, which
the intervals do not hold.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from negrec_core.metrics import Estimate
from train.ours import OURS

# Figure -> draws of it, as `negrec_core.metrics.bootstrap` gives them.
Draws = dict[str, np.ndarray]


def over_seeds(draws: Sequence[np.ndarray]) -> dict[str, float]:
    """value, low, high and spread of a figure, or of a difference, from its draws with each seed."""
    found = np.array(draws, float)
    spread = float(found[:, 0].std(ddof=1)) if len(found) > 1 else float("nan")
    return {
        name: round(end, 5) for name, end in (asdict(Estimate.of(found.mean(0))) | {"spread": spread}).items()
    }


def summarise(cells: Sequence[Path], out: Path) -> None:
    """Write one data set's file.

    Args:
        cells: files of its cells; the draws of one without an error lie beside it, as .parquet.
        out: the file to write.
    """
    known = [json.loads(path.read_text(encoding="utf-8")) for path in cells]
    judged = {
        cell["seed"]: _draws(path.with_suffix(".parquet"))
        for path, cell in zip(cells, known, strict=True)
        if not cell["error"]
    }
    content = {
        "dataset": known[0]["dataset"],
        "title": known[0]["title"],
        "cells": [_without_rows(cell) for cell in known],
        "rows": [_row(method, judged) for method in dict.fromkeys(m for own in judged.values() for m in own)],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _draws(path: Path) -> dict[str, Draws]:
    """Method -> its draws, from the file that `negrec evaluate` writes."""
    found: dict[str, Draws] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["method"], {})[row["figure"]] = np.array(row["draws"])
    return found


def _without_rows(cell: dict[str, Any]) -> dict[str, Any]:
    if cell["error"]:
        return cell
    return cell | {"evaluation": {name: part for name, part in cell["evaluation"].items() if name != "rows"}}


def _row(method: str, judged: dict[int, dict[str, Draws]]) -> dict[str, Any]:
    of = {seed: methods for seed, methods in judged.items() if method in methods}
    figures = next(iter(of.values()))[method]
    return {
        "method": method,
        "seeds": sorted(of),
        "figures": {f: over_seeds([methods[method][f] for methods in of.values()]) for f in figures},
        "difference": {
            f: over_seeds([methods[OURS][f] - methods[method][f] for methods in of.values()])
            for f in figures
            if method != OURS
        },
    }
