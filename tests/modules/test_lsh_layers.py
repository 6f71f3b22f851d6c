"""Attention by hashing with its maps: rows beside others, kinds of rows, decoding, and what a cache holds of it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_efficient.models.terraformer.configuration_terraformer import TerraformerConfig
from hf_efficient.modules.lsh_layers import LshAttention
from hf_efficient.ops.lsh_attention import lsh_decode
from hf_efficient.ops.lsh_hashing import hash_buckets
from hf_efficient.ops.rerun import Remembered


MAPS = {
    "dense": {},
    "dense-shared": {"attention_share_qk": True},
    "conv": {"attention_type": "multiplicative_conv", "attention_sparsity": 3},
    "conv-shared": {"attention_type": "multiplicative_conv", "attention_sparsity": 3, "attention_share_qk": True},
}
every_map = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)


def make_config(**fields):
    return TerraformerConfig(
        vocab_size=9,
        hidden_size=12,
        num_attention_heads=2,
        num_encoder_layers=0,
        num_decoder_layers=1,
        attentions_per_layer=1,
        is_encoder_decoder=False,
        max_position_embeddings=64,
        dropout=0.0,
        attn_implementation="sdpa",
        **{"decoder_long_attention": "lsh", "lsh_chunk_length": 4, "lsh_buckets": [4], **fields},
    )


def make_attention(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = make_config(**fields)
    attention = LshAttention(config, 0, config.decoder_long_attention, 64).to(dtype).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.0, 0.5)
    return attention


def make_inputs(batch, length, width=12):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def causal(length, real=None):
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    return seen if real is None else seen & real[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 63])
@every_map
def test_decoding_is_that_of_a_query_at_a_time(maps, length):
    """Its own keys held as they are, against the op, which is tested against loops."""
    attention, x = make_attention(**maps), make_inputs(2, length + 3)
    cache = DynamicCache(config=attention.config)
    # The state of convolutions is the layer's matter: here one call projects all tokens.
    query, key, value, _ = attention.project(x, None, None, False)
    query_key = attention._query_key(query, key)
    attention._attend_from_cache(query_key[:, :, :length], value[:, :, :length], None, None, cache, None)
    buckets = hash_buckets(query_key, attention.rotations, attention.factors)
    for place in range(length, length + 3):
        new = slice(place, place + 1)
        found = attention._attend_from_cache(query_key[:, :, new], value[:, :, new], None, None, cache, None)
        held = (query_key[:, :, : place + 1], value[:, :, : place + 1], buckets[..., : place + 1])
        expected = lsh_decode(query_key[:, :, new], *held, chunk_length=4)
        torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_row_keeps_its_kind():
    """Rows that are short when they are first read attend to all keys for good, beside others that do not."""
    attention, x = make_attention(decoder_long_attention="mixed", lsh_full_length=6), make_inputs(3, 12)
    real = torch.ones(3, 12, dtype=torch.bool)
    starts = (5, 0, 3)  # rows of four, nine and six tokens, which grow beyond six
    for row, start in enumerate(starts):
        real[row, :start] = False

    def decode(rows, start):
        cache, own = DynamicCache(config=attention.config), real[rows, start:]
        first = 9 - start
        found = [attention(x[rows, start:9], causal(first, own[:, :first]), cache, real=own[:, :first])[0]]
        for place in range(9, 12):
            mask = own[:, None, None, : place + 1 - start]
            found.append(attention(x[rows, place : place + 1], mask, cache)[0])
        return torch.cat(found, dim=1)

    together = decode(slice(0, 3), 0)
    for row, start in enumerate(starts):
        rows = slice(row, row + 1)
        torch.testing.assert_close(together[rows, start:], decode(rows, start), atol=1e-12, rtol=0)
        attended, _ = attention.attend(
            *(part[rows, :, start:] for part in _projected(attention, x)), causal(12 - start)
        )
        of_all_keys, _ = attention.finish(attended, None, None, False)
        assert torch.allclose(of_all_keys, together[rows, start:], atol=1e-12) == (row != 1)


def _projected(attention, x):
    query, key, value, _ = attention.project(x, None, None, False)
    query_key = attention._query_key(query, key)
    return query_key, query_key, value


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_16_bits_holds_buckets_exactly(dtype):
    attention = make_attention(torch.float32, lsh_buckets=[64, 32], lsh_rounds=3).to(dtype)
    assert attention.rotations.dtype == torch.float32, "rounded directions hash to other buckets"
    x = make_inputs(2, 40).to(dtype)
    query_key, _, value = _projected(attention, x)
    cache = DynamicCache(config=attention.config)
    attention._attend_from_cache(query_key, value, None, None, cache, None)
    buckets = hash_buckets(query_key, attention.rotations, attention.factors)
    assert buckets.max() > 300
    assert torch.equal(attention.digits(3).read(cache.layers[0].keys).buckets.long(), buckets)


@torch.no_grad()
def test_rows_that_are_exchanged_take_their_buckets_along():
    attention, x = make_attention(), make_inputs(2, 11)
    cache = DynamicCache(config=attention.config)
    attention(x[:, :9], None, cache)
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.tensor([1, 0]))
    expected = attention(x[:, 9:10], None, cache)[0]
    found = attention(x.flip(0)[:, 9:10], None, other)[0]
    torch.testing.assert_close(found, expected.flip(0), atol=1e-12, rtol=0)


def test_a_second_run_takes_the_buckets_of_the_first():
    attention, x, memory = make_attention(), make_inputs(1, 20), Remembered()
    memory.begin(x.device)
    first = attention(x, None, memory=memory)[0]
    attention.rotations = -attention.rotations.flip(2)
    memory.begin(x.device)
    assert torch.equal(attention(x, None, memory=memory)[0], first)
    assert not torch.equal(attention(x, None)[0], first)


@torch.no_grad()
def test_evaluation_may_use_more_rounds():
    more, few, x = make_attention(lsh_eval_rounds=5), make_attention(), make_inputs(1, 40)
    assert torch.equal(more.rotations[:, :2], few.rotations)
    assert not torch.allclose(more(x)[0], few(x)[0])
    assert torch.equal(more.train()(x)[0], few.train()(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("begins", ["in-evaluation", "in-training"])
def test_a_cache_goes_on_with_the_rounds_that_it_began_with(begins):
    attention, x = make_attention(lsh_eval_rounds=5), make_inputs(2, 41)
    trains = begins == "in-training"
    one_kind = make_attention(**({} if trains else {"lsh_rounds": 5}))
    found = []
    for model, switches in ((attention, True), (one_kind, False)):
        cache = DynamicCache(config=model.config)
        model.train(trains)(x[:, :40], cache=cache)
        found.append(model.train(trains != switches)(x[:, 40:], cache=cache)[0])
    assert torch.equal(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize("numbers", [6, 11, 16], ids=["no-buckets", "odd", "more-rounds"])
def test_a_cache_that_another_model_filled_is_refused(numbers):
    attention, x = make_attention(), make_inputs(1, 8)
    cache = DynamicCache(config=attention.config)
    cache.update(torch.zeros(1, 2, 8, numbers), torch.zeros(1, 2, 8, 6), 0)
    with pytest.raises(ValueError, match=f"The cache holds keys of {numbers} numbers in layer 0"):
        attention(x, cache=cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lsh_buckets": [6, 3]}, "lsh_buckets must be even numbers"),
        ({"lsh_chunk_length": 65}, r"lsh_chunk_length \(65\) is more than max_position_embeddings \(64\)"),
        ({"decoder_long_attention": "sometimes"}, "decoder_long_attention"),
        ({"decoder_long_attention": "none", "attention_share_qk": True}, "belong to attention_type"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        make_config(**fields)
