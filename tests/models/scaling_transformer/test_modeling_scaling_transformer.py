"""What a Scaling Transformer computes does not depend on how its input is laid out: batches, padding, documents."""

import pytest
import torch

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import (
    ScalingTransformerForCausalLM,
)
from hf_efficient.modules.sparse_layers import SparseFeedForward
from hf_efficient.modules.unit_usage import sparse_feed_forwards
from hf_efficient.ops.backend import use_backend
from tests.helpers.comparison import assert_close, assert_gradients_close, named_gradients
from training.benchmarks.equal_winners import equal_winners


PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "inside": [[1, 0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}


def assert_rows(model, output, ids, mask):
    """Real positions of each row are those of the row alone, without padding."""
    for row in range(len(ids)):
        alone = model(ids[row : row + 1, mask[row]]).last_hidden_state[0]
        torch.testing.assert_close(output[row, mask[row]], alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 63])
def test_a_batch_equals_its_rows(make_model, make_ids, variant, length):
    model, ids = make_model(**variant), make_ids(3, length)
    assert_rows(model, model(ids).last_hidden_state, ids, torch.ones_like(ids).bool())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("where", PADS)
def test_padding_leaves_no_trace(make_model, make_ids, variant, where, attention):
    ids, mask = make_ids(3, 9), torch.tensor(PADS[where]).bool()
    model = make_model(attention=attention, **variant)
    output = model(ids, attention_mask=mask.long()).last_hidden_state
    assert output.isfinite().all()
    assert_rows(model, output, ids, mask)


@torch.no_grad()
def test_nan_in_padded_embeddings_is_harmless(make_model, variant):
    model, mask = make_model(**variant), torch.tensor(PADS["inside"]).bool()
    embeddings = torch.randn(3, 9, 24, dtype=torch.float64)
    expected = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    spoilt = embeddings.masked_fill(~mask[..., None], float("nan"))
    output = model(inputs_embeds=spoilt, attention_mask=mask).last_hidden_state
    assert torch.equal(output[mask], expected[mask])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradients_of_padded_rows(make_model, make_ids, variant, training):
    """Those of the rows alone; the masks of training are soft here, so that nothing depends on draws."""
    fields = {**variant, "lm_head_sparse_probability": None}
    fields |= {"ff_hard_probability": 0.0} if "ff_sparsity" in variant else {}
    fields |= {"position_embedding_type": "learned"} if training else {}
    model = make_model(ScalingTransformerForCausalLM, **fields).train(training)
    ids, mask = make_ids(3, 9), torch.tensor(PADS["left"]).bool()
    results = []
    for padded in (True, False):
        model.zero_grad()
        for row in range(1 if padded else 3):
            rows = slice(0, 3) if padded else slice(row, row + 1)
            kept = mask[rows] if padded else mask[rows, mask[row]]
            row_ids = ids[rows] if padded else ids[rows, mask[row]]
            logits = model(row_ids, attention_mask=kept.long()).logits
            logits[kept].square().sum().backward()
        results.append(named_gradients(model))
    assert_gradients_close(*results, 1e-9)


# Lengths of the documents in each row, and the first position of the first: a row can begin within a document
PACKED = {"rows": [(4, 5, 2), (1, 10, 0)], "many": [(1, 1, 9), (2, 1, 8)]}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx"])
def test_packed_documents_are_strangers(make_model, make_ids, variant, told_by, case, pads, attention):
    model, ids = make_model(attention=attention, **variant), make_ids(2, 11 + pads)
    given = []
    for lengths in PACKED[case]:
        spans = [torch.arange(n) if told_by == "position_ids" else torch.full((n,), i) for i, n in enumerate(lengths)]
        given.append(torch.nn.functional.pad(torch.cat(spans), (0, pads)))
    mask = (torch.arange(11 + pads) < 11).long().expand(2, -1) if pads else None
    output = model(ids, attention_mask=mask, **{told_by: torch.stack(given)}).last_hidden_state
    for row, lengths in enumerate(PACKED[case]):
        start = 0
        for length in filter(None, lengths):
            alone = model(ids[row : row + 1, start : start + length]).last_hidden_state[0]
            torch.testing.assert_close(output[row, start : start + length], alone, atol=1e-10, rtol=1e-10)
            start += length


