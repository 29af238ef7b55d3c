"""Plots kept beside the models."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
