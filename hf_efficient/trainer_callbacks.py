"""Callbacks that `EfficientTrainer` needs for exact resuming."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


class LogWhenSaving(TrainerCallback):
    """A checkpoint does not hold the sums of an unfinished logging window, so the window ends where one is
    saved."""

    def _log_if_saving(self, args, state, control, **kwargs):
        may_save = control.should_save or (args.save_strategy == SaveStrategy.BEST and control.should_evaluate)
        if may_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        return control

    on_step_end = _log_if_saving
    on_epoch_end = _log_if_saving


class TellEpoch(TrainerCallback):
    """Passes the epoch to a collator that has `set_epoch`, before the epoch's data loader starts."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))
