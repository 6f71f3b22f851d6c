"""Trainer callbacks of objectives: loss components in the log, warnings, and the change from stage one to stage two."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from ..utils.loss_averages import Means, part_counts, scalar_parts
from ..utils.warning_callback import WarningCallback


logger = logging.getLogger(__name__)


class LossComponentsCallback(TrainerCallback):
    """
    Adds the components of an objective's loss to what `Trainer` logs in training.

    They are means over the logging window and all processes, so that other callbacks see them and `state.log_history`
    keeps them. Pass it to Trainer before the callbacks that read them. [`~hf_efficient.trainer.EfficientTrainer`] logs
    them by itself, in evaluation too, and leaves this callback out.

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


class CollapseCallback(WarningCallback):
    """
    Warns once, with advice, when the logged `token_variance_fraction` stays near zero.

    A dip is normal: masked language models pass through one in their first steps, while they learn no more than how
    frequent each word is.

    Args:
        threshold (`float`, *optional*, defaults to 0.1):
            Fraction below which an encoder counts as collapsed.
        patience (`int`, *optional*, defaults to 200):
            Steps for which the fraction must have stayed below.
    """

    logged_value = "token_variance_fraction"

    def __init__(self, threshold: float = 0.1, patience: int = 200):
        super().__init__(threshold, patience)

    def warn(self, steps, state, args, value):
        logger.warning(
            "The encoder has collapsed: for %d steps up to step %d, almost nothing of its final states differs between "
            "tokens (fraction %.4f; 0.5 or more is usual). Stop, and start again with a lower learning rate (now %g; "
            "try a third of it, or 3e-4), a longer warm-up, gradients clipped at 1.0 (--max_grad_norm, now %g), and, "
            "where a second loss is added, a smaller weight for it.",
            steps,
            state.global_step,
            value,
            args.learning_rate,
            args.max_grad_norm,
        )


class ChanceLevelCallback(WarningCallback):
    """
    Warns once, with advice, when a discriminator goes on to find none of the replaced tokens.

    Args:
        threshold (`float`, *optional*, defaults to 0.02):
            Fraction of replaced tokens found, `recall_replaced`, below which a discriminator counts as blind.
        patience (`int`, *optional*, defaults to 2,000):
            Steps for which it must have been so. A thousand are normal at the start.
    """

    logged_value = "recall_replaced"

    def __init__(self, threshold: float = 0.02, patience: int = 2000):
        super().__init__(threshold, patience)

    def warn(self, steps, state, args, value):
        logger.warning(
            "The discriminator is at chance level: for %d steps up to step %d it has found next to none of the "
            "replaced tokens (%.1f %%). It may begin to learn late, or never. An encoder that starts as a masked "
            "language model learns at once: if this one did not, start again and add "
            "stage_one=masked_lm,discriminator_start_step=%d to --objective_overrides; else try a longer stage one, or "
            "a lower learning rate (now %g).",
            steps,
            state.global_step,
            100 * value,
            2 * self.patience,
            args.learning_rate,
        )


class StartDiscriminatorCallback(TrainerCallback):
    """
    Ends stage one of an objective: sets its buffer `discriminator_on` when its masked language models have left their
    plateau.

    At first a masked language model learns no more than how frequent each token is, and its samples then teach a
    discriminator little, while the discriminator's gradient is noise to the shared embeddings. Stage one ends when the
    logged `generator_loss` (`masked_lm_loss`, the encoder's, if the encoder learns too) falls below
    `config.discriminator_start_loss`, or when `config.discriminator_start_step` steps are done, whichever comes first.
    The buffer is part of checkpoints, so a resumed run continues in its stage.

    Args:
        objective (`PreTrainedModel`):
            A [`~hf_efficient.objectives.discriminator.DiscriminatorObjective`], of which these are used:
            `config.discriminator_start_loss`, `config.discriminator_start_step`, `config.stage_one`,
            `discriminator_active`, `enable_discriminator()`, and `frozen_parameters()`.
    """

    def __init__(self, objective: Any):
        self.objective = objective
        self.component = "masked_lm_loss" if objective.config.stage_one == "masked_lm" else "generator_loss"

    def _start(self, state: Any, reason: str) -> None:
        self.objective.enable_discriminator()
        if state.is_world_process_zero:
            logger.info("The discriminator is trained too, from step %d on: %s.", state.global_step + 1, reason)

    def on_step_begin(self, args, state, control, **kwargs):
        start = self.objective.config.discriminator_start_step
        if start is not None and state.global_step >= start and not self.objective.discriminator_active:
            self._start(state, f"{start} steps are done")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs, start = logs or {}, self.objective.config.discriminator_start_loss
        if start is None or self.objective.discriminator_active:
            return
        if logs.get(self.component, start) < start:
            self._start(state, f"{self.component} is {logs[self.component]:.4f}, below {start}")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # None rather than zero, by which weight decay and an optimiser's moments would act.
        if not self.objective.discriminator_active:
            for parameter in self.objective.frozen_parameters():
                parameter.grad = None


class DiscriminatorWarmupCallback(TrainerCallback):
    """
    Scales the encoder's updates up from 0 to their full size over its first `config.discriminator_warmup_steps` steps.

    A schedule's own warm-up is long over when stage one ends, and an encoder that was never trained collapses if it
    begins at the full learning rate. Whatever the optimiser and the schedule are, the weights go a growing fraction of
    the way that a step takes them; until then a copy of them is kept. The buffer `discriminator_steps` counts the
    steps, so that a resumed run continues where it was. Parameters that the first version of FSDP flattens together
    with those of stage one are updated in full.

    Args:
        objective (`PreTrainedModel`):
            A [`~hf_efficient.objectives.discriminator.DiscriminatorObjective`], of which these are used:
            `config.discriminator_warmup_steps`, `discriminator_active`, `discriminator_steps`, and
            `discriminator_parameters()`.
    """

    def __init__(self, objective: Any):
        self.objective = objective
        self.before: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        objective = self.objective
        self.before = []
        if (
            objective.discriminator_active
            and objective.discriminator_steps < objective.config.discriminator_warmup_steps
        ):
            self.before = [parameter.detach().clone() for parameter in objective.discriminator_parameters()]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        objective = self.objective
        if not self.before:
            return
        fraction = (int(objective.discriminator_steps) + 1) / (objective.config.discriminator_warmup_steps + 1)
        for parameter, before in zip(objective.discriminator_parameters(), self.before, strict=True):
            parameter.lerp_(before, 1.0 - fraction)
        self.before = []
        objective.discriminator_steps += 1


def discriminator_callbacks(objective: Any) -> list[TrainerCallback]:
    """
    Make the callbacks of a [`~hf_efficient.objectives.discriminator.DiscriminatorObjective`]: its loss components in
    the log, the warnings, and as configured the end of stage one and the encoder's warm-up behind it.
    """
    callbacks = [LossComponentsCallback(objective), CollapseCallback(), ChanceLevelCallback()]
    if objective.config.has_stage_one:
        callbacks.append(StartDiscriminatorCallback(objective))
    if objective.config.discriminator_warmup_steps:
        callbacks.append(DiscriminatorWarmupCallback(objective))
    return callbacks
