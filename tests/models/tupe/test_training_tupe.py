"""What training needs of TUPE: losses of every head, accumulation, checkpointing, autocast, dropout."""

import pytest
import torch
from torch import nn

from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
    TupeMLP,
)
from tests.helpers.comparison import assert_close, assert_gradients_close


def labels_of(kind, ids):
    """Labels for four rows, with an uneven number of targets a row where a row has several."""
    targets = torch.where(torch.arange(ids.shape[1]) < torch.tensor([[3], [1], [4], [1]]), ids, -100)
    return {
        "tokens": targets,
        "classes": torch.tensor([0, 2, 1, 1]),
        "values": torch.tensor([0.3, -1.5, 2.0, 0.1]),
        "vectors": torch.randn(4, 3),
        "multi": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        "tags": torch.where(targets >= 0, targets % 3, -100),
    }[kind]


# class, config fields, labels, how many targets the labels hold (what Trainer counts), the loss by hand
HEADS = [
    pytest.param(TupeForMaskedLM, {}, "tokens", nn.functional.cross_entropy, id="masked-lm"),
    pytest.param(TupeForPreTraining, {}, "tokens", None, id="pretraining"),
    pytest.param(
        TupeForSequenceClassification, {"num_labels": 3}, "classes", nn.functional.cross_entropy, id="classification"
    ),
    pytest.param(TupeForSequenceClassification, {"num_labels": 1}, "values", nn.functional.mse_loss, id="regression"),
    pytest.param(
        TupeForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
        "vectors",
        nn.functional.mse_loss,
        id="regression-3-values",
    ),
    pytest.param(
        TupeForSequenceClassification,
        {"num_labels": 3},
        "multi",
        nn.functional.binary_cross_entropy_with_logits,
        id="multi-label",
    ),
    pytest.param(TupeForTokenClassification, {"num_labels": 3}, "tags", nn.functional.cross_entropy, id="tokens"),
]


@pytest.mark.parametrize(("cls", "fields", "kind", "by_hand"), HEADS)
def test_accumulation_equals_one_large_batch(make_model, make_inputs, cls, fields, kind, by_hand):
    """The loss is a mean over targets; micro-batches with `num_items_in_batch`, as Trainer counts it, add up to it."""
    model, accumulated = make_model(cls, **fields).double(), make_model(cls, **fields).double()
    inputs = make_inputs(7, 5, 7, 2)
    labels = labels_of(kind, inputs["input_ids"])
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    if by_hand is not None:
        logits = outputs.logits.flatten(0, -2) if kind in ("tokens", "tags") else outputs.logits
        logits = logits.squeeze(-1) if kind == "values" else logits
        flat = labels.flatten() if kind in ("tokens", "tags") else labels
        flat = flat.double() if flat.is_floating_point() else flat
        assert outputs.loss.item() == pytest.approx(by_hand(logits, flat).item(), rel=1e-6)
    count = (labels != -100).sum()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        loss = accumulated(**part, labels=labels[rows], num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert_gradients_close(accumulated, model, 1e-6)


def test_accumulation_of_multiple_choice(make_model, make_inputs):
    model = make_model(TupeForMultipleChoice).double()
    accumulated = make_model(TupeForMultipleChoice).double()
    inputs = {name: tensor.view(3, 2, 7) for name, tensor in make_inputs(7, 5, 7, 2, 3, 3).items()}
    labels = torch.tensor([1, 0, 0])
    model(**inputs, labels=labels).loss.backward()
    for row in range(3):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        accumulated(**part, labels=labels[row : row + 1], num_items_in_batch=3).loss.backward()
    assert_gradients_close(accumulated, model, 1e-9)


def test_question_answering_loss_ignores_answers_that_were_cut_off(make_model, make_inputs):
    model = make_model(TupeForQuestionAnswering)
    inputs = make_inputs(7, 5)
    start, end = torch.tensor([2, 7]), torch.tensor([3, 50])
    outputs = model(**inputs, start_positions=start, end_positions=end)
    expected = nn.functional.cross_entropy(outputs.start_logits[:1], start[:1])
    expected = (expected + nn.functional.cross_entropy(outputs.end_logits[:1], end[:1])) / 2
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_pretraining_equals_masked_lm(make_model, make_inputs):
    """Its head runs at the targets only; loss, their logits and every gradient are the same."""
    dense, sparse = make_model(TupeForMaskedLM).double(), make_model(TupeForPreTraining).double()
    inputs = make_inputs(7, 5, 7, 2)
    labels = labels_of("tokens", inputs["input_ids"])
    expected, ours = dense(**inputs, labels=labels), sparse(**inputs, labels=labels)
    assert_close("loss", ours.loss, expected.loss, 1e-13)
    assert ours.logits.shape == ((labels != -100).sum(), 40)
    assert_close("logits", ours.logits, expected.logits[labels != -100], 1e-13)
    expected.loss.backward()
    ours.loss.backward()
    assert_gradients_close(sparse, dense, 1e-11)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["mean", "count-0", "count-tensor-0"])
@pytest.mark.parametrize("cls", [TupeForMaskedLM, TupeForPreTraining, TupeForTokenClassification])
def test_no_target_gives_no_loss_and_no_gradient(make_model, make_inputs, cls, count):
    model = make_model(cls)
    inputs = make_inputs(7, 5)
    loss = model(**inputs, labels=torch.full((2, 7), -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), f"gradient of {name}"


def test_dropout_is_drawn_from_the_seed(make_model, make_inputs):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "activation_dropout": 0.1}
    model = make_model(TupeForMaskedLM, **dropout).train()
    inputs = make_inputs(7, 5)

    def logits(seed):
        torch.manual_seed(seed)
        return model(**inputs).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


@pytest.mark.parametrize(
    "field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "classifier_dropout"]
)
def test_each_dropout_acts_in_training(make_model, make_inputs, field):
    model = make_model(TupeForSequenceClassification, num_labels=3, **{field: 0.5}).train()
    inputs = make_inputs(7, 5)
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_no_gradient(make_model, make_inputs, monkeypatch, use_reentrant):
    fields = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    plain = make_model(TupeForMaskedLM, **fields).train()
    checkpointed = make_model(TupeForMaskedLM, **fields).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs = make_inputs(7, 5)
    runs = []
    forward = TupeMLP.forward  # not the layer's own, which some versions of transformers wrap
    monkeypatch.setattr(TupeMLP, "forward", lambda self, *args: runs.append(self) or forward(self, *args))
    for model, expected_runs in ((plain, 2), (checkpointed, 4)):
        runs.clear()
        torch.manual_seed(3)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert len(runs) == expected_runs
    assert_gradients_close(checkpointed, plain, 1e-6)


def test_bf16_autocast_is_close_to_float32(make_model, make_inputs):
    inputs = make_inputs(63, 17)
    model, reference = make_model(TupeForMaskedLM), make_model(TupeForMaskedLM)
    expected = reference(**inputs, labels=inputs["input_ids"])
    expected.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs, labels=inputs["input_ids"])
        assert model.model.position_bias(63).dtype == torch.float32
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    assert_close("loss", outputs.loss, expected.loss, 1e-2)
    expected_grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.norm() for gradient in expected_grads.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - expected_grads[name]).norm() < 0.05 * expected_grads[name].norm() + 1e-3 * largest, (
            name
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in ("first", "from cache"):
            assert_close(call, model(**inputs).logits.float(), expected.logits, 5e-2)
