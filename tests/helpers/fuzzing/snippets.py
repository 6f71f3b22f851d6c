"""Calls as lines of Python that anyone can run."""

from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .subjects import fields


def _tensor(value: Tensor) -> str:
    dtype = str(value.dtype)
    if value.is_meta:
        return f"torch.zeros({tuple(value.shape)}, dtype={dtype}, device='meta')"
    if value.dim() > 2 and value.is_floating_point() and value.isfinite().all() and (value != 0).any():
        return f"torch.randn({tuple(value.shape)}).to({dtype})"
    if value.numel() and value.dim() > 1 and (value == value.flatten()[0]).all():
        return f"torch.full({tuple(value.shape)}, {value.flatten()[0].item()}, dtype={dtype})"
    text = str(value.tolist()).replace("nan", "float('nan')").replace("inf", "float('inf')")
    default = value.dtype in (torch.int64, torch.bool) and value.numel()
    return f"torch.tensor({text})" if default else f"torch.tensor({text}, dtype={dtype})"


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, float) and not -1e30 < value < 1e30:
        return f"float('{value}')"
    if isinstance(value, (str, int, float, list, type(None))):
        return repr(value)
    return f"<{type(value).__name__}>"


def as_code(case: Case) -> str:
    """The call of a case, on a model of the same config with weights as they are drawn at initialisation."""
    key = case.subject.key
    config = f"{type(case.subject.config).__name__}({', '.join(f'{n}={v!r}' for n, v in fields(key).items())})"
    attention = f", attn_implementation={key.attention!r}" if key.attention else ""
    dtype = "" if key.dtype == torch.float32 else f".to({key.dtype})"
    train = ".train()" if case.mode == "train" else ".eval()"
    call = ", ".join(f"{name}={_value(value)}" for name, value in case.call.items())
    return f"{key.head}._from_config({config}{attention}){dtype}{train}({call})"
