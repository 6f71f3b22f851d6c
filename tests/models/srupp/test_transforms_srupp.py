"""SRU++ under the transforms of `torch.func`, in forward mode, and differentiated twice."""

import pytest
import torch
from torch.func import functional_call

from hf_efficient.models.srupp.modeling_srupp import (
    SruppForCausalLM,
    SruppForMaskedLM,
    SruppForQuestionAnswering,
    SruppForSequenceClassification,
    SruppForTokenClassification,
    SruppModel,
)
from tests.helpers.derivatives import check_first_derivatives, check_second_derivatives, check_vmap


CONFIGS = {
    "default": {},
    "bidirectional": {"bidirectional": True},
    "no-peephole-post-norm": {"use_peephole": False, "layer_norm": True, "normalize_after": True, "rescale": True},
    "tanh-wider-embedding": {"recurrence_activation": "tanh", "embedding_size": 14, "num_attention_heads": 1},
    "sru": {"projection_size": 0, "attention_layers": []},
}
SMALL = {"hidden_size": 6, "projection_size": 4, "num_hidden_layers": 2}


def make_batch(ids, config):
    """Padding on the right and inside, or, in a causal model, rows of several documents."""
    if config.bidirectional:
        mask = torch.ones_like(ids)
        mask[0, 3], mask[1, -2:] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    positions[1, 3:] -= 3
    return {"input_ids": ids, "position_ids": positions}


@pytest.fixture(params=CONFIGS)
def last_states(request, make_model, make_ids):
    """The final states as a function of the parameters, and parameters; explicit attention, which has second
    derivatives by autograd as well."""
    model = make_model(SruppModel, attention="eager", **{**SMALL, **CONFIGS[request.param]})
    batch = make_batch(make_ids(2, 7), model.config)
    point = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return lambda point: functional_call(model, point, kwargs=batch).last_hidden_state, point


def test_first_derivatives(last_states):
    check_first_derivatives(*last_states)


def test_second_derivatives(last_states):
    states, point = last_states

    def number(point):
        return states(point).square().sum()

    check_second_derivatives(number, point, 1e-5, whole=["layers.0.bias"], reverse_of_forward=False)


def test_default_attention_has_derivatives(make_model, make_ids):
    """Its fused kernels have neither forward mode nor a second derivative; under transforms they do not run."""
    models = [make_model(SruppModel, attention=attention, **SMALL) for attention in ("sdpa", "eager")]
    ids, point = make_ids(2, 7), dict(models[0].named_parameters())
    check_first_derivatives(lambda point: functional_call(models[0], point, (ids,)).last_hidden_state, point, 1e-6)
    fused, explicit = (
        torch.func.hessian(
            lambda bias, model=model: (
                functional_call(model, {**point, "layers.0.bias": bias}, (ids,)).last_hidden_state.square().sum()
            )
        )(point["layers.0.bias"].detach())
        for model in models
    )
    torch.testing.assert_close(fused, explicit)


@pytest.mark.parametrize(
    ("heads", "part"), [(1, "down_proj"), (1, "q_proj"), (1, "v_proj"), (2, "down_proj"), (2, "k_proj"), (2, "v_proj")]
)
def test_a_second_backward_pass_through_fused_attention_is_refused(heads, part, make_model, make_ids):
    """In words that name the explicit form, which has one; the gradient itself is the same."""
    ids, gradients = make_ids(2, 7), []
    for attention in ("sdpa", "eager"):
        model = make_model(SruppModel, attention=attention, num_attention_heads=heads, **SMALL)
        weight = model.get_parameter(f"layers.0.projection.{'' if part == 'down_proj' else 'attention.'}{part}.weight")
        number = model(ids).last_hidden_state.square().sum()
        (gradient,) = torch.autograd.grad(number, weight, create_graph=True)
        gradients.append(gradient.detach())
        if attention == "eager":
            assert torch.autograd.grad(gradient.square().sum(), weight)[0].any()
            continue
        with pytest.raises(RuntimeError, match=r"no derivative.* model\.set_attn_implementation\('eager'\)"):
            torch.autograd.grad(gradient.square().sum(), weight)
    torch.testing.assert_close(*gradients)


