"""What every race's report does with curves over time."""

from pathlib import Path
from typing import Any


def time_to_reach(curve: list[list[float]], loss: float) -> float | None:
    """Core seconds at which a held-out curve first passes `loss`, between two evaluations by a straight line; `None` if
    it never does."""
    before: tuple[float, float] | None = None
    for seconds, _, value in curve:
        if value <= loss:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (seconds, value)
    return None


def draw_curves(races: list[dict[str, Any]], names: dict[str, str], path: Path, value: str) -> None:
    """The runs of several races over core time: one colour a contestant, one line a race."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours: dict[str, str] = {}
    for runs in races:
        for name, run in runs.items():
            if "curve" not in run:
                continue
            shown = names.get(name, name)
            label = None if name in colours else shown
            colour = colours.setdefault(name, f"C{len(colours)}")
            minutes = [point[0] / 60 for point in run["curve"]]
            axes.plot(minutes, [point[2] for point in run["curve"]], color=colour, label=label, linewidth=1.6)
    axes.set_xlabel("core time, minutes")
    axes.set_ylabel(value)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
