"""Masks and checks of caches of models with states, against what they say of each query and key."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_efficient.modules.causal_inputs import (
    KeyPlace,
    check_cache,
    check_continuation,
    check_room,
    cover_cache,
    first_and_last_tokens,
    held_tokens,
    holds_tokens,
    padding_mask,
    scores_mask,
)
from tests.helpers.families import SCALING_TRANSFORMER, SRUPP


ROWS = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "inside": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]],
}


def config_of(attention="eager", **fields):
    config = SRUPP.make_config(**fields)
    config._attn_implementation = attention
    return config


def embeddings(batch, length):
    return torch.zeros(batch, length, 18)


@pytest.mark.parametrize("where", ROWS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_is_read_from_the_last_tokens_of_a_mask(where, dtype):
    mask = torch.tensor(ROWS[where]).to(dtype)
    assert torch.equal(padding_mask(mask, 5), mask.bool())
    over_a_past = torch.cat([torch.zeros(2, 3).to(dtype), mask], 1)
    assert torch.equal(padding_mask(over_a_past, 5), mask.bool())
    for ready in ({"linear_attention": mask}, {"hybrid": {"linear_attention": mask, "full_attention": None}}):
        assert torch.equal(padding_mask(ready, 5), mask.bool())


@pytest.mark.parametrize("length", [1, 63])
def test_nothing_is_padding(length):
    ones = torch.ones(1, length)
    padded_past = torch.cat([torch.zeros(1, 2), ones], 1)
    for mask in (None, ones, padded_past, torch.zeros(1, 1, length, length), {"full_attention": None}):
        assert padding_mask(mask, length) is None


def test_a_mask_is_extended_over_the_cache():
    model = SCALING_TRANSFORMER.make_model()
    cache = model(SCALING_TRANSFORMER.make_ids(2, 3), use_cache=True).cache
    mask = torch.tensor(ROWS["left"])
    assert cover_cache(mask, cache, 5).tolist() == [[1, 1, 1, *row] for row in ROWS["left"]]
    for other in (None, {}, mask[:, None, None], torch.ones(2, 8)):
        assert cover_cache(other, cache, 5) is other


def seen(config, mask, batch, length, past=0):
    """`(batch, length, past + length)`: which keys each query sees by what [`scores_mask`] gave."""
    if mask is None:  # the attention is causal by itself
        return torch.ones(length, past + length).tril(past).bool().expand(batch, -1, -1)
    mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask.expand(batch, 1, -1, -1)[:, 0]


def by_loop(causal, real, starts, window, past, past_real):
    """The same, a query and a key at a time; `None` in the place of what a padded query sees."""
    batch, length = real.shape
    found = torch.zeros(batch, length, past + length).bool()
    for row in range(batch):
        documents = starts[row].cumsum(0).tolist()
        for query in range(length):
            for key in range(past + length):
                place = key - past
                is_real = past_real[row, key] if place < 0 else real[row, place]
                is_near = window is None or place >= query - window
                is_same = place < 0 or documents[place] == documents[query]
                found[row, query, key] = is_real and is_near and is_same and (not causal or place <= query)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("documents", [False, True], ids=["one-text", "documents"])
@pytest.mark.parametrize("where", [None, *ROWS])
def test_masks_of_scores(attention, causal, window, documents, where):
    config = config_of(attention, is_causal=causal)
    real = torch.ones(2, 5).bool() if where is None else torch.tensor(ROWS[where]).bool()
    starts = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]).bool() if documents else torch.zeros(2, 5).bool()
    mask = scores_mask(
        config, embeddings(2, 5), None if where is None else real, None, starts if documents else None, window
    )
    if mask is None:
        assert where is None
        assert window is None
        assert not documents
        if not causal:
            return
    expected = by_loop(causal, real, starts, window, 0, None)
    assert torch.equal(seen(config, mask, 2, 5)[real], expected[real])


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("past", [1, 4])
@pytest.mark.parametrize("where", [None, "past", "all"])
@pytest.mark.parametrize("window", [None, 2])
def test_masks_over_keys_outside_a_cache(length, past, where, window):
    """A padded query sees itself alone where nothing else is left, so that no softmax is empty."""
    config, real = config_of(), torch.ones(2, length).bool()
    past_real = torch.ones(2, past).bool()
    if where is not None:
        past_real[0] = False
    if where == "all":
        real[0, 0] = False
    given = {"past_mask": None if where is None else past_real}
    mask = real if where == "all" else None
    found = seen(
        config, scores_mask(config, embeddings(2, length), mask, None, None, window, past, **given), 2, length, past
    )
    none = torch.zeros(2, length).bool()
    expected = by_loop(True, real, none, window, past, past_real)
    if where == "all":
        assert found[0, 0].nonzero().tolist() == [[past]]
    assert torch.equal(found[real], expected[real])


def test_a_mask_over_past_and_new_tokens_counts_for_both():
    config = config_of()
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    found = seen(config, scores_mask(config, embeddings(1, 4), mask, None, None, None, 2), 1, 4, 2)
    assert found[0, [0, 1, 3]].long().tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1]]


def test_a_given_mask_stands_in_the_place_of_causality():
    config, whole = config_of(), torch.ones(2, 1, 5, 5).bool()
    starts = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    ones = torch.ones(2, 5).bool()
    assert seen(config, scores_mask(config, embeddings(2, 5), whole, None, None), 2, 5).all()
    for given, window in ((starts, None), (None, 1), (starts, 1)):
        none = torch.zeros(2, 5).bool() if given is None else given
        found = seen(config, scores_mask(config, embeddings(2, 5), whole, None, given, window), 2, 5)
        assert torch.equal(found, by_loop(False, ones, none, window, 0, None))


def test_ready_masks_are_taken_by_kind_of_layer():
    ready = torch.zeros(1, 1, 5, 5)
    for given in ({"full_attention": ready}, {"hybrid": {"full_attention": ready, "linear_attention": None}}):
        assert scores_mask(config_of(), embeddings(1, 5), given, None, None) is ready


def test_attentions_that_take_no_ready_mask():
    config = config_of("flex_attention")
    with pytest.raises(ValueError, match=r"Memory works with eager and sdpa attention, not with 'flex_attention'"):
        scores_mask(config, embeddings(1, 5), None, None, None, None, 3)
    with pytest.raises(ValueError, match=r"flex_attention takes no tensor of four dimensions.*'sdpa'"):
        scores_mask(config, embeddings(1, 5), torch.ones(1, 1, 5, 5), None, None)


HYBRID = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
KINDS = {"keys": {}, "keys-and-states": HYBRID}
CACHES = {"dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=9)}


@torch.no_grad()
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_what_a_cache_holds(fields, make_cache):
    model = SCALING_TRANSFORMER.make_model(**fields)
    cache, is_static = make_cache(config=model.config), make_cache is not DynamicCache
    assert not holds_tokens(cache)
    assert held_tokens(cache, torch.ones(2, 5), 5) == (0, None)
    model(SCALING_TRANSFORMER.make_ids(2, 5), cache=cache)
    assert holds_tokens(cache)
    assert held_tokens(cache, torch.ones(2, 6), 1) == (5, None)
    assert held_tokens(cache, torch.ones(2, 1, 1, 6), 1) == (5, 9 if is_static else 6)
    for length in (1, 4):
        check_room(cache, length)
    if is_static:
        with pytest.raises(ValueError, match=r"holds 5 tokens of 9, and 5 more do not fit: .*max_cache_len"):
            check_room(cache, 5)
    else:
        check_room(cache, 500)


def test_a_cache_without_layers_holds_nothing():
    assert not holds_tokens(DynamicCache())
    check_room(DynamicCache(), 63)


@torch.no_grad()
def test_caches_that_do_not_fit():
    model = SCALING_TRANSFORMER.make_model(**HYBRID)
    width, kinds = model.config.state_size, model.config.layer_types
    cache = model(SCALING_TRANSFORMER.make_ids(2, 5), use_cache=True).cache
    check_cache(cache, 2, kinds, width, "a model")
    check_cache(DynamicCache(config=model.config), 7, kinds, 1, "a model")  # nothing in it yet that could differ
    with pytest.raises(TypeError, match=r"cache must be a Cache of transformers.*, not list"):
        check_cache([], 2, kinds, width, "a model")
    for batch, size in ((1, width), (2, width + 1)):
        with pytest.raises(ValueError, match=rf"states of shape \(2, {width}\).*want \({batch}, {size}\)"):
            check_cache(cache, batch, kinds, size, "a model")
    with pytest.raises(ValueError, match=r"of 2 layers, without a place for the states of this model's 3 layers"):
        check_cache(cache, 2, [*kinds, "hybrid"], width, "a model")
    with pytest.raises(ValueError, match=r"DynamicCache of 0 layers.*does not work with a model: take LoRA"):
        check_cache(DynamicCache(), 2, kinds, width, "a model")
    check_cache(DynamicCache(), 2, ["full_attention"] * 3, 0, "a model")  # it grows layer by layer
    with pytest.raises(ValueError, match=r"of 2 layers, but the model has 2 layers that keep keys and values alone"):
        check_cache(cache, 2, ["full_attention"] * 2, 0, "a model")


@torch.no_grad()
def test_continuations_that_do_not_fit():
    model = SCALING_TRANSFORMER.make_model(dtype=torch.float32)
    cache = model(SCALING_TRANSFORMER.make_ids(2, 5), use_cache=True).cache
    place, states = KeyPlace(0, 4, 6), torch.zeros(2, 1, 24)
    check_continuation(cache, place, None, states)
    check_continuation(cache, None, None, states[:1])
    for wrong, given, starts, message in (
        (place, states[:1], None, r"keys of 2 rows, but the input has 1: each batch begins"),
        (KeyPlace(0, 2, 12), states, None, r"keys of shape \(2, 4, 5, 6\).*has 2 heads of size 12"),
        (place, states.double(), None, r"keys of torch.float32, but the model computes in torch.float64"),
        (place, states, torch.ones(2, 1).bool(), r"A document begins within a row that goes on from a cache"),
    ):
        with pytest.raises(ValueError, match=message):
            check_continuation(cache, wrong, starts, given)


@pytest.mark.parametrize(
    ("row", "first", "last"),
    [([0, 0, 1, 1, 1], 2, 4), ([1, 1, 1, 0, 0], 0, 2), ([0, 1, 0, 1, 0], 1, 3), ([0] * 5, 0, 0), ([1] * 63, 0, 62)],
    ids=["left", "right", "inside", "nothing", "63"],
)
def test_where_the_text_of_a_row_begins_and_ends(row, first, last):
    mask, states = torch.tensor([row]), torch.zeros(1, len(row), 3)
    config = SRUPP.make_config(pad_token_id=7)
    ids = torch.full_like(mask, 5).masked_fill(mask == 0, 7)
    past = torch.ones(1, 2).long()
    for given in ((None, mask), (ids, None), (None, torch.cat([past, mask], 1))):
        found = first_and_last_tokens(config, *given, states)
        assert [index.tolist() for index in found] == [[first], [last]]


def test_a_text_of_which_nothing_says_where_it_ends():
    ids, states = torch.full((2, 1), 7), torch.zeros(2, 1, 3)
    for config, given in (
        (SRUPP.make_config(pad_token_id=7), (None, None)),
        (SRUPP.make_config(pad_token_id=7), (None, torch.ones(2, 1, 1, 1))),
        (SRUPP.make_config(pad_token_id=None), (ids.expand(2, 63), None)),
    ):
        states = torch.zeros(2, 63 if given[0] is not None else 1, 3)
        first, last = first_and_last_tokens(config, *given, states)
        assert first.tolist() == [0, 0]
        assert last.tolist() == [states.shape[1] - 1] * 2
