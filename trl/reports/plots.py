"""
A run's curves as a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Title -> (key in the log, label). A panel is drawn where one of its keys was logged.
PANELS = {
    "Loss": (("loss", "train"), ("eval_loss", "eval")),
    "Token accuracy": (("mean_token_accuracy", "train"), ("eval_mean_token_accuracy", "eval")),
    "Reward": (("reward", "train"), ("eval_reward", "eval")),
    "Preference accuracy": (("rewards/accuracies", "train"), ("eval_rewards/accuracies", "eval")),
    "Learning rate": (("learning_rate", "train"),),
    "Gradient norm": (("grad_norm", "train"),),
}
EXTRA_PANELS = {  # keys that other methods use for what a panel shows
    "Preference accuracy": (("accuracy", "train"), ("eval_accuracy", "eval")),
}


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one key."""
    points = {
        entry["step"]: float(entry[key])
        for entry in log_history
        if "step" in entry and isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    }
    return list(points), list(points.values())


def _collect(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    panels = {}
    for title, keys in PANELS.items():
        curves = []
        for key, label in (*keys, *EXTRA_PANELS.get(title, ())):
            steps, values = _series(log_history, key)
            if values:
                curves.append((label, steps, values))
        if curves:
            panels[title] = curves
    return panels


def plot_training_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """
    Draw loss, accuracy or reward, learning rate and gradient norm over the steps, as far as they were logged.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG file to write.

    Returns:
        The path; None where nothing was logged, or matplotlib is not installed.
    """
    panels = _collect(log_history)
    if not panels:
        return None
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.info("No picture of the curves: matplotlib is not installed (`pip install matplotlib`).")
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for label, steps, values in curves:
            axis.plot(steps, values, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return path
