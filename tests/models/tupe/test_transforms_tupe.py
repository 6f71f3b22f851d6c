"""TUPE under the transforms of `torch.func`, in forward mode, and differentiated twice."""

import pytest
import torch
from torch.func import functional_call

from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
    TupeModel,
)
from tests.helpers.derivatives import check_first_derivatives, check_second_derivatives, check_vmap


SMALL = {"hidden_size": 6, "num_attention_heads": 2, "intermediate_size": 7, "max_position_embeddings": 12}


@pytest.fixture(params=["tupe_auto", "eager", "sdpa"])
def last_states(request, variant, make_model, make_inputs):
    """The final states as a function of the parameters, and parameters."""
    model = make_model(TupeModel, attention=request.param, **{**SMALL, **variant}).double()
    inputs = make_inputs(7, 4)
    return lambda point: functional_call(model, point, kwargs=inputs).last_hidden_state, dict(model.named_parameters())


def test_first_derivatives(last_states):
    check_first_derivatives(*last_states, tolerance=1e-6)


@pytest.mark.parametrize("attention", ["tupe_auto", "eager"])
def test_second_derivatives(attention, variant, make_model, make_inputs):
    model = make_model(TupeModel, attention=attention, **{**SMALL, **variant}).double()
    inputs = make_inputs(7, 4)

    def number(point):
        return functional_call(model, point, kwargs=inputs).last_hidden_state.sin().sum()

    point = dict(model.named_parameters())
    check_second_derivatives(number, point, 1e-4, whole=["position_bias.query.bias"], reverse_of_forward=False)


@pytest.mark.parametrize("attention", ["tupe_auto", "sdpa"])
def test_a_second_backward_pass_through_fused_attention_is_refused(attention, make_model, make_inputs):
    """It runs where the position bias is frozen."""
    model = make_model(TupeModel, attention=attention, **SMALL)
    model.position_bias.requires_grad_(False)
    weight = model.get_parameter("layers.0.self_attn.k_proj.weight")
    number = model(**make_inputs(7, 4)).last_hidden_state.sin().sum()
    (gradient,) = torch.autograd.grad(number, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative.* model\.set_attn_implementation\('eager'\)"):
        torch.autograd.grad(gradient.square().sum(), weight)


HEADS = {
    "masked-lm": (TupeForMaskedLM, "tokens"),
    "pretraining": (TupeForPreTraining, "tokens"),
    "classification": (TupeForSequenceClassification, "row"),
    "token-classification": (TupeForTokenClassification, "classes"),
    "question-answering": (TupeForQuestionAnswering, "span"),
    "multiple-choice": (TupeForMultipleChoice, "choice"),
}


def make_labels(kind, ids):
    if kind == "span":
        return {"start_positions": torch.tensor([1, 0, 3]), "end_positions": torch.tensor([2, 5, 3])}
    if kind in ("row", "choice"):
        return {"labels": torch.tensor([1, 0, 1])}
    labels = ids % 2 if kind == "classes" else ids.clone()
    labels[:, ::3] = -100
    return {"labels": labels}


@pytest.mark.parametrize("own_batch", [False, True], ids=["one-batch", "own-batches"])
@pytest.mark.parametrize("head", HEADS)
def test_vmap_over_models_equals_a_loop(head, own_batch, make_model, make_inputs):
    cls, kind = HEADS[head]
    models = [make_model(cls, **SMALL).double() for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.2)
    batch = make_inputs(7, 4, 7)
    batch.update(make_labels(kind, batch["input_ids"]))
    if kind == "choice":
        batch = {
            name: value if name == "labels" else torch.stack([value, value.flip(0)], 1) for name, value in batch.items()
        }
    check_vmap(models, batch, lambda output: output.loss, own_batch, 1e-6)


def test_vmap_over_long_padded_rows_equals_a_loop(make_model, make_inputs):
    """Without transforms such rows attend one by one, by their lengths."""
    models = [make_model(TupeModel, max_position_embeddings=300).double() for _ in range(2)]
    for own_batch in (False, True):
        check_vmap(models, make_inputs(263, 63), lambda output: output.last_hidden_state.mean(1), own_batch, 1e-8)


def test_no_bias_of_a_transform_is_kept(make_model, make_inputs):
    model, inputs = make_model(TupeModel, **SMALL), make_inputs(7)
    weights = {name: torch.stack([value, 2 * value]) for name, value in model.named_parameters()}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        torch.func.vmap(lambda point: functional_call(model, point, kwargs=inputs).last_hidden_state)(weights)
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
