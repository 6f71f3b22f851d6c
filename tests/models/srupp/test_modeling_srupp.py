"""What SRU++ computes does not depend on how its input is laid out: batches, padding, packed documents."""

import pytest
import torch

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppForMaskedLM, SruppModel


BIDIRECTIONAL = {
    "both-ways": {"bidirectional": True},
    "both-ways-one-head-norms": {
        "bidirectional": True, "num_attention_heads": 1, "layer_norm": True, "attention_layers": [1]
    },
    "not-causal": {"is_causal": False},
}  # fmt: skip
PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "inside": [[1, 0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}


def assert_rows(model, output, ids, mask, tolerance=1e-10):
    """Real positions of each row are those of the row alone, without padding."""
    for row in range(len(ids)):
        alone = model(ids[row : row + 1, mask[row]]).last_hidden_state[0]
        torch.testing.assert_close(output[row, mask[row]], alone, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_a_batch_equals_its_rows(make_model, make_ids, variant):
    model, ids = make_model(**variant), make_ids(3, 11)
    assert_rows(model, model(ids).last_hidden_state, ids, torch.ones_like(ids).bool())


@torch.no_grad()
@pytest.mark.parametrize("where", PADS)
def test_padding_leaves_no_trace(make_model, make_ids, variant, where):
    ids, mask = make_ids(3, 9), torch.tensor(PADS[where]).bool()
    for attention in ("eager", "sdpa"):
        model = make_model(attention=attention, **variant)
        output = model(ids, attention_mask=mask.long()).last_hidden_state
        assert output.isfinite().all()
        assert_rows(model, output, ids, mask)


@torch.no_grad()
def test_padding_leaves_no_trace_in_float32(make_config, make_ids):
    """As a model begins: to 1e-6."""
    for cls, fields in ((SruppForCausalLM, {}), (SruppForMaskedLM, {"bidirectional": True})):
        model, ids = cls(make_config(**fields)).eval(), make_ids(3, 9)
        for rows in PADS.values():
            mask = torch.tensor(rows).bool()
            logits = model(ids, attention_mask=mask).logits
            for row in range(3):
                alone = model(ids[row : row + 1, mask[row]]).logits[0]
                torch.testing.assert_close(logits[row, mask[row]], alone, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("where", PADS)
@pytest.mark.parametrize("fields", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL)
def test_padding_leaves_no_trace_in_an_encoder(make_model, make_ids, fields, where):
    model, ids, mask = make_model(**fields), make_ids(3, 9), torch.tensor(PADS[where]).bool()
    assert_rows(model, model(ids, attention_mask=mask.long()).last_hidden_state, ids, mask)


@torch.no_grad()
def test_nan_in_padded_embeddings_is_harmless(make_model, make_ids, variant):
    model, mask = make_model(**variant), torch.tensor(PADS["inside"]).bool()
    embeddings = torch.randn(3, 9, model.config.embedding_size, dtype=torch.float64)
    expected = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    spoilt = embeddings.masked_fill(~mask[..., None], float("nan"))
    output = model(inputs_embeds=spoilt, attention_mask=mask).last_hidden_state
    assert torch.equal(output[mask], expected[mask])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_padded_rows(make_model, make_ids, attention):
    """Those of the rows alone, although queries at the pads in front see nothing."""
    model, ids, mask = make_model(SruppForCausalLM, attention), make_ids(3, 9), torch.tensor(PADS["left"]).bool()
    results = []
    for padded in (True, False):
        model.zero_grad()
        for row in range(1 if padded else 3):
            rows = slice(0, 3) if padded else slice(row, row + 1)
            kept = mask[rows] if padded else mask[rows, mask[row]]
            row_ids = ids[rows] if padded else ids[rows, mask[row]]
            logits = model(row_ids, attention_mask=kept.long()).logits
            logits[kept].square().sum().backward()
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# Lengths of the documents in each row, and the first position of the first: a row can begin within a document
PACKED = {"rows": [(4, 5, 2), (1, 10, 0)], "begun": [(3, 8, 0), (7, 4, 0)]}


def packed_positions(lengths, first=0):
    spans = [torch.arange(length) for length in lengths]
    spans[0] = spans[0] + first
    return torch.cat(spans)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_attention_heads": 1}, {"attention_layers": [-1]}, {"attention_layers": []}, *BIDIRECTIONAL.values()],
    ids=["all", "one-head", "last", "none", *BIDIRECTIONAL],
)
def test_packed_documents_are_strangers(make_model, make_ids, fields, case, pads, attention):
    model, ids = make_model(attention=attention, **fields), make_ids(2, 11 + pads)
    first = 5 if case == "begun" else 0
    positions = torch.stack([packed_positions(lengths, first) for lengths in PACKED[case]])
    positions = torch.nn.functional.pad(positions, (0, pads))
    mask = (torch.arange(11 + pads) < 11).long().expand(2, -1) if pads else None
    output = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    for row, lengths in enumerate(PACKED[case]):
        start = 0
        for length in filter(None, lengths):
            alone = model(ids[row : row + 1, start : start + length]).last_hidden_state[0]
            torch.testing.assert_close(output[row, start : start + length], alone, atol=1e-10, rtol=1e-10)
            start += length


@torch.no_grad()
def test_positions_that_do_not_restart_change_nothing(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 7)
    expected = model(ids).last_hidden_state
    for positions in (torch.arange(7)[None], torch.arange(7).expand(2, -1) + 9, torch.full((2, 7), 3)):
        assert torch.equal(model(ids, position_ids=positions).last_hidden_state, expected)


@torch.no_grad()
def test_a_causal_model_does_not_look_ahead(make_model, make_ids, variant):
    model, ids = make_model(**variant), make_ids(1, 9)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 41
    before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-10, rtol=1e-10)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], [0, 1, 2]], ids=["sru", "attends"])
