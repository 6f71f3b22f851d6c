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
