"""A target in one call and in chunks with a cache; the source is read once, and its keys are never copied."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_efficient.models.terraformer.modeling_terraformer import TerraformerForCausalLM
from tests.helpers.comparison import assert_close, assert_gradients_close, named_gradients
from tests.helpers.families import TERRAFORMER


CHUNKS = {"one-by-one": [1] * 11, "uneven": [3, 1, 5, 2], "prefill-decode": [8, 1, 1, 1], "whole": [11]}
CROSS = [name for name, fields in TERRAFORMER.variants.items() if "decoder_type" in fields]
JOINED = [name for name in TERRAFORMER.variants if name not in CROSS]


def dynamic(config, source_length):
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def static(config, source_length):
    """With room to spare in both parts."""
    parts = (StaticCache(config=config, max_cache_len=length) for length in (13, source_length + 2))
    return EncoderDecoderCache(*parts)


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_chunks_equal_the_whole(make_model, make_batch, variant, lengths, make_cache, attention):
    model, batch = make_model(attention=attention, **variant), make_batch([5, 9, 1], 11)
    expected = model(**batch.source, decoder_input_ids=batch.targets, use_cache=False).logits
    cache, logits = make_cache(model.config, 9), []
    for part in batch.targets.split(lengths, 1):
        output = model(**batch.source, decoder_input_ids=part, cache=cache)
        assert output.cache is cache
        logits.append(output.logits)
    assert_close("logits", torch.cat(logits, 1), expected, 1e-12)
    assert int(cache.get_seq_length()) == 11


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padded_targets_in_chunks(make_model, make_batch, variant, side):
    model, batch = make_model(**variant), make_batch([5, 9], 10)
    row = {"left": [0, 0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0, 0], "inside": [1, 0, 0, 1, 0, 1]}[side]
    mask = torch.tensor([[*row, 1, 1, 1, 1], [1] * 10])
    given = {**batch.source, "decoder_input_ids": batch.targets, "decoder_attention_mask": mask}
    expected = model(**given, use_cache=False).logits
    cache, logits, seen = None, [], 0
    for length in (6, 1, 2, 1):
        output = model(
            **batch.source,
            decoder_input_ids=batch.targets[:, seen : seen + length],
            decoder_attention_mask=mask[:, : seen + length],
            cache=cache,
            use_cache=True,
        )
        cache, seen = output.cache, seen + length
        logits.append(output.logits)
    real = mask.bool()
    assert_close("logits", torch.cat(logits, 1)[real], expected[real], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_the_source_is_read_once_and_not_copied(make_model, make_batch, variant, padded, monkeypatch):
    """Steps need no source but its mask; its keys stay where they are, and so do its states."""
    model, batch = make_model(**variant), make_batch([5, 9] if padded else [9, 9], 8)
    given = {"attention_mask": batch.attention_mask} if padded else {}
    expected = model(**batch.source, decoder_input_ids=batch.targets, use_cache=False).logits
    cache = model(**batch.source, decoder_input_ids=batch.targets[:, :3], use_cache=True).cache
    layers = cache.cross_attention_cache.layers
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers]
    monkeypatch.setattr(model.model.encoder, "forward", None)
    for place in range(3, 8):
        output = model(decoder_input_ids=batch.targets[:, place : place + 1], cache=cache, **given)
        assert_close(f"step {place}", output.logits, expected[:, place : place + 1], 1e-12)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers] == places
    assert {layer.keys.shape[2] for layer in layers} == {9}
    assert {layer.keys.shape[2] for layer in cache.self_attention_cache.layers} == {8}


def sizes_of_new_tensors(run):
    """Numbers in the largest tensor that a call makes."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            is_view = any(result.alias_info is not None for result in func._schema.returns)
            for tensor in [out] if isinstance(out, torch.Tensor) else []:
                if not is_view and tensor.untyped_storage().data_ptr() not in known:
                    self.found = max(self.found, tensor.numel())
            return out

    known: set[int] = set()
    with Largest() as mode:
        run()
    return mode.found


@torch.no_grad()
@pytest.mark.parametrize("name", ["all-sru", "cross-sparse"])
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_a_step_makes_nothing_of_the_size_of_the_source(make_model, make_batch, name, padded):
    """Beside scores, a number for each head and key, nothing grows with the source."""
    model = make_model(attention="eager", **TERRAFORMER.variants[name])
    batch = make_batch([50, 63] if padded else [63, 63], 3)
    cache = model(**batch.source, decoder_input_ids=batch.targets[:, :2], use_cache=True).cache
    given = {"attention_mask": batch.attention_mask} if padded else {}
    largest = sizes_of_new_tensors(lambda: model(decoder_input_ids=batch.targets[:, 2:], cache=cache, **given))
    assert largest < 63 * model.config.hidden_size / 2


