"""Lines that a run prints while it trains, in place of the raw dictionaries of Trainer."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback


def log_line(step: int, logs: dict[str, Any]) -> str:
    """Write the figures of a log as one line, by the names that they have in `state.log_history`: `step 20: loss 2.3,
    learning_rate 0.0003`."""
    figures = {name: value for name, value in logs.items() if name != "total_flos"}
    told = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items())
    return f"step {step}: {', '.join(told)}"


class LineProgressCallback(ProgressCallback):
    """Bar of progress, above which each log is one line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(log_line(state.global_step, logs))


class LinePrinterCallback(PrinterCallback):
    """Each log as one line, without a bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs:
            print(log_line(state.global_step, logs), flush=True)


def in_lines(callback: TrainerCallback) -> TrainerCallback:
    """The callback that takes the place of one by which Trainer prints; any other is returned as it is."""
    if type(callback) is ProgressCallback:
        return LineProgressCallback(callback.max_str_len)
    return LinePrinterCallback() if type(callback) is PrinterCallback else callback
