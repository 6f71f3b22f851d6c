"""A model whose weights were changed behind torch's back gives what a fresh model with these weights gives."""

import copy

import pytest
import torch

from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM, TupeModel
from tests.helpers.comparison import assert_close


def double_in_place(tensor):
    """Change a tensor without a new storage and without a count of its versions, and hand it on."""
    tensor.data.mul_(2)
    return tensor


def load_again(model):
    weights = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(weights)


# All of them go through `_apply`, which replaces what a parameter holds and leaves the parameter.
CHANGES = {
    "in-place": lambda model: model._apply(double_in_place),
    "half": lambda model: model.half().float(),
    "bfloat16": lambda model: model.bfloat16().float(),
    "to-float64": lambda model: model.to(torch.float64),
    "to-and-back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "to_empty": lambda model: load_again(model),
}


@pytest.fixture(params=[TupeModel, TupeForMaskedLM])
def model(request, make_model):
    return make_model(request.param)


def outputs(model, length=7):
    ids = torch.arange(2 * length).view(2, length) % 30 + 3
    ids[:, 0] = 0
    with torch.no_grad():
        return model(ids)[0]


def fresh(model):
    """A model that was never run, with the same weights."""
    other = type(model)(copy.deepcopy(model.config)).to(next(model.parameters()).dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("change", CHANGES)
def test_outputs_follow_weights_that_are_moved(model, change, length):
    before = outputs(model, length)
    CHANGES[change](model)
    after = outputs(model, length)
    assert_close("outputs", after, outputs(fresh(model), length))
    assert not torch.equal(after.double(), before.double())
