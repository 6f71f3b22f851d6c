"""Measures of collapse and of chance level, against arithmetic by hand."""

import math

import pytest
import torch

from hf_efficient.objectives.diagnostics import chance_level_loss, token_variance_fraction


def test_chance_level_of_two_classes_is_the_entropy():
    assert chance_level_loss(0.5) == pytest.approx(math.log(2))
    assert chance_level_loss(0.0, 10) == chance_level_loss(1.0) == 0.0
    assert chance_level_loss(0.1475) == pytest.approx(0.4183, abs=1e-4)


@pytest.mark.parametrize("choices", [2, 7])
def test_chance_level_is_that_of_the_best_constant(choices):
    """No constant distribution over the candidates does better, and one reaches it."""
    fraction = 0.13

    def loss(rejected):
        return -(1 - fraction) * math.log(rejected) - fraction * math.log((1 - rejected) / (choices - 1))

    by_chance = chance_level_loss(fraction, choices)
    assert loss(1 - fraction) == pytest.approx(by_chance, abs=1e-12)
    assert all(loss(1 - fraction + change) > by_chance for change in (-0.05, 0.05))


def test_token_variance_fraction_by_hand():
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Mean (2/3, 1/3); squared distances 2/9 + 8/9 + 2/9, over a second moment of 3.
    assert token_variance_fraction(states, mask).item() == pytest.approx(12 / 27)
    assert token_variance_fraction(torch.ones(2, 5, 8)).item() == pytest.approx(0.0, abs=1e-6)
    assert token_variance_fraction(torch.randn(8, 64, 32)).item() == pytest.approx(1.0, abs=0.01)
