"""The comparisons of the tests see what they are for."""

import pytest
import torch
from torch import nn

from tests.helpers.comparison import assert_allclose, assert_close, assert_equal, assert_gradients_close


X = torch.linspace(0.5, 2.0, 15).view(3, 5)


def test_error_is_relative_to_the_whole_tensor():
    assert_close("x", X * (1 + 1e-6), X, 2e-6)
    with pytest.raises(AssertionError, match=r"x: relative RMS error 0\.01 exceeds 1e-05"):
        assert_close("x", X * 1.01, X)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (X[:, :4], r"shape \(3, 4\), expected \(3, 5\)"),
        (X.double(), "torch.float64, expected torch.float32"),
        (torch.where(X > 1, torch.nan, X), "error inf exceeds"),
        (1.0, "is float, expected a tensor"),
    ],
    ids=["shape", "dtype", "nan", "number"],
)
def test_other_tensors_are_named(actual, message):
    with pytest.raises(AssertionError, match=rf"^y\.a\[1\]: .*{message}"):
        assert_close("y", {"a": [X, actual]}, {"a": [X, X]})


def test_nan_and_infinity_agree_with_themselves():
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert_close("odd", odd, odd.clone())


def test_missing_entries_are_named():
    with pytest.raises(AssertionError, match=r"x: only one side has \['b'\]"):
        assert_close("x", {"a": X}, {"a": X, "b": X})


def test_elements_and_bits():
    assert_allclose("x", X + 1e-4, X, atol=2e-4)
    with pytest.raises(AssertionError, match=r"x \(relative RMS error"):
        assert_allclose("x", X + 1e-3, X, atol=2e-4)
    with pytest.raises(AssertionError, match="x: differs"):
        assert_equal("x", X + 1e-7, X)


def test_gradients_are_compared_by_name():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    first(torch.ones(1, 3)).sum().backward()
    with pytest.raises(AssertionError, match="no parameter has a gradient"):
        assert_gradients_close(first, second)
    second(torch.ones(1, 3)).sum().backward()
    assert_gradients_close(first, second)
    second.bias.grad += 1
    with pytest.raises(AssertionError, match=r"gradient\.bias: relative RMS error"):
        assert_gradients_close(first, second)
