"""The encoder's forms of attention against each other, and which of them runs."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.models.tupe import modeling_tupe
from tests.helpers.attention import replace_attention
from tests.helpers.comparison import assert_close, assert_gradients_close


LENGTHS = [
    pytest.param((1,), id="B1-T1"),
    pytest.param((2, 2, 2), id="B3-T2"),
    pytest.param((63, 5), id="B2-T63-padded"),
]


@pytest.fixture
def paths(monkeypatch):
    """Names of the attention functions in the order in which they ran."""
    ran = []

    def watched(name, function):
        def run_and_note(*args, **kwargs):
            ran.append(name)
            return function(*args, **kwargs)

        return run_and_note

    eager = watched("eager", modeling_tupe.eager_attention_forward)
    monkeypatch.setattr(modeling_tupe, "eager_attention_forward", eager)
    auto = watched(modeling_tupe.AUTO_ATTENTION, modeling_tupe.auto_attention_forward)
    monkeypatch.setattr(modeling_tupe, "auto_attention_forward", auto)
    replace_attention(monkeypatch, "sdpa", watched("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"]))
    return ran


def run(model, inputs, with_grad):
    real = inputs["attention_mask"].bool()
    with torch.set_grad_enabled(with_grad):
        output = model(**inputs).last_hidden_state[real]
    if with_grad:
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        (output * cotangent).sum().backward()
    return output


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_attention_gives_the_same_outputs_and_gradients(make_model, make_inputs, variant, lengths):
    inputs = make_inputs(*lengths)
    # In float64, because some gradients are zero but for rounding (a key's bias moves all logits of a row alike).
    reference = make_model(attention="eager", **variant).double()
    expected = run(reference, inputs, with_grad=True)
    for attention in ("sdpa", None):
        model = make_model(attention=attention, **variant).double()
        assert model.config._attn_implementation == (attention or "tupe_auto")
        assert_close(f"{attention}, with grad", run(model, inputs, with_grad=True), expected, 1e-13)
        assert_gradients_close(model, reference, 1e-11)
        for call in ("first", "from cache"):
            assert_close(f"{attention}, no grad, {call}", run(model, inputs, with_grad=False), expected, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(17, 17), (17, 4)], ids=["full", "padded"])
def test_flex_attention_gives_the_same_outputs(make_model, make_inputs, monkeypatch, lengths):
    """Inference only: flex_attention has no backward on a CPU. Slow because it is compiled."""
    inputs, seen = make_inputs(*lengths), []
    flex_attention = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def watched(module, query, key, value, mask, position_bias=None, **kwargs):
        seen.append((mask, position_bias))
        return flex_attention(module, query, key, value, mask, position_bias=position_bias, **kwargs)

    replace_attention(monkeypatch, "flex_attention", watched)
    model, reference = make_model(attention="flex_attention"), make_model(attention="eager")
    assert_close("flex", run(model, inputs, with_grad=False), run(reference, inputs, with_grad=False), 1e-5)
    assert len(seen) == 2
    for mask, position_bias in seen:
        assert isinstance(mask, BlockMask)
        assert position_bias.shape == (2, 3, 17, 17)
        assert position_bias.stride(0) == 0  # a view that takes no memory


@pytest.mark.parametrize(
    ("training", "with_grad", "dropout", "expected"),
    [
        pytest.param(True, True, 0.1, "eager", id="training"),
        pytest.param(True, True, 0.0, "eager", id="training-no-dropout"),
        pytest.param(False, True, 0.1, "eager", id="eval-with-grad"),
        pytest.param(False, False, 0.1, "sdpa", id="inference"),
        pytest.param(True, False, 0.1, "eager", id="train-mode-no-grad"),
    ],
)
def test_path_that_auto_takes_on_a_cpu(make_model, make_inputs, paths, training, with_grad, dropout, expected):
    model = make_model(attention_probs_dropout_prob=dropout).train(training)
    with torch.set_grad_enabled(with_grad):
        model(**make_inputs(7, 5))
    assert paths == ["tupe_auto", expected] * 2


def test_frozen_positions_train_through_the_fused_kernel(make_model, make_inputs, paths):
    model = make_model().train()
    model.position_bias.requires_grad_(False)
    model(**make_inputs(7, 5)).last_hidden_state.sum().backward()
    assert paths == ["tupe_auto", "sdpa"] * 2
    assert all(parameter.grad is None for parameter in model.position_bias.parameters())
    assert model.embed_tokens.weight.grad.abs().sum() > 0


def test_forced_attention_is_the_one_that_runs(make_model, make_inputs, paths):
    model = make_model(attention="sdpa")
    model(**make_inputs(7, 5))
    assert paths == ["sdpa"] * 2
    model.set_attn_implementation("eager")
    model(**make_inputs(7, 5))
    assert paths == ["sdpa"] * 2 + ["eager"] * 2


def test_attention_weights_are_returned_under_auto(make_model, make_inputs, paths):
    inputs = make_inputs(7, 5)
    with torch.no_grad():
        outputs = make_model()(**inputs, output_attentions=True, output_hidden_states=True)
        expected = make_model(attention="eager")(**inputs, output_attentions=True)
    assert "sdpa" not in paths
    assert len(outputs.hidden_states) == 3
    for ours, theirs in zip(outputs.attentions, expected.attentions, strict=True):
        assert_close("attention", ours, theirs, 1e-5)
        assert torch.allclose(ours.sum(-1), torch.ones(2, 3, 7))
        assert ours[1, :, :, 5:].max() == 0


def test_bias_is_not_expanded_over_the_batch_in_training(make_model, make_inputs):
    model = make_model().train()
    seen = []
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    model(**make_inputs(7, 5, 3))
    (first_bias, first_mask), (second_bias, second_mask) = seen
    assert first_bias.shape == (1, 3, 7, 7)
    assert first_bias is second_bias
    assert first_mask is second_mask
    assert first_mask.shape[:2] == (3, 1)
    seen.clear()
    with torch.no_grad():
        model.eval()(input_ids=make_inputs(7, 7)["input_ids"])
    assert seen[0][0].shape == (1, 3, 7, 7)  # nor in evaluation, where there is no padding
