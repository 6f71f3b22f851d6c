"""Lines that a run prints while it trains: rows of aligned figures under names that are said once."""

from collections.abc import Iterator
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback


# What a log is of, by the beginning of its names; the names of a kind are shown without it.
_KINDS = {"eval": "eval_", "test": "test_", "final": "final_", "end": "train_"}
# Figures that others tell already, or nobody reads in passing. All are in `state.log_history`.
_LEFT_OUT = ("total_flos", "steps_per_second")
_WIDTH = 9  # of `1.234e-05`


class LogTable:
    """
    Rows of a table that grows with the run.

    Each row starts with what it is of (`train`, `eval`, `test`; `final` of a closing measurement, `end` of the whole
    run) and the step. Names of figures stand above the first row of their kind, each word on a line of its own, and
    again only where a kind gets new ones.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[str]] = {}

    def lines(self, step: int, logs: dict[str, Any]) -> Iterator[str]:
        """
        Write what is logged at a step as a row, below names where they have not been said, and with a line of its own
        for each text.

        Args:
            step (`int`): the optimiser step.
            logs (`dict`): figures and texts by name.
        """
        kind = next((kind for kind, prefix in _KINDS.items() if any(name.startswith(prefix) for name in logs)), "train")
        shown = {name.removeprefix(_KINDS.get(kind, "")): value for name, value in logs.items() if value is not None}
        figures = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in shown.items()
            if name not in _LEFT_OUT and not isinstance(value, str)
        }
        columns = self._columns.setdefault(kind, [])
        if not figures.keys() <= set(columns):
            columns += [name for name in figures if name not in columns]
            yield from self._names(columns)
        if figures:
            cells = [figures.get(name, "").rjust(_width(name)) for name in columns]
            yield "  ".join([f"{kind:5}{step:>7}", *cells]).rstrip()
        for name, value in shown.items():
            if isinstance(value, str):
                yield f"{name}: {value}"

    @staticmethod
    def _names(columns: list[str]) -> Iterator[str]:
        words = [name.split("_") for name in columns]
        height = max(map(len, words))
        for row in range(height):
            first = "step" if row == height - 1 else ""
            cells = [
                (parts[row - height + len(parts)] if row >= height - len(parts) else "").rjust(_width(name))
                for name, parts in zip(columns, words, strict=True)
            ]
            yield "  ".join([f"{first:>12}", *cells]).rstrip()


def _width(name: str) -> int:
    return max(_WIDTH, *map(len, name.split("_")))


class LineProgressCallback(ProgressCallback):
    """Bar of progress, above which each log is a row of a table."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.table = LogTable()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            for line in self.table.lines(state.global_step, logs):
                self.training_bar.write(line)


class LinePrinterCallback(PrinterCallback):
    """Each log as a row of a table, without a bar."""

    def __init__(self) -> None:
        self.table = LogTable()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs:
            for line in self.table.lines(state.global_step, logs):
                print(line, flush=True)


def in_lines(callback: TrainerCallback) -> TrainerCallback:
    """The callback that takes the place of one by which Trainer prints; any other is returned as it is."""
    if type(callback) is ProgressCallback:
        return LineProgressCallback(callback.max_str_len)
    return LinePrinterCallback() if type(callback) is PrinterCallback else callback
