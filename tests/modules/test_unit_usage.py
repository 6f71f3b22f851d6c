"""What controllers choose, counted by hand."""

import math

import pytest
import torch

from hf_efficient.modules.sparse_layers import SparseFeedForward
from hf_efficient.modules.unit_usage import UnitUsage, observed_units, sparse_feed_forwards


def test_figures():
    usage = UnitUsage(2, 4, torch.device("cpu"))
    usage(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[True, False], [True, True]]))
    usage(torch.tensor([[0, 1], [3, 1]]), torch.tensor([[False, True], [True, True]]))
    figures = usage.figures()
    assert figures["dead_units"] == pytest.approx(5 / 8)
    assert figures["top_share"] == pytest.approx((3 / 4 + 1) / 2)
    assert figures["killed_winners"] == pytest.approx(2 / 8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert figures["entropy"] == pytest.approx(entropy / 2)


def test_even_use_and_nothing_at_all():
    usage = UnitUsage(1, 3, torch.device("cpu"))
    assert usage.figures() == {"dead_units": 1.0, "entropy": 0.0, "top_share": 0.0, "killed_winners": 0.0}
    usage(torch.tensor([[0], [1], [2]]), torch.ones(3, 1).bool())
    found = usage.figures()
    assert found["dead_units"] == 0.0
    assert found["entropy"] == pytest.approx(1.0)
    assert found["top_share"] == pytest.approx(1 / 3)


def test_blocks_of_one_unit_are_as_even_as_can_be():
    usage = UnitUsage(3, 1, torch.device("cpu"))
    usage(torch.zeros(2, 3).long(), torch.ones(2, 3).bool())
    assert usage.figures()["entropy"] == 1.0


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_watched_inside_the_block_alone(training):
    torch.manual_seed(0)
    model = torch.nn.Sequential(SparseFeedForward(6, 12, 4, 3), torch.nn.ReLU(), SparseFeedForward(6, 10, 5, 2))
    for layer in sparse_feed_forwards(model).values():
        layer.init_own_weights()
    model.train(training)
    x = torch.randn(7, 6)
    with observed_units(model) as usage:
        assert list(usage) == list(sparse_feed_forwards(model)) == ["0", "2"]
        model(x)
    model(x)
    assert [int(one.counts.sum()) for one in usage.values()] == [7 * 3, 7 * 2]
    logits = torch.einsum("kni,ij,tj->tkn", model[0].controller_up, model[0].controller_down, x)
    if not training:
        chosen = (logits + model[0].controller_bias).argmax(-1) + 4 * torch.arange(3)
        assert torch.equal(usage["0"].counts, torch.bincount(chosen.flatten(), minlength=12))
    with pytest.raises(ZeroDivisionError), observed_units(model):
        raise ZeroDivisionError
    assert all(layer.observer is None for layer in sparse_feed_forwards(model).values())
