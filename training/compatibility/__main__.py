"""
Run every family with every consumer, and write docs/compatibility.md.

    python -m training.compatibility
    python -m training.compatibility --consumers peft,TRL --families tupe,srupp

Each consumer has a process of its own, so that one that crashes costs its own cell alone. Chosen consumers or families
replace their cells of the page, and the others stay. It ends with exit code 1 where a cell fails, which is neither a
consumer that does what it should nor one that refuses by name. It takes about ten minutes of one core.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from hf_efficient.auto import FAMILIES
from hf_efficient.utils.process import OneLineErrorParser, errors_in_one_line, names_among

from .consumers import CONSUMERS, Consumer, run_cell
from .table import FAILED, RESULTS, Cell, merge, read, render, write


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
LIMIT = 900  # seconds for a consumer with all families


def run_consumer(consumer: Consumer, families: Sequence[str]) -> list[Cell]:
    """
    Run a consumer's cells in a process of their own, and in a new one after a cell that ended it.

    Args:
        consumer (`Consumer`): who is run.
        families (`Sequence[str]`): their `model_type`s.

    Returns:
        `list[Cell]`: one for each family.
    """
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cells.jsonl")
        while missing := families[len(cells) :]:
            file.write_text("")
            command = [sys.executable, "-m", "training.compatibility", "--worker", str(file)]
            command += ["--consumers", consumer.name, "--families", ",".join(missing)]
            try:
                ended = subprocess.run(command, cwd=ROOT, timeout=LIMIT).returncode
                how = f"its process ended with {ended}"
            except subprocess.TimeoutExpired:
                how = f"it took more than {LIMIT} seconds"
            cells += [Cell(**json.loads(line)) for line in file.read_text().splitlines()]
            if len(cells) < len(families):
                today = date.today().isoformat()
                cells.append(Cell(consumer.name, consumer.version, today, families[len(cells)], FAILED, how))
    return cells


def work(consumer: Consumer, families: Iterable[str], file: Path) -> None:
    """Run cells in this process, and write each as a line as soon as it is there."""
    for family in families:
        cell = run_cell(consumer, family)
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(cell)) + "\n")


def run(
    consumers: Sequence[Consumer],
    families: Sequence[str],
    page: Path,
    run_one: Callable[[Consumer, Sequence[str]], list[Cell]] = run_consumer,
) -> list[Cell]:
    """
    Run cells and write the page after each consumer. Other cells of the page stay.

    Args:
        consumers (`Sequence[Consumer]`): who is run.
        families (`Sequence[str]`): their `model_type`s.
        page (`Path`): the page.
        run_one (`Callable`): runs a consumer's cells.

    Returns:
        `list[Cell]`: those that were run.
    """
    cells = read(page.read_text(encoding="utf-8")) if page.exists() else []
    order = [(name, family) for name in CONSUMERS for family in FAMILIES]
    versions = {"Python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers", "accelerate")}
    new: list[Cell] = []
    for consumer in consumers:
        found = run_one(consumer, families)
        for cell in found:
            print(f"{cell.result:<8} {cell.consumer} {cell.version}, {cell.family}: {cell.detail}", flush=True)
        cells, new = merge(cells, found, order), [*new, *found]
        write(page, render(cells, versions))
    return new


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineErrorParser(
        prog="python -m training.compatibility",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, known in (("--consumers", CONSUMERS), ("--families", FAMILIES)):
        names = ",".join(known)
        parser.add_argument(option, type=names_among(known), default=names, help=f"some of {names}; commas between")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write (default: docs/compatibility.md)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """
    Run the cells that are asked for.

    Raises:
        SystemExit: with 1 if a cell fails.
    """
    args = parse(argv)
    consumers = [CONSUMERS[name] for name in args.consumers]
    if args.worker is not None:
        work(consumers[0], args.families, args.worker)
        return
    cells = run(consumers, args.families, args.page)
    counts = {result: sum(cell.result == result for cell in cells) for result in RESULTS}
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    if counts[FAILED]:
        sys.exit(1)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
