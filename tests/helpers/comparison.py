"""Comparison of tensors by their relative root mean square error."""

import math

import torch


def _rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item() if values.numel() else 0.0


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """
    Compare two tensors of one shape and dtype.

    Args:
        name (`str`): what is compared, for the message.
        actual, expected (`Tensor`): the tensors.
        tolerance (`float`): the largest root mean square of the difference, relative to that of `expected`.

    Raises:
        AssertionError: if shape, dtype or values differ; NaN equals nothing.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    if not actual.numel():
        return
    difference = actual.detach().cpu().double() - expected.detach().cpu().double()
    error = _rms(difference) / max(_rms(expected.detach().cpu()), torch.finfo(torch.float64).tiny)
    if math.isnan(error) or error > tolerance:
        raise AssertionError(f"{name}: relative RMS error {error:.3g} exceeds {tolerance:.3g}")
