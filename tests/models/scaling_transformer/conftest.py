"""A tiny Scaling Transformer of odd sizes, and inputs for it."""

import pytest

from tests.helpers.families import SCALING_TRANSFORMER


@pytest.fixture
def make_config():
    """`make_config(**fields)`: two layers of width 24, four heads, no dropout."""
    return SCALING_TRANSFORMER.make_config


@pytest.fixture
def make_model():
    """`make_model(cls=ScalingTransformerModel, attention=None, dtype=torch.float64, **config fields)`."""
    return SCALING_TRANSFORMER.make_model


@pytest.fixture
def make_ids():
    """`make_ids(batch, length)`: the same ids for the same sizes."""
    return SCALING_TRANSFORMER.make_ids


@pytest.fixture(params=SCALING_TRANSFORMER.variants)
def variant(request):
    """Config fields of each kind of model in turn."""
    return SCALING_TRANSFORMER.variants[request.param]
