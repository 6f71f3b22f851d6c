"""Losses of heads, one for each problem type, all exact under gradient accumulation, and the positions they need."""

from typing import Any

import torch
from torch import nn

from ..utils.config_checks import PROBLEM_TYPES, check_choice
from ..utils.labels import IGNORE_INDEX
from .input_checks import (
    check_class_ids,
    check_count,
    check_has_values,
    check_labels,
    check_target_count,
    check_tensor,
    values_can_be_read,
)


def in_float32(values: torch.Tensor) -> torch.Tensor:
    """Convert to float32 unless the dtype is more precise already, for sums that a lower precision would spoil."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def divide_by_targets(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """
    Divide a sum of losses by a number of targets, on the device of the sum; by 1 where there is none.

    Raises:
        TypeError, ValueError: if the number is none; see [`check_target_count`].
    """
    check_target_count(count)
    count = torch.as_tensor(count, device=total.device)
    # No lower bound of 1: Trainer divides the number among processes that share a batch, which may leave a half.
    return total / torch.where(count > 0, count, 1)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    name: str = "labels",
) -> torch.Tensor:
    """
    Cross-entropy in float32 or better, summed over targets and divided by their number.

    Args:
        logits (`torch.Tensor` of shape `(n, classes)`): unnormalised log-probabilities.
        labels (`torch.Tensor` of shape `(n,)`): class ids of any integer dtype, -100 where there is no target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): number of targets over all accumulated batches and
            processes, as Trainer counts them, so that the losses of micro-batches add up to that of one large batch.
            By default the number of targets in `labels`.
        name (`str`, defaults to `"labels"`): what errors call the labels.

    Returns:
        `torch.Tensor` of shape `()`: nats per target; 0, with gradients of 0, without any target.

    Raises:
        ValueError: if the labels are no class ids; see [`check_class_ids`].
    """
    check_class_ids(labels, logits.shape[-1], logits.device, name)
    labels = labels.to(logits.device, torch.long)
    total = nn.functional.cross_entropy(in_float32(logits), labels, reduction="sum")
    return divide_by_targets(
        total, (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    )


def next_token_targets(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """Targets of each position, from the `labels` of the input or from `shift_labels`, which are already shifted."""
    if shift_labels is not None or labels is None:
        return shift_labels
    check_tensor("labels", labels)
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def token_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Loss of a head that predicts a class, or an id of the vocabulary, for each token.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, classes)`): output of the head.
        labels (`torch.Tensor` of shape `(batch, length)`): class ids, -100 where a token has none. For a language model
            they are already shifted.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): see [`cross_entropy`].

    Raises:
        ValueError: if the labels are no class ids, or not one for each token.
    """
    check_labels(labels, tuple(logits.shape[:-1]), "(batch, length)")
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), num_items_in_batch)


def question_answering_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Mean of the losses of an answer's first and of its last token.

    Args:
        start_logits, end_logits (`torch.Tensor` of shape `(batch, length)`): output of the head.
        start_positions, end_positions (`torch.Tensor` of shape `(batch,)`): index of the answer's first and last token;
            an index outside the input, as of an answer that was cut off, is no target.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): number of answers; see [`cross_entropy`]. Trainer,
            which counts `labels` alone, gives none here.

    Raises:
        ValueError: if the positions are not integers, or not one for each row.
    """
    losses = []
    for name, logits, positions in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        batch, length = logits.shape
        check_labels(positions, (batch,), "(batch,)", name)
        check_has_values(name, positions, logits.device)
        if not positions.is_complex():
            outside = (positions < 0) | (positions >= length)
            positions = positions.masked_fill(outside, IGNORE_INDEX)
        losses.append(cross_entropy(logits, positions, num_items_in_batch, name))
    return (losses[0] + losses[1]) / 2


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
            floats `(batch, num_labels)` for several labels at once. -100 stands where there is no target, whatever the
            problem type, since Trainer counts all other labels.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): see [`cross_entropy`].

    Raises:
        TypeError: if the labels are no tensor.
        ValueError: if they do not have the shape or the values that the problem type requires, or if there is no such
            problem type. `config` then stays as it is.
    """
    check_tensor("labels", labels)
    check_has_values("labels", labels, logits.device)
    problem_type = config.problem_type
    if problem_type is not None:
        check_choice(config, "problem_type", PROBLEM_TYPES)
    else:
        if config.num_labels == 1:
            problem_type = "regression"
        elif labels.is_floating_point():
            problem_type = "multi_label_classification"
        else:
            problem_type = "single_label_classification"
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        check_labels(labels, (logits.shape[0],), "(batch,): one class id a row")
        loss = cross_entropy(logits, labels, num_items_in_batch)
    else:
        loss = _loss_of_numbers(problem_type, logits, labels, num_items_in_batch)
    config.problem_type = problem_type
    return loss


