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


def ranked_first(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Which of the `targets` `(tokens,)` have the highest of the `logits` `(tokens, vocab_size)`; of several equal ones,
    as low precision makes them, the lowest id counts. It is what `logits.argmax(-1) == targets` says, but a CPU takes
    some times as long for that.
    """
    best = logits.amax(-1)
    first = logits.gather(1, targets.unsqueeze(1)).squeeze(1) == best
    rows = first.nonzero().squeeze(1)
    before = torch.arange(logits.shape[1], device=logits.device) < targets[rows].unsqueeze(1)
    first[rows] = ~((logits[rows] == best[rows].unsqueeze(1)) & before).any(-1)
    return first
