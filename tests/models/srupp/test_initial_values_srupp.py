"""A new model's weights, of the size that the original gives them, and where dropout falls."""

import math

import pytest
import torch

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppModel


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


def assert_uniform(tensor, bound):
    """Within the bound, near it, and of its spread."""
    assert tensor.abs().max() <= bound
    assert tensor.abs().max() > 0.95 * bound
    assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("heads", [1, 4])
def test_new_models_begin_as_the_original_s(make_config, heads):
    width, size, fields = 64, 32, {"dropout": 0.36, "highway_bias": -3.0, "weight_c_init": 0.5}
    config = make_config(
        hidden_size=width, projection_size=size, num_attention_heads=heads, attention_layers=[0], **fields
    )
    model = SruppForCausalLM(config)
    for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert_uniform(matrix, (3 / width) ** 0.5)
    assert (model.lm_head.bias == 0).all()
    for index, layer in enumerate(model.model.layers):
        projection = layer.projection
        assert_uniform(projection.down_proj.weight, (6 / (width + size)) ** 0.5)
        assert_uniform(projection.out_proj.weight, (6 / (size + 3 * width)) ** 0.5 * 0.8)  # sqrt(1 - 0.36)
        assert_uniform(layer.weight_c, 0.5)
        assert torch.equal(layer.bias, torch.tensor([[0.0], [-3.0]]).expand(2, width))
        assert (projection.norm.weight == 1).all()
        assert (projection.norm.bias == 0).all()
        if index == 0:
            keys = projection.attention.q_proj if heads == 1 else projection.attention.k_proj
            for matrix in (keys.weight, projection.attention.v_proj.weight):  # Xavier of one matrix, 2 d' by d'
                assert_uniform(matrix, (6 / (3 * size)) ** 0.5)
            assert projection.attention.alpha == 0


def test_other_beginnings(make_config):
    plain = SruppModel(make_config(hidden_size=64, projection_size=0, attention_layers=[], dropout=0.36))
    assert_uniform(plain.layers[0].projection.out_proj.weight, (6 / (64 + 3 * 64)) ** 0.5)  # SRU: no factor
    first = SruppModel(make_config(hidden_size=64, embedding_size=48)).layers[0].projection.out_proj
    assert first.weight.shape[0] == 4 * 64
    assert_uniform(first.weight, (6 / (10 + 4 * 64)) ** 0.5)
    frozen = SruppModel(make_config(use_peephole=False)).layers[0].weight_c
    assert not frozen.requires_grad
    assert (frozen == 0).all()
    rescaled = SruppModel(make_config(rescale=True, highway_bias=-1.0)).layers[0]
    assert rescaled.scale == pytest.approx(math.sqrt(1 + 2 / math.e))
    adaptive = SruppForCausalLM(make_config(hidden_size=64, embedding_size=64, adaptive_cutoffs=[20, 33]))
    for table in adaptive.lm_head.tables[:2]:  # by the model's width, not the table's
        assert_uniform(table.weight, (3 / 64) ** 0.5)
    assert_uniform(adaptive.lm_head.projections[0].weight, (6 / 128) ** 0.5)
    assert all((bias == 0).all() for bias in adaptive.lm_head.biases)
    assert_uniform(adaptive.lm_head.cluster_weight, (3 / 64) ** 0.5)
