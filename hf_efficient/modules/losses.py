"""Losses of heads, one for each problem type, all of them exact under gradient accumulation."""

from typing import Any

import torch
from torch import nn

from ..utils.labels import IGNORE_INDEX
from .input_checks import check_labels


def in_float32(values: torch.Tensor) -> torch.Tensor:
    """Convert to float32 unless the dtype is more precise already, for sums that a lower precision would spoil."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def divide_by_targets(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Divide a sum of losses by a number of targets, on the device of the sum; by 1 where there is none."""
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Cross-entropy in float32 or better, summed over targets and divided by their number.

    Args:
        logits (`torch.Tensor` of shape `(n, classes)`): unnormalised log-probabilities.
        labels (`torch.LongTensor` of shape `(n,)`): class ids, -100 where there is no target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): number of targets over all accumulated batches and
            processes, as Trainer counts them, so that the losses of micro-batches add up to that of one large batch.
            By default the number of targets in `labels`.

    Returns:
        `torch.Tensor` of shape `()`: nats per target; 0 without any target.
    """
    total = nn.functional.cross_entropy(in_float32(logits), labels.to(logits.device), reduction="sum")
    return divide_by_targets(
        total, (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    )


def sequence_classification_loss(
    config: Any, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Loss of a head that classifies or rates whole rows, for the three problem types of transformers.

    Unlike the library's own losses, those of regression and of several labels honour `num_items_in_batch` too.

    Args:
        config (`PreTrainedConfig`): gives `problem_type` and `num_labels`; a `problem_type` of `None` is inferred from
            the labels and set.
        logits (`torch.Tensor` of shape `(batch, num_labels)`): output of the head.
        labels (`torch.Tensor`): class ids `(batch,)`; numbers `(batch,)` or `(batch, num_labels)` for regression;
            floats `(batch, num_labels)` for several labels at once.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): see [`cross_entropy`].

    Raises:
        ValueError: if the labels do not have the shape that the problem type requires.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        else:
            config.problem_type = "single_label_classification"
    labels = labels.to(logits.device)
    if config.problem_type == "single_label_classification":
        check_labels(labels, (logits.shape[0],), "(batch,): one class id a row")
        return cross_entropy(logits, labels, num_items_in_batch)
    if config.num_labels == 1 and labels.dim() == 1:
        logits = logits.squeeze(-1)
    meaning = "(batch, num_labels), or (batch,) for one value" if config.num_labels == 1 else "(batch, num_labels)"
    check_labels(labels, tuple(logits.shape), meaning)
    criterion = nn.MSELoss if config.problem_type == "regression" else nn.BCEWithLogitsLoss
    logits = in_float32(logits)
    total = criterion(reduction="sum")(logits, labels.to(logits.dtype))
    return divide_by_targets(total, labels.numel() if num_items_in_batch is None else num_items_in_batch)
