"""Layers with weights of 8 and 4 bits, by a compiled kernel on the CPU where there is one, else in plain torch.

ops/quantized.py says what each computes and is the form in plain torch; kernels/decode-layer holds the compiled one,
which finds the same integers. It runs where nothing looks at a call: no gradient, compiler, tracer or transform.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import quantized
from .backend import fall_back, is_transformed, note_reference, register_op, select
from .kernel_loader import load_implementation


OP_NAME = "quantized_layers"
KERNEL = "decode-layer"

_IN_TORCH = SimpleNamespace(
    linear=quantized.quantized_linear,
    multiplicative=quantized.quantized_multiplicative,
    module_conv=quantized.quantized_module_conv,
    sparse_feed_forward=lambda *arguments: quantized.quantized_sparse_feed_forward(
        *arguments[:-2], activation=arguments[-2], multiply_by_controller=arguments[-1]
    ),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IN_TORCH = register_op(OP_NAME, _IN_TORCH, {"cpu": partial(load_implementation, KERNEL, vars(_IN_TORCH), "cpu")})


def _wants_a_value(x: Tensor) -> bool:
    """Return whether nothing but a value is wanted of a call on `x`, in a dtype that kernels take."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype not in _DTYPES:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    try:  # a private name, see `may_skip_dispatcher`
        return torch._C._len_torch_dispatch_stack() == 0
    except AttributeError:
        return False


def _implementation(x: Tensor, codes: tuple[Tensor, ...], *biases: Tensor | None) -> Any:
    """Select the form that runs: plain torch also for a bias in float64, and for codes that lie otherwise in memory."""
    if not _wants_a_value(x) or any(bias is not None and bias.dtype not in _DTYPES for bias in biases):
        if not torch.compiler.is_compiling():
            note_reference(OP_NAME)
        return _IN_TORCH
    implementation = select(OP_NAME, x.device)
    if implementation is not _IN_TORCH and not all(map(Tensor.is_contiguous, codes)):
        return fall_back(OP_NAME, "a weight is not contiguous", "Give weight.contiguous().")
    return implementation


