"""The sparse feed-forward as loops over tokens and blocks, written to be read.

`ops/sparse_ff.py` has the formulas. These loops state them one block at a time in plain torch and leave the gradients
to autograd; they are slow, and the tests hold every other implementation against them.
"""

import torch
from torch import Tensor, nn

from .sparse_ff_reference import ACTIVATIONS


def controller_logits_naive(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The logits of one token, `(blocks, block size)`; the arguments are those of `controller_logits`."""
    precision = torch.promote_types(x.dtype, torch.float32)
    hidden = down.to(precision) @ x.to(precision)
    rows = [up_block.to(precision) @ hidden + bias_block for up_block, bias_block in zip(up, bias, strict=True)]
    return torch.stack(rows)


def first_maximum(values: Tensor) -> int:
    """Index of the largest value of a vector, the first among equals; NaN counts as the largest."""
    best = 0
    for index, value in enumerate(values.tolist()):
        if values[best].isnan():
            break
        if value != value or value > values[best]:
            best = index
    return best


def sparse_ff_naive(
    x: Tensor, controller_down: Tensor, controller_up: Tensor, controller_bias: Tensor, up: Tensor, down: Tensor,
    bias: Tensor | None = None, inner_bias: Tensor | None = None, *, activation: str = "relu",
    multiply_by_controller: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Apply the feed-forward layer as in evaluation, one chosen unit after the other.

    Arguments and results are those of [`~hf_efficient.ops.sparse_ff.sparse_ff`], except that no argument is checked.
    """
    act, outputs, winners = ACTIVATIONS[activation], [], []
    for token in x.flatten(0, -2):
        logits = controller_logits_naive(token, controller_down, controller_up, controller_bias)
        output = token.new_zeros(down.shape[-1]) if bias is None else bias
        chosen = []
        for block, block_logits in enumerate(logits):
            unit = first_maximum(block_logits.detach())
            value = up[block, unit] @ token
            value = act(value if inner_bias is None else value + inner_bias[block, unit])
            if multiply_by_controller:
                value = value * block_logits.softmax(-1)[unit].to(value.dtype)
            if value != 0:  # else the row counts for nothing, whatever it holds
                output = output + value * down[block, unit]
            chosen.append(unit)
        outputs.append(output)
        winners.append(chosen)
    shape = x.shape[:-1]
    return torch.stack(outputs).reshape(*shape, -1), torch.tensor(winners, dtype=torch.int32).reshape(*shape, -1)


def gated_units_naive(
    pre_activations: Tensor, logits: Tensor, winners: Tensor | None, activation: str = "relu",
    multiply_by_controller: bool = False,
) -> Tensor:  # fmt: skip
    """
    Hidden units of training, the mask written out and the straight-through estimator as `onehot + p - stop_grad(p)`.

    Arguments and results are those of [`~hf_efficient.ops.sparse_ff.gated_units`].
    """
    probabilities = logits.softmax(-1)
    mask = probabilities
    if winners is not None:
        one_hot = nn.functional.one_hot(winners.long(), logits.shape[-1]).to(probabilities.dtype)
        mask = one_hot + probabilities - probabilities.detach()
    hidden = ACTIVATIONS[activation](pre_activations * mask.flatten(-2).to(pre_activations.dtype))
    if multiply_by_controller and winners is not None:
        hidden = hidden * probabilities.detach().flatten(-2).to(hidden.dtype)
    return hidden
