"""Products of large matrices with a few rows, as in decoding token by token."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.backend import is_transformed, may_skip_dispatcher, note_reference, register_op, select
from ..ops.kernel_loader import load_implementation
from .input_checks import under_autocast
from .sparse_layers import MultiplicativeDense


OP_NAME = "decode_products"
KERNEL = "decode-layer"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 8  # beyond them, products of matrices are quicker

# The modules as they are written.
_IN_TORCH = register_op(
    OP_NAME, SimpleNamespace(), {"cpu": partial(load_implementation, KERNEL, ("linear", "multiplicative"), "cpu")}
)

# Names of the matrix of each kind of module and of what gates it.
_PRODUCTS = {nn.Linear: ("weight", ""), MultiplicativeDense: ("projection", "gating")}
_LEAST_BYTES = 1 << 18  # below, the call itself counts


def something_looks_on() -> bool:
    """Return whether a transform, autocast or a hook of all modules is at work."""
    return is_transformed() or under_autocast("cpu") or _has_any_global_hook()


def apply_to_few(module: Any, x: Tensor) -> Tensor:
    """
    Apply a linear or a multiplicative layer, for a few rows in evaluation on a CPU by compiled products: they read a
    large matrix, above all one of 16 bits, quicker than the library that torch calls for any number of rows.

    Args:
        module (`nn.Module`): any module; of another kind, or hooked, trained or small, it is called as usual.
        x (`Tensor` of shape `(..., width)`): its input.
    """
    kind = type(module)
    if kind not in _PRODUCTS or not may_skip_dispatcher(x):  # before sizes, which a compiler would guard
        return module(x)
    rows = x.numel() // x.shape[-1] if x.dim() > 1 and x.shape[-1] else 0
    if not 0 < rows <= MOST_ROWS:
        return module(x)
    matrix, gating = (module._parameters.get(name) for name in _PRODUCTS[kind])
    state = module.__dict__
    runs_as_written = (
        matrix is None
        or not x.is_cpu
        or x.dtype not in DTYPES
        or matrix.dtype != x.dtype
        or matrix.nbytes < _LEAST_BYTES
        or not matrix.is_contiguous()
        or state["training"]
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or "forward" in state
        or something_looks_on()
    )
    kernel = _IN_TORCH if runs_as_written else select(OP_NAME, x.device)
    if kernel is _IN_TORCH:
        note_reference(OP_NAME)
        return module(x)
    flat, bias = x.reshape(rows, x.shape[-1]), module.bias
    if gating is None:
        return kernel.linear(flat, matrix, None, bias).view(*x.shape[:-1], -1)
    return kernel.multiplicative(flat, gating, None, matrix, None, bias).view(*x.shape[:-1], -1)
