"""Comparison of tensors, and of structures of tensors, with messages that say which one went wrong and by how much."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-3) -> float:
    """
    Root mean square of the difference over that of `expected`, or over `floor` where `expected` is smaller.

    Infinite where the two differ in which elements are NaN or infinite.
    """
    if expected.numel() == 0:
        return 0.0
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities among them
    if not (same | (a.isfinite() & b.isfinite())).all():
        return float("inf")
    difference = torch.where(same, 0.0, a - b).square().mean().sqrt().item()
    scale = torch.where(b.isfinite(), b, 0.0).square().mean().sqrt().item()
    return difference / max(scale, floor)


def _compare(name: str, actual: Any, expected: Any, check: Callable[[str, Tensor, Tensor], None]) -> None:
    """Walk through two equal structures and `check` each pair of tensors."""
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected), f"{name}: only one side has {sorted(set(actual) ^ set(expected))}"
        for key, value in expected.items():
            _compare(f"{name}.{key}", actual[key], value, check)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), f"{name}: has {len(actual)} entries, expected {len(expected)}"
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            _compare(f"{name}[{index}]", ours, theirs, check)
    elif expected is None or isinstance(expected, (str, bool)):
        assert actual == expected, f"{name}: is {actual!r}, expected {expected!r}"
    elif isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{name}: is {type(actual).__name__}, expected a tensor"
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
        check(name, actual, expected)
    else:
        check(name, torch.as_tensor(actual).double(), torch.as_tensor(expected).double())


def assert_close(name: str, actual: Any, expected: Any, tolerance: float = 1e-5, floor: float = 1e-3) -> None:
    """
    Fail unless tensors agree in their relative root mean square error.

    Args:
        name (`str`): what is compared; names of entries are put behind it.
        actual, expected: tensors, numbers, `None`, or lists, tuples and dicts of such.
        tolerance (`float`, defaults to 1e-5): the largest error of each tensor.
        floor (`float`, defaults to 1e-3): see [`relative_error`]; gradients that are zero but for rounding have no
            scale of their own.

    Raises:
        AssertionError: with the name of the first pair that differs in type, shape, dtype or value.
    """

    def check(name: str, ours: Tensor, theirs: Tensor) -> None:
        error = relative_error(ours, theirs, floor)
        assert error <= tolerance, f"{name}: relative RMS error {error:.3g} exceeds {tolerance:.3g}"

    _compare(name, actual, expected, check)


def assert_allclose(name: str, actual: Any, expected: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Fail unless every element agrees within `atol + rtol * |expected|`, as recorded cases ask."""

    def check(name: str, ours: Tensor, theirs: Tensor) -> None:
        error = relative_error(ours, theirs)
        torch.testing.assert_close(
            ours, theirs, atol=atol, rtol=rtol, msg=lambda text: f"{name} (relative RMS error {error:.3g}): {text}"
        )

    _compare(name, actual, expected, check)


def assert_equal(name: str, actual: Any, expected: Any) -> None:
    """Fail unless tensors are equal to the bit, which holds only where the same code runs twice."""

    def check(name: str, ours: Tensor, theirs: Tensor) -> None:
        assert torch.equal(ours, theirs), f"{name}: differs, by {relative_error(ours, theirs):.3g} (relative RMS error)"

    _compare(name, actual, expected, check)


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_gradients_close(
    actual: nn.Module | Mapping[str, Tensor], expected: nn.Module | Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Compare the gradients of two modules, or of dicts of them, by name; both must have the same ones, and some."""
    found, wanted = (named_gradients(x) if isinstance(x, nn.Module) else x for x in (actual, expected))
    assert wanted, "no parameter has a gradient"
    assert_close("gradient", found, wanted, tolerance)