def test_an_encoder_sees_both_sides(make_model, make_ids, layers):
    model, ids = make_model(bidirectional=True, attention_layers=layers), make_ids(1, 9)
    output = model(ids).last_hidden_state
    for place in (0, 8):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 41
        assert ((model(changed).last_hidden_state - output).abs().sum(-1) > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"num_attention_heads": 1}, {"is_causal": False}], ids=["", "one-head", "encoder"]
)
def test_attention_window(make_model, make_ids, fields):
    """Attention over keys that it leaves out is no attention: their content has no effect but through the states, which
    are cut off here by forget gates that forget all."""
    model, ids = make_model(attention_layers=[0], num_hidden_layers=1, **fields), make_ids(2, 9)
    with torch.no_grad():
        model.layers[0].weight_c.zero_()
        model.layers[0].bias[0].fill_(-1e4)
    output = model(ids, attention_window=3).last_hidden_state
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 41
    difference = (model(changed, attention_window=3).last_hidden_state - output).abs().sum(-1)
    seen_by = [4, 5, 6, 7] if fields.get("is_causal") is not False else [0, 1, 2, 3, 4, 5, 6, 7]
    for place in range(9):
        assert (difference[:, place] > 1e-6).all() == (place in seen_by), place
    torch.testing.assert_close(model(ids, attention_window=8).last_hidden_state, model(ids).last_hidden_state)


@torch.no_grad()
def test_bfloat16_stays_near_float32(make_model, make_ids):
    model, ids = make_model(SruppForCausalLM, dtype=torch.float32), make_ids(2, 63)
    expected = model(ids).logits
    output = model.to(torch.bfloat16)(ids).logits
    assert output.dtype == torch.bfloat16
    assert (output - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_compiles_whole_with_dynamic_length(make_model, make_ids):
    model = make_model(SruppForCausalLM, num_hidden_layers=1, num_attention_heads=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 17):
        ids = make_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(ids, attention_mask=mask, labels=ids, use_cache=False)
            output.loss.backward()
            results.append([output.logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"bidirectional": True}], ids=["causal", "encoder"])
def test_exports_and_reloads(make_model, make_ids, fields, tmp_path):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    wrapped = Logits(make_model(num_hidden_layers=1, **fields)).eval()
    ids = make_ids(2, 7)
    shape = {1: torch.export.Dim("length", min=2, max=100)}
    program = torch.export.export(wrapped, (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape))
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    ids = make_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    torch.testing.assert_close(module(ids, mask)[mask.bool()], wrapped(ids, mask)[mask.bool()])


@torch.no_grad()
def test_attentions_and_hidden_states(make_model, make_ids):
    model, ids = make_model(attention="eager", attention_layers=[0, 2]), make_ids(2, 7)
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 2, 7, 7)
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_the_three_forms_of_figure_1(make_config):
    """(a) SRU, (b) with a low-rank map, (c) SRU++: the parameters of a layer (d = 18, d' = 10, k = 3)."""
    recurrence, counts = 4 * 18, []
    for fields in (
        {"projection_size": 0, "attention_layers": []},
        {"attention_layers": [], "attention_layer_norm": False},
        {},
    ):
        counts.append(sum(p.numel() for p in SruppModel(make_config(**fields)).layers[1].parameters()) - recurrence)
    assert counts == [18 * 54, 18 * 10 + 10 * 54, 18 * 10 + 2 * 10 * 10 + 1 + 2 * 10 + 10 * 54]
