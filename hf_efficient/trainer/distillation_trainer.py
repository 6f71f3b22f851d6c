"""Training of a language model towards the logits of another one, its teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from ..utils.labels import IGNORE_INDEX
from .segment_trainer import SegmentTrainer


def divergence(logits: Tensor, teacher_logits: Tensor, counted: Tensor, temperature: float = 1.0) -> Tensor:
    """
    Kullback-Leibler divergence of a model from its teacher, summed over tokens, in nats, times `temperature` squared,
    by which its gradient is as large at every temperature (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher_logits (`Tensor` of shape `(batch, length, vocabulary)`): of both.
        counted (`Tensor` of shape `(batch, length)`): boolean; `False` where a position does not count.
        temperature (`float`, defaults to 1.0): divides the logits of both.

    Returns:
        `Tensor` of shape `()`: float32.
    """
    own, teachers = ((one[counted].float() / temperature).log_softmax(-1) for one in (logits, teacher_logits))
    return nn.functional.kl_div(own, teachers, reduction="sum", log_target=True) * temperature**2


def check_distillation(distillation_weight: float, temperature: float) -> None:
    """Raise a `ValueError` for settings of [`DistillationTrainer`] outside their ranges."""
    if not 0 <= distillation_weight <= 1:
        raise ValueError(f"`distillation_weight` must be from 0 to 1, not {distillation_weight}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, not {temperature}.")


class DistillationTrainer(SegmentTrainer):
    """
    [`SegmentTrainer`] that trains a language model on a text and towards the logits of a teacher on that text:

        loss = (1 - w) cross entropy + w temperature^2 KL(teacher || model)

    The teacher is in evaluation mode, gets no gradient and is in no checkpoint, so that resuming needs it again. The
    two parts are logged beside the loss, as `cross_entropy` and `divergence`; a batch without targets weighs nothing in
    any of them. With w = 0 the teacher is not asked, and there is no `divergence`. In evaluation the loss is the cross
    entropy alone, as that of any language model.

    Args:
        teacher (`nn.Module`): a causal language model of the same vocabulary.
        distillation_weight (`float`, defaults to 0.5): w, from 0 to 1.
        temperature (`float`, defaults to 1.0): divides the logits of both.
        kwargs:
            See [`SegmentTrainer`].

    Raises:
        ValueError: for a weight or a temperature outside its range, or a teacher of another vocabulary.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        distillation_weight: float = 0.5,
        temperature: float = 1.0,
        **kwargs: Any,
    ):
        check_distillation(distillation_weight, temperature)
        super().__init__(*args, **kwargs)
        sizes = [getattr(getattr(one, "config", None), "vocab_size", None) for one in (self.model, teacher)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(f"The model has a vocabulary of {sizes[0]} ids, and its teacher one of {sizes[1]}.")
        self.teacher: Any = teacher.eval().requires_grad_(False).to(self.args.device)
        self.distillation_weight, self.temperature = distillation_weight, temperature

    def _counted(self, inputs: dict[str, Any]) -> Tensor:
        """Positions whose next token is a target."""
        if "shift_labels" in inputs:
            return inputs["shift_labels"] != IGNORE_INDEX
        return nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX) != IGNORE_INDEX

    def _distance(self, inputs: dict[str, Any], logits: Tensor, counted: Tensor) -> Tensor:
        """The divergence from the teacher, summed over a batch's targets."""
        names = ("input_ids", "attention_mask", "position_ids")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        with torch.no_grad():
            teacher_logits = self.teacher(**given, use_cache=False).logits
        return divergence(logits, teacher_logits, counted, self.temperature)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            counted = self._counted(inputs)
            count = counted.sum()
            loss, targets = torch.where(count > 0, loss, 0.0), count.clamp(min=1)  # no mean over nothing
            parts, items, processes = {"cross_entropy": loss}, targets, 1
            if num_items_in_batch is not None:  # as Trainer scales the loss of the model itself
                items = num_items_in_batch
                processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                parts["cross_entropy"] = loss * items / (processes * targets)
            if self.distillation_weight > 0:
                total = self._distance(inputs, outputs.logits, counted)
                parts["divergence"] = total / targets
                distance = torch.where(count > 0, total * processes / items, 0.0)
                loss = (1 - self.distillation_weight) * loss + self.distillation_weight * distance
            self._means["train"].add(parts, count, {})
        return (loss, outputs) if return_outputs else loss
