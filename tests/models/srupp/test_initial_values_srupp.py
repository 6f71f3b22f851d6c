"""A new model's weights, of the size that the original gives them, and where dropout falls."""

import math

import pytest
import torch

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM


WIDTH, PROJECTION = 192, 96


def make_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": WIDTH, "projection_size": PROJECTION, "num_hidden_layers": 3}
    return SruppForCausalLM(SruppConfig(**{**sizes, "attention_every_n_layers": 1, **fields}))


@pytest.mark.parametrize("highway_bias", [-2.0, 0.75])
def test_the_bias_of_the_highway_is_that_of_the_output_gate(highway_bias):
    """Row 0 is the forget gate's, which begins without one."""
    for layer in make_model(highway_bias=highway_bias).model.layers:
        assert layer.bias[0].tolist() == [0.0] * WIDTH
        assert layer.bias[1].tolist() == [highway_bias] * WIDTH


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_begins_at_zero_with_keys_and_values_as_one_matrix(heads):
    """Xavier over the matrix of both, (2 d', d'): variance 2 / (3 d')."""
    for layer in make_model(num_attention_heads=heads).model.layers:
        attention = layer.projection.attention
        assert attention.alpha.item() == 0.0
        keys = attention.q_proj if heads == 1 else attention.k_proj
        for linear in (keys, attention.v_proj):
            assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * PROJECTION)), rel=0.03)


@pytest.mark.parametrize(("dropout", "projection_dropout"), [(0.0, None), (0.4, None), (0.1, 0.4)])
def test_the_map_to_the_recurrence_makes_up_for_dropout(dropout, projection_dropout):
    model = make_model(dropout=dropout, projection_dropout=projection_dropout)
    rate = dropout if projection_dropout is None else projection_dropout
    expected = math.sqrt(2 / (PROJECTION + 3 * WIDTH)) * math.sqrt(1 - rate)
    for layer in model.model.layers:
        assert layer.projection.out_proj.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_embeddings_and_output_have_a_variance_of_one_over_the_width():
    model = make_model(tie_word_embeddings=False)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(WIDTH**-0.5, rel=0.03)
        assert weight.abs().max().item() <= math.sqrt(3 / WIDTH)


def record(model, ids):
    """The inputs of each layer's projection and the dropout masks of its recurrence, in a training step."""
    inputs, masks = [], []
    for layer in model.model.layers:
        layer.projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        layer.recurrence.register_forward_pre_hook(lambda module, args: masks.append(args[7]))
    model.train()(ids)
    return inputs, masks


def test_one_mask_serves_all_steps_of_a_row():
    inputs, masks = record(make_model(dropout=0.0, input_dropout=0.5), torch.arange(14).view(2, 7))
    assert masks == [None] * 3
    for tensor in inputs:
        dropped = tensor == 0
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.15)
        assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
        assert not torch.equal(dropped[0], dropped[1])


def test_the_last_layer_drops_nothing_of_its_recurrence():
    """The model's own dropout comes behind it."""
    _, masks = record(make_model(dropout=0.5), torch.arange(14).view(2, 7))
    assert [mask is None for mask in masks] == [False, False, True]
    for mask in masks[:2]:
        assert set(mask.unique().tolist()) == {0.0, 2.0}
