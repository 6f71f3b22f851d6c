"""Blocks, controllers and rows of a layer that is fitted: planted structure is found, and errors never grow."""

import pytest
import torch

from hf_efficient.models.scaling_transformer.layer_fitting import (
    DenseUnits,
    assign_units,
    begin_controller,
    best_units,
    coactivation,
    fit_controller,
    fit_rows,
    squared_error,
)


ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


def make_units(width=7, units=30, activation="relu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(units, width, generator=generator) for _ in range(2))
    return DenseUnits(up, down, 0.3 * torch.randn(units, generator=generator), activation)


def make_x(tokens, width=7, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("groups", "size"), [(4, 2), (5, 3), (2, 7)], ids=str)
def test_units_that_fire_together_stand_in_different_blocks(groups, size):
    """Each of `size` groups fires as one; there are as many blocks as a group has units."""
    units = groups * size
    group = torch.randperm(units, generator=torch.Generator().manual_seed(3)) % size
    together = (group[:, None] == group[None]).double()
    order = assign_units(together, size)
    assert sorted(order.tolist()) == list(range(units))
    for block in order.view(groups, size):
        assert sorted(group[block].tolist()) == list(range(size))


def test_blocks_cost_less_than_random_ones_and_are_the_same_twice():
    units, x = make_units(units=40), make_x(500)
    together = coactivation(units, x)
    order = assign_units(together, 5)
    assert torch.equal(order, assign_units(together, 5))

    def cost(order):
        blocks = order.view(-1, 5)
        return sum(together[block][:, block].sum() - together[block, block].sum() for block in blocks)

    chance = [cost(torch.randperm(40, generator=torch.Generator().manual_seed(seed))) for seed in range(20)]
    assert cost(order) < 0.8 * min(chance)


def test_coactivation_is_what_both_units_contribute():
    units, x = make_units(activation="gelu"), make_x(50)
    contributions = units.hidden(x).clamp(min=0) * units.down.norm(dim=1)
    expected = torch.einsum("ti,tj->ij", contributions, contributions) / 50
    torch.testing.assert_close(coactivation(units, x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_best_units_leave_the_least_of_their_block(activation):
    units, x = make_units(activation=activation), make_x(11)
    winners, gains = best_units(units, x, 5)
    contributions = (units.hidden(x).unsqueeze(-1) * units.down).unflatten(1, (6, 5))
    whole = contributions.sum(2)
    left = (whole.unsqueeze(2) - contributions).square().sum(-1)
    assert winners.dtype == torch.int16  # there are as many as tokens times blocks
    assert torch.equal(winners.long(), left.argmin(-1))
    torch.testing.assert_close(gains, whole.square().sum(-1) - left.amin(-1), atol=1e-4, rtol=1e-4)


def test_a_controller_of_full_rank_sees_what_units_see():
    units, x = make_units(), make_x(300)
    controller = begin_controller(units, x, 7)
    seen = (x @ units.up.T + units.inner_bias) * units.down.norm(dim=1)
    logits = x @ controller.down.T @ controller.up.T + controller.bias
    scale = (logits / seen).median()
    assert scale > 0
    torch.testing.assert_close(logits, scale * seen, atol=1e-3, rtol=1e-3)


def test_a_controller_finds_winners_that_low_rank_decides():
    """Units see two directions of the input alone, so that a controller of rank 2 can know all that they do."""
    generator = torch.Generator().manual_seed(0)
    x, units = make_x(4000), make_units(units=24)
    units.up = torch.randn(24, 2, generator=generator) @ torch.randn(2, 7, generator=generator)
    winners, gains = best_units(units, x, 4)
    fitted = fit_controller(begin_controller(units, x, 2), x, winners, gains, 2, 10, generator)
    found = fitted.winners(x, 4)
    assert float(gains[found == winners].sum() / gains.sum()) > 0.97
    poor = fit_controller(begin_controller(units, x, 1), x, winners, gains, 1, 10, generator).winners(x, 4)
    assert gains[poor == winners].sum() < gains[found == winners].sum()


@pytest.mark.parametrize("rank", [3, 9], ids=["low", "above-the-width"])
def test_a_controller_learns_winners_of_which_units_know_nothing(rank):
    generator = torch.Generator().manual_seed(0)
    x = make_x(4000)
    planted = torch.randn(12, 2, generator=generator) @ torch.randn(2, 7, generator=generator)
    winners = (x @ planted.T).unflatten(1, (4, 3)).argmax(-1)
    begun = begin_controller(make_units(units=12), x, rank)
    fitted = fit_controller(begun, x, winners, torch.ones(4000, 4), rank, 60, generator)
    assert (len(fitted.down), fitted.up.shape) == (rank, (12, rank))
    before, after = ((one.winners(x, 3) == winners).double().mean() for one in (begun, fitted))
    assert after > before + 0.3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_fitted_rows_never_worsen_the_error(activation, tokens):
    units, x = make_units(activation=activation), make_x(tokens)
    winners, _ = best_units(units, x, 5)
    target = units.hidden(x) @ units.down + make_x(tokens, seed=9)
    rows, bias = fit_rows(units, x, winners, target, 5)
    fitted = DenseUnits(units.up, rows, units.inner_bias, activation)
    before = DenseUnits(units.up, units.down, units.inner_bias, activation)
    zero = torch.zeros(7)
    rest = squared_error(before, zero, x, winners, target, 5)
    assert squared_error(fitted, bias, x, winners, target, 5) <= rest * (1 + 1e-6) + 1e-9
    if tokens == 200:
        assert squared_error(fitted, bias, x, winners, target, 5) < 0.8 * rest


def test_a_unit_that_is_never_chosen_keeps_its_row():
    units, x = make_units(), make_x(100)
    rows, _ = fit_rows(units, x, torch.zeros(100, 6, dtype=torch.long), make_x(100, seed=4), 5)
    kept = [unit for unit in range(30) if unit % 5]
    torch.testing.assert_close(rows[kept], units.down[kept])
    assert not torch.allclose(rows[::5], units.down[::5])