def _check_width(x: Tensor, width: int, name: str) -> None:
    """Refuse an input of another width than that of rows with `width` numbers, those that they are filled up with
    included."""
    if x.dim() == 0 or quantized.padded_width(x.shape[-1]) != width:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit rows of {name} with {width} numbers.")


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Multiply rounded inputs by quantised rows; see [`quantized.quantized_linear`].

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        codes, scales (`Tensor`): of a matrix `(outputs, width)`, in `int8` or `int4`.
        bias (`Tensor` of shape `(outputs,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(..., outputs)`: in the dtype of `x`.

    Raises:
        ValueError: if `x` is not as wide as the rows.
    """
    _check_width(x, codes.shape[-1] if codes.dtype == torch.int8 else codes.shape[-2] * quantized.GROUP, "codes")
    implementation = _implementation(x, (codes, scales), bias)
    if implementation is _IN_TORCH or x.dim() == 2:
        return implementation.linear(x, codes, scales, bias)
    return implementation.linear(x.reshape(-1, x.shape[-1]), codes, scales, bias).view(*x.shape[:-1], -1)


def quantized_multiplicative(
    x: Tensor,
    gating: Tensor,
    gating_scales: Tensor,
    projection: Tensor,
    projection_scales: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """
    Apply a multiplicative layer with a quantised gating and projection; see [`quantized.quantized_multiplicative`].

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        gating, gating_scales (`Tensor` of shape `(modules, padded width)`, `(modules,)`): in `int8`.
        projection, projection_scales (`Tensor` of shape `(size, padded width)`, `(size,)`): in `int8`, transposed.
        bias (`Tensor` of shape `(modules * size,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(..., modules * size)`: in the dtype of `x`.

    Raises:
        ValueError: if `x` is not as wide as the gating and the projection.
    """
    _check_width(x, gating.shape[-1], "gating")
    _check_width(x, projection.shape[-1], "projection")
    weights = (gating, gating_scales, projection, projection_scales, bias)
    implementation = _implementation(x, (gating, projection), bias)
    if implementation is _IN_TORCH or x.dim() == 2:
        return implementation.multiplicative(x, *weights)
    return implementation.multiplicative(x.reshape(-1, x.shape[-1]), *weights).view(*x.shape[:-1], -1)


def quantized_module_conv(
    windows: Tensor, kernel: Tensor, kernel_scales: Tensor, bias: Tensor | None, window: int, width: int
) -> Tensor:
    """
    Convolve over time and modules with a quantised kernel; see [`quantized.quantized_module_conv`].

    Args:
        windows (`Tensor` of shape `(batch, length + window - 1, modules, channels)` or `(batch, length, window,
            modules, channels)`): input.
        kernel, kernel_scales (`Tensor` of shape `(size, padded window * width * channels)`, `(size,)`): in `int8`.
        bias (`Tensor` of shape `(size,)`, *optional*): added to each module.
        window, width (`int`): tokens and modules that an output sees.

    Returns:
        `Tensor` of shape `(batch, length, modules * size)`: in the dtype of `windows`.

    Raises:
        ValueError: if the kernel's rows have other numbers than so many tokens, modules and channels.
    """
    if quantized.padded_width(window * width * windows.shape[-1]) != kernel.shape[-1]:
        raise ValueError(
            f"Rows of kernel with {kernel.shape[-1]} numbers do not fit {window} tokens, {width} modules and "
            f"{windows.shape[-1]} channels."
        )
    return _implementation(windows, (kernel,), bias).module_conv(windows, kernel, kernel_scales, bias, window, width)


def quantized_sparse_feed_forward(
    x: Tensor,
    controller_down: Tensor,
    controller_down_scales: Tensor,
    controller_up: Tensor,
    controller_up_scales: Tensor,
    controller_bias: Tensor,
    units: Tensor,
    bias: Tensor | None = None,
    inner_bias: Tensor | None = None,
    *,
    activation: str = "relu",
    multiply_by_controller: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Apply a sparse feed-forward layer with a quantised controller and records of quantised units; see
    [`quantized.quantized_sparse_feed_forward`].

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        controller_down, controller_down_scales, controller_up, controller_up_scales, controller_bias (`Tensor`): the
            controller, in `int8`.
        units (`Tensor` of shape `(blocks, block size, bytes)`): records, in `int8` or `int4`.
        bias, inner_bias (`Tensor`, *optional*): added to the output, and to a unit's product with the input.
        activation (`str`, defaults to `"relu"`): one of `relu`, `gelu`, `gelu_new` and `silu`.
        multiply_by_controller (`bool`, defaults to `False`): scale a winner by its probability in its block.

    Returns:
        `tuple(Tensor, Tensor)`: the output, of the shape and dtype of `x`, and the winners, `(..., blocks)`, int32.

    Raises:
        ValueError: if `x` is not as wide as the controller's rows, or records of rows of its width have another size.
    """
    width = x.shape[-1]
    _check_width(x, controller_down.shape[-1], "controller_down")
    if units.shape[-1] not in [quantized.record_bytes(width, kind) for kind in quantized.FORMATS]:
        raise ValueError(f"units with {units.shape[-1]} bytes a record are of no format of rows of {width} numbers.")
    controller = (controller_down, controller_down_scales, controller_up, controller_up_scales, controller_bias)
    arguments = (*controller, units, bias, inner_bias, activation, multiply_by_controller)
    implementation = _implementation(x, (controller_down, controller_up, units), bias, inner_bias)
    if implementation is _IN_TORCH or x.dim() == 2:
        return implementation.sparse_feed_forward(x, *arguments)
    output, winners = implementation.sparse_feed_forward(x.reshape(-1, width), *arguments)
    return output.view(x.shape), winners.view(*x.shape[:-1], -1)
