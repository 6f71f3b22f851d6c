"""Layers of the Scaling Transformer: what training draws, what is injected and remembered, and what they say."""

import pytest
import torch
from scipy.stats import binomtest

from hf_efficient.modules.sparse_layers import (
    ModularDense,
    ModuleConv,
    MultiplicativeDense,
    SparseFeedForward,
    UnitDraws,
    pack_units,
    unpack_units,
)
from hf_efficient.ops.sparse_ff_naive import gated_units_naive
from tests.helpers.comparison import assert_close, assert_equal, named_gradients


def make_layer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = SparseFeedForward(6, 12, 4, 3, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.to(dtype)


def trained_by_hand(layer, x, winners):
    """The training form of one call, its mask written out."""
    logits = torch.einsum("kni,ij,tj->tkn", layer.controller_up, layer.controller_down, x) + layer.controller_bias
    units = x @ layer.up.flatten(0, 1).T
    units = units if layer.inner_bias is None else units + layer.inner_bias.flatten()
    hidden = gated_units_naive(units, logits, winners, layer.activation, layer.multiply_by_controller)
    return hidden @ layer.down.flatten(0, 1) + layer.bias, logits


@pytest.mark.parametrize(
    "options",
    [{}, {"multiply_by_controller": True}, {"activation": "gelu", "inner_bias": True, "multiply_by_controller": True}],
    ids=["relu", "multiplied", "gelu"],
)
@pytest.mark.parametrize(("select", "kind"), [(0.29, "hard"), (0.31, "soft")])
def test_training_with_injected_draws(select, kind, options):
    layer, x = make_layer(**options).train(), torch.randn(5, 6, dtype=torch.float64)
    uniforms = torch.rand(5, 3, 4, dtype=torch.float64)
    _, logits = trained_by_hand(layer, x, None)
    winners = (logits.log_softmax(-1) - 0.1 * (-uniforms.log()).log()).argmax(-1)
    results = []
    for by_hand in (False, True):
        layer.zero_grad()
        if by_hand:
            output, _ = trained_by_hand(layer, x, winners if kind == "hard" else None)
        else:
            output = layer(x, UnitDraws(select=torch.tensor(select), uniforms=uniforms))
        output.square().sum().backward()
        results.append({"output": output.detach(), **named_gradients(layer)})
    assert results[0].keys() == {"output", *dict(layer.named_parameters())}
    assert_close("training", *results, 1e-12)


def test_injected_winners_are_taken():
    layer, x = make_layer().train(), torch.randn(5, 6, dtype=torch.float64)
    winners = torch.randint(4, (5, 3))
    draws = UnitDraws(select=torch.tensor(0.0), winners=winners)
    state = torch.get_rng_state()
    assert_close("output", layer(x, draws).detach(), trained_by_hand(layer, x, winners)[0].detach(), 1e-12)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn for what is given"


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_second_run_repeats_the_first_and_leaves_the_generator_alike(probability):
    layer, x = make_layer(hard_probability=probability).train(), torch.randn(2, 5, 6, dtype=torch.float64)
    draws, results = UnitDraws(), []
    for _ in range(2):
        torch.manual_seed(4)
        results.append((layer(x, draws).detach(), torch.rand(3)))
    assert_equal("output and what is drawn next", *results)
    torch.manual_seed(5)
    assert_equal("another generator", layer(x, draws).detach(), results[0][0])
    assert (draws.winners is not None) == (probability == 1.0)


def test_hard_masks_have_their_share_of_calls():
    """One draw for a call, not for a token."""
    layer, x = make_layer(torch.float32).train(), torch.randn(3, 6)
    hard = 0
    with torch.no_grad():
        soft, _ = trained_by_hand(layer, x, None)
        for _ in range(1000):
            hard += not torch.allclose(layer(x), soft, atol=1e-4)
    assert binomtest(hard, 1000, 0.3).pvalue > 1e-3


def test_evaluation_reads_the_winners_alone():
    layer, x = make_layer().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    flat = x.flatten(0, 1)
    _, logits = trained_by_hand(layer, flat, None)
    expected, _ = trained_by_hand(layer, flat, logits.argmax(-1))
    assert_close("output", layer(x).detach(), expected.view_as(x).detach(), 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_watching_changes_nothing(training):
    """Neither the output nor what is drawn after it; and a call that is run again counts once."""
    layer, x = make_layer().train(training), torch.randn(5, 6, dtype=torch.float64)
    seen, results = [], []
    for observer in (None, lambda *args: seen.append(args)):
        layer.observer = observer
        torch.manual_seed(6)
        draws = UnitDraws()
        results.append(([layer(x, draws).detach() for _ in range(2)], torch.rand(2)))
    assert_equal("watched", *results)
    assert len(seen) == (1 if training else 2)
    winners, passes = seen[0]
    assert winners.shape == passes.shape == (5, 3)
    units = (x @ layer.up.flatten(0, 1).T).view(5, 3, 4).gather(-1, winners.long().unsqueeze(-1)).squeeze(-1)
    assert torch.equal(passes, units > 0)


def test_autocast_chooses_by_float32():
    layer, x = make_layer(torch.float32).eval(), torch.randn(40, 6)
    seen = []
    layer.observer = lambda winners, passes: seen.append(winners)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        trained = layer.train()(x)
    assert torch.equal(seen[0], seen[1])
    assert trained.dtype == torch.bfloat16


def test_packed_units_come_back():
    layer = make_layer()
    records = pack_units(layer.up, layer.down)
    assert records.shape == (3, 4, 12)
    assert records.is_contiguous()
    up, down = unpack_units(records)
    assert_equal("units", [up.detach(), down.detach()], [layer.up.detach(), layer.down.detach()])
    assert records[1, 2].tolist() == [*layer.up[1, 2].tolist(), *layer.down[1, 2].tolist()]


def test_what_layers_say_of_themselves():
    assert "6, 3 blocks of 4 units, rank 3, relu" in repr(make_layer())
    assert "6, 10, 5 modules, bias=False" in repr(MultiplicativeDense(6, 10, 5, bias=False))
    assert "6, 6, 3 modules, bias=True" in repr(ModularDense(6, 3))
    assert "2, 4, window=3, width=5" in repr(ModuleConv(2, 4, 3, 5))


def test_linear_adapters_pass_by():
    """Their weights are no `nn.Linear`, whose adapters would multiply all units."""
    modules = [make_layer(), MultiplicativeDense(6, 6, 2), ModularDense(6, 2), ModuleConv(2, 2, 3, 3)]
    assert not any(isinstance(child, torch.nn.Linear) for module in modules for child in module.modules())


def test_winners_are_remembered_in_a_byte_each():
    layer, draws = SparseFeedForward(5, 12, 4, 2, hard_probability=1.0).train(), UnitDraws()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    layer(torch.randn(7, 5), draws)
    (kept,) = [value for value in vars(draws).values() if isinstance(value, torch.Tensor) and value.dim() == 2]
    assert kept.dtype == torch.uint8
    assert draws.winners.dtype == torch.int64
