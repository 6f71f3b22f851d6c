"""Comparison of tensors by their relative error, with a message that says which tensor went wrong and by how much."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`; 0 for two tensors without elements.

    Infinite where the tensors differ in which elements are NaN or infinite, or where `expected` alone is all zeros.
    """
    if expected.numel() == 0:
        return 0.0
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities among them
    if not (same | (a.isfinite() & b.isfinite())).all():
        return float("inf")
    difference = torch.where(same, 0.0, a - b).square().mean().sqrt().item()
    scale = torch.where(b.isfinite(), b, 0.0).square().mean().sqrt().item()
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else float("inf")


def assert_close(name: str, actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Fail unless two tensors, or two equal structures of tensors, agree.

    Args:
        name (`str`): what is compared; nested names are put behind it.
        actual, expected: tensors, numbers, `None`, or lists, tuples and dicts of such.
        tolerance (`float`, defaults to 1e-5): the largest relative root mean square error of each tensor.

    Raises:
        AssertionError: with the name of the first pair that differs in type, shape, dtype or value.
    """
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"{name}: has {list(actual)}, expected {list(expected)}"
        for key, value in expected.items():
            assert_close(f"{name}.{key}", actual[key], value, tolerance)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), f"{name}: has {len(actual)} entries, expected {len(expected)}"
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_close(f"{name}[{index}]", ours, theirs, tolerance)
    elif expected is None or isinstance(expected, (str, bool)):
        assert actual == expected, f"{name}: is {actual!r}, expected {expected!r}"
    elif isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{name}: is {type(actual).__name__}, expected a tensor"
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
        error = relative_error(actual, expected)
        assert error <= tolerance, f"{name}: relative RMS error {error:.3g} exceeds {tolerance:.3g}"
    else:
        assert_close(name, torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), tolerance)


def named_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_gradients_close(actual: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 1e-5) -> None:
    """Compare the gradients of two modules by name; both must have the same ones, and at least one."""
    found, wanted = named_gradients(actual), named_gradients(expected)
    assert wanted, "no parameter has a gradient"
    assert_close("gradient", found, wanted, tolerance)
