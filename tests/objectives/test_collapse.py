"""What encoders are measured against that learn nothing."""

import math

import pytest

from hf_efficient.objectives.collapse import blind_loss


def test_one_share_is_one_entropy():
    assert blind_loss(0.5) == pytest.approx(math.log(2))
    assert blind_loss(0.0, 10) == blind_loss(1.0) == 0.0
    assert blind_loss(0.1475) == pytest.approx(0.4183, abs=1e-4)


@pytest.mark.parametrize("choices", [2, 7])
def test_a_blind_choice_by_the_best_constant(choices):
    """No constant distribution over the candidates does better, and one reaches it."""
    share = 0.13

    def loss(rejected):
        return -(1 - share) * math.log(rejected) - share * math.log((1 - rejected) / (choices - 1))

    blind = blind_loss(share, choices)
    assert loss(1 - share) == pytest.approx(blind, abs=1e-12)
    assert all(loss(1 - share + change) > blind for change in (-0.05, 0.05))
