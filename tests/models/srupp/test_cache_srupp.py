"""A text in one call and in segments with memory: the same. A window beside a cache, and what caches weigh."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache

from hf_efficient.models.srupp.masking_srupp import SegmentMemory
from hf_efficient.models.srupp.modeling_srupp import SruppForCausalLM
from tests.helpers.families import in_chunks


CHUNKS = {"one-by-one": [1] * 11, "uneven": [3, 1, 5, 2], "prefill-decode": [7, 1, 1, 1, 1]}
OUTER_PRE_NORM = {
    "two-heads": {"layer_norm": True},
    "one-head": {"layer_norm": True, "num_attention_heads": 1},
    "inner-norm-too": {"layer_norm": True, "attention_normalize_after": False, "embedding_size": 14},
}


def in_segments(model, ids, lengths, keep):
    """Logits of calls that each get memory: of the segment before alone, or with `keep` of all before."""
    memory, logits = None, []
    for part in ids.split(lengths, 1):
        output = model(part, memory=memory, return_memory=True)
        logits.append(output.logits)
        earlier, memory = memory, output.memory
        if keep and earlier is not None:
            pairs = zip(earlier.layer_inputs, memory.layer_inputs, strict=True)
            inputs = tuple(None if new is None else torch.cat([old, new], 1) for old, new in pairs)
            memory = memory._replace(layer_inputs=inputs)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS)
def test_any_segments_equal_the_whole(make_model, make_ids, variant, lengths):
    model, ids = make_model(SruppForCausalLM, **variant), make_ids(2, 11)
    segments = in_segments(model, ids, lengths, keep=True)
    torch.testing.assert_close(segments, model(ids).logits, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("fields", OUTER_PRE_NORM.values(), ids=OUTER_PRE_NORM)
def test_with_a_norm_before_layers_a_cache_equals_memory(make_model, make_ids, fields, lengths):
    """There chunks differ from the whole by the original's definition: what is past is seen without the norm."""
    model, ids = make_model(SruppForCausalLM, **fields), make_ids(2, 11)
    expected = in_segments(model, ids, lengths, keep=True)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=14)):
        torch.testing.assert_close(in_chunks(model, ids, lengths, cache), expected, atol=1e-10, rtol=1e-10)
    assert (expected - model(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_memory_is_the_segment_before_alone(make_model, make_ids):
    """Attention ends there, the state does not: with one layer, tokens before the last segment act through c only."""
    model, ids = make_model(SruppForCausalLM, num_hidden_layers=1), make_ids(2, 12)
    ours = in_segments(model, ids, [4, 4, 4], keep=False)
    torch.testing.assert_close(ours[:, :8], model(ids[:, :8]).logits, atol=1e-10, rtol=1e-10)
    state = model(ids[:, :4], return_memory=True).memory.cell_states
    second = model(ids[:, :8], return_memory=True).memory
    memory = SegmentMemory(second.cell_states, tuple(x[:, 4:] for x in second.layer_inputs))
    assert not torch.equal(state[0], second.cell_states[0])
    torch.testing.assert_close(ours[:, 8:], model(ids[:, 8:], memory=memory).logits, atol=1e-10, rtol=1e-10)
    assert (ours[:, 8:] - model(ids).logits[:, 8:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"attention_layers": [1]}, {"num_attention_heads": 1}])
def test_padding_in_segments(make_model, make_ids, fields):
    """Pads of either segment, told by the memory itself or by a mask over both."""
    model, ids = make_model(SruppForCausalLM, **fields), make_ids(2, 10)
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 1, 1], [1] * 10]).bool()
    first = model(ids[:, :5], attention_mask=mask[:, :5], return_memory=True)
    for given in (mask[:, 5:], mask):
        logits = model(ids[:, 5:], attention_mask=given, memory=first.memory).logits
        for row in range(2):
            alone = model(ids[row : row + 1, mask[row]]).logits[0, mask[row, :5].sum() :]
            torch.testing.assert_close(logits[row, mask[row, 5:]], alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_attention_heads": 1}, {"attention_layers": [-1]}])
def test_a_window_beside_a_cache(make_model, make_ids, fields):
    model, ids = make_model(SruppForCausalLM, **fields), make_ids(2, 11)
    whole = model(ids, attention_window=3).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=14)):
        ours = in_chunks(model, ids, [4, 1, 5, 1], cache, attention_window=3)
        torch.testing.assert_close(ours, whole, atol=1e-10, rtol=1e-10)
    assert (whole - model(ids).logits).abs().max() > 1e-3


def cache_bytes(cache) -> int:
    """Memory behind all tensors of a cache, whole storages, so that a view of something larger counts as that."""
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None), *layer.conv_states.values()):
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def no_attention():
    """The name of an attention that takes no time: what a cache keeps of a layer does not depend on its output."""
    name = "none_of_test_cache_srupp"
    AttentionInterface.register(name, lambda module, query, *args, **kwargs: (query.transpose(1, 2), None))
    yield name
    del AttentionInterface._global_mapping[name]


@torch.no_grad()
def test_memory_of_caches(make_config, no_attention):
    """Ten layers at 16,384 tokens: k = 10 takes at most an eighth of k = 1, SRU a vector a layer and a byte a token."""
    sizes = {"hidden_size": 16, "projection_size": 4, "num_hidden_layers": 10, "num_attention_heads": 1}
    ids, weights = torch.zeros(1, 1024, dtype=torch.long), {}
    cases = {"1": ({}, 16), "10": ({"attention_every_n_layers": 10}, 16), "sru": ({"attention_layers": []}, 2)}
    for name, (fields, calls) in cases.items():
        model = SruppForCausalLM._from_config(make_config(**sizes, **fields), attn_implementation=no_attention).eval()
        cache = DynamicCache(config=model.config)
        for _ in range(calls):
            model(ids, cache=cache, logits_to_keep=1)
        assert cache.get_seq_length() == calls * 1024
        weights[name] = cache_bytes(cache)
    states = 10 * 16 * 4
    assert weights["10"] == states + 16_384 * 4 * 4
    assert weights["10"] <= weights["1"] / 8
    assert weights["sru"] == states + 2 * 1024


def test_no_cache_is_built_beside_memory(make_model, make_ids):
    assert make_model(SruppForCausalLM)(make_ids(1, 5), return_memory=True).cache is None


@torch.no_grad()
def test_memory_is_float32_in_a_bfloat16_model(make_model, make_ids):
    memory = make_model(SruppForCausalLM, dtype=torch.bfloat16)(make_ids(2, 7), return_memory=True).memory
    assert {state.dtype for state in memory.cell_states} == {torch.float32}
