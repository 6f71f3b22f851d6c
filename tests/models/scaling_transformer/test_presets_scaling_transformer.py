"""Named presets have the shapes of the published models, and counts that follow from them."""

import pytest
import torch

from hf_efficient.auto import FAMILIES
from hf_efficient.models.scaling_transformer.configuration_scaling_transformer import ScalingTransformerConfig
from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM


VOCABULARY, POSITIONS = 32_000, 2048


def dense_ff(d, f):
    return 2 * d * f + f + d


def sparse_ff(d, f, rank):
    return 2 * d * f + d + d * rank + rank * f + f


def dense_attention(d):
    return 4 * (d * d + d)


def sparse_attention(d, modules):
    """One multiplicative layer and three convolutions: over 3 x 3 for queries and keys, 3 x 1 for values."""
    m = d // modules
    return modules * d + d * m + d + (2 * 9 + 3) * m * m + 3 * m


def sparse_head(d, modules):
    return modules * d + d * VOCABULARY // modules + VOCABULARY


def total(d, layers, attention, feed_forward, head=None):
    """Without the table of positions, whose length a user chooses."""
    head = d * VOCABULARY + VOCABULARY if head is None else head
    return VOCABULARY * d + layers * (attention + feed_forward + 4 * d) + 2 * d + head


# By the formulas above, and in millions.
PARAMETERS = {
    "24x1024-dense": (total(1024, 24, dense_attention(1024), dense_ff(1024, 4096)), 368),
    "24x1024-ff": (total(1024, 24, dense_attention(1024), sparse_ff(1024, 4096, 64)), 376),
    "24x1024-qkv": (total(1024, 24, sparse_attention(1024, 16), dense_ff(1024, 6144)), 372),
    "24x1024-ff-qkv": (total(1024, 24, sparse_attention(1024, 16), sparse_ff(1024, 6144, 96)), 388),
    "24x1024-all": (
        total(1024, 24, sparse_attention(1024, 16), sparse_ff(1024, 6144, 96), sparse_head(1024, 4)),
        364,
    ),
    "15x9216-dense": (total(9216, 15, dense_attention(9216), dense_ff(9216, 40960)), 17_012),
    "14x9216-all": (
        total(9216, 14, sparse_attention(9216, 64), sparse_ff(9216, 65536, 32), sparse_head(9216, 4)),
        17_348,
    ),
}


def test_each_preset_has_its_count():
    assert ScalingTransformerConfig.presets() == list(PARAMETERS) == FAMILIES["scaling_transformer"].presets


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_its_shape_says(name):
    config = ScalingTransformerConfig.preset(name)
    with torch.device("meta"):
        count = ScalingTransformerForCausalLM(config).num_parameters()
    expected, millions = PARAMETERS[name]
    assert count == expected + POSITIONS * config.hidden_size
    assert round(expected / 1e6) == millions
    layers, _, width = name.partition("-")[0].partition("x")
    assert (config.num_hidden_layers, config.hidden_size) == (int(layers), int(width))


def test_the_largest_can_be_built_with_few_layers():
    config = ScalingTransformerConfig.preset("14x9216-all", num_hidden_layers=1, vocab_size=8)
    assert (config.hidden_size, config.ff_sparsity, config.ff_rank, config.attention_sparsity) == (9216, 256, 32, 64)
    with torch.device("meta"):
        model = ScalingTransformerForCausalLM(config)
    assert len(model.model.layers) == 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_presets_work(name):
    """Cut down to a width that a test can pay for."""
    fields = ScalingTransformerConfig.preset_fields(name)
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 1}
    model = ScalingTransformerForCausalLM(ScalingTransformerConfig(**{**fields, **small, "vocab_size": 44})).eval()
    ids = torch.arange(10).view(2, 5)
    assert model(ids, labels=ids).loss.isfinite()
