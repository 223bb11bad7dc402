"""The demo's picture: accuracy on held-out questions over both phases, one after the other."""

from __future__ import annotations

from pathlib import Path

COLOURS = {"SFT": "#3465a4", "GRPO": "#c4561a"}
LEARNED_FROM = {
    "SFT": "imitates demonstrations,\nmistakes included",
    "GRPO": "is told which of its own\nanswers are right",
}


def draw_accuracy(curves: dict[str, list[tuple[int, float]]], path: Path) -> Path | None:
    """
    Draw the curves of the phases on one axis.

    Args:
        curves: of each phase, in order, its points: answers learned from since its begin, and accuracy from 0 to 1.
        path: PNG file to write.

    Returns:
        The path; None without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.add_subplot()
    begin = 0
    for phase, points in curves.items():
        answers, accuracies = zip(*points, strict=True)
        places = [begin + count for count in answers]
        colour = COLOURS[phase]
        axis.axvspan(begin, places[-1], color=colour, alpha=0.06, linewidth=0)
        axis.plot(places, accuracies, color=colour, marker="o", markersize=4, linewidth=2)
        axis.annotate(
            f"{accuracies[-1]:.1%}",
            (places[-1], accuracies[-1]),
            (-6, 8),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
        axis.text((begin + places[-1]) / 2, 0.97, phase, color=colour, ha="center", va="top", weight="bold", size=13)
        axis.text((begin + places[-1]) / 2, 0.90, LEARNED_FROM[phase], color=colour, ha="center", va="top", size=9)
        begin = places[-1]
    axis.set_xlim(0, begin)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("answers learned from")
    axis.set_title("Accuracy on held-out questions (greedy decoding)")
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
