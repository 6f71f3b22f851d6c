"""What an encoder-decoder computes of a row does not depend on what stands beside it or in its padding."""

import copy
from types import SimpleNamespace

import pytest
import torch

from hf_efficient.models.terraformer.modeling_terraformer import (
    TerraformerEncoderModel,
    TerraformerForSequenceClassification,
    TerraformerModel,
)
from tests.helpers.comparison import assert_close, assert_equal
from tests.helpers.families import TERRAFORMER


def alone(model, source, target):
    return model(input_ids=source[None], decoder_input_ids=target[None], use_cache=False).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_alone_are_those_of_a_batch(make_model, make_batch, variant, side, attention):
    """Of sources of other lengths, the shortest of one token."""
    model, batch = make_model(attention=attention, **variant), make_batch([5, 9, 1, 2], side=side)
    logits = model(**batch.source, decoder_input_ids=batch.targets, use_cache=False).logits
    for row, source in enumerate(batch.sources):
        assert_close(f"row {row}", logits[row], alone(model, source, batch.targets[row]), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_targets_may_be_padded_anywhere(make_model, make_batch, variant, where):
    row = {"left": [0, 0, 1, 1, 1, 1], "right": [1, 1, 1, 1, 0, 0], "inside": [1, 0, 1, 0, 1, 1]}[where]
    model, batch = make_model(**variant), make_batch([5, 9])
    mask = torch.tensor([row, [1] * 6])
    logits = model(**batch.source, decoder_input_ids=batch.targets, decoder_attention_mask=mask, use_cache=False).logits
    for index, source in enumerate(batch.sources):
        real = mask[index].bool()
        assert_close(f"row {index}", logits[index, real], alone(model, source, batch.targets[index, real]), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cache"])
def test_nan_in_padded_embeddings_leaves_no_trace(make_model, make_batch, variant, cached):
    model, batch = make_model(**variant), make_batch([5, 9, 1])
    embed = model.get_input_embeddings()
    sources, targets = embed(batch.input_ids), embed(batch.targets)
    target_mask = torch.ones_like(batch.targets)
    target_mask[0, 4:] = 0
    results = []
    for filling in (0.0, float("nan")):
        results.append(
            model(
                inputs_embeds=sources.masked_fill(batch.attention_mask[..., None] == 0, filling),
                attention_mask=batch.attention_mask,
                decoder_inputs_embeds=targets.masked_fill(target_mask[..., None] == 0, filling),
                decoder_attention_mask=target_mask,
                use_cache=cached,
            ).logits[target_mask.bool()]
        )
    assert results[1].isfinite().all()
    assert_equal("logits", *results)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", [TerraformerEncoderModel, TerraformerForSequenceClassification])
def test_the_encoder_alone_and_its_classifier(make_model, make_batch, cls, side, variant):
    model, batch = make_model(cls, **variant), make_batch([5, 9, 1], side=side)
    output = model(**batch.source)[0]
    for row, source in enumerate(batch.sources):
        found = output[row] if output.dim() == 2 else output[row, batch.attention_mask[row].bool()]
        assert_close(f"row {row}", found, model(source[None])[0][0], 1e-12)


@torch.no_grad()
def test_the_encoder_of_a_model_is_found_and_its_output_taken(make_model, make_batch, variant):
    model, batch = make_model(**variant), make_batch([5, 9])
    expected = model(**batch.source, decoder_input_ids=batch.targets)
    assert model.get_encoder() is model.model.encoder
    encoded = model.get_encoder()(**batch.source)
    given = {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.targets}
    for form in (encoded, encoded.to_tuple(), dict(encoded)):
        assert_equal("logits", model(encoder_outputs=form, **given).logits, expected.logits)
    assert_equal("encoder", expected.encoder_last_hidden_state, encoded.last_hidden_state)


@torch.no_grad()
def test_the_decoder_does_not_look_ahead(make_model, make_batch, variant):
    model, batch = make_model(**variant), make_batch([5, 9])
    changed = batch.targets.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % model.config.vocab_size
    before, after = (
        model(**batch.source, decoder_input_ids=ids, use_cache=False).logits for ids in (batch.targets, changed)
    )
    assert_close("logits", after[:, :4], before[:, :4], 1e-12)
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@torch.no_grad()
def test_attentions_and_hidden_states(make_model, make_batch, variant):
    model, batch = make_model(TerraformerModel, attention="eager", **variant), make_batch([7, 7])
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    output = model(**batch.source, decoder_input_ids=batch.targets, **options)
    plain = model(**batch.source, decoder_input_ids=batch.targets, use_cache=False)
    assert_close("output", output.last_hidden_state, plain.last_hidden_state, 1e-12)
    config = model.config
    keys = 6 if config.decoder_type == "cross_attention" else 13
    assert len(output.encoder_attentions) == config.num_encoder_layers
    assert len(output.decoder_attentions) == config.num_hidden_layers
    for weights in output.decoder_attentions:
        assert weights.shape == (2, 4, keys, keys)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, keys).double())
    assert len(output.encoder_hidden_states) == config.num_encoder_layers + 1
    assert len(output.decoder_hidden_states) == config.num_decoder_layers + 1
    if config.decoder_type == "cross_attention":
        assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 4, 6, 7)] * 2


