"""A tiny Scaling Transformer of odd sizes, and inputs for it."""

import pytest
import torch

from hf_efficient.models.scaling_transformer.configuration_scaling_transformer import ScalingTransformerConfig
from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerModel


SIZES = {
    "vocab_size": 42,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 70,
    "dropout": 0.0,
    "activation_dropout": 0.0,
}
FF = {"ff_sparsity": 5, "ff_rank": 3}
QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
SRU = {"ff_sru_layers": 2, "ff_sru_units": 5}
VARIANTS = {
    "dense": {},
    "ff": FF,
    "ff-options": {**FF, "ff_multiply_by_controller": True, "ff_inner_bias": True, "hidden_act": "gelu"},
    "qkv": {**QKV, "layer_norm_center": False},
    "all-sru": {**FF, **QKV, **SRU, "lm_head_type": "multiplicative", "loss_sparsity": 3},
    "by-module-conv-fixed-base": {
        **FF,
        **QKV,
        "attention_value_input": "by_module",
        "attention_output": "conv",
        "position_embedding_type": "fixed_base",
        "lm_head_type": "multiplicative",
        "loss_sparsity": 7,
        "lm_head_sparse_probability": 0.5,
    },
    "concatenated-shared-qk": {
        **QKV,
        "attention_value_input": "concatenated",
        "attention_share_qk": True,
        "attention_output": "multiplicative_conv",
        "attention_window": 4,
        "attention_kernel_width": 5,
        "position_embedding_type": "low_rank",
        "position_rank": 7,
    },
    "multiplicative-low-rank": {
        "attention_type": "multiplicative",
        "attention_sparsity": 8,
        "position_embedding_type": "none",
        "lm_head_type": "low_rank",
        "lm_head_rank": 5,
    },
    "modular-sru": {
        "attention_type": "multiplicative_modular",
        "attention_sparsity": 3,
        "ff_sru_layers": 1,
        "ff_sru_units": 7,
        "tie_word_embeddings": True,
    },
    "window-1": {**QKV, "attention_window": 1, "attention_output": "conv", "num_attention_heads": 1},
}


@pytest.fixture
def make_config():
    """`make_config(**fields)`: two layers of width 24, four heads, no dropout."""
    return lambda **fields: ScalingTransformerConfig(**{**SIZES, **fields})


@pytest.fixture
def make_model(make_config):
    """`make_model(cls=ScalingTransformerModel, attention=None, dtype=torch.float64, **config fields)`, in evaluation
    mode. All weights are drawn anew and large, so that no part of the model is too small to be seen in its output."""

    def make(cls=ScalingTransformerModel, attention=None, dtype=torch.float64, **fields):
        torch.manual_seed(0)
        model = cls._from_config(make_config(**fields), attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.35)
        return model.to(dtype)

    return make


@pytest.fixture
def make_ids():
    """`make_ids(batch, length)`: the same ids for the same sizes."""

    def make(batch: int, length: int, vocab_size: int = SIZES["vocab_size"]):
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        return torch.randint(0, vocab_size, (batch, length), generator=generator)

    return make


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Config fields of each kind of model in turn."""
    return VARIANTS[request.param]
