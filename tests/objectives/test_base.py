"""Defaults of the encoder protocol: scaled-down configs, and the module behind the embeddings."""

import pytest
import torch

import hf_efficient
from hf_efficient.objectives.base import position_inputs, post_embedding_module, scale_down_config
from tests.objectives.encoders import CONFIGS, make_encoder


def test_layers_settings_are_cut_with_the_depth():
    shallow = scale_down_config(make_encoder("modernbert").config, num_hidden_layers=1)
    assert len(shallow.layer_types) == 1


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_number_of_heads_can_be_given(heads):
    assert scale_down_config(make_encoder("bert").config, num_attention_heads=heads).num_attention_heads == heads


def test_srupp_scales_its_projections_with_its_width():
    layered = hf_efficient.SruppConfig(
        hidden_size=20, num_hidden_layers=3, projection_size=[12, 0, 7], attention_layers=[0], bidirectional=True
    )
    small = scale_down_config(layered, divider=2, num_hidden_layers=2)
    assert (small.hidden_size, small.embedding_size, small.projection_size) == (10, 10, [6, 0])
    assert layered.hidden_size == 20
    assert scale_down_config(layered).hidden_size == 6  # even, for two directions
    few = scale_down_config(layered, divider=2, num_attention_heads=3)
    assert (few.num_attention_heads, few.projection_size) == (3, [6, 0, 3])


def test_srupp_with_one_projection_size_keeps_one():
    config = hf_efficient.SruppConfig(hidden_size=30, num_hidden_layers=2, projection_size=12, num_attention_heads=3)
    small = config.scale_down(divider=2, num_hidden_layers=1)
    assert (small.hidden_size, small.num_hidden_layers, small.num_attention_heads) == (15, 1, 1)
    assert small.projection_size == 6


@pytest.mark.parametrize("name", CONFIGS)
def test_every_encoder_has_a_module_behind_its_embeddings(name):
    encoder = make_encoder(name)
    module = post_embedding_module(encoder)
    assert type(module).__name__ == ("Dropout" if name == "srupp" else "LayerNorm")
    assert module in list(encoder.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_counted_by_the_mask_and_not_by_ids(side):
    """RoBERTa begins to count at the first token; a sample may be the padding id, and counts all the same."""
    encoder = make_encoder("roberta")
    tokens, padding = list(range(5, 12)), [1, 1, 1]
    ids = torch.tensor([tokens + padding if side == "right" else padding + tokens])
    mask = (ids != 1).long()
    expected = encoder.embeddings.create_position_ids_from_input_ids(ids, 1)
    assert torch.equal(position_inputs(encoder, ids, mask)["position_ids"], expected)
    sampled = ids.clone()
    sampled[0, 4] = 1
    assert torch.equal(position_inputs(encoder, sampled, mask)["position_ids"], expected)
    assert position_inputs(make_encoder("bert"), ids, mask) == {}