def test_presets_of_the_authors_code_have_no_position_of_their_own_for_joined_targets(make_model, make_batch):
    """Source and target are counted from 0 each, by a table of its own, whatever the other's length."""
    model, batch = make_model(), make_batch([5, 9])
    encoder, decoder = model.model.encoder.positions, model.model.decoder.positions
    assert encoder.table.shape == decoder.table.shape == (70, 24)
    with torch.no_grad():
        before = model(**batch.source, decoder_input_ids=batch.targets).logits
        decoder.table[6:] += 1.0
        encoder.table[9:] += 1.0
        assert_equal("logits", model(**batch.source, decoder_input_ids=batch.targets).logits, before)
        decoder.table[5] += 1.0
        assert not torch.equal(model(**batch.source, decoder_input_ids=batch.targets).logits, before)


def test_labels_are_the_target_moved_by_one(make_model, make_batch):
    model, batch = make_model(pad_token_id=3, decoder_start_token_id=2), make_batch([5, 9])
    labels = batch.targets.clone()
    labels[0, 4:] = -100
    output = model(**batch.source, labels=labels)
    moved = torch.nn.functional.pad(labels[:, :-1].masked_fill(labels[:, :-1] == -100, 3), (1, 0), value=2)
    assert_equal("moved", model.prepare_decoder_input_ids_from_labels(labels), moved)
    logits = model(**batch.source, decoder_input_ids=moved, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    assert_equal("logits", output.logits, logits)


@torch.no_grad()
def test_the_average_of_a_long_text_is_finite_in_float16(make_model, monkeypatch):
    model = make_model(cls=TerraformerForSequenceClassification).half()
    vectors = torch.full((2, 1300, model.model.encoder.width), 60.0).half()
    large = SimpleNamespace(last_hidden_state=vectors, hidden_states=None, attentions=None)
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: large)
    mask = torch.ones(2, 1300)
    mask[1, -3:] = 0
    logits = model.score(model.norm(vectors[:, 0]))
    assert_close("logits", model(torch.ones(2, 1300, dtype=torch.long), mask, return_dict=True).logits, logits, 1e-2)


@torch.no_grad()
def test_logits_to_keep(make_model, make_batch):
    model, batch = make_model(**TERRAFORMER.variants["all-sru"]), make_batch([5, 9])
    every = model(**batch.source, decoder_input_ids=batch.targets).logits
    assert_close("last", model(**batch.source, decoder_input_ids=batch.targets, logits_to_keep=2).logits, every[:, -2:])


@pytest.mark.parametrize("decoder_type", ["joined", "cross_attention"])
@pytest.mark.parametrize("kind", ["learned", "low_rank"])
def test_source_and_target_may_begin_at_one_start_of_each_row(make_model, make_batch, decoder_type, kind):
    fields = {"decoder_type": decoder_type, "position_embedding_type": kind, "attentions_per_layer": 1}
    starts = {"position_shared_start": True, "position_max_offset": 9, "position_zero_probability": 0.0}
    model = make_model(TerraformerModel, **fields, **starts).train()
    found = {}
    for name, stack in (("source", model.encoder), ("target", model.decoder)):
        stack.positions.register_forward_hook(lambda layer, given, out, name=name: found.update({name: (layer, out)}))
    batch = make_batch([5, 5, 5, 5, 5, 5])
    torch.manual_seed(0)
    copy.deepcopy(model)(**batch.source, decoder_input_ids=batch.targets)  # shares starts of its own
    model(**batch.source, decoder_input_ids=batch.targets)
    places = {}
    for name, (layer, vectors) in found.items():
        table = layer.table if layer.projection is None else layer.table @ layer.projection
        places[name] = [int((table - row[0]).abs().sum(1).argmin()) for row in vectors]
    assert places["source"] == places["target"]
    assert len(set(places["source"])) > 2
