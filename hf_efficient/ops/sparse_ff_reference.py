"""The sparse feed-forward in plain torch, always available.

`ops/sparse_ff.py` has the formulas. In training all units are multiplied, and what is written by hand is the gradient
of the mask, for which autograd would keep six tensors of the size of the hidden layer. In evaluation a few tokens read
the rows of their own units alone; for many it is quicker to multiply all.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .backend import is_at_most


# All of them give 0 for 0, as a unit that is not chosen must.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_new": lambda value: nn.functional.gelu(value, approximate="tanh"),
    "silu": nn.functional.silu,
}


def controller_logits(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """See [`~hf_efficient.ops.sparse_ff.controller_logits`]."""
    precision = torch.promote_types(x.dtype, torch.float32)
    hidden = nn.functional.linear(x.to(precision), down.to(precision))
    logits = nn.functional.linear(hidden, up.flatten(0, 1).to(precision), bias.flatten().to(precision))
    return logits.unflatten(-1, tuple(bias.shape))


def unit_indices(winners: Tensor, block_size: int) -> Tensor:
    """The place of each winner among all units, `(..., blocks)`, from its place in its block."""
    blocks = torch.arange(winners.shape[-1], device=winners.device)
    return winners + blocks * block_size


def _probability_of(logits: Tensor, winners: Tensor) -> Tensor:
    return logits.softmax(-1).gather(-1, winners.unsqueeze(-1)).squeeze(-1)


def evaluation_form(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, inner_bias: Tensor | None,
    activation: str, multiply_by_controller: bool, ignore_unused: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Output and winners from logits, out of differentiable operators.

    Args:
        x (`Tensor` of shape `(tokens, width)`): the layer's input.
        logits (`Tensor` of shape `(tokens, blocks, block size)`): the controller's.
        ignore_unused (`bool`, defaults to `False`): let rows of `down` that are multiplied by 0 give 0 where they hold
            inf or NaN too. This reads values and writes in place: for a CPU, where no gradient is wanted.

    The other arguments are those of [`~hf_efficient.ops.sparse_ff.sparse_ff`].
    """
    winners = logits.argmax(-1)
    units = unit_indices(winners, up.shape[1])
    rows_up, rows_down = up.flatten(0, 1), down.flatten(0, 1)
    # A few tokens read their own units alone. A row that is gathered is written and read again, so it does not pay up
    # to as many tokens as all units together would.
    gathers = is_at_most(4 * x.shape[0], up.shape[1])
    if gathers:
        value = torch.bmm(rows_up[units].to(x.dtype), x.unsqueeze(-1)).squeeze(-1)
    else:
        value = nn.functional.linear(x, rows_up.to(x.dtype)).gather(1, units)
    if inner_bias is not None:
        value = value + inner_bias.flatten()[units].to(value.dtype)
    value = ACTIVATIONS[activation](value)
    if multiply_by_controller:
        value = value * _probability_of(logits, winners).to(value.dtype)
    if gathers:
        output = torch.bmm(value.unsqueeze(1), rows_down[units].to(x.dtype)).squeeze(1)
    else:
        output = value.new_zeros(x.shape[0], rows_up.shape[0]).scatter(1, units, value) @ rows_down.to(x.dtype)
    if ignore_unused and not math.isfinite(output.sum().item()):
        _ignore_unused_rows(output, value, units, rows_down)
    return (output if bias is None else output + bias.to(output.dtype)), winners.int()


def _ignore_unused_rows(output: Tensor, value: Tensor, units: Tensor, rows: Tensor) -> None:
    """Compute tokens of the output that are not finite anew, from the rows whose units are not 0 alone."""
    for token in (~output.isfinite().all(-1)).nonzero().flatten().tolist():
        alive = value[token].nonzero().squeeze(1)
        used = rows.index_select(0, units[token].index_select(0, alive)).to(output.dtype)
        torch.mv(used.t(), value[token].index_select(0, alive), out=output[token])


