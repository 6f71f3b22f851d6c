"""What a model computes does not depend on how its input is laid out, batches, padding, documents, nor on how it runs:
compiled or exported."""

import pytest
import torch

from tests.helpers.comparison import assert_close, assert_gradients_close, named_gradients
from tests.helpers.families import (
    CAUSAL_VARIANTS,
    FF,
    PADS,
    QKV,
    SCALING_TRANSFORMER,
    SPARSE_LOSS,
    SRUPP,
    assert_rows,
    every_causal_variant,
    subjects,
)


ENCODERS = subjects(
    {
        "srupp": {
            "both-ways": {"bidirectional": True},
            "both-ways-one-head-norms": {
                "bidirectional": True,
                "num_attention_heads": 1,
                "layer_norm": True,
                "attention_layers": [1],
            },
            "not-causal": {"is_causal": False},
        }
    }
)
every_variant = pytest.mark.parametrize(("family", "variant"), [*CAUSAL_VARIANTS, *ENCODERS])
either_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 63])
@every_variant
def test_a_batch_equals_its_rows(family, variant, length):
    model, ids = family.make_model(**variant), family.make_ids(3, length)
    assert_rows(model, model(ids).last_hidden_state, ids, torch.ones_like(ids).bool())


@torch.no_grad()
@either_attention
@pytest.mark.parametrize("where", PADS)
@every_variant
def test_padding_leaves_no_trace(family, variant, where, attention):
    model, ids, mask = family.make_model(None, attention, **variant), family.make_ids(3, 9), torch.tensor(PADS[where])
    output = model(ids, attention_mask=mask).last_hidden_state
    assert output.isfinite().all()
    assert_rows(model, output, ids, mask.bool())


@torch.no_grad()
@every_variant
def test_nan_in_padded_embeddings_is_harmless(family, variant):
    model, mask = family.make_model(**variant), torch.tensor(PADS["inside"]).bool()
    embeddings = torch.randn(3, 9, model.get_input_embeddings().embedding_dim, dtype=torch.float64)
    expected = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    spoilt = embeddings.masked_fill(~mask[..., None], float("nan"))
    output = model(inputs_embeds=spoilt, attention_mask=mask).last_hidden_state
    assert torch.equal(output[mask], expected[mask])


@pytest.mark.parametrize(
    ("attention", "training"),
    [("eager", False), ("sdpa", False), ("sdpa", True)],
    ids=["evaluation-eager", "evaluation-sdpa", "training"],
)
@every_causal_variant
def test_gradients_of_padded_rows(family, variant, attention, training):
    """Those of the rows alone, although queries at the pads in front see nothing. The masks of training are soft here,
    so that nothing depends on draws."""
    fields = {**variant}
    if "ff_sparsity" in variant:
        fields["ff_hard_probability"] = 0.0
    if family is not SRUPP:
        fields["lm_head_sparse_probability"] = None
        fields |= {"position_embedding_type": "learned"} if training else {}
    model = family.make_model(family.causal_lm, attention, **fields).train(training)
    ids, mask = family.make_ids(3, 9), torch.tensor(PADS["left"]).bool()
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
    if training or "ff_sparsity" not in variant:  # winners are constants in evaluation, and their controller has none
        assert results[0].keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert_gradients_close(*results, 1e-9)


# Lengths of the documents in each row
PACKED = {
    "rows": [(4, 5, 2), (1, 10, 0)],
    "many": [(1, 1, 9), (2, 1, 8)],
    "begun": [(3, 8, 0), (7, 4, 0)],  # rows that begin within a document, at its position 5
}


@torch.no_grad()
@either_attention
@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize(
    ("told_by", "case"),
    [*(("position_ids", case) for case in PACKED), ("seq_idx", "rows"), ("seq_idx", "many")],
)
@pytest.mark.parametrize(
    ("family", "variant"),
    [*CAUSAL_VARIANTS, pytest.param(SRUPP, {"attention_layers": []}, id="srupp-none-attends"), *ENCODERS],
)
def test_packed_documents_are_strangers(family, variant, told_by, case, pads, attention):
    model, ids = family.make_model(None, attention, **variant), family.make_ids(2, 11 + pads)
    first = 5 if case == "begun" else 0
    given = []
    for lengths in PACKED[case]:
        spans = [torch.arange(n) if told_by == "position_ids" else torch.full((n,), i) for i, n in enumerate(lengths)]
        spans[0] = spans[0] + first
        given.append(torch.nn.functional.pad(torch.cat(spans), (0, pads)))
    given = torch.stack(given)
    mask = (torch.arange(11 + pads) < 11).long().expand(2, -1) if pads else None
    output = model(ids, attention_mask=mask, **{told_by: given}).last_hidden_state
    for row, lengths in enumerate(PACKED[case]):
        start = 0
        for length in filter(None, lengths):
            span = (slice(row, row + 1), slice(start, start + length))
            positions = {"position_ids": given[span]} if first and start == 0 else {}
            alone = model(ids[span], **positions).last_hidden_state[0]
            torch.testing.assert_close(output[row, start : start + length], alone, atol=1e-10, rtol=1e-10)
            start += length


