"""A text in one call and in chunks with a cache: the same, whatever stands where padding does; and what caches hold."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_efficient.models.scaling_transformer.modeling_scaling_transformer import ScalingTransformerForCausalLM
from hf_efficient.modules.sparse_layers import SparseFeedForward
from tests.helpers.comparison import assert_gradients_close, named_gradients


CHUNKS = {"one-by-one": [1] * 11, "uneven": [3, 1, 5, 2], "prefill-decode": [7, 1, 1, 1, 1]}
CACHES = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=13)}


def in_chunks(model, ids, lengths, cache, **inputs):
    """Logits of calls that each see one chunk and the cache."""
    logits = []
    for part in ids.split(lengths, 1):
        output = model(part, cache=cache, use_cache=True, **inputs)
        assert output.cache is cache
        logits.append(output.logits)
    return torch.cat(logits, 1)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS)
def test_any_chunks_equal_the_whole(make_model, make_ids, variant, lengths):
    model, ids = make_model(ScalingTransformerForCausalLM, **variant), make_ids(2, 11)
    whole = model(ids).logits
    for make_cache in CACHES.values():
        cache = make_cache(config=model.config)
        assert_near(in_chunks(model, ids, lengths, cache), whole)
        assert int(cache.get_seq_length()) == 11


@torch.no_grad()
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padded_prefill_then_decoding(make_model, make_ids, variant, side, make_cache):
    """A pad holds no key, has no position and leaves the state alone, so that it does not matter where it stands."""
    model, ids = make_model(ScalingTransformerForCausalLM, **variant), make_ids(2, 10)
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
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_a_mask_over_new_tokens_alone(make_model, make_ids, variant, make_cache):
    """Then nothing in the cache is padding; the new tokens may still hold some."""
    model, ids = make_model(ScalingTransformerForCausalLM, **variant), make_ids(2, 10)
    mask = torch.tensor([[1] * 10, [1, 1, 1, 1, 1, 1, 0, 1, 0, 1]]).bool()
    cache = make_cache(config=model.config)
    model(ids[:, :6], cache=cache)
    logits = model(ids[:, 6:], attention_mask=mask[:, 6:], cache=cache).logits
    for row in range(2):
        assert_near(logits[row, mask[row, 6:]], model(ids[row : row + 1, mask[row]]).logits[0, 6:])


@torch.no_grad()
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_packed_rows_into_a_cache(make_model, make_ids, variant, make_cache):
    """What follows continues a row's last document, in the states; its keys and positions are for the caller to say."""
    model, ids = make_model(ScalingTransformerForCausalLM, **variant), make_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    alone = model(ids[:, 4:]).logits
    cache = make_cache(config=model.config)
    assert_near(model(ids[:, :7], position_ids=positions, cache=cache).logits[:, 4:], alone[:, :3])
    mask = (torch.arange(9) >= 4).long()[None]
    assert_near(model(ids[:, 7:], attention_mask=mask, cache=cache).logits, alone[:, 3:])


@torch.no_grad()
def test_a_rollback_leaves_no_trace(make_model, make_ids, variant):
    """As assisted decoding needs it: record, crop, go on."""
    model, ids = make_model(ScalingTransformerForCausalLM, **variant), make_ids(1, 11)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    if model.config.state_size:
        cache.activate_past_recording()
    model(make_ids(1, 4), cache=cache)
    cache.crop(-4)
    assert_near(model(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:])


