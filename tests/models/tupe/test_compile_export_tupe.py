"""TUPE as one graph: `torch.compile(fullgraph=True)` in training and inference, and `torch.export`."""

import pytest
import torch

from hf_efficient.models.tupe import modeling_tupe
from hf_efficient.models.tupe.modeling_tupe import TupeForMaskedLM, TupeForSequenceClassification
from tests.helpers.comparison import assert_close, assert_gradients_close


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that runs the graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph


@pytest.mark.parametrize("attention", ["sdpa", None])
def test_training_compiles_to_one_graph_for_all_lengths(make_model, make_inputs, attention):
    model = make_model(TupeForMaskedLM, attention, num_hidden_layers=1).train()
    reference = make_model(TupeForMaskedLM, attention, num_hidden_layers=1).train()
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for lengths in ((9, 4), (11, 11), (23, 2)):
        inputs = make_inputs(*lengths)
        loss = compiled(**inputs, labels=inputs["input_ids"]).loss
        expected = reference(**inputs, labels=inputs["input_ids"]).loss
        assert_close("loss", loss, expected, 1e-5)
        loss.backward()
        expected.backward()
    assert graphs.count == 1
    assert_gradients_close(model, reference, 1e-4)


def test_inference_compiles_to_one_graph_for_all_lengths(make_model, make_inputs):
    model = make_model(TupeForSequenceClassification, num_hidden_layers=1, num_labels=3)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    with torch.no_grad():
        for lengths in ((9, 4), (11, 11), (23, 2)):
            inputs = make_inputs(*lengths)
            assert_close(f"logits at {lengths}", compiled(**inputs).logits, model(**inputs).logits, 1e-5)
    assert graphs.count == 1


def test_gradients_through_aot_autograd(make_model, make_inputs):
    """The backward is traced too, as inductor needs it."""
    model, reference = (make_model(TupeForMaskedLM, num_hidden_layers=1).train() for _ in range(2))
    inputs = make_inputs(9, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    reference(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert_gradients_close(model, reference, 1e-4)


@pytest.mark.slow
def test_inductor_gives_the_same_gradients(make_model, make_inputs):
    model, reference = make_model(TupeForMaskedLM).train(), make_model(TupeForMaskedLM).train()
    inputs = make_inputs(9, 4)
    torch.compile(model, fullgraph=True)(**inputs, labels=inputs["input_ids"]).loss.backward()
    reference(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert_gradients_close(model, reference, 1e-4)


def test_exported_program_runs_any_batch_and_comes_back_from_a_file(make_model, make_inputs, tmp_path):
    model = make_model(TupeForSequenceClassification, num_labels=3)
    inputs = make_inputs(9, 4, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}, strict=False)
    operators = {
        node.target.namespace
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    assert operators == {"aten"}
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in ((9, 4, 6), (9,), (2, 9, 1, 9, 5)):
        inputs = make_inputs(*lengths)
        with torch.no_grad():
            assert_close(f"logits of {lengths}", reloaded(**inputs)["logits"], model(**inputs).logits, 1e-5)


def test_exported_program_runs_any_length(make_model, make_inputs):
    model = make_model(TupeForMaskedLM)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=70)
    inputs = make_inputs(9, 4)
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={name: {0: batch, 1: length} for name in inputs}, strict=False
    ).module()
    for lengths in ((9, 4), (63,), (3, 2, 1), (70, 1)):
        inputs = make_inputs(*lengths)
        with torch.no_grad():
            assert_close(f"logits of {lengths}", program(**inputs)["logits"], model(**inputs).logits, 1e-5)


@pytest.mark.filterwarnings("ignore:.*TorchScript|`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_serves_other_masks_and_new_weights(make_model, make_inputs, monkeypatch):
    monkeypatch.setattr(modeling_tupe, "ROWWISE_MIN_LENGTH", 1)
    model = make_model(return_dict=False, num_hidden_layers=1)
    first, second = make_inputs(9, 4), make_inputs(2, 9)
    with torch.no_grad():
        expected = model(**second)[0]  # also leaves a position bias to be kept
        traced = torch.jit.trace(model, (first["input_ids"], first["attention_mask"]), check_trace=False)
        assert_close("other lengths", traced(second["input_ids"], second["attention_mask"])[0], expected, 1e-5)
        model.position_bias.query.weight.mul_(2)
        expected = model(**second)[0]
        assert_close("new weights", traced(second["input_ids"], second["attention_mask"])[0], expected, 1e-5)
