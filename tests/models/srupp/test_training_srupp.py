"""What training needs of SRU++: losses, segments, checkpointing, dropout, masked-LM pretraining."""

import pytest
import torch
from torch import nn

from hf_efficient.models.srupp.modeling_srupp import (
    SruppForCausalLM,
    SruppForMaskedLM,
    SruppForQuestionAnswering,
    SruppForSequenceClassification,
    SruppForTokenClassification,
    SruppLayer,
)
from hf_efficient.objectives.mlm import MaskedLMObjective
from tests.helpers.comparison import assert_gradients_close, named_gradients


@pytest.mark.parametrize("fields", [{}, {"bidirectional": True}], ids=["causal", "both-ways"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_reads_where_each_direction_ends(make_model, make_ids, fields, side):
    model = make_model(SruppForSequenceClassification, num_labels=3, pad_token_id=0, **fields)
    ids, mask = make_ids(2, 7), torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    mask = mask.flip(1) if side == "left" else mask
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.tensor([2, 0])
    output = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    for row in range(2):
        kept = ids[row : row + 1, mask[row].bool()]
        states = model.model(kept).last_hidden_state[0]
        pooled = torch.cat([states[-1, :9], states[0, 9:]]) if fields else states[-1]
        torch.testing.assert_close(output.logits[row], model.score(pooled))
        torch.testing.assert_close(output.logits[row], model(kept).logits[0])
    if not fields and side == "right":  # the padding id alone tells where a causal model has read everything
        torch.testing.assert_close(model(ids).logits, output.logits)


def test_other_heads(make_model, make_ids):
    ids, mask = make_ids(2, 7), torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    labels = (ids % 3).masked_fill(mask == 0, -100)
    model = make_model(SruppForTokenClassification, num_labels=3, bidirectional=True)
    output = model(ids, attention_mask=mask, labels=labels)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    model = make_model(SruppForQuestionAnswering, bidirectional=True)
    starts, ends = torch.tensor([1, 3]), torch.tensor([2, 6])
    output = model(ids, attention_mask=mask, start_positions=starts, end_positions=ends)
    pairs = ((output.start_logits, starts), (output.end_logits, ends))
    torch.testing.assert_close(output.loss, sum(nn.functional.cross_entropy(*pair) for pair in pairs) / 2)
    regression = make_model(SruppForSequenceClassification, num_labels=1)
    output = regression(ids, attention_mask=mask, labels=torch.tensor([0.5, -1.0], dtype=torch.float64))
    expected = nn.functional.mse_loss(output.logits[:, 0], torch.tensor([0.5, -1.0], dtype=torch.float64))
    torch.testing.assert_close(output.loss, expected)


def test_masked_lm_objective(make_model, make_ids):
    """Pretraining through the repository's objective, whose head runs at targets alone: loss and gradients as usual."""
    model, ids = make_model(SruppForMaskedLM, bidirectional=True, mask_token_id=1), make_ids(2, 9)
    labels = ids.masked_fill(torch.rand(2, 9) > 0.4, -100)
    masked = ids.masked_fill(labels >= 0, 1)
    logits = model(masked).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    expected = named_gradients(model)
    model.zero_grad()
    objective_loss = MaskedLMObjective(model=model)(input_ids=masked, labels=labels).loss
    objective_loss.backward()
    torch.testing.assert_close(objective_loss, loss)
    assert_gradients_close(model, expected, 1e-9)


@pytest.mark.parametrize("fields", [{}, {"num_attention_heads": 1}, {"attention_layers": [1]}, {"layer_norm": True}])
def test_gradients_flow_through_projections_of_memory(make_model, make_ids, fields):
    """Three segments. What is remembered is a constant, how it is projected is learnt: a replay with the same constants
    by finite differences."""
    model, ids = make_model(SruppForCausalLM, **fields), make_ids(2, 12)
    memories, memory = [], None
    for part in ids.split(4, 1):
        memories.append(memory)
        output = model(part, labels=part, memory=memory, return_memory=True)
        memory = output.memory.detach()
    model.zero_grad()
    last = memories[2]
    assert not any(state.requires_grad for state in last.cell_states)
    assert [x is not None for x in last.layer_inputs] == [i in model.config.attention_layer_indices for i in range(3)]
    assert last.length == 4

    def loss(memory=last):
        logits = model(ids[:, 8:], memory=memory).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 9:].flatten())

    loss().backward()
    attending = model.config.attention_layer_indices[-1]
    weight = model.model.layers[attending].projection.down_proj.weight
    direction, step = torch.randn_like(weight), 1e-5
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
        weight += step * direction
    torch.testing.assert_close((weight.grad * direction).sum(), (above - below) / (2 * step), atol=1e-5, rtol=1e-5)
    assert (loss(None) - loss()).abs() > 1e-4  # memory matters


