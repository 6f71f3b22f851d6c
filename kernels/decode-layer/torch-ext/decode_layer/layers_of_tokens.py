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