def test_the_explicit_form_of_sdpa_keeps_its_second_derivative(make_model, make_ids):
    """torch takes it where the fused kernels are switched off, or have no dropout."""
    model = make_model(SruppModel, attention="sdpa", attention_dropout=0.5, **SMALL).train()
    weight = model.layers[0].projection.down_proj.weight
    number = model(make_ids(2, 7)).last_hidden_state.square().sum()
    (gradient,) = torch.autograd.grad(number, weight, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), weight)[0].any()


def test_memory_has_derivatives(make_model, make_ids):
    model = make_model(SruppModel, attention="eager", **SMALL)
    memory = model(make_ids(2, 5), return_memory=True).memory.detach()
    ids = make_ids(2, 4)

    def states(point):
        inputs = (memory.layer_inputs[0], point["input"])
        given = memory._replace(cell_states=(point["state"], memory.cell_states[1]), layer_inputs=inputs)
        return model(ids, memory=given).last_hidden_state

    check_first_derivatives(states, {"state": memory.cell_states[0], "input": memory.layer_inputs[1]})


HEADS = {
    "causal-lm": (SruppForCausalLM, {}, "tokens"),
    "tied-no-peephole": (SruppForCausalLM, {"tie_word_embeddings": True, "use_peephole": False}, "tokens"),
    "masked-lm": (SruppForMaskedLM, {"bidirectional": True}, "tokens"),
    "classification": (SruppForSequenceClassification, {"pad_token_id": 0}, "row"),
    "bidirectional-classification": (SruppForSequenceClassification, {"bidirectional": True}, "row"),
    "token-classification": (SruppForTokenClassification, {}, "classes"),
    "question-answering": (SruppForQuestionAnswering, {"bidirectional": True}, "span"),
    "adaptive": (SruppForCausalLM, "words", "tokens"),
}


def make_labels(kind, ids):
    if kind == "span":
        return {"start_positions": torch.tensor([1, 0, 3]), "end_positions": torch.tensor([2, 5, 3])}
    if kind == "row":
        return {"labels": torch.tensor([1, 0, 1])}
    labels = ids % 2 if kind == "classes" else ids.clone()
    labels[:, ::3] = -100
    return {"labels": labels}


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_the_loss_are_its_finite_differences(head, make_model, make_ids, word_fields):
    cls, fields, kind = HEADS[head]
    model, ids = make_model(cls, **SMALL, **(word_fields if fields == "words" else fields)), make_ids(3, 7)
    batch = {"input_ids": ids, **make_labels(kind, ids)}
    point = {name: value for name, value in model.named_parameters() if value.requires_grad}
    check_first_derivatives(lambda point: functional_call(model, point, kwargs=batch).loss, point)


@pytest.mark.parametrize("own_batch", [False, True], ids=["one-batch", "own-batches"])
@pytest.mark.parametrize("head", HEADS)
def test_vmap_over_models_equals_a_loop(head, own_batch, make_model, make_ids, word_fields):
    cls, fields, kind = HEADS[head]
    fields = word_fields if fields == "words" else fields
    models = [make_model(cls, **{**SMALL, **fields}) for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.2)
    ids = make_ids(3, 7)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, **make_labels(kind, ids)}
    check_vmap(models, batch, lambda output: output.loss, own_batch, 1e-9)


@pytest.mark.parametrize("own_batch", [False, True], ids=["one-batch", "own-batches"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vmap_over_packed_rows_equals_a_loop(attention, own_batch, make_model, make_ids):
    models = [make_model(SruppForCausalLM, attention=attention, **SMALL) for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.2)
    batch = make_batch(make_ids(3, 7), models[0].config)
    check_vmap(models, batch, lambda output: output.logits, own_batch, 1e-9)


def test_a_cache_beside_a_mask_of_its_own_is_refused(make_model, make_ids):
    model, ids = make_model(SruppForCausalLM), make_ids(2, 7)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="without a cache"):
        torch.func.vmap(lambda mask: model(ids, attention_mask=mask, cache=cache).logits)(torch.ones_like(ids)[None])
