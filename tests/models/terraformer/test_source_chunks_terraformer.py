"""Sources and prompts that are read into a cache some tokens at a time, for batches of unequal lengths."""

import pytest
import torch

from hf_efficient.models.terraformer.modeling_terraformer import TerraformerForCausalLM
from tests.helpers.families import TERRAFORMER, TERRAFORMER_LM


JOINED = ("dense", "all-sru", "average-one-swap", "half-width", "forgetting")
LSH = {"decoder_long_attention": "lsh", "lsh_chunk_length": 4}
MIXED = {**LSH, "decoder_long_attention": "mixed", "lsh_full_length": 6}
HASHED = {"lsh": LSH, "lsh, sparse": {**LSH, **TERRAFORMER.variants["all-sru"]}, "mixed": MIXED}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
LENGTHS = [5, 13, 1]


@torch.no_grad()
def logits_of(model, batch, rows=slice(None), **options):
    """Of the target in one call, and of one more token behind it."""
    source = {name: tensor[rows] for name, tensor in batch.source.items()}
    first = model(**source, decoder_input_ids=batch.targets[rows, :5], use_cache=True, **options)
    more = {"attention_mask": source["attention_mask"], "decoder_input_ids": batch.targets[rows, 5:]}
    return torch.cat([first.logits, model(**more, cache=first.cache, use_cache=True).logits], dim=1)


@pytest.mark.parametrize("size", [1, 4, 12, 13, 64])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", JOINED)
def test_attention_to_all_keys_gives_the_same_in_pieces(make_model, make_batch, kind, side, size):
    model, batch = make_model(**TERRAFORMER.variants[kind]), make_batch(LENGTHS, side=side)
    whole, pieces = logits_of(model, batch), logits_of(model, batch, source_chunk_size=size)
    torch.testing.assert_close(pieces, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fields", HASHED.values(), ids=HASHED)
def test_hashed_sources_do_not_depend_on_the_size_of_pieces(make_model, make_batch, fields):
    """Each token sees what it would see in decoding; a row in a batch gives what it gives alone."""
    model, batch = make_model(**fields), make_batch(LENGTHS, side="left")
    one_by_one = logits_of(model, batch, source_chunk_size=1)
    for size in (4, 5, 64):
        torch.testing.assert_close(logits_of(model, batch, source_chunk_size=size), one_by_one, atol=1e-10, rtol=1e-10)
    for row, source in enumerate(batch.sources):
        alone = {"input_ids": source[None], "decoder_input_ids": batch.targets[row : row + 1, :5]}
        with torch.no_grad():
            expected = model(**alone, use_cache=True, source_chunk_size=3).logits[0]
        torch.testing.assert_close(one_by_one[row, :5], expected, atol=1e-10, rtol=1e-10)


def test_mixed_attention_decides_by_the_whole_source(make_model, make_batch):
    """Short rows see all keys, as at once; the long one hashes, though no piece is longer than the limit."""
    model, batch = make_model(**MIXED), make_batch(LENGTHS)
    full = make_model(**{**MIXED, "lsh_full_length": 64})
    in_pieces, whole = logits_of(model, batch, source_chunk_size=4), logits_of(full, batch)
    torch.testing.assert_close(in_pieces[::2], whole[::2], atol=1e-10, rtol=1e-10)
    assert (in_pieces[1] - whole[1]).abs().max() > 1e-3


def test_generate_reads_sources_in_pieces(make_model, make_batch):
    model, batch = make_model(**TERRAFORMER.variants["all-sru"]), make_batch(LENGTHS)
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        rows = slice(1, 2) if "prompt_lookup_num_tokens" in options else slice(None)
        source = {name: tensor[rows] for name, tensor in batch.source.items()}
        expected = model.generate(**source, **GREEDY, **options)
        assert torch.equal(model.generate(**source, **GREEDY, **options, prefill_chunk_size=4), expected)


@pytest.mark.parametrize("fields", HASHED.values(), ids=HASHED)
def test_prompts_of_a_language_model_do_not_depend_on_the_size_of_pieces(fields):
    model = TERRAFORMER_LM.make_model(TerraformerForCausalLM, **fields, attentions_per_layer=1)
    ids = TERRAFORMER_LM.make_ids(2, 11)
    mask = torch.tensor([[0] * 6 + [1] * 5, [1] * 11])
    found = {
        size: model.generate(ids, attention_mask=mask, **GREEDY, prefill_chunk_size=size)[:, 11:] for size in (1, 4, 30)
    }
    assert torch.equal(found[1], found[4])
    assert torch.equal(found[1], found[30])
    alone = model.generate(ids[:1, 6:], **GREEDY, prefill_chunk_size=2)[:, 5:]
    assert torch.equal(alone, found[1][:1])


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_sizes_that_are_none_are_refused(make_model, make_batch, size):
    with pytest.raises(ValueError, match=r"source_chunk_size .*must be 1 or more, not"):
        logits_of(make_model(), make_batch(LENGTHS), source_chunk_size=size)


def test_cross_attention_has_nothing_to_cut(make_model, make_batch):
    with pytest.raises(ValueError, match=r"wants decoder_type='joined'.*leave it out"):
        make_model(**TERRAFORMER.variants["cross"]).generate(**make_batch(LENGTHS).source, prefill_chunk_size=4)