def chosen_in_steps_and_at_once(model, ids):
    """For each sparse layer the winners of decoding and of the whole, `(batch, length, blocks)`, after their logits."""
    chosen = []
    for layer in model.modules():
        if isinstance(layer, SparseFeedForward):
            layer.observer = lambda winners, passes: chosen.append(winners)
    batch, length = ids.shape
    logits = [model(ids).logits]
    whole = [winners.view(batch, length, -1) for winners in chosen]
    chosen.clear()
    logits.append(in_chunks(model, ids, [1] * length, DynamicCache(config=model.config)))
    steps = [torch.stack(chosen[layer :: len(whole)], 1).view_as(winners) for layer, winners in enumerate(whole)]
    return logits, list(zip(steps, whole, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("batch", range(1, 9))
def test_steps_choose_the_units_of_the_whole(make_model, make_ids, variant, batch):
    """In float32, for all batches that a kernel decodes."""
    if "ff_sparsity" not in variant:
        pytest.skip("chooses nothing")
    model, ids = make_model(ScalingTransformerForCausalLM, dtype=torch.float32, **variant), make_ids(batch, 7)
    (whole, steps), chosen = chosen_in_steps_and_at_once(model, ids)
    torch.testing.assert_close(steps, whole, atol=2e-5, rtol=2e-5)
    for found, expected in chosen:
        assert torch.equal(found, expected)


@torch.no_grad()
def test_steps_in_bfloat16_choose_nearly_all_units_of_the_whole(make_config):
    """Both round the multiplicative layers in one place; in two, 1 % of the first layer's units would be others."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "ff_sparsity": 32, "ff_rank": 16}
    torch.manual_seed(0)
    config = make_config(**sizes, attention_type="multiplicative_conv", attention_sparsity=16)
    model = ScalingTransformerForCausalLM(config).eval().to(torch.bfloat16)
    _, chosen = chosen_in_steps_and_at_once(model, torch.randint(0, 42, (4, 60)))
    found, expected = chosen[0]
    assert (found == expected).float().mean() > 0.995


@torch.no_grad()
def test_states_are_float32_in_a_bfloat16_model(make_model, make_ids):
    fields = {"attention_type": "multiplicative_conv", "attention_sparsity": 6, "ff_sru_layers": 1}
    model, ids = make_model(ScalingTransformerForCausalLM, dtype=torch.bfloat16, **fields), make_ids(2, 7)
    for make_cache in CACHES.values():
        cache = make_cache(config=model.config)
        model(ids, cache=cache)
        assert {layer.conv_states[0].dtype for layer in cache.layers} == {torch.float32}
        assert {layer.conv_states[0].shape for layer in cache.layers} == {(2, 2 * 24 + 32, 1)}
        assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}


@pytest.mark.parametrize("grad", [True, False])
def test_no_cache_is_built_in_a_training_step(make_model, make_ids, grad):
    model, ids = make_model(ScalingTransformerForCausalLM).train(), make_ids(1, 5)
    with torch.set_grad_enabled(grad):
        assert (model(ids).cache is None) == grad
        cache = DynamicCache(config=model.config)
        assert model(ids, cache=cache).cache is cache
    assert model.eval()(ids).cache is not None
    assert model(ids, use_cache=False).cache is None


def test_a_call_that_goes_on_from_a_cache_can_be_differentiated(make_model, make_ids, variant):
    model, ids = make_model(ScalingTransformerForCausalLM, **variant), make_ids(2, 7)
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


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"ff_sparsity": 5, "ff_rank": 3}], ids=["dense", "ff"])
def test_a_cache_that_grows_layer_by_layer(make_model, make_ids, fields):
    model, ids = make_model(ScalingTransformerForCausalLM, **fields), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask}):
        cache = DynamicCache()
        steps = [model(ids[:, :4], cache=cache, **{name: value[:, :4] for name, value in inputs.items()}).logits]
        steps += [
            model(ids[:, end - 1 : end], cache=cache, **{name: value[:, :end] for name, value in inputs.items()}).logits
            for end in range(5, 10)
        ]
        found, expected = torch.cat(steps, dim=1), model(ids, **inputs).logits
        real = mask.bool() if inputs else torch.ones_like(mask).bool()
        assert_near(found[real], expected[real])
    assert len(cache.layers) == 2
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=DynamicCache()), greedy)


@torch.no_grad()
def test_a_cache_of_another_depth_or_without_states(make_model, make_ids):
    dense, shallow, ids = make_model(), make_model(num_hidden_layers=1), make_ids(2, 9)
    cache = shallow(ids, cache=DynamicCache()).cache
    with pytest.raises(ValueError, match=r"of 1 layers, but the model has 2 layers.*by DynamicCache\(config") as raised:
        dense(ids, cache=cache)
    assert "Prefix tuning" not in str(raised.value)
    recurrent = make_model(ff_sru_layers=1)
    with pytest.raises(ValueError, match=r"without a place for the states of this model's 2 layers.*Prefix tuning"):
        recurrent(ids, cache=DynamicCache())
