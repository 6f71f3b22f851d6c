"""The Scaling Transformer under the transforms of `torch.func`, in forward mode, and differentiated twice."""

import pytest
import torch
from torch.func import functional_call

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from tests.helpers.comparison import assert_close, named_gradients
from tests.helpers.derivatives import check_first_derivatives, check_second_derivatives, check_vmap


SMALL = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
KINDS = {
    "all": {
        "ff_sparsity": 3,
        "ff_rank": 2,
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 4,
        "ff_sru_layers": 1,
        "ff_sru_units": 3,
        "lm_head_type": "multiplicative",
        "loss_sparsity": 3,
    },
    "conv-output": {
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 4,
        "attention_value_input": "by_module",
        "attention_output": "multiplicative_conv",
        "position_embedding_type": "fixed_base",
        "lm_head_type": "low_rank",
        "lm_head_rank": 3,
    },
}


@pytest.fixture(params=KINDS)
def make(request, make_model):
    return lambda attention="eager": make_model(
        ScalingTransformerForCausalLM, attention=attention, **SMALL, **KINDS[request.param]
    )


def test_first_derivatives(make, make_ids):
    """The winners are constants, which no small difference moves."""
    model, ids = make("sdpa"), make_ids(2, 5, 12)
    point = dict(model.named_parameters())
    check_first_derivatives(lambda point: functional_call(model, point, (ids,), {"labels": ids}).loss, point)


def test_second_derivatives(make, make_ids):
    model, ids = make(), make_ids(1, 4, 12)

    def number(point):
        return functional_call(model, point, (ids,)).logits.square().sum()

    check_second_derivatives(number, dict(model.named_parameters()), 1e-4, reverse_of_forward=False)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_vmap_over_models_equals_a_loop(make, make_ids, form):
    models, ids = [make("sdpa") for _ in range(2)], make_ids(3, 7, 12)
    for parameter in models[1].parameters():
        parameter.data.mul_(1.2)
    mask, positions = torch.ones_like(ids), torch.arange(7).repeat(3, 1)
    mask[1, -3:] = 0
    positions[1, 3:] -= 3
    batch = {"input_ids": ids, **({"attention_mask": mask} if form == "padded" else {"position_ids": positions})}
    check_vmap(models, batch, lambda output: output.logits, True, 1e-9)


def test_gradients_of_soft_training(make_model, make_ids):
    fields = {**SMALL, **KINDS["all"], "ff_hard_probability": 0.0}
    model, ids = make_model(ScalingTransformerForCausalLM, **fields).train(), make_ids(2, 5, 12)
    point = dict(model.named_parameters())
    found = torch.func.grad(lambda point: functional_call(model, point, (ids,), {"labels": ids}).loss)(point)
    model(ids, labels=ids).loss.backward()
    assert_close("gradients", found, named_gradients(model), 1e-9)
