"""A tiny TUPE of odd sizes, and inputs for it."""

import pytest
import torch

from hf_efficient.models.tupe.configuration_tupe import TupeConfig
from hf_efficient.models.tupe.modeling_tupe import TupeModel


SIZES = {
    "vocab_size": 40,
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 21,
    "max_position_embeddings": 70,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}

VARIANTS = {
    "tupe-r": {},
    "tupe-a-prenorm": {"relative_attention": False, "normalize_before": True},
    "tied-cls-no-embedding-norm": {"untie_cls": False, "embedding_norm": False},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Config fields of each kind of model in turn."""
    return VARIANTS[request.param]


@pytest.fixture
def make_config():
    """`make_config(**fields)`: three heads of width 5, two layers, no dropout."""
    return lambda **fields: TupeConfig(**{**SIZES, **NO_DROPOUT, **fields})


@pytest.fixture
def make_model(make_config):
    """`make_model(cls=TupeModel, attention=None, **config fields)`, in eval mode. All weights are drawn anew and large,
    so that no part of the model is too small to be seen in its output."""

    def make(cls=TupeModel, attention=None, **fields):
        torch.manual_seed(0)
        model = cls._from_config(make_config(**fields), attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.3)
        return model

    return make


@pytest.fixture
def make_inputs():
    """`make_inputs(*lengths)`: `input_ids` and `attention_mask` of rows with these lengths, padded on the right."""

    def make(*lengths: int, vocab_size: int = SIZES["vocab_size"]):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocab_size, (len(lengths), max(lengths)), generator=generator)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        ids[:, 0] = 0
        return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}

    return make