def test_memory_that_is_not_detached_carries_gradients_back(make_model, make_ids):
    """Two segments in one graph: the gradients of the whole text."""
    model, ids = make_model(SruppForCausalLM), make_ids(2, 10)
    model(ids).logits.square().sum().backward()
    expected = named_gradients(model)
    model.zero_grad()
    first = model(ids[:, :6], return_memory=True)
    second = model(ids[:, 6:], memory=first.memory)
    (first.logits.square().sum() + second.logits.square().sum()).backward()
    assert_gradients_close(model, expected, 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fields", [{}, {"num_attention_heads": 1, "dropout": 0.3, "attention_dropout": 0.2}])
def test_gradient_checkpointing_changes_no_gradient(make_model, make_ids, fields, reentrant):
    model, ids = make_model(SruppForCausalLM, **fields).train(), make_ids(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    memory = model(ids, return_memory=True).memory.detach()
    runs = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        output = model(ids, attention_mask=mask, memory=memory, labels=ids, return_memory=True)
        (output.loss + sum(state.sum() for state in output.memory.cell_states)).backward()
        runs.append(named_gradients(model))
    assert_gradients_close(*runs, 1e-9)


def test_dropouts(make_model, make_ids):
    """Each acts in training alone. A layer drops its output by one mask for all steps, the last layer not at all."""
    ids = make_ids(2, 50)
    for field in ("dropout", "attention_dropout", "input_dropout", "projection_dropout"):
        model = make_model(SruppForCausalLM, **{field: 0.4})
        assert torch.equal(model(ids).logits, make_model(SruppForCausalLM)(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), field
    model = make_model(SruppForCausalLM, attention_layers=[], dropout=0.4, projection_dropout=0.0).train()
    calls = []
    recur = SruppLayer._shared_mask
    for layer in model.model.layers:
        layer._shared_mask = lambda *args, layer=layer: calls.append(recur(layer, *args)) or calls[-1]
    model(ids)
    cell_masks = calls[1::2]  # each layer asks for its input's first
    assert calls[::2] == [None] * 3
    assert cell_masks[2] is None
    for mask in cell_masks[:2]:
        assert mask.shape == (2, 18)
        assert {0.0} < {round(value, 4) for value in mask.flatten().tolist()} <= {0.0, round(1 / 0.6, 4)}


def test_dropout_without_gradients(make_model, make_ids):
    """The original refuses this."""
    model, ids = make_model(SruppForCausalLM, dropout=0.4).train(), make_ids(2, 9)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_autocast_keeps_states_in_float32(make_model, make_ids):
    model, ids = make_model(SruppForCausalLM, dtype=torch.float32), make_ids(2, 33)
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, return_memory=True)
        output.loss.backward()
    assert {state.dtype for state in output.memory.cell_states} == {torch.float32}
    torch.testing.assert_close(output.loss, expected.loss, atol=0.05, rtol=0.02)
    assert all(gradient.isfinite().all() for gradient in named_gradients(model).values())