@torch.no_grad()
def test_documents_told_by_their_ends(make_model, make_ids, variant):
    model, ids = make_model(**variant), make_ids(1, 9)
    ends = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    output = model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=6, max_length_k=6).last_hidden_state
    alone = torch.cat([model(part).last_hidden_state for part in ids.split([2, 1, 6], 1)], 1)
    torch.testing.assert_close(output, alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_positions_are_taken_as_they_are(make_model, make_ids):
    """A table's rows at the positions that are given; a document may begin anywhere in it."""
    ids = make_ids(2, 5)
    for fields in ({}, {"position_embedding_type": "low_rank", "position_rank": 7}):
        model = make_model(**fields)
        shifted = model(ids, position_ids=torch.arange(9, 14)[None]).last_hidden_state
        assert not torch.allclose(shifted, model(ids).last_hidden_state)
        model.positions.table.copy_(model.positions.table.roll(-9, 0))
        assert_close("shifted table", model(ids).last_hidden_state, shifted, 1e-12)
    model = make_model(position_embedding_type="none")
    assert_close("none", model(ids, position_ids=torch.arange(9, 14)[None])[0], model(ids)[0], 1e-12)


@torch.no_grad()
def test_a_causal_model_does_not_look_ahead(make_model, make_ids, variant):
    model, ids = make_model(**variant), make_ids(1, 9)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 42
    before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-10, rtol=1e-10)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_controllers_choose_by_float32_whatever_the_dtype(make_model, make_ids, variant, dtype, monkeypatch):
    from hf_efficient.ops import sparse_ff_reference

    model, ids = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **variant), make_ids(2, 63)
    expected, found = model(ids).logits, []
    compute = sparse_ff_reference.controller_logits
    monkeypatch.setattr(
        sparse_ff_reference, "controller_logits", lambda *args: found.append(compute(*args)) or found[-1]
    )
    with use_backend("reference"):  # a kernel has logits of its own
        output = model.to(dtype)(ids).logits
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert len(found) == len(sparse_feed_forwards(model))
    assert {logits.dtype for logits in found} <= {torch.float32}
    if not found:  # where rounding cannot choose another unit
        assert (output - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


EVERYTHING = {
    "num_hidden_layers": 1,
    "ff_sparsity": 5,
    "ff_rank": 3,
    "attention_type": "multiplicative_conv",
    "attention_sparsity": 6,
    "attention_value_input": "by_module",
    "lm_head_type": "multiplicative",
    "loss_sparsity": 3,
}


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_compiles_whole(make_model, make_ids, mode):
    """Training draws inside the graph, so that it is compared where draws decide nothing: by soft masks alone."""
    model = make_model(ScalingTransformerForCausalLM, **EVERYTHING, ff_hard_probability=0.0).train(mode == "training")
    torch._dynamo.reset()
    trains = mode == "training"  # of one length, since graphs of both passes take long to make
    options = {"dynamic": False, "backend": "aot_eager"} if trains else {"dynamic": True, "backend": "eager"}
    compiled = torch.compile(model, fullgraph=True, **options)
    for length in (17,) if trains else (5, 17):
        ids = make_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        results = []
        for run in (model, compiled):
            model.zero_grad()
            with torch.set_grad_enabled(mode != "evaluation"):
                output = run(ids, attention_mask=mask, labels=ids, use_cache=False)
            if mode != "evaluation":
                output.loss.backward()
            results.append({"logits": output.logits.detach(), **named_gradients(model)})
        assert_close("compiled", results[1], results[0], 1e-9)


def test_a_compiled_training_step_has_hard_masks(make_model, make_ids):
    """By select, which is drawn in the graph: here always hard masks; the test above has soft ones."""
    fields = {"ff_sparsity": 5, "ff_rank": 3, "ff_hard_probability": 1.0, "ff_temperature": 1e-9}
    model = make_model(ScalingTransformerForCausalLM, num_hidden_layers=1, **fields).train()
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, fullgraph=True, backend="eager"), make_ids(2, 7)
    assert_close("logits", compiled(ids).logits.detach(), model(ids).logits.detach(), 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, EVERYTHING], ids=["dense", "everything"])
def test_exports_and_reloads(make_model, make_ids, fields, tmp_path):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    wrapped = Logits(make_model(ScalingTransformerForCausalLM, **fields)).eval()
    ids = make_ids(2, 7)
    shape = {1: torch.export.Dim("length", min=2, max=60)}
    program = torch.export.export(wrapped, (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape))
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    ids = make_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    torch.testing.assert_close(module(ids, mask)[mask.bool()], wrapped(ids, mask)[mask.bool()])


@torch.no_grad()
def test_attentions_and_hidden_states(make_model, make_ids, variant):
    model, ids = make_model(attention="eager", **variant), make_ids(2, 7)
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert output.attentions[0].shape == (2, model.config.num_attention_heads, 7, 7)
    torch.testing.assert_close(output.attentions[1].sum(-1).mean().item(), 1.0)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_gradients_in_evaluation_mode(make_model, make_ids):
    """The winners are constants there: their own rows have a gradient, the controller has none."""
    model = make_model(ScalingTransformerForCausalLM, ff_sparsity=5, ff_rank=3)
    ids = make_ids(2, 7)
    model(ids, labels=ids).loss.backward()
    layer = model.model.layers[0].feed_forward.sparse
    assert isinstance(layer, SparseFeedForward)
    assert layer.up.grad.any()
    assert layer.down.grad.any()
    assert layer.controller_up.grad is None
    assert model.model.embed_tokens.weight.grad.any()


@torch.no_grad()
def test_a_mask_of_four_dimensions_stands_in_the_place_of_causality(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 7)
    causal = torch.ones(7, 7).tril().bool().expand(2, 1, -1, -1)
    assert_close("causal", model(ids, attention_mask=causal)[0], model(ids)[0], 1e-12)
    whole = torch.ones(2, 1, 7, 7).bool()
    assert not torch.allclose(model(ids, attention_mask=whole)[0], model(ids)[0])


def test_most_winners_are_the_same_in_bfloat16(make_config, make_ids):
    """All but a few in a hundred of a new model, of which rounding before the controller is the cause."""
    fields = {"hidden_size": 96, "intermediate_size": 192, "ff_sparsity": 8, "ff_rank": 12, "num_hidden_layers": 2}
    model = ScalingTransformerForCausalLM(make_config(**fields))
    shares = equal_winners(model, make_ids(4, 63))
    assert len(shares) == 2
    assert min(shares) > 0.93
    assert equal_winners(model, make_ids(4, 63), torch.float32) == [1.0, 1.0]
