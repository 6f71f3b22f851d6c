"""Export of SRU++ to ONNX, whose results in another runtime are those of torch."""

import pytest
import torch

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppForSequenceClassification, SruppModel
from tests.helpers.comparison import assert_close


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

MODELS = {
    "one-layer": (SruppModel, {"num_hidden_layers": 1}),
    "base": (SruppModel, {}),
    "causal-lm-tied": (SruppForCausalLM, {"tie_word_embeddings": True, "use_peephole": False}),
    "bidirectional-classification": (SruppForSequenceClassification, {"bidirectional": True}),
}


def result_of(output):
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


# torch compiles the step of every recurrence.
@pytest.mark.parametrize(
    "name", ["one-layer", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
def test_another_runtime_gives_the_same_for_all_lengths(name, make_model, make_ids, tmp_path):
    cls, fields = MODELS[name]
    model = make_model(cls, dtype=torch.float32, use_cache=False, **{"num_hidden_layers": 2, **fields})
    ids = make_ids(2, 9)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        model,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        dynamo=True,
        verbose=False,
    )
    assert "Scan" in {node.op_type for node in program.model.graph}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch, length in ((1, 1), (3, 9), (2, 63)):
        ids = make_ids(batch, length)
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        found, *_ = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = result_of(model(ids, attention_mask=mask)).detach()
        real = mask.bool() if expected.dim() == 3 else slice(None)
        assert_close(f"{batch} rows of {length}", torch.from_numpy(found)[real], expected[real], 1e-5)
