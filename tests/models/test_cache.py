"""A text in one call and in chunks with a cache: the same, whatever stands where padding does; and what caches hold."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.helpers.comparison import assert_gradients_close, named_gradients
from tests.helpers.families import (
    CAUSAL,
    CAUSAL_VARIANTS,
    SCALING_TRANSFORMER,
    SRUPP,
    TERRAFORMER_LM,
    every_causal_variant,
    in_chunks,
)


CHUNKS = {"one-by-one": [1] * 11, "uneven": [3, 1, 5, 2], "prefill-decode": [7, 1, 1, 1, 1]}
CACHES = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=13)}
CONV_AND_SRU = {"attention_type": "multiplicative_conv", "attention_sparsity": 6, "ff_sru_layers": 1}
# Fields of a model with states, and the shape of a layer's: windows and cells, or cells alone.
STATES = [
    pytest.param(SCALING_TRANSFORMER, (CONV_AND_SRU, (2, 2 * 24 + 32, 1)), id="scaling_transformer"),
    pytest.param(SRUPP, ({}, (2, 18, 1)), id="srupp"),
    pytest.param(
        TERRAFORMER_LM, ({**CONV_AND_SRU, "attentions_per_layer": 1}, (2, 2 * 24 + 32, 1)), id="terraformer_lm"
    ),
]

either_cache = pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@either_cache
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS)
@every_causal_variant
def test_any_chunks_equal_the_whole(family, variant, lengths, make_cache):
    model, ids = family.make_model(family.causal_lm, **variant), family.make_ids(2, 11)
    cache = make_cache(config=model.config)
    assert_near(in_chunks(model, ids, lengths, cache), model(ids).logits)
    assert int(cache.get_seq_length()) == 11


@torch.no_grad()
@either_cache
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@every_causal_variant
def test_padded_prefill_then_decoding(family, variant, side, make_cache):
    """A pad holds no key, has no position and leaves the state alone, so that it does not matter where it stands."""
    model, ids = family.make_model(family.causal_lm, **variant), family.make_ids(2, 10)
    row = {"left": [0, 0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0, 0], "inside": [1, 0, 0, 1, 0, 1]}[side]
    mask = torch.tensor([[*row, 1, 1, 1, 1], [1] * 10]).bool()
    cache, logits, seen = make_cache(config=model.config), [], 0
    for length in (6, 1, 2, 1):
        output = model(ids[:, seen : seen + length], attention_mask=mask[:, : seen + length], cache=cache)
        logits.append(output.logits)
        seen += length
    logits = torch.cat(logits, 1)
    for index in range(2):
        assert_near(logits[index, mask[index]], model(ids[index : index + 1, mask[index]]).logits[0])


@torch.no_grad()
@either_cache
@every_causal_variant
def test_a_mask_over_new_tokens_alone(family, variant, make_cache):
    """Then nothing in the cache is padding; the new tokens may still hold some."""
    model, ids = family.make_model(family.causal_lm, **variant), family.make_ids(2, 10)
    mask = torch.tensor([[1] * 10, [1, 1, 1, 1, 1, 1, 0, 1, 0, 1]]).bool()
    cache = make_cache(config=model.config)
    model(ids[:, :6], cache=cache)
    logits = model(ids[:, 6:], attention_mask=mask[:, 6:], cache=cache).logits
    for row in range(2):
        assert_near(logits[row, mask[row, 6:]], model(ids[row : row + 1, mask[row]]).logits[0, 6:])


@torch.no_grad()
@either_cache
@pytest.mark.parametrize(
    ("family", "variant"), [*CAUSAL_VARIANTS, pytest.param(SRUPP, {"attention_layers": []}, id="srupp-none-attends")]
)
def test_packed_rows_into_a_cache(family, variant, make_cache):
    """What follows continues a row's last document, in the states; its keys and positions are for the caller to say."""
    model, ids = family.make_model(family.causal_lm, **variant), family.make_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    alone = model(ids[:, 4:]).logits
    cache = make_cache(config=model.config)
    assert_near(model(ids[:, :7], position_ids=positions, cache=cache).logits[:, 4:], alone[:, :3])
    mask = (torch.arange(9) >= 4).long()[None]
    assert_near(model(ids[:, 7:], attention_mask=mask, cache=cache).logits, alone[:, 3:])


@torch.no_grad()
@every_causal_variant
def test_a_rollback_leaves_no_trace(family, variant):
    """As assisted decoding needs it: record, crop, go on."""
    model, ids = family.make_model(family.causal_lm, **variant), family.make_ids(1, 11)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    if set(model.config.layer_types) != {"full_attention"}:  # there are states
        cache.activate_past_recording()
    model(family.make_ids(1, 4), cache=cache)
    cache.crop(-4)
    assert_near(model(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:])


@torch.no_grad()
@either_cache
@pytest.mark.parametrize(("family", "case"), STATES)
def test_states_are_float32_in_a_bfloat16_model(family, case, make_cache):
    fields, shape = case
    model = family.make_model(family.causal_lm, dtype=torch.bfloat16, **fields)
    cache = make_cache(config=model.config)
    model(family.make_ids(2, 7), cache=cache)
    assert {layer.conv_states[0].dtype for layer in cache.layers} == {torch.float32}
    assert {layer.conv_states[0].shape for layer in cache.layers} == {shape}
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", CAUSAL, ids=lambda family: family.name)
def test_no_cache_is_built_in_a_training_step(family, grad):
    model, ids = family.make_model(family.causal_lm).train(), family.make_ids(1, 5)
    with torch.set_grad_enabled(grad):
        assert (model(ids).cache is None) == grad
        cache = DynamicCache(config=model.config)
        assert model(ids, cache=cache).cache is cache
    assert model.eval()(ids).cache is not None
    assert model(ids, use_cache=False).cache is None


@every_causal_variant
def test_a_call_that_goes_on_from_a_cache_can_be_differentiated(family, variant):
    model, ids = family.make_model(family.causal_lm, **variant), family.make_ids(2, 7)
    gradients = []
    for split in (False, True):
        model.zero_grad()
        if split:
            cache = DynamicCache(config=model.config)
            first, second = ids.split([4, 3], 1)
            model(first, cache=cache)
            logits = model(second, cache=cache).logits
        else:
            logits = model(ids).logits[:, 4:]
        logits.square().sum().backward()
        gradients.append(named_gradients(model))
    assert_gradients_close(*gradients, 1e-9)
