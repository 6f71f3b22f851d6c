"""Labels of masked rows: the true id at targets, -100 elsewhere, as transformers' losses take them."""

import torch
from torch import Tensor


IGNORE_INDEX = -100


def check_labels(input_ids: Tensor, labels: Tensor | None) -> Tensor:
    """
    The labels, if there is one for each token.

    Raises:
        ValueError: if there are no labels, or not one for each token.
    """
    if labels is None or labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, not "
            f"{None if labels is None else tuple(labels.shape)}: let MaskingCollator make the batches."
        )
    return labels


def original_ids(input_ids: Tensor, labels: Tensor) -> Tensor:
    """The rows before masking."""
    return torch.where(labels == IGNORE_INDEX, input_ids, labels)
