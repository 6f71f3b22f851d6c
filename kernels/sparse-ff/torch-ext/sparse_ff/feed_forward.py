"""The op in C++ with its shapes, and the public function."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix, ops


def forward(*arguments):
    """The op itself, without its checks for gradients; see [`sparse_feed_forward`]."""
    if forward_ad._current_level >= 0:  # torch would take its derivative for zero
        raise RuntimeError(
            "The compiled sparse feed-forward has no forward-mode derivative: call `sparse_ff` of "
            "`hf_efficient.ops.sparse_ff`, which is made of plain torch operators there."
        )
    return ops.forward.default(*arguments)


def _forward_fake(x, controller_down, controller_up, *rest):
    winners = x.new_empty(x.shape[0], controller_up.shape[0], dtype=torch.int32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), winners


torch.library.register_fake(add_op_namespace_prefix("forward"), _forward_fake)


def sparse_feed_forward(
    x: Tensor, controller_down: Tensor, controller_up: Tensor, controller_bias: Tensor, up: Tensor, down: Tensor,
    bias: Tensor | None = None, inner_bias: Tensor | None = None, activation: str = "relu",
    multiply_by_controller: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Run a sparse feed-forward with the units that its controller chooses.

    Each argument may be float32, bfloat16 or float16, whatever the others are; all is computed in float32. On a CPU a
    token's result does not depend on the tokens beside it; on a GPU sums may be added up in another order. `up` and
    `down` may be views, such as halves of one tensor with a record `[up row | down row]` for each unit: their last
    dimension must be contiguous.

    Args:
        x (`Tensor` of shape `(tokens, width)`): the input.
        controller_down (`Tensor` of shape `(rank, width)`): the controller's first matrix.
        controller_up (`Tensor` of shape `(blocks, block_size, rank)`): its second, a row for each unit.
        controller_bias (`Tensor` of shape `(blocks, block_size)`): its bias.
        up (`Tensor` of shape `(blocks, block_size, width)`): the first layer, a row for each unit.
        down (`Tensor` of shape `(blocks, block_size, width)`): the second layer, a row for each unit.
        bias (`Tensor` of shape `(width,)`, *optional*): added to the result.
        inner_bias (`Tensor` of shape `(blocks, block_size)`, *optional*): added before the activation.
        activation (`str`, defaults to `"relu"`): `"relu"`, `"gelu"`, `"gelu_new"` (its tanh form) or `"silu"`.
        multiply_by_controller (`bool`, defaults to `False`): multiply what a winner gives by its probability among the
            units of its block.

    Returns:
        `tuple(Tensor, Tensor)`: the result, `(tokens, width)` in the dtype of `x`, and the winners,
        `(tokens, blocks)` in int32: the first of equal logits, and NaN before all others.

    Raises:
        RuntimeError: if shapes, dtypes, devices or options do not fit together; says which. If a gradient is wanted.
    """
    given = (x, controller_down, controller_up, controller_bias, up, down, bias, inner_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        raise RuntimeError("The compiled sparse feed-forward has no gradient: call it under `torch.no_grad()`.")
    return forward(*given, activation, multiply_by_controller)
