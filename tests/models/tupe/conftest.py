"""A tiny TUPE of odd sizes, and inputs for it."""

import pytest
import torch

from tests.helpers.families import TUPE


@pytest.fixture(params=TUPE.variants)
def variant(request):
    """Config fields of each kind of model in turn."""
    return TUPE.variants[request.param]


@pytest.fixture
def make_config():
    """`make_config(**fields)`: three heads of width 5, two layers, no dropout."""
    return TUPE.make_config


@pytest.fixture
def make_model():
    """`make_model(cls=TupeModel, attention=None, dtype=torch.float32, **config fields)`."""
    return TUPE.make_model


@pytest.fixture
def make_inputs():
    """`make_inputs(*lengths)`: `input_ids` and `attention_mask` of rows with these lengths, padded on the right."""

    def make(*lengths: int, vocab_size: int = TUPE.sizes["vocab_size"]):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocab_size, (len(lengths), max(lengths)), generator=generator)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        ids[:, 0] = 0
        return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}

    return make
