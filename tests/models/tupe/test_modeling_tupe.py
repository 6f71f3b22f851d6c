"""What padding, batching and the layout must not change; the position bias; the heads' outputs."""

import pytest
import torch

from hf_efficient.models.tupe.modeling_tupe import (
    TupeForMaskedLM,
    TupeForMultipleChoice,
    TupeForPreTraining,
    TupeForQuestionAnswering,
    TupeForSequenceClassification,
    TupeForTokenClassification,
)
from tests.helpers.comparison import assert_close


@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
def test_a_batch_equals_its_rows_and_padding_changes_nothing(make_model, make_inputs, attention, with_grad):
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
def test_padding_inside_changes_nothing(make_model, make_inputs, attention):
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
def test_a_fully_padded_row_is_finite(make_model, make_inputs, attention, dtype):
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


def test_position_bias_uses_the_rows_of_the_table_as_the_original_does(make_model, variant):
    """Row i + 1 for token i; rows 0 and 1 for [CLS] where it is untied; two buckets for it that the formula leaves."""
    module = make_model(**variant).double().position_bias
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


def test_inputs_embeds_equal_ids(make_model, make_inputs):
    model = make_model()
    inputs = make_inputs(7, 5)
    embeds = model.embed_tokens(inputs["input_ids"])
    expected = model(**inputs).last_hidden_state
    ours = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert torch.equal(ours, expected)
    assert torch.equal(model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))[0], expected)


def test_position_of_cls_matters_only_where_it_is_tied(make_model):
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


def test_longer_positions_keep_what_was_learned(make_model, make_inputs):
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


@torch.no_grad()
def test_calls_of_multiple_choice_do_not_mix(make_model, make_inputs):
    """A call within a call, as threads may make them, with another number of choices."""
    model = make_model(TupeForMultipleChoice)
    inputs = make_inputs(7, 5, 6, 4, 7, 3)
    pairs, triples = ({name: x.unflatten(0, (-1, choices)) for name, x in inputs.items()} for choices in (2, 3))
    expected, inner = model(**pairs).logits, []
    handle = model.model.register_forward_hook(
        lambda *arguments: None if inner else inner.append(True) or inner.append(model(**triples).logits)
    )
    assert torch.equal(model(**pairs).logits, expected)
    handle.remove()
    assert inner[1].shape == (2, 3)


@pytest.mark.parametrize("positions", [63, 70, 71, 500])
def test_new_positions_are_drawn_like_those_of_a_new_model(make_model, positions):
    """Rows of zeros would give all new positions one vector, so that none could be told from another."""
    model = make_model(initializer_range=0.05, hidden_size=60)
    old = model.get_position_embeddings().weight.detach().clone()
    model.resize_position_embeddings(positions)
    table = model.get_position_embeddings().weight.detach()
    kept = min(len(table), len(old))
    assert torch.equal(table[:kept], old[:kept])
    new = table[kept:]
    assert len(new) == max(positions - 70, 0)
    assert len(new.unique(dim=0)) == len(new)
    if len(new) > 100:
        assert new.std().item() == pytest.approx(0.05, rel=0.03)
        assert new.mean().item() == pytest.approx(0.0, abs=0.002)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_positions_have_dtype_and_trainability_of_the_old_ones(make_model, dtype):
    model = make_model().to(dtype)
    model.get_position_embeddings().weight.requires_grad_(False)
    model.resize_position_embeddings(75)
    table = model.get_position_embeddings().weight
    assert table.dtype == dtype
    assert not table.requires_grad
    assert table[71:].abs().min(dim=1).values.max() > 0
