"""Encoder-decoders compiled and exported: evaluation as one graph for any lengths, training with a break at each block
that is rebuilt."""

import pytest
import torch

from hf_efficient.models.terraformer.modeling_terraformer import TerraformerForConditionalGeneration
from tests.helpers.comparison import assert_close, named_gradients
from tests.helpers.families import CROSS, FF, QKV, SPARSE_LOSS, TERRAFORMER


SMALL = {"num_encoder_layers": 1, "num_decoder_layers": 1, "attentions_per_layer": 1}
ALL = {**SMALL, **FF, **QKV, "ff_sru_layers": 1, **SPARSE_LOSS}
MIXED = {"encoder_long_attention": "lsh", "decoder_long_attention": "mixed", "lsh_full_length": 8}
KINDS = {
    "joined": ALL,
    "joined, hashing and mixed": {**ALL, **MIXED, "lsh_chunk_length": 4},
    "cross, hashing": {**ALL, **CROSS, "encoder_long_attention": "lsh", "lsh_chunk_length": 4},
}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, source, mask, target):
        return self.model(source, mask, decoder_input_ids=target, use_cache=False).logits


def inputs_of(length, target_length, rows=2):
    source, target = TERRAFORMER.make_ids(rows, length), TERRAFORMER.make_ids(rows, target_length)
    mask = torch.ones_like(source)
    mask[-1, : length // 2] = 0
    return source, mask, target


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_exports_and_reloads_for_any_rows_and_lengths(make_model, kind, tmp_path):
    wrapped = Logits(make_model(**KINDS[kind])).eval()
    rows = torch.export.Dim("rows", min=1, max=60)
    source, target = ({0: rows, 1: torch.export.Dim(name, min=2, max=60)} for name in ("source", "target"))
    program = torch.export.export(wrapped, inputs_of(7, 5), dynamic_shapes=(source, source, target))
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    for sizes in ((7, 5, 2), (23, 9, 3), (2, 2, 1)):
        given = inputs_of(*sizes)
        torch.testing.assert_close(module(*given), wrapped(*given), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_evaluation_compiles_whole(make_model):
    model = make_model(**KINDS["joined, hashing and mixed"])
    torch._dynamo.reset()
    compiled = torch.compile(Logits(model), fullgraph=True, dynamic=True, backend="eager")
    given = inputs_of(23, 9)
    torch.testing.assert_close(compiled(*given), Logits(model)(*given), atol=1e-10, rtol=1e-10)


def test_training_breaks_the_graph_at_blocks_that_are_rebuilt(make_model):
    model = make_model(TerraformerForConditionalGeneration, **SMALL).train()
    source, mask, target = inputs_of(7, 5)
    results = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(source, mask, labels=target).loss.backward()
        results.append(named_gradients(model))
    assert_close("gradient", results[1], results[0], 1e-9)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks
    assert all("reversible blocks rebuild their inputs" in reason for reason in breaks), list(breaks)
