"""A first phase of training, in which only the generator learns, and the callbacks that lead from it to the second."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

from .collapse import BlindnessWatch, CollapseWatch
from .parts_log import PartsLog


logger = logging.getLogger(__name__)


def starts_with_detector(config: PreTrainedConfig) -> bool:
    """Whether there is no first phase: neither a loss nor a step is given at which it ends."""
    return config.detector_start_loss is None and config.detector_start_step is None


def detector_callbacks(objective: PreTrainedModel) -> list[TrainerCallback]:
    """What such an objective asks of Trainer: its parts in the log, watches for collapse and blindness, one for the end
    of its first phase, if it has one, and what lets the encoder begin slowly then."""
    phases: list[TrainerCallback] = [] if starts_with_detector(objective.config) else [PlateauWatch(objective)]
    if objective.config.detector_warmup_steps:
        phases.append(DetectorWarmup(objective))
    return [PartsLog(objective), CollapseWatch(), BlindnessWatch(), *phases]


def units_without(objective: nn.Module, table: Tensor) -> set[str]:
    """
    The classes of modules that FSDP may wrap one by one (`_no_split_modules`) if `table` is used all over `objective`:
    all but those that hold it, since outside of such a unit its weights are not there.
    """
    holders = {type(module).__name__ for module in objective.modules() if any(p is table for p in module.parameters())}
    return set(getattr(objective, "_no_split_modules", None) or ()) - holders


def add_idle(loss: Tensor, objective: nn.Module, idle: list[nn.Parameter]) -> Tensor:
    """
    The same loss, with a gradient of zero for parameters that take no part in it, where DistributedDataParallel would
    wait for one.

    On one process and under FSDP, which wait for nothing, they get no gradient at all. [`PlateauWatch`] makes it
    none in each case, so that optimisers leave them and their moments alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()):
        return loss
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    idle = [parameter for parameter in idle if parameter.requires_grad]
    if not idle:
        return loss
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in objective.modules())
    if sharded or any(isinstance(parameter, DTensor) for parameter in idle):
        return loss
    return loss + 0.0 * torch.stack([parameter.sum() for parameter in idle]).sum()


class PlateauWatch(TrainerCallback):
    """
    Ends the first phase of an objective: switches its buffer `detector_on` on when what learns is off its plateau.

    At first a masked language model learns no more than how frequent each token is, and what it samples then teaches
    a detector little, while the detector's gradient is noise to the shared table. The phase ends when the logged
    `generator_loss` (of the encoder, `masked_lm_loss`, if that learns too) falls below `config.detector_start_loss`, or
    when `config.detector_start_step` steps are done, whichever comes first. The buffer is part of checkpoints, so a
    resumed run goes on in its phase.

    Args:
        objective (`PreTrainedModel`):
            With `config.detector_start_loss`, `config.detector_start_step`, `config.first_phase`, a bool `detects`, and
            methods `switch_detector`, and `idle_parameters`, which names what the first phase does not train.
    """

    def __init__(self, objective: Any):
        self.objective = objective
        self.part = "masked_lm_loss" if objective.config.first_phase == "masked_lm" else "generator_loss"

    def _switch_on(self, state: Any, reason: str) -> None:
        self.objective.switch_detector()
        if state.is_world_process_zero:
            logger.info("The detector is trained too, from step %d on: %s.", state.global_step + 1, reason)

    def on_step_begin(self, args, state, control, **kwargs):
        start = self.objective.config.detector_start_step
        if start is not None and state.global_step >= start and not self.objective.detects:
            self._switch_on(state, f"{start} steps are done")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs, start = logs or {}, self.objective.config.detector_start_loss
        if start is not None and logs.get(self.part, start) < start and not self.objective.detects:
            self._switch_on(state, f"{self.part} is {logs[self.part]:.4f}, below {start}")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # Not zero, by which weight decay and an optimiser's moments would act.
        if not self.objective.detects:
            for parameter in self.objective.idle_parameters():
                parameter.grad = None


class DetectorWarmup(TrainerCallback):
    """
    Lets the encoder begin slowly: over its first `config.detector_warmup_steps` steps its updates grow from 0 to what
    the optimiser makes of them.

    A schedule's own warm-up is long over when a first phase ends, and an encoder that was never trained collapses if it
    begins at the full learning rate. Whatever the optimiser and the schedule, the weights go a growing share of the way
    that a step takes them; until then a copy of them is kept. The buffer `detector_steps` counts, so that a resumed run
    goes on where it was. Parameters that the first version of FSDP mixes with those of the first phase are not slowed.

    Args:
        objective (`PreTrainedModel`):
            With `config.detector_warmup_steps`, a bool `detects`, a buffer `detector_steps`, and a method
            `detector_parameters` that names what begins slowly.
    """

    def __init__(self, objective: Any):
        self.objective = objective
        self.before: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        objective = self.objective
        self.before = []
        if objective.detects and objective.detector_steps < objective.config.detector_warmup_steps:
            self.before = [parameter.detach().clone() for parameter in objective.detector_parameters()]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        objective = self.objective
        if not self.before:
            return
        share = (int(objective.detector_steps) + 1) / (objective.config.detector_warmup_steps + 1)
        for parameter, before in zip(objective.detector_parameters(), self.before, strict=True):
            parameter.lerp_(before, 1.0 - share)
        self.before = []
        objective.detector_steps += 1