def _loss_of_numbers(
    problem_type: str, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Loss of regression, or of several labels at once, over `(batch, num_labels)` numbers."""
    single = logits.shape[1] == 1
    if single and labels.dim() == 1:
        logits = logits.squeeze(-1)
    meaning = "(batch, num_labels), or (batch,) for one value" if single else "(batch, num_labels)"
    check_labels(labels, tuple(logits.shape), meaning)
    if labels.is_complex():
        raise ValueError(f"labels must be real numbers, not of {labels.dtype}.")
    is_regression = problem_type == "regression"
    criterion = nn.functional.mse_loss if is_regression else nn.functional.binary_cross_entropy_with_logits
    logits, is_target = in_float32(logits), labels != IGNORE_INDEX
    if values_can_be_read(labels):
        _check_numbers(labels[is_target], is_regression)
    losses = criterion(logits, labels.to(logits.dtype), reduction="none")
    total = losses.masked_fill(~is_target, 0.0).sum()
    return divide_by_targets(total, is_target.sum() if num_items_in_batch is None else num_items_in_batch)


def _check_numbers(targets: torch.Tensor, is_regression: bool) -> None:
    """
    Raises:
        ValueError: if a number to be learned is not finite, or not a probability where there are several labels.
    """
    fits = targets.isfinite() if is_regression else (targets >= 0) & (targets <= 1)  # NaN is no probability either
    if not fits.all():
        wanted = "finite" if is_regression else "from 0 to 1 (config.problem_type is 'multi_label_classification')"
        value = targets[~fits][0].item()
        raise ValueError(f"labels hold {value}, but must be {wanted}; what is not to be learned is {IGNORE_INDEX}.")


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    Select the positions whose logits are wanted, before a head computes them.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`): final states.
        logits_to_keep (`int` or `torch.Tensor`): number of last positions, 0 for all; or which, for all rows or for
            each, by index or as a mask.

    Raises:
        ValueError: for a negative number, and for a tensor that holds neither indices of the input nor booleans for it.
    """
    if not isinstance(logits_to_keep, torch.Tensor):
        check_count("logits_to_keep", logits_to_keep)
        return hidden_states[:, -logits_to_keep:]
    batch, length = hidden_states.shape[:2]
    is_mask = logits_to_keep.dtype == torch.bool
    shape = tuple(logits_to_keep.shape)
    if logits_to_keep.is_floating_point() or shape[:-1] not in ((), (batch,)) or (is_mask and shape[-1:] != (length,)):
        raise ValueError(
            f"logits_to_keep must hold indices, (n,) or {(batch, 'n')}, or booleans, {(length,)} or {(batch, length)}; "
            f"got {shape} of {logits_to_keep.dtype}."
        )
    if not is_mask and logits_to_keep.numel() and values_can_be_read(logits_to_keep):
        lowest, highest = (int(bound) for bound in torch.aminmax(logits_to_keep))
        if lowest < -length or highest >= length:
            bad = lowest if lowest < -length else highest
            raise ValueError(f"logits_to_keep holds {bad}, but the input has {length} positions (0 to {length - 1}).")
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if is_mask:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
