"""Tables of scores over seeds, as Markdown, csv and JSON."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def spread(scores: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of the scores of some seeds, and their number."""
    return {
        "median": statistics.median(scores),
        "min": min(scores),
        "max": max(scores),
        "seeds": len(scores),
    }


def cell(value: Any, digits: int = 1) -> str:
    """A value of a table as text: floats with so many digits, `-` for `None`."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], digits: int = 1) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(cell(row[column], digits) for column in columns)} |" for row in rows)]


def write_table(
    folder: str, name: str, summary: Mapping[str, Any], text: str, columns: Sequence[str], rows: Sequence[Mapping]
) -> None:
    """
    Write a table as `<name>.json`, `<name>.md` and `<name>.csv`.

    Args:
        folder (`str`): folder that exists.
        name (`str`): name of the files.
        summary (`Mapping`): content of the JSON file.
        text (`str`): content of the Markdown file.
        columns (`Sequence[str]`), rows (`Sequence[Mapping]`): content of the csv file.
    """
    path = Path(folder)
    (path / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (path / f"{name}.md").write_text(text, encoding="utf-8")
    with (path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