@torch.no_grad()
def test_a_rollback_leaves_no_trace(make_model, make_batch, variant):
    """As assisted decoding needs it: record, crop, go on."""
    model, batch = make_model(**variant), make_batch([9], 8)
    expected = model(**batch.source, decoder_input_ids=batch.targets, use_cache=False).logits
    cache = dynamic(model.config, 9)
    model(**batch.source, decoder_input_ids=batch.targets[:, :3], cache=cache)
    if model.config.decoder_state_size:
        cache.activate_past_recording()
    model(**batch.source, decoder_input_ids=batch.targets.flip(1)[:, :4], cache=cache)
    cache.crop(-4)
    found = model(**batch.source, decoder_input_ids=batch.targets[:, 3:], cache=cache).logits
    assert_close("logits", found, expected[:, 3:], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("make_cache", [dynamic, static])
def test_states_are_float32_in_a_bfloat16_model(make_model, make_batch, make_cache):
    model = make_model(dtype=torch.bfloat16, **TERRAFORMER.variants["all-sru"])
    batch, cache = make_batch([5, 9]), make_cache(model.config, 9)
    model(**batch.source, decoder_input_ids=batch.targets, cache=cache)
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        with_states = part.layers[:: model.config.attentions_per_layer]
        # Of each of two attentions the shared window of two tokens, and two recurrences of 5 units
        assert {layer.conv_states[0].shape for layer in with_states} == {(2, 2 * 2 * 24 + 2 * 5, 1)}
        assert {layer.conv_states[0].dtype for layer in with_states} == {torch.float32}
        assert {layer.keys.dtype for layer in part.layers} == {torch.bfloat16}


def test_no_cache_is_built_in_a_training_step(make_model, make_batch):
    model, batch = make_model(**TERRAFORMER.variants["all-sru"]).train(), make_batch([5, 9])
    given = {**batch.source, "decoder_input_ids": batch.targets}
    assert model(**given).cache is None
    with torch.no_grad():
        assert model(**given).cache is not None
    assert model.eval()(**given).cache is not None
    assert model(**given, use_cache=False).cache is None


def test_a_call_that_goes_on_from_a_cache_can_be_differentiated(make_model, make_batch, variant):
    model, batch = make_model(**variant), make_batch([5, 9], 7)
    gradients = []
    for split in (False, True):
        model.zero_grad()
        if split:
            cache = dynamic(model.config, 9)
            model(**batch.source, decoder_input_ids=batch.targets[:, :4], cache=cache)
            logits = model(**batch.source, decoder_input_ids=batch.targets[:, 4:], cache=cache).logits
        else:
            logits = model(**batch.source, decoder_input_ids=batch.targets, use_cache=False).logits[:, 4:]
        logits.square().sum().backward()
        gradients.append(named_gradients(model))
    assert_gradients_close(*gradients, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "all-sru", "cross"])
def test_a_cache_of_another_kind_batch_or_model_is_refused(make_model, make_config, make_batch, name):
    fields = TERRAFORMER.variants[name]
    model, batch, other = make_model(**fields), make_batch([5, 9]), make_batch([5, 9, 1])
    given = {**batch.source, "decoder_input_ids": batch.targets}
    with pytest.raises(TypeError, match=r"cache must be an EncoderDecoderCache .* not DynamicCache"):
        model(**given, cache=DynamicCache(config=model.config))
    filled = model(**other.source, decoder_input_ids=other.targets).cache
    with pytest.raises(ValueError, match=r"cache holds|begins with a cache of its own"):
        model(**given, cache=filled)
    wider = make_model(**{**fields, "num_attention_heads": 2})
    with pytest.raises(ValueError, match="cache holds keys of shape"):
        model(**given, cache=wider(**given).cache)
    shallow = make_config(**{**fields, "num_decoder_layers": 1, "attentions_per_layer": 1})
    with pytest.raises(ValueError, match=r"cache is a DynamicCache of 1 layers"):
        model(**given, cache=dynamic(shallow, 9))


@torch.no_grad()
def test_a_causal_model_refuses_the_cache_of_an_encoder_decoder(make_model, make_batch):
    lone = {"is_encoder_decoder": False, "num_encoder_layers": 0}
    model, batch = make_model(TerraformerForCausalLM, **lone), make_batch([5, 9])
    with pytest.raises(ValueError, match="cache is a EncoderDecoderCache"):
        model(batch.targets, cache=dynamic(model.config, 9))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "cross"])
def test_a_static_cache_that_is_too_small_says_so(make_model, make_batch, name):
    model, batch = make_model(**TERRAFORMER.variants[name]), make_batch([5, 9], 14)
    with pytest.raises(ValueError, match=r"The cache holds 0 tokens of 13, and 14 more do not fit"):
        model(**batch.source, decoder_input_ids=batch.targets, cache=static(model.config, 9))
    with pytest.raises(ValueError, match=r"of 8, and 9 more do not fit"):
        model(**batch.source, decoder_input_ids=batch.targets[:, :3], cache=static(model.config, 6))
