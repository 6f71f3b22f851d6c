"""Named presets have the shapes of the published models, and counts that follow from them."""

import pytest
import torch

from hf_efficient.auto import FAMILIES
from hf_efficient.models.terraformer.configuration_terraformer import TerraformerConfig
from hf_efficient.models.terraformer.modeling_terraformer import (
    TerraformerForCausalLM,
    TerraformerForConditionalGeneration,
)
from tests.models.scaling_transformer.test_presets_scaling_transformer import (
    POSITIONS,
    VOCABULARY,
    dense_attention,
    dense_ff,
    sparse_attention,
    sparse_ff,
    sparse_head,
)


def sru_branch(d, units=32):
    """Norm, a map to a few units, a recurrence with three gates, and back."""
    return 2 * d + d * units + units + 3 * units * units + 3 * units + units * d + d


def total(d, encoder, decoder, encoder_layers, decoder_layers, head=None):
    """Without the tables of positions: embedding, layers with their norms, norms at the ends of both stacks, output."""
    head = d * VOCABULARY + VOCABULARY if head is None else head
    return VOCABULARY * d + encoder_layers * encoder + decoder_layers * decoder + head


D, F, WIDE, WIDE_F = 1024, 6144, 9216, 65536
NORM, WIDE_NORM = 2 * D, 2 * WIDE
SPARSE = {"ff": sparse_ff(D, F, 96), "qkv": sparse_attention(D, 16), "head": sparse_head(D, 4)}
# Both kinds of cross attention: keys and values are dense; queries of the sparse one a layer and a convolution.
MODULE = D // 16
SPARSE_QUERY = 16 * D + D * MODULE + D + 9 * MODULE * MODULE + MODULE
CROSS = {"dense": dense_attention(D), "sparse": 2 * (D * D + D) + SPARSE_QUERY}
JOINED_WIDE = sparse_attention(WIDE, 64), sparse_ff(WIDE, WIDE_F, 32)


def cross_model(attention, feed_forward, cross, head=None):
    encoder = dense_attention(D) + feed_forward + 2 * NORM
    return total(D, encoder, attention + cross + feed_forward + 3 * NORM, 24, 24, head) + 2 * NORM


def wide(decoder_layers, attentions):
    """The encoder keeps both streams, so that one norm stands at the decoder's end alone."""
    attention, feed_forward = JOINED_WIDE
    encoder = dense_attention(WIDE) + feed_forward + 2 * WIDE_NORM
    decoder = attentions * (attention + WIDE_NORM) + feed_forward + WIDE_NORM
    return total(WIDE, encoder, decoder, 6, decoder_layers, sparse_head(WIDE, 4)) + WIDE_NORM


MEDIUM_FF = SPARSE["ff"] + sru_branch(D)
# By the formulas above, and in millions.
PARAMETERS = {
    "24+24x1024-dense": (cross_model(dense_attention(D), dense_ff(D, 4096), CROSS["dense"]), 771),
    "24+24x1024-all": (cross_model(SPARSE["qkv"], SPARSE["ff"], CROSS["dense"], SPARSE["head"]), None),
    "24+24x1024-all-cross": (cross_model(SPARSE["qkv"], SPARSE["ff"], CROSS["sparse"], SPARSE["head"]), None),
    "terraformer-medium": (
        total(
            D,
            dense_attention(D) + MEDIUM_FF + 2 * NORM,
            2 * (SPARSE["qkv"] + NORM) + MEDIUM_FF + NORM,
            24,
            24,
            SPARSE["head"],
        )
        + NORM,
        None,
    ),
    "6+6x9216-dense": (
        total(
            WIDE,
            dense_attention(WIDE) + dense_ff(WIDE, 40960) + 2 * WIDE_NORM,
            2 * dense_attention(WIDE) + dense_ff(WIDE, 40960) + 3 * WIDE_NORM,
            6,
            6,
        )
        + 2 * WIDE_NORM,
        None,
    ),
    "terraformer-17b": (wide(6, 1), None),
    "terraformer-54b": (wide(36, 2), None),
    # No biases in attention; the output layer and its norm read both streams.
    "reformer-lm": (
        total(512, 0, 4 * 512**2 + dense_ff(512, 2048) + 2 * 1024, 0, 6, 2 * 1024 + 1024 * VOCABULARY + VOCABULARY),
        None,
    ),
}
ENCODER_DECODERS = [name for name in PARAMETERS if name != "reformer-lm"]


def model_of(config):
    kind = TerraformerForConditionalGeneration if config.is_encoder_decoder else TerraformerForCausalLM
    return kind(config)


def test_each_preset_has_its_count():
    assert TerraformerConfig.presets() == list(PARAMETERS) == FAMILIES["terraformer"].presets


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_its_shape_says(name):
    config = TerraformerConfig.preset(name)
    with torch.device("meta"):
        count = model_of(config).num_parameters()
    expected, millions = PARAMETERS[name]
    tables = 2 if config.is_encoder_decoder else 1
    assert count == expected + tables * POSITIONS * config.hidden_size
    assert millions is None or round(expected / 1e6) == millions


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_presets_work(name):
    """Cut down to a width that a test can pay for."""
    fields = TerraformerConfig.preset_fields(name)
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    layers = {"num_encoder_layers": int(name in ENCODER_DECODERS), "num_decoder_layers": 1, "vocab_size": 44}
    model = model_of(TerraformerConfig(**{**fields, **small, **layers})).eval()
    ids = torch.arange(10).view(2, 5)
    assert model(ids, labels=ids).loss.isfinite()
