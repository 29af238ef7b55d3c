"""Plots kept beside models and results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from negrec_core.metrics import Estimate

# What a training log may hold and is worth looking at.
_SHOWN = ("loss", "reward", "reward_std", "kl", "legal", "entropy")


def plot_curve(curve: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss against step, and below it whatever else of interest the log holds."""
    shown = [name for name in _SHOWN if any(name in entry for entry in curve)] or ["loss"]
    figure, panels = plt.subplots(
        len(shown), figsize=(7, 1 + 2.2 * len(shown)), sharex=True, squeeze=False, layout="constrained"
    )
    for name, axes in zip(shown, panels[:, 0], strict=True):
        points = [(entry["step"], entry[name]) for entry in curve if name in entry]
        axes.plot([step for step, _ in points], [value for _, value in points])
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[0, 0].set_title(title)
    panels[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_methods(figures: Mapping[str, Mapping[str, Estimate]], path: Path, title: str) -> None:
    """Figure -> method -> estimate, one panel per figure with a bar and its interval per method."""
    methods = list(next(iter(figures.values())))
    canvas, panels = plt.subplots(
        1, len(figures), figsize=(2.6 * len(figures), 0.28 * len(methods) + 1), sharey=True
    )
    for axes, (name, estimates) in zip(panels, figures.items(), strict=True):
        shown = [estimates[method] for method in methods]
        values = [estimate.value for estimate in shown]
        # Means over seeds of ends and of values need not be in order.
        reach = [
            [max(e.value - e.low, 0) for e in shown],
            [max(e.high - e.value, 0) for e in shown],
        ]
        axes.barh(methods, values, xerr=reach, color=["C1", *["C0"] * (len(methods) - 1)], ecolor="0.3")
        axes.set_title(name, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    canvas.suptitle(title, fontsize=10)
    canvas.tight_layout()
    canvas.savefig(path, dpi=80)
    plt.close(canvas)
