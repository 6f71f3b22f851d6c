"""The table of a GLUE run: one row for each task with median and spread over seeds, and the average."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


AVERAGE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
FORMULA = (
    "A task's score is the plain mean of its metrics (MNLI: of matched and mismatched) times 100, and its row shows "
    "the median over seeds. The GLUE average is the plain mean of the medians of the eight tasks without WNLI."
)
COLUMNS = ("task", "median", "min", "max", "seeds", "metrics", "note")


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]], notes: Mapping[str, str]) -> dict[str, Any]:
    """
    Makes the rows of the table and the average.

    Args:
        results (`Mapping[str, Sequence[Mapping]]`):
            For each task that was asked for the results of its seeds, possibly none. A result has `metrics`:
            a number for each, or None where it is undefined.
        notes (`Mapping[str, str]`):
            What is to be said about a task, such as why it has no result.

    Returns:
        `dict`: `rows` (dictionaries of `COLUMNS`, scores times 100, None without a result), `average` (None
        if no task entered), `entered` and `missing` (names of the average's tasks) and `formula`.
    """
    rows = [_row(task, runs, notes.get(task, "")) for task, runs in results.items()]
    medians = {row["task"]: row["median"] for row in rows if row["median"] is not None}
    entered = [task for task in AVERAGE_TASKS if task in medians]
    return {
        "rows": rows,
        "average": statistics.fmean(medians[task] for task in entered) if entered else None,
        "entered": entered,
        "missing": [task for task in AVERAGE_TASKS if task not in medians],
        "formula": FORMULA,
    }


def _row(task: str, runs: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    if not runs:
        return {**dict.fromkeys(COLUMNS), "task": task, "seeds": 0, "metrics": "", "note": note}
    # A correlation is undefined if all predictions are equal, which is no better than none at all.
    known = [{name: value or 0.0 for name, value in run["metrics"].items()} for run in runs]
    undefined = sum(None in run["metrics"].values() for run in runs)
    if undefined:
        note = "; ".join(filter(None, [note, f"{undefined} of {len(runs)} seeds predict a constant, counted as 0"]))
    scores = [100 * statistics.fmean(metrics.values()) for metrics in known]
    medians = {name: 100 * statistics.median(metrics[name] for metrics in known) for name in known[0]}
    return {
        "task": task,
        "median": statistics.median(scores),
        "min": min(scores),
        "max": max(scores),
        "seeds": len(runs),
        "metrics": ", ".join(f"{name} {median:.1f}" for name, median in medians.items()),
        "note": note,
    }


def write_table(summary: Mapping[str, Any], folder: str) -> None:
    """Writes `summary` to `folder` as `glue.json`, `glue.csv` and `glue.md`."""
    path = Path(folder)
    (path / "glue.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (path / "glue.md").write_text(to_markdown(summary), encoding="utf-8")
    with (path / "glue.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(summary["rows"])
        writer.writerow({"task": "average", "median": summary["average"], "note": _average_note(summary)})


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table, the average with what entered it, and the formula."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in COLUMNS)} |" for row in summary["rows"]]
    average = _cell(summary["average"])
    return "\n".join([*lines, "", f"Average: {average} ({_average_note(summary)}).", "", summary["formula"], ""])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _average_note(summary: Mapping[str, Any]) -> str:
    if not summary["missing"]:
        return "the GLUE average, over all eight tasks"
    return (
        f"over {len(summary['entered'])} of 8 tasks, so not the GLUE average; without {', '.join(summary['missing'])}"
    )
