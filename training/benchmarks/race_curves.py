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


def draw_curves(races: list[dict[str, Any]], names: dict[str, str], path: Path, panels: dict[str, str]) -> None:
    """
    The runs of several races over core time: one colour a contestant, one line a race, one panel a quantity.

    Args:
        races (`list[dict]`): runs by name; a run holds lists of (core seconds, steps, value), with a standard error
            behind where a band of two of them on each side is to be drawn.
        names (`dict[str, str]`): what to call them.
        path (`Path`): the picture.
        panels (`dict[str, str]`): for each panel the list of a run to draw, and the label of its axis. Runs that have
            no such list are not in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(7.2 * len(panels) ** 0.6, 4.2), layout="constrained", squeeze=False
    )
    colours: dict[str, str] = {}
    lines: dict[str, Any] = {}
    for axes, (key, label) in zip(grid[0], panels.items(), strict=True):
        for name, run in [item for runs in races for item in runs.items() if item[1].get(key)]:
            colour = colours.setdefault(name, f"C{len(colours)}")
            minutes = [point[0] / 60 for point in run[key]]
            values = [point[2] for point in run[key]]
            (line,) = axes.plot(minutes, values, color=colour, linewidth=1.6)
            if len(run[key][0]) > 3:
                errors = [2 * point[3] for point in run[key]]
                low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
                axes.fill_between(minutes, low, high, color=colour, alpha=0.12, linewidth=0)
            lines.setdefault(names.get(name, name), line)
        axes.set_xlabel("core time, minutes")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if len(panels) == 1:
        grid[0][0].legend(list(lines.values()), list(lines))
    else:
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
