"""What `EfficientTrainer` adds to the log, and the callbacks that it needs for that and for exact resuming."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
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


class Means:
    """Weighted means of scalar tensors, summed on their device without waiting for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float, weights: Mapping[str, Tensor]) -> None:
        """Values that stand for `weight` items each, or as many as `weights` says."""
        for name, value in values.items():
            value, count = value.detach().float(), weights.get(name, weight)
            # A part may be undefined for a batch, like the recall of something that did not occur.
            defined = value.isfinite()
            pair = torch.stack([torch.where(defined, value * count, 0.0), torch.where(defined, count, 0.0)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means so far, over all processes, as plain numbers; starts anew."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = reduce(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums = {}
        return {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight}
