"""Means of the parts of a loss over many batches."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .labels import IGNORE_INDEX


def scalar_parts(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Scalar tensors in a model's output, its loss excepted, to be averaged over batches."""
    return {
        name: value
        for name, value in outputs.items()
        if name != "loss" and isinstance(value, Tensor) and value.dim() == 0
    }


def count_targets(batch: Mapping[str, Any], shifts_labels: bool = False) -> Tensor | float:
    """
    Count what the loss of a batch is a mean over.

    Args:
        batch (`Mapping[str, Any]`): inputs of a model.
        shifts_labels (`bool`, defaults to `False`): whether the model predicts each label from the position before it,
            so that the first one of a row is no target. `shift_labels` in the batch are taken as they are.

    Returns:
        `Tensor` or `float`: labels that are not -100, or the answers that lie inside the input (the mean of the numbers
        of starts and of ends); 1 without either.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        if isinstance(batch.get("shift_labels"), Tensor):
            labels = batch["shift_labels"]
        elif shifts_labels:
            labels = labels[..., 1:]
        return labels.ne(IGNORE_INDEX).sum()
    ends = [batch[name] for name in ("start_positions", "end_positions") if isinstance(batch.get(name), Tensor)]
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if len(ends) == 2 and isinstance(tokens, Tensor):
        positions = torch.stack(ends)
        return ((positions >= 0) & (positions < tokens.shape[1])).sum() / 2
    return 1.0


def part_counts(
    model: nn.Module, outputs: Any, batch: Mapping[str, Any], shifts_labels: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """Numbers of items that the parts of a batch's output are means over: its targets, by [`count_targets`], and the
    numbers that the model's own `part_counts(outputs, batch)` names."""
    own: Any = getattr(model, "part_counts", None)
    return count_targets(batch, shifts_labels), {} if own is None else own(outputs, batch)


class Means:
    """Weighted means of scalar tensors, summed on their device without waiting for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float, weights: Mapping[str, Tensor]) -> None:
        """Values that stand for `weight` items each, or as many as `weights` says; of no items, they may be NaN."""
        for name, value in values.items():
            value, count = value.detach().float(), weights.get(name, weight)
            # A part may be undefined for a batch, like the recall of something that did not occur. But a loss over
            # targets that is not finite has to be seen.
            defined = torch.as_tensor(count, device=value.device) > 0 if name == "loss" else value.isfinite()
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
