"""A Trainer callback that warns of a bad value in the log."""

from typing import Any

from transformers import TrainerCallback


class WarningCallback(TrainerCallback):
    """
    Warns once when a logged value has stayed below a threshold for some time, across interruptions too.

    Args:
        threshold (`float`):
            Value below which the state of training counts as bad.
        patience (`int`):
            Steps for which the value must have stayed below.
    """

    logged_value: str

    def __init__(self, threshold: float, patience: int):
        self.threshold = threshold
        self.patience = patience
        self.bad_since: int | None = None
        self.warned = False

    def warn(self, steps: int, state: Any, args: Any, value: float) -> None:
        """Log the warning, after so many `steps` with a bad `value`."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self.bad_since = None
        for entry in state.log_history:  # of a run that is resumed
            self._follow(entry, entry["step"])

    def _follow(self, logs: dict[str, float], step: int) -> bool:
        """Update since when the value is bad, and return whether these logs say that it is."""
        if self.logged_value not in logs:
            return False
        bad = logs[self.logged_value] < self.threshold
        self.bad_since = (step if self.bad_since is None else self.bad_since) if bad else None
        return bad

    def on_log(self, args, state, control, logs=None, **kwargs):
        bad = self._follow(logs or {}, state.global_step)
        if not bad or self.bad_since is None or self.warned or not state.is_world_process_zero:
            return
        steps = state.global_step - self.bad_since
        if steps >= self.patience:
            self.warned = True
            self.warn(steps, state, args, logs[self.logged_value])
