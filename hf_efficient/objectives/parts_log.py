"""The parts of an objective's loss in the log of plain `Trainer`."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from ..utils.loss_averages import Means, part_counts, scalar_parts


class PartsLog(TrainerCallback):
    """
    Adds the parts of an objective's loss to what `Trainer` logs in training, as means over the logging window and all
    processes, so that watches see them and `state.log_history` keeps them. Give it to Trainer before what reads them.

    [`~hf_efficient.trainer.EfficientTrainer`], which logs them by itself and in evaluation too, leaves it out.

    Args:
        objective (`PreTrainedModel`):
            The model that is trained.
    """

    for_plain_trainer = True

    def __init__(self, objective: nn.Module):
        self.objective = objective
        self.means = Means()
        self.hook: RemovableHandle | None = None

    def _add(self, objective: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if objective.training and isinstance(output, ModelOutput):
            self.means.add(scalar_parts(output), *part_counts(objective, output, kwargs))

    def on_train_begin(self, args, state, control, **kwargs):
        self.hook = self.objective.register_forward_hook(self._add, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.hook is not None:
            self.hook.remove()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.hook is None or "loss" not in (logs or {}):
            return
        from accelerate.utils import reduce

        parts = self.means.take(lambda sums: reduce(sums, reduction="sum"))
        logs.update(parts)
        state.log_history[-1].update(parts)
