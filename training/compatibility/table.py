"""The page of the matrix, `docs/compatibility.md`: its cells, how they are written, and how they are read back."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


YES, REFUSED, FAILED, NOT_RUN = "yes", "refused", "fails", "not run"
RESULTS = (YES, REFUSED, FAILED, NOT_RUN)
HEAD = ("consumer", "version", "run on", "family", "result", "what was run, or why not")
BEGIN, END = "<!-- cells -->", "<!-- end of cells -->"

PAGE = """# What works with what

Each cell of this page was executed, with a model of a few thousand weights: *yes* means that the consumer did what is
said below it, and that what it gave was compared with the model's own outputs where there is something to compare.
*refused* means that an error says so, by name; the reason is below. *Not run* is a consumer that was not installed.
`make matrix` installs all of them into an environment of its own (`.venv-matrix`) and writes this page;
`python -m training.compatibility --help` says how to run a part. [Another page](ecosystem.md) says what each of them
needs, with commands.

{versions}

{matrix}

## Cells

{begin}
{cells}
{end}
"""


@dataclass(frozen=True)
class Cell:
    """
    Outcome of one consumer with one family.

    Args:
        consumer (`str`): its name, as in `python -m training.compatibility --consumers`.
        version (`str`): of its package, or `"-"` where that is not installed.
        date (`str`): of the run, as `YYYY-MM-DD`.
        family (`str`): the family's `model_type`.
        result (`str`): one of `RESULTS`.
        detail (`str`): what was run, or the reason why not.
    """

    consumer: str
    version: str
    date: str
    family: str
    result: str
    detail: str

    def __post_init__(self) -> None:
        if self.result not in RESULTS:
            raise ValueError(f"A result is one of {', '.join(RESULTS)}, not {self.result!r}.")


def _row(values: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(value.split()).replace("|", "\\|") for value in values) + " |"


def _values(row: str) -> list[str]:
    return [value.strip().replace("\0", "|") for value in row.strip()[1:-1].replace("\\|", "\0").split("|")]


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join([_row(head), _row("---" for _ in head), *map(_row, rows)])


def render(cells: Sequence[Cell], versions: dict[str, str]) -> str:
    """
    Write the page.

    Args:
        cells (`Sequence[Cell]`): in the order in which they stand there.
        versions (`dict[str, str]`): of what all cells ran with, by name.

    Returns:
        `str`: Markdown.
    """
    families = list(dict.fromkeys(cell.family for cell in cells))
    consumers = list(dict.fromkeys(cell.consumer for cell in cells))
    found = {(cell.consumer, cell.family): cell for cell in cells}
    matrix = []
    for consumer in consumers:
        of_consumer = [cell for cell in cells if cell.consumer == consumer]
        last = max(of_consumer, key=lambda cell: cell.date)
        results = (found[consumer, family].result if (consumer, family) in found else NOT_RUN for family in families)
        matrix.append([consumer, last.version, last.date, *results])
    rows = ([cell.consumer, cell.version, cell.date, cell.family, cell.result, cell.detail] for cell in cells)
    return PAGE.format(
        versions="The last run was with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        matrix=_table(["consumer", "version", "run on", *families], matrix),
        begin=BEGIN,
        cells=_table(HEAD, rows),
        end=END,
    )


def read(page: str) -> list[Cell]:
    """
    Read the cells of a page that [`render`] wrote.

    Raises:
        ValueError: if the page holds none of its marks, or a row of another form.
    """
    if BEGIN not in page or END not in page:
        raise ValueError("The page has no cells to go on from: write it anew with all consumers and families.")
    rows = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    values = [_values(row) for row in rows]
    if any(len(row) != len(HEAD) for row in values):
        raise ValueError(f"Every row of the cells has {len(HEAD)} columns.")
    return [Cell(*row) for row in values]


def merge(before: Iterable[Cell], new: Iterable[Cell], order: Sequence[tuple[str, str]]) -> list[Cell]:
    """Put new cells in the place of earlier ones of the same consumer and family, in the order of these two."""
    cells = {(cell.consumer, cell.family): cell for cell in (*before, *new)}
    return [cells[place] for place in order if place in cells]


def write(path: Path, page: str) -> None:
    """Write the page whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
