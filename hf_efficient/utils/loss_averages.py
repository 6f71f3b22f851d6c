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


def part_counts(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Numbers of items that the parts of a batch's output are means over: its targets (1 without labels), and the
    numbers that the model's own `part_counts(outputs, batch)` names."""
    labels = batch.get("labels")
    targets = labels.ne(IGNORE_INDEX).sum() if isinstance(labels, Tensor) else 1.0
    own: Any = getattr(model, "part_counts", None)
    return targets, {} if own is None else own(outputs, batch)


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
