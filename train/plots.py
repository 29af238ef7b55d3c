"""Plots kept beside the models."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_curve(curve: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss against step."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([entry["step"] for entry in curve], [entry["loss"] for entry in curve])
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
