"""SRU++ that looks both ways, its window, and its sizes; what all families share is tested in tests/models."""

import pytest
import torch

from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM, SruppForMaskedLM, SruppModel
from tests.helpers.families import PADS


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
def test_positions_that_do_not_restart_change_nothing(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 7)
    expected = model(ids).last_hidden_state
    for positions in (torch.arange(7)[None], torch.arange(7).expand(2, -1) + 9, torch.full((2, 7), 3)):
        assert torch.equal(model(ids, position_ids=positions).last_hidden_state, expected)


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
