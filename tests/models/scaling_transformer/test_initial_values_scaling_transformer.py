"""A new model's weights, of the size that the original gives them."""

import math

import pytest
import torch

from hf_efficient.models.scaling_transformer.configuration_scaling_transformer import ScalingTransformerConfig
from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM


D, F, N, R, S, V = 96, 192, 8, 24, 8, 300
FIELDS = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
SPARSE = {
    "ff_sparsity": N,
    "ff_rank": R,
    "attention_type": "multiplicative_conv",
    "attention_sparsity": S,
    "lm_head_type": "multiplicative",
    "loss_sparsity": 4,
    "ff_sru_layers": 1,
}


def make_model(**fields):
    torch.manual_seed(0)
    return ScalingTransformerForCausalLM(ScalingTransformerConfig(**FIELDS, **fields))


def assert_uniform(tensor, bound):
    """Within the bound, near it, and of its spread."""
    assert tensor.abs().max() <= bound
    assert tensor.abs().max() > 0.93 * bound
    assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.08)


def assert_normal(tensor, std):
    assert tensor.std().item() == pytest.approx(std, rel=0.25 if tensor.numel() < 300 else 0.08)
    assert tensor.abs().max() > 1.5 * std


def glorot(inputs, outputs):
    return math.sqrt(6 / (inputs + outputs))


@pytest.mark.parametrize("scaled", [False, True])
def test_sparse_feed_forward(scaled):
    """Each matrix as the whole that it is in the original, not block by block."""
    layer = make_model(**SPARSE, ff_scaled_init=scaled).model.layers[0].feed_forward.sparse
    assert_uniform(layer.controller_down, glorot(D, R))
    assert_uniform(layer.controller_up, glorot(R, F))
    assert_uniform(layer.up, glorot(D, F))
    assert_uniform(layer.down, glorot(D, F) * (math.sqrt(N) if scaled else 1.0))
    for bias in (layer.controller_bias, layer.bias):
        assert_normal(bias, 1e-6)


def test_sparse_attention_and_output_layer():
    model, m = make_model(**SPARSE), D // S
    projections = model.model.layers[0].attention.projections
    assert_normal(projections.shared.gating, 0.5)
    assert_uniform(projections.shared.projection, glorot(D, m))
    for conv in (projections.query_conv, projections.key_conv, projections.value_conv):
        assert_normal(conv.kernel, math.sqrt(2 / (m + m)))  # whatever its window and width
        assert conv.bias.abs().max() < 1e-5
    assert_normal(model.lm_head.gating, 0.5)
    assert_uniform(model.lm_head.projection, glorot(D, V // 4))
    assert_normal(model.lm_head.bias, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_dense_layers(tied):
    model = make_model(tie_word_embeddings=tied)
    layer = model.model.layers[0]
    assert_uniform(model.model.embed_tokens.weight, (3 / D) ** 0.5)
    assert_uniform(model.lm_head.weight, (3 / D) ** 0.5 if tied else glorot(D, V))
    assert_uniform(layer.attention.q_proj.weight, glorot(D, D))
    assert_uniform(layer.feed_forward.up_proj.weight, glorot(D, F))
    assert_normal(layer.feed_forward.up_proj.bias, 1e-6)
    for norm in (layer.attention_norm, layer.feed_forward.norm, model.model.norm):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_recurrences_are_dense_layers():
    sru = make_model(**SPARSE).model.layers[0].feed_forward.sru
    assert_uniform(sru.in_proj.weight, glorot(D, 32))
    assert_uniform(sru.layers[0].weight, glorot(32, 96))


def test_id_0_has_a_vector():
    """It is padding and start in the original's data."""
    model = make_model(pad_token_id=0)
    assert model.model.embed_tokens.weight[0].any()
    model.train()(torch.zeros(1, 3).long(), labels=torch.ones(1, 3).long()).loss.backward()
    assert model.model.embed_tokens.weight.grad[0].any()


def test_positions():
    table = make_model().model.positions.table
    place = torch.arange(40.0)
    for column, rate in ((0, 1.0), (10, 10_000 ** (-10 / D))):
        torch.testing.assert_close(table[:, column].detach(), (place * rate).sin(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(table[:, column + 1].detach(), (place * rate).cos(), atol=1e-5, rtol=1e-5)
    low = make_model(position_embedding_type="low_rank", position_rank=16).model.positions
    torch.testing.assert_close(low.table[:, 0].detach(), place.sin(), atol=1e-5, rtol=1e-5)
    assert_uniform(low.projection, glorot(16, D))
    digits = make_model(position_embedding_type="fixed_base").model.positions
    assert_uniform(digits.vectors, 1e-4)
    assert_uniform(digits.start, 1e-4)
