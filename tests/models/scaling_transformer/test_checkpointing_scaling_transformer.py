"""Layers that run a second time in the backward pass: they choose the same units and drop the same values."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.modules import sparse_layers
from tests.helpers.comparison import assert_gradients_close, named_gradients


FF = {"ff_sparsity": 5, "ff_rank": 3}
QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
DROPOUT = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.2}
KINDS = {
    "hard": {**FF, "ff_hard_probability": 1.0},
    "soft": {**FF, "ff_hard_probability": 0.0},
    "either-sru-dropout": {**FF, **QKV, "ff_sru_layers": 1, "ff_hard_probability": 0.5, **DROPOUT},
    "hard-shared-dropout": {**FF, "ff_hard_probability": 1.0, "dropout": 0.3, "share_dropout": True},
    "dense-dropout": DROPOUT,
}


def gradients(model, ids, seed=3):
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model.zero_grad()
    torch.manual_seed(seed)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    return named_gradients(model)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("chunk_size", [0, 7], ids=["whole", "pieces"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(make_model, make_ids, kind, chunk_size, reentrant):
    model = make_model(ScalingTransformerForCausalLM, ff_chunk_size=chunk_size, **KINDS[kind]).train()
    ids = make_ids(2, 9)
    for seed in (3, 4):  # of which some calls have hard masks, and some soft ones
        model.gradient_checkpointing_disable()
        expected = gradients(model, ids, seed)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_gradients_close(gradients(model, ids, seed), expected, 1e-9)


@pytest.mark.parametrize("kind", ["hard", "hard-shared-dropout"])
def test_pieces_that_run_twice_have_the_gradient_of_their_forward_pass(make_model, make_ids, kind, monkeypatch):
    """Against the same pieces, kept instead of recomputed."""
    from hf_efficient.modules import sparse_blocks

    model = make_model(ScalingTransformerForCausalLM, ff_chunk_size=7, **KINDS[kind]).train()
    ids = make_ids(2, 9)
    found = gradients(model, ids)
    monkeypatch.setattr(sparse_blocks, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    assert_gradients_close(found, gradients(model, ids), 1e-9)


@pytest.mark.parametrize("wrapped", ["checkpointing", "pieces", "pieces-in-checkpointing"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_the_second_run_takes_the_winners_of_the_first(make_model, make_ids, wrapped, reentrant, monkeypatch):
    """Even where its logits are others, as rounding can make them: here they are turned round."""
    fields = {**FF, "ff_hard_probability": 1.0, "ff_chunk_size": 7 if "pieces" in wrapped else 0}
    model = make_model(ScalingTransformerForCausalLM, **fields).train()
    if "checkpointing" in wrapped:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    chosen, drawn, phase = {"forward": [], "backward": []}, [], ["forward"]
    draw, units = sparse_layers.draw_winners, sparse_layers.gated_units

    def turned_round(logits, *args):
        winners = draw(-logits if phase[0] == "backward" else logits, *args)
        drawn.append(winners)
        return winners

    def noted(pre_activations, code, up, bias, winners, *options):
        chosen[phase[0]].append(winners)
        return units(pre_activations, code, up, bias, winners, *options)

    monkeypatch.setattr(sparse_layers, "draw_winners", turned_round)
    monkeypatch.setattr(sparse_layers, "gated_units", noted)
    loss = model(make_ids(2, 9), labels=make_ids(2, 9)).loss
    phase[0] = "backward"
    loss.backward()
    first = {tuple(winners.flatten().tolist()) for winners in chosen["forward"]}
    again = {tuple(winners.flatten().tolist()) for winners in chosen["backward"]}
    assert len(first) == len(chosen["forward"]) > 0
    assert again == first


def test_a_model_inside_a_checkpoint_of_the_user(make_model, make_ids):
    model = make_model(ScalingTransformerForCausalLM, **KINDS["either-sru-dropout"]).train()
    ids = make_ids(2, 9)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    results = []
    for recomputed in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        run = lambda x: model(inputs_embeds=x).logits  # noqa: E731
        logits = checkpoint(run, embedded, use_reentrant=False) if recomputed else run(embedded)
        logits.square().sum().backward()
        results.append(named_gradients(model))
    assert_gradients_close(*results, 1e-9)


def test_compiled_recomputation(make_model, make_ids):
    """A compiler refuses to run again what writes down what it drew. Pieces inside a layer, both run again."""
    fields = {**FF, "num_hidden_layers": 1, "ff_hard_probability": 0.0, "ff_chunk_size": 9}
    model, ids = make_model(ScalingTransformerForCausalLM, **fields).train(), make_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = named_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    assert_gradients_close(model, expected, 1e-9)