@torch.no_grad()
@every_variant
def test_documents_told_by_their_ends(family, variant):
    model, ids = family.make_model(**variant), family.make_ids(1, 9)
    ends = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    output = model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=6, max_length_k=6).last_hidden_state
    alone = torch.cat([model(part).last_hidden_state for part in ids.split([2, 1, 6], 1)], 1)
    torch.testing.assert_close(output, alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@every_causal_variant
def test_a_causal_model_does_not_look_ahead(family, variant):
    model, ids = family.make_model(**variant), family.make_ids(1, 9)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % model.config.vocab_size
    before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-10, rtol=1e-10)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


EVERYTHING = {"num_hidden_layers": 1, **FF, **QKV, "attention_value_input": "by_module", **SPARSE_LOSS}
DYNAMIC = {"dynamic": True, "backend": "aot_eager"}
# Training draws inside the graph, so that it is compared where draws decide nothing: by soft masks alone; and for one
# length, since graphs of both passes take long to make.
COMPILED = [
    pytest.param(SRUPP, {"num_hidden_layers": 1, "num_attention_heads": 1}, True, DYNAMIC, id="srupp"),
    pytest.param(
        SCALING_TRANSFORMER, EVERYTHING, False, {**DYNAMIC, "backend": "eager"}, id="scaling_transformer-evaluation"
    ),
    pytest.param(
        SCALING_TRANSFORMER,
        {**EVERYTHING, "ff_hard_probability": 0.0},
        True,
        {**DYNAMIC, "dynamic": False},
        id="scaling_transformer-training",
    ),
]


@pytest.mark.parametrize(("family", "fields", "training", "options"), COMPILED)
def test_compiles_whole(family, fields, training, options):
    model = family.make_model(family.causal_lm, **fields).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **options)
    for length in (5, 17) if options["dynamic"] else (17,):
        ids = family.make_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        results = []
        for run in (model, compiled):
            model.zero_grad()
            with torch.set_grad_enabled(training):
                output = run(ids, attention_mask=mask, labels=ids, use_cache=False)
            if training:
                output.loss.backward()
            results.append({"logits": output.logits.detach(), **named_gradients(model)})
        assert_close("compiled", results[1], results[0], 1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "case"),
    subjects(
        {
            "srupp": {
                "causal": ("Model", {"num_hidden_layers": 1}),
                "encoder": ("Model", {"num_hidden_layers": 1, "bidirectional": True}),
            },
            "scaling_transformer": {
                "dense": ("ForCausalLM", {"num_hidden_layers": 1}),
                "everything": ("ForCausalLM", EVERYTHING),
            },
        }
    ),
)
def test_exports_and_reloads(family, case, tmp_path):
    class FirstOutput(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False)[0]

    kind, fields = case
    wrapped = FirstOutput(family.make_model(family.head(kind), **fields)).eval()
    ids = family.make_ids(2, 7)
    shape = {1: torch.export.Dim("length", min=2, max=60)}
    program = torch.export.export(wrapped, (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape))
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    ids = family.make_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    torch.testing.assert_close(module(ids, mask)[mask.bool()], wrapped(ids, mask)[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(SRUPP, {"attention_layers": [0, 2]}, id="srupp-two-of-three-attend"),
        *subjects({"scaling_transformer": SCALING_TRANSFORMER.variants}),
    ],
)
def test_attentions_and_hidden_states(family, variant):
    model, ids = family.make_model(attention="eager", **variant), family.make_ids(2, 7)
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    heads = model.config.num_attention_heads
    assert output.attentions[0].shape == (2, heads, 7, 7)
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(2, heads, 7, dtype=torch.float64))
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
