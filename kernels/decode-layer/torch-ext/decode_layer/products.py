"""The ops in C++ with their shapes, and the public functions."""

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops


def _linear_fake(x, weight, scales, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


torch.library.register_fake(add_op_namespace_prefix("linear"), _linear_fake)


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """
    Multiply rows by a matrix of any format.

    Args:
        x (`Tensor` of shape `(tokens, inputs)`): in float32, bfloat16 or float16.
        weight (`Tensor` of shape `(outputs, inputs)`): in float32, bfloat16 or float16, or codes.
        scales (`Tensor`, *optional*): of codes.
        bias (`Tensor` of shape `(outputs,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(tokens, outputs)`: in the dtype of `x`.

    Raises:
        RuntimeError: if shapes or dtypes do not fit together; says which.
    """
    return ops.linear.default(x, weight, scales, bias)


def _multiplicative_fake(x, gating, gating_scales, projection, projection_scales, bias):
    size = projection.shape[0] if projection.dtype == torch.int8 else projection.shape[1]
    return x.new_empty(x.shape[0], gating.shape[0] * size)


torch.library.register_fake(add_op_namespace_prefix("multiplicative"), _multiplicative_fake)


def multiplicative(
    x: Tensor,
    gating: Tensor,
    gating_scales: Tensor | None,
    projection: Tensor,
    projection_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """
    Multiply by a matrix that is the product of a gating for each module and one projection, both in floating point or
    both in int8. In int8 the input times a module's gating is rounded for that module.

    Args:
        x (`Tensor` of shape `(tokens, inputs)`): input.
        gating (`Tensor` of shape `(modules, inputs)`): in int8 filled up to whole groups.
        gating_scales (`Tensor` of shape `(modules,)`, *optional*): of codes.
        projection (`Tensor` of shape `(inputs, size)`): in int8 transposed, `(size, padded inputs)`.
        projection_scales (`Tensor` of shape `(size,)`, *optional*): of codes.
        bias (`Tensor` of shape `(modules * size,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(tokens, modules * size)`: in the dtype of `x`.

    Raises:
        RuntimeError: if shapes or dtypes do not fit together; says which.
    """
    return ops.multiplicative.default(x, gating, gating_scales, projection, projection_scales, bias)


def _module_conv_fake(windows, kernel, scales, bias, window, width):
    length = windows.shape[1] if windows.dim() == 5 else windows.shape[1] - window + 1
    return windows.new_empty(windows.shape[0], length, windows.shape[-2] * kernel.shape[0])


torch.library.register_fake(add_op_namespace_prefix("module_conv"), _module_conv_fake)


def module_conv(
    windows: Tensor, kernel: Tensor, scales: Tensor | None, bias: Tensor | None, window: int, width: int
) -> Tensor:
    """
    Convolve each token with the tokens before it and each module with its neighbours; modules beyond the first and the
    last are zero. In int8 what a module sees is rounded for that module.

    Args:
        windows (`Tensor` of shape `(batch, length + window - 1, modules, channels)` or `(batch, length, window,
            modules, channels)`): the text with the `window - 1` tokens that came before it, or each token's own window.
        kernel (`Tensor` of shape `(size, channels, window, width)`): in int8 `(size, padded count)`, with the numbers
            of a row in the order (window, width, channels).
        scales (`Tensor` of shape `(size,)`, *optional*): of codes.
        bias (`Tensor` of shape `(size,)`, *optional*): added to each module.
        window (`int`): tokens that a module sees.
        width (`int`): modules that it sees, an odd number.

    Returns:
        `Tensor` of shape `(batch, length, modules * size)`: in the dtype of `windows`.

    Raises:
        RuntimeError: if shapes or dtypes do not fit together; says which.
    """
    return ops.module_conv.default(windows, kernel, scales, bias, window, width)


def _sparse_feed_forward_fake(x, controller_down, controller_down_scales, controller_up, *rest):
    winners = x.new_empty(x.shape[0], controller_up.shape[0], dtype=torch.int32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), winners


torch.library.register_fake(add_op_namespace_prefix("sparse_feed_forward"), _sparse_feed_forward_fake)


def sparse_feed_forward(
    x: Tensor,
    controller_down: Tensor,
    controller_down_scales: Tensor | None,
    controller_up: Tensor,
    controller_up_scales: Tensor | None,
    controller_bias: Tensor,
    units: Tensor,
    bias: Tensor | None = None,
    inner_bias: Tensor | None = None,
    activation: str = "relu",
    multiply_by_controller: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Run a sparse feed-forward of quantised units with the units that its controller chooses.

    A unit is one record, `[codes of the first row | codes of the second | scales of the first | scales of the second]`,
    filled up to a multiple of 64 bytes; its size tells whether it is in int8 or int4. Input and inner layer of the
    controller are rounded to 8 bits; what a unit gives is not.

    Args:
        x (`Tensor` of shape `(tokens, width)`): the input.
        controller_down, controller_down_scales (`Tensor` of shape `(rank, width)`): the controller's first matrix, of
            any format.
        controller_up, controller_up_scales (`Tensor` of shape `(blocks, block_size, rank)`): its second.
        controller_bias (`Tensor` of shape `(blocks, block_size)`): its bias.
        units (`Tensor` of shape `(blocks, block_size, bytes)`): records, in uint8.
        bias (`Tensor` of shape `(width,)`, *optional*): added to the result.
        inner_bias (`Tensor` of shape `(blocks, block_size)`, *optional*): added before the activation.
        activation (`str`, defaults to `"relu"`): `"relu"`, `"gelu"`, `"gelu_new"` (its tanh form) or `"silu"`.
        multiply_by_controller (`bool`, defaults to `False`): multiply what a winner gives by its probability among the
            units of its block.

    Returns:
        `tuple(Tensor, Tensor)`: the result, `(tokens, width)` in the dtype of `x`, and the winners, `(tokens, blocks)`
        in int32: the first of equal logits, and NaN before all others.

    Raises:
        RuntimeError: if shapes, dtypes or options do not fit together; says which.
    """
    return ops.sparse_feed_forward.default(
        x, controller_down, controller_down_scales, controller_up, controller_up_scales, controller_bias, units, bias,
        inner_bias, activation, multiply_by_controller,
    )  # fmt: skip
