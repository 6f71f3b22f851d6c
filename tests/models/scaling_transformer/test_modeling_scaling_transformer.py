"""A Scaling Transformer's positions, winners and masks; what all families share is tested in tests/models."""

import pytest
import torch

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.modules.sparse_layers import SparseFeedForward
from hf_efficient.modules.unit_usage import sparse_feed_forwards
from hf_efficient.ops.backend import use_backend
from tests.helpers.comparison import assert_close
from training.benchmarks.equal_winners import equal_winners


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


def test_a_compiled_training_step_has_hard_masks(make_model, make_ids):
    """By select, which is drawn in the graph: here always hard masks; the test above has soft ones."""
    fields = {"ff_sparsity": 5, "ff_rank": 3, "ff_hard_probability": 1.0, "ff_temperature": 1e-9}
    model = make_model(ScalingTransformerForCausalLM, num_hidden_layers=1, **fields).train()
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, fullgraph=True, backend="eager"), make_ids(2, 7)
    assert_close("logits", compiled(ids).logits.detach(), model(ids).logits.detach(), 1e-9)


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
