"""The encoder's forms of attention against each other, and what padding, batching and the layout must not change."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.models.tupe import attention_tupe, modeling_tupe
from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
)


VARIANTS = [
    pytest.param({}, id="tupe-r"),
    pytest.param({"relative_attention": False, "normalize_before": True}, id="tupe-a-prenorm"),
    pytest.param({"untie_cls": False, "embedding_norm": False}, id="tied-cls-no-embedding-norm"),
]
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

    eager = watched("eager", attention_tupe.eager_attention_forward)
    for module in (attention_tupe, modeling_tupe):
        monkeypatch.setattr(module, "eager_attention_forward", eager)
    auto = watched(attention_tupe.AUTO_ATTENTION, attention_tupe.auto_attention_forward)
    monkeypatch.setattr(modeling_tupe, "auto_attention_forward", auto)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"]))
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
@pytest.mark.parametrize("fields", VARIANTS)
def test_every_attention_gives_the_same_outputs_and_gradients(
    make_model, make_inputs, assert_close, assert_same_gradients, fields, lengths
):
    inputs = make_inputs(*lengths)
    # In float64, because some gradients are zero but for rounding (a key's bias moves all logits of a row alike).
    reference = make_model(attention="eager", **fields).double()
    expected = run(reference, inputs, with_grad=True)
    for attention in ("sdpa", None):
        model = make_model(attention=attention, **fields).double()
        assert model.config._attn_implementation == (attention or "tupe_auto")
        assert_close(f"{attention}, with grad", run(model, inputs, with_grad=True), expected, 1e-13)
        assert_same_gradients(model, reference, 1e-11)
        for call in ("first", "from cache"):
            assert_close(f"{attention}, no grad, {call}", run(model, inputs, with_grad=False), expected, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(17, 17), (17, 4)], ids=["full", "padded"])
def test_flex_attention_gives_the_same_outputs(make_model, make_inputs, assert_close, monkeypatch, lengths):
    """Inference only: flex_attention has no backward on a CPU. Slow because it is compiled."""
    inputs, seen = make_inputs(*lengths), []
    flex_attention = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def watched(module, query, key, value, mask, position_bias=None, **kwargs):
        seen.append((mask, position_bias))
        return flex_attention(module, query, key, value, mask, position_bias=position_bias, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", watched)
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


def test_attention_weights_are_returned_under_auto(make_model, make_inputs, paths, assert_close):
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


@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
def test_a_batch_equals_its_rows_and_padding_changes_nothing(
    make_model, make_inputs, assert_close, attention, with_grad
):
    model = make_model(attention=attention)
    inputs = make_inputs(9, 1, 4)
    real = inputs["attention_mask"].bool()
    with torch.set_grad_enabled(with_grad):
        batch = model(**inputs).last_hidden_state
        inputs["input_ids"][~real] = torch.randint(3, 40, ((~real).sum(),))
        other_pads = model(**inputs).last_hidden_state
        longer = {name: torch.nn.functional.pad(tensor, (0, 6)) for name, tensor in inputs.items()}
        longer = model(**longer).last_hidden_state
        for row, ids in enumerate(inputs["input_ids"]):
            keep = real[row]
            alone = model(input_ids=ids[keep][None]).last_hidden_state[0]
            assert_close(f"row {row}", batch[row, keep], alone, 1e-5)
            assert_close(f"row {row}, other ids in the pads", other_pads[row, keep], alone, 1e-5)
            assert_close(f"row {row}, more padding", longer[row, : keep.numel()][keep], alone, 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
def test_padding_inside_changes_nothing(make_model, make_inputs, assert_close, attention):
    """Tokens keep their columns, and what stands in the masked ones is not seen."""
    model = make_model(attention=attention)
    inputs = make_inputs(9, 9)
    inputs["attention_mask"][:, 3:5] = 0
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).last_hidden_state
    inputs["input_ids"][:, 3:5] = 17
    assert_close("other ids", model(**inputs).last_hidden_state[real], expected[real], 1e-6)
    embeds = model.embed_tokens(inputs["input_ids"]).detach()
    embeds[:, 3:5] = 1e3
    embedded = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert_close("other embeddings", embedded[real], expected[real], 1e-5)
    pairs = real[:, None, None, :].expand(-1, 1, 9, -1)
    for mask in (pairs, pairs.long(), (1.0 - pairs.float()) * -1e9):
        # A 4-D mask leaves the embeddings of masked columns alone, which nobody looks at.
        assert_close(
            f"4-D {mask.dtype}", model(inputs["input_ids"], mask).last_hidden_state[real], expected[real], 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
def test_a_fully_padded_row_is_finite(make_model, make_inputs, assert_close, attention, dtype):
    model = make_model(attention=attention).to(dtype)
    inputs = make_inputs(7, 7)
    expected = model(**{name: tensor[:1] for name, tensor in inputs.items()}).last_hidden_state
    inputs["attention_mask"][1] = 0
    output = model(**inputs).last_hidden_state
    assert output.isfinite().all()
    assert_close("the other row", output[:1], expected, 1e-5 if dtype == torch.float32 else 2e-2)
    output.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), f"gradient of {name}"
    with torch.no_grad():
        assert model(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("fields", VARIANTS)
def test_position_bias_uses_the_rows_of_the_table_as_the_original_does(make_model, assert_close, fields):
    """Row i + 1 for token i; rows 0 and 1 for [CLS] where it is untied; two buckets for it that the formula leaves."""
    module = make_model(**fields).double().position_bias
    length, buckets = 13, module.relative_attention_bias
    table = module.norm(module.position_embeddings.weight[: length + 1])
    query, key = module.query(table).view(-1, 3, 5), module.key(table).view(-1, 3, 5)
    expected = torch.empty(3, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            row, column = i + 1, j + 1
            if module.untie_cls and (i == 0 or j == 0):
                row = column = 0 if i == 0 else 1
                bucket = 16 if i == 0 else 32
            else:
                distance = abs(j - i)
                bucket = (distance if distance < 8 else 8 + (distance >= 12)) + 16 * (j > i)
            expected[:, i, j] = (query[row] * key[column]).sum(-1) / 10**0.5
            if buckets is not None:
                expected[:, i, j] += buckets.weight[bucket]
    assert_close("position bias", module(length), expected, 1e-13)


def test_padding_enters_the_first_layer_as_zeros(make_model, make_inputs):
    model, seen = make_model(), []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = make_inputs(7, 5)
    model(**inputs)
    assert (seen[0][1, 5:] == 0).all()
    assert (seen[0][inputs["attention_mask"].bool()] != 0).all()


def test_inputs_embeds_equal_ids(make_model, make_inputs, assert_close):
    model = make_model()
    inputs = make_inputs(7, 5)
    embeds = model.embed_tokens(inputs["input_ids"])
    expected = model(**inputs).last_hidden_state
    ours = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(ours, expected)
    assert torch.equal(model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))[0], expected)


def test_position_of_cls_matters_only_where_it_is_tied(make_model, assert_close):
    """[CLS] at column 0 attends evenly to equal tokens in any order; a token elsewhere sees the order."""
    model = make_model(num_hidden_layers=1)
    ids = torch.tensor([[0, 5, 6, 7, 8], [0, 8, 7, 6, 5]])
    first, reversed_order = model(ids).last_hidden_state[:, 0]
    assert_close("state of [CLS]", first, reversed_order, 1e-5)
    tied = make_model(num_hidden_layers=1, untie_cls=False)
    first, reversed_order = tied(ids).last_hidden_state[:, 0]
    assert (first - reversed_order).abs().max() > 1e-2


def test_heads_have_the_shapes_they_promise(make_model, make_inputs):
    inputs = make_inputs(7, 5)
    assert make_model(TupeForMaskedLM)(**inputs).logits.shape == (2, 7, 40)
    assert make_model(TupeForPreTraining)(**inputs).logits.shape == (2, 7, 40)
    assert make_model(TupeForSequenceClassification, num_labels=5)(**inputs).logits.shape == (2, 5)
    assert make_model(TupeForTokenClassification, num_labels=5)(**inputs).logits.shape == (2, 7, 5)
    answers = make_model(TupeForQuestionAnswering)(**inputs)
    assert answers.start_logits.shape == answers.end_logits.shape == (2, 7)
    choices = {name: tensor.view(1, 2, 7) for name, tensor in inputs.items()}
    model = make_model(TupeForMultipleChoice)
    outputs = model(**choices, labels=torch.tensor([1]))
    assert outputs.logits.shape == (1, 2)
    assert torch.allclose(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([1])))
    embeds = model.model.embed_tokens(choices["input_ids"])
    assert torch.equal(
        model(inputs_embeds=embeds, attention_mask=choices["attention_mask"]).logits, model(**choices).logits
    )


def test_tuples_have_the_order_of_the_outputs(make_model, make_inputs):
    inputs = make_inputs(7, 5)
    model = make_model(TupeForMaskedLM)
    outputs = model(**inputs, labels=inputs["input_ids"])
    loss, logits = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)


def test_longer_positions_keep_what_was_learned(make_model, make_inputs, assert_close):
    model = make_model(TupeForSequenceClassification, num_labels=3)
    inputs = make_inputs(63, 5)
    expected = model(**inputs).logits
    model.resize_position_embeddings(75)
    assert model.config.max_position_embeddings == 75
    assert model.get_position_embeddings().weight.shape == (76, 15)
    assert_close("logits", model(**inputs).logits, expected, 1e-6)
    assert model(**make_inputs(75)).logits.isfinite().all()
    model.resize_position_embeddings(63)
    assert_close("logits", model(**inputs).logits, expected, 1e-6)
    with pytest.raises(ValueError, match="at least 1 position"):
        model.resize_position_embeddings(0)