def _one_token(
    x: Tensor, logits: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, inner_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[`evaluation_form`] of a single token with ReLU: a unit that it kills need not be read for the second product."""
    winners = logits[0].argmax(-1)
    units = unit_indices(winners, up.shape[1])
    value = torch.mv(up.flatten(0, 1).index_select(0, units).to(x.dtype), x[0])
    if inner_bias is not None:
        value = value + inner_bias.flatten().index_select(0, units).to(value.dtype)
    alive = (~(value <= 0)).nonzero().squeeze(1)
    rows = down.flatten(0, 1).index_select(0, units.index_select(0, alive)).to(x.dtype)
    output = torch.mv(rows.t(), value.index_select(0, alive))
    return (output if bias is None else output + bias.to(output.dtype)).unsqueeze(0), winners.int().unsqueeze(0)


def forward(
    x: Tensor, controller_down: Tensor, controller_up: Tensor, controller_bias: Tensor, up: Tensor, down: Tensor,
    bias: Tensor | None, inner_bias: Tensor | None, activation: str, multiply_by_controller: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and winners, of shape `(tokens, width)` and `(tokens, blocks)`; see `sparse_ff`."""
    logits = controller_logits(x, controller_down, controller_up, controller_bias)
    # What it reads depends on values, which is quick on a CPU alone; NaN is not above 0, and has to go on.
    is_cpu = x.device.type == "cpu"
    if len(x) == 1 and is_cpu and activation == "relu" and not multiply_by_controller:
        return _one_token(x, logits, up, down, bias, inner_bias)
    return evaluation_form(x, logits, up, down, bias, inner_bias, activation, multiply_by_controller, is_cpu)


def plain_gated_units(
    pre_activations: Tensor, logits: Tensor, winners: Tensor | None, activation: str, multiply_by_controller: bool
) -> Tensor:
    """[`~hf_efficient.ops.sparse_ff.gated_units`] out of differentiable operators, to any order of derivative."""
    probabilities = logits.softmax(-1)
    mask = probabilities
    if winners is not None:
        chosen = torch.arange(logits.shape[-1], device=logits.device) == winners.unsqueeze(-1)
        mask = chosen.to(probabilities.dtype) + (probabilities - probabilities.detach())
    hidden = ACTIVATIONS[activation](pre_activations * mask.flatten(-2).to(pre_activations.dtype))
    if multiply_by_controller and winners is not None:
        hidden = hidden * probabilities.detach().flatten(-2).to(hidden.dtype)
    return hidden


def relu_units(pre_activations: Tensor, logits: Tensor, winners: Tensor | None, multiply_by_controller: bool) -> Tensor:
    """Value of [`plain_gated_units`] with ReLU."""
    if winners is None:
        return (pre_activations * logits.softmax(-1).flatten(-2).to(pre_activations.dtype)).relu_()
    units = unit_indices(winners, logits.shape[-1])
    value = pre_activations.gather(-1, units).relu_()
    if multiply_by_controller:
        value = value * _probability_of(logits, winners).to(value.dtype)
    return torch.zeros_like(pre_activations).scatter_(-1, units, value)


def relu_units_backward(
    gradient: Tensor, pre_activations: Tensor, logits: Tensor, winners: Tensor | None, multiply_by_controller: bool
) -> tuple[Tensor, Tensor]:
    """
    Gradients of pre-activations and logits.

    With p = softmax(logits), m the mask and z the pre-activations, h = relu(z m) and g the gradient of h where z > 0:
    dz = g m, and dm = g z, which straight-through is the gradient of p. Of hard masks only winners have any.

    Nothing is written into tensors that are not made from the gradient: with `is_grads_batched` there are several.
    """
    probabilities = logits.softmax(-1)
    if winners is None:
        gradient = gradient.masked_fill(pre_activations <= 0, 0.0)
        to_mask = (gradient * pre_activations).to(probabilities.dtype).view_as(probabilities)
        to_logits = to_mask.mul_(probabilities)
        to_logits = to_logits.sub_(probabilities * to_logits.sum(-1, keepdim=True))
        return gradient.mul_(probabilities.flatten(-2).to(gradient.dtype)), to_logits
    units = unit_indices(winners, logits.shape[-1])
    value, slope = pre_activations.gather(-1, units), gradient.gather(-1, units)
    chosen = probabilities.gather(-1, winners.unsqueeze(-1))
    if multiply_by_controller:
        slope = slope * chosen.squeeze(-1).to(slope.dtype)
    slope = slope.masked_fill(value <= 0, 0.0)
    to_units = torch.zeros_like(gradient).scatter_(-1, units, slope)
    share = (slope * value).to(probabilities.dtype).unsqueeze(-1) * chosen
    to_logits = (probabilities * -share).scatter_add_(-1, winners.unsqueeze(-1), share)
    return to_units, to_logits
