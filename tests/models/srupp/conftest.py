"""A tiny SRU++ of odd sizes, and inputs for it."""

import pytest
import torch

from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from hf_efficient.models.srupp.convert_srupp import restore_state_dict
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppModel


SIZES = {"vocab_size": 41, "hidden_size": 18, "projection_size": 10, "num_hidden_layers": 3, "num_attention_heads": 2}
VARIANTS = {
    "all-attend": {},
    "one-head": {"num_attention_heads": 1},
    "last-attends": {"attention_layers": [-1]},
    "first-attends": {"attention_layers": [0]},
    "sru": {"projection_size": 0, "attention_layers": []},
    "sru-projected": {"attention_layers": [], "attention_layer_norm": False, "has_skip_term": False},
    "post-norm": {"layer_norm": True, "normalize_after": True, "rescale": True},
    "inner-pre-norm": {"attention_normalize_after": False, "embedding_size": 14, "recurrence_activation": "tanh"},
    "tied-no-peephole": {"tie_word_embeddings": True, "use_peephole": False, "project_input": True},
}


@pytest.fixture
def make_config():
    """`make_config(**fields)`: three layers of width 18, two heads of width 5, no dropout."""
    return lambda **fields: SruppConfig(**{**SIZES, **fields})


@pytest.fixture
def make_model(make_config):
    """`make_model(cls=SruppModel, attention=None, dtype=torch.float64, **config fields)`, in eval mode. All weights are
    drawn anew and large, alpha included, so that no part of the model is too small to be seen in its output."""

    def make(cls=SruppModel, attention=None, dtype=torch.float64, **fields):
        torch.manual_seed(0)
        model = cls._from_config(make_config(**fields), attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm.weight" in name or "alpha" in name else 0.0, 0.35)
        return model.to(dtype)

    return make


@pytest.fixture
def make_original(make_model):
    """`make_original(cls, **fields)`: a model, and its weights under the original's names."""

    def make(cls=SruppForCausalLM, **fields):
        model = make_model(cls, dtype=torch.float32, **fields)
        if not model.config.use_peephole:
            for layer in model.modules():
                if hasattr(layer, "weight_c"):
                    layer.weight_c.data.zero_()
        weights = model.state_dict()
        if cls is SruppModel:
            del weights["embed_tokens.weight"]
        return model, restore_state_dict(weights, model.config)

    return make


@pytest.fixture
def word_fields():
    """Config fields of a model of words: adaptive embedding and softmax."""
    return {
        "adaptive_cutoffs": [11, 30],
        "adaptive_embedding_size": 17,
        "adaptive_divisor": 4,
        "tie_word_embeddings": True,
        "embedding_size": None,
    }


@pytest.fixture
def make_ids():
    """`make_ids(batch, length)`: the same ids for the same sizes."""

    def make(batch: int, length: int, vocab_size: int = SIZES["vocab_size"]):
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        return torch.randint(3, vocab_size, (batch, length), generator=generator)

    return make


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Config fields of each kind of model in turn."""
    return VARIANTS[request.param]
