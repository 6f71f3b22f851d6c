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


_PIECE = 1 << 17  # numbers of a tensor that should stay in a core's cache

# All of them give 0 for 0, as a unit that is not chosen must.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_new": lambda value: nn.functional.gelu(value, approximate="tanh"),
    "silu": nn.functional.silu,
}


def controller_logits(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """See [`~hf_efficient.ops.sparse_ff.controller_logits`]."""
    return logits_of_code(controller_code(x, down), up, bias)


def controller_code(x: Tensor, down: Tensor) -> Tensor:
    """The controller's inner vectors, `(..., rank)`, in float32 or better."""
    precision = torch.promote_types(x.dtype, torch.float32)
    return nn.functional.linear(x.to(precision), down.to(precision))


def logits_of_code(code: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The controller's logits, `(..., blocks, block size)`, from its inner vectors."""
    logits = nn.functional.linear(code, up.flatten(0, 1).to(code.dtype), bias.flatten().to(code.dtype))
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


def units_at(logits: Tensor, levels: Tensor, temperature: float) -> Tensor:
    """The first unit of each block at which the sum of softmax(logits / temperature) exceeds a level, a number from 0
    to below 1."""
    reached = (logits / temperature).softmax(-1).cumsum(-1)
    below = reached <= levels.unsqueeze(-1) * reached[..., -1:]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)  # a product that is rounded up is not below the whole sum


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


def in_pieces(tokens: int, units: int, device: torch.device) -> list[slice]:
    """Cut tokens into pieces of which a CPU's caches hold all tensors that stand between two products of matrices."""
    if device.type != "cpu":
        return [slice(0, tokens)]
    rows = max(16, _PIECE // units) * torch.get_num_threads()
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _probabilities(code: Tensor, up: Tensor, bias: Tensor, shape: torch.Size) -> Tensor:
    """Probabilities of units, `(tokens, blocks, block size)`, from the controller's inner vectors."""
    return torch.addmm(bias, code, up.t()).view(-1, *shape).softmax(-1)


def relu_units(
    pre_activations: Tensor, code: Tensor, up: Tensor, bias: Tensor, winners: Tensor | None, multiply: bool
) -> Tensor:
    """
    Hidden units with ReLU from the controller's inner vectors, whose logits never exist for all tokens at once.

    Args:
        pre_activations (`Tensor` of shape `(tokens, blocks * block size)`): all units' products with the input.
        code (`Tensor` of shape `(tokens, rank)`): C_down x.
        up, bias (`Tensor` of shape `(blocks, block size, rank)` and `(blocks, block size)`): of the controller.
        winners (`Tensor` of shape `(tokens, blocks)`, *optional*): chosen units; without them the mask is soft.
        multiply (`bool`): scale winners by their probability.
    """
    rows, offsets, units = up.flatten(0, 1), bias.flatten(), bias.numel()
    hidden = torch.empty_like(pre_activations) if winners is None else torch.zeros_like(pre_activations)
    for piece in in_pieces(len(code), units, code.device):
        given, out = pre_activations[piece], hidden[piece]
        if winners is None:
            mask = _probabilities(code[piece], rows, offsets, bias.shape).flatten(-2).to(given.dtype)
            torch.mul(given, mask, out=out).clamp_(min=0)
            continue
        places = unit_indices(winners[piece], bias.shape[-1])
        value = given.gather(-1, places).relu_()
        if multiply:
            chosen = _probabilities(code[piece], rows, offsets, bias.shape).flatten(-2).gather(-1, places)
            value.mul_(chosen.to(value.dtype))
        out.scatter_(-1, places, value)
    return hidden


def relu_units_backward(
    gradient: Tensor,
    pre_activations: Tensor,
    code: Tensor,
    up: Tensor,
    bias: Tensor,
    winners: Tensor | None,
    multiply: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Gradients of pre-activations, inner vectors, and the controller's second matrix and bias.

    With p = softmax(logits), m the mask and z the pre-activations, h = relu(z m) and g the gradient of h where z > 0:
    dz = g m, and dm = g z, which straight-through is the gradient of p. Of hard masks only winners have any.
    """
    rows, offsets, units = up.flatten(0, 1), bias.flatten(), bias.numel()
    to_units = torch.empty_like(pre_activations) if winners is None else torch.zeros_like(pre_activations)
    to_code, to_rows, to_offsets = torch.empty_like(code), torch.zeros_like(rows), torch.zeros_like(offsets)
    for piece in in_pieces(len(code), units, code.device):
        given, slope, out, inner = pre_activations[piece], gradient[piece], to_units[piece], code[piece]
        probabilities = _probabilities(inner, rows, offsets, bias.shape)
        if winners is None:
            slope = torch.ops.aten.threshold_backward(slope, given, 0)
            torch.mul(slope, probabilities.flatten(-2).to(slope.dtype), out=out)
            to_mask = slope.mul_(given).to(probabilities.dtype).view_as(probabilities)
            to_logits = torch._softmax_backward_data(to_mask, probabilities, -1, probabilities.dtype)
        else:
            places = unit_indices(winners[piece], bias.shape[-1])
            value, slope = given.gather(-1, places), slope.gather(-1, places)
            chosen = probabilities.flatten(-2).gather(-1, places)
            if multiply:
                slope = slope * chosen.to(slope.dtype)
            slope = slope.masked_fill_(value <= 0, 0.0)
            out.scatter_(-1, places, slope)
            share = (slope * value).to(chosen.dtype).mul_(chosen)
            to_logits = probabilities.mul_(-share.unsqueeze(-1))
            to_logits.view(len(inner), -1).scatter_add_(-1, places, share)
        to_logits = to_logits.view(len(inner), -1)
        torch.mm(to_logits, rows, out=to_code[piece])
        to_rows.addmm_(to_logits.t(), inner)
        to_offsets += to_logits.sum(0)
    return to_units, to_code, to_rows.view_as(up), to_offsets.view_as(bias)


def plain_controlled_units(
    pre_activations: Tensor, code: Tensor, up: Tensor, bias: Tensor, winners: Tensor | None, multiply: bool
) -> Tensor:
    """[`relu_units`] out of differentiable operators."""
    logits = logits_of_code(code, up, bias)
    return plain_gated_units(pre_activations, logits, winners, "relu", multiply)
