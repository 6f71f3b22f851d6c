"""A tiny SRU++ of odd sizes, and inputs for it."""

import pytest
import torch

from hf_efficient.models.srupp.convert_srupp import restore_state_dict
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppModel
from tests.helpers.families import SRUPP


@pytest.fixture
def make_config():
    """`make_config(**fields)`: three layers of width 18, two heads of width 5, no dropout."""
    return SRUPP.make_config


@pytest.fixture
def make_model():
    """`make_model(cls=SruppModel, attention=None, dtype=torch.float64, **config fields)`."""
    return SRUPP.make_model


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
    return SRUPP.make_ids


@pytest.fixture(params=SRUPP.variants)
def variant(request):
    """Config fields of each kind of model in turn."""
    return SRUPP.variants[request.param]
