"""Masks and caches of models that attend and carry a state from token to token as well.

Such a model reads every token in order, so padding and documents that share a row concern its states as much as its
attention. In its cache each layer has keys and values, a state, or both.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import and_masks, create_bidirectional_mask, create_causal_mask

from ..utils.cache_naming import cache_kwarg
from .input_checks import additive_mask, compute_dtype, stands_for_many, values_can_be_read, values_exist


# Where a cache's layer keeps room for tokens to come; see decoding.py. Its keys may have fewer bits than the model.
DECODING_ROOM = "_decoding_room"


def padding_mask(attention_mask: torch.Tensor | dict[str, Any] | None, length: int) -> torch.Tensor | None:
    """
    Args:
        attention_mask: as the model gets it: `(batch, at least length)`; of four dimensions, which says nothing of
            padding; or the ready masks of compiled generation, by kind of layer.

    Returns:
        `Tensor` of shape `(batch, length)`: boolean, `False` at padding; `None` where there is none to be seen.
    """
    mask = attention_mask
    if isinstance(mask, dict):
        mask = mask.get("hybrid", mask).get("linear_attention")
    if mask is None or mask.dim() != 2:
        return None
    mask = mask[:, -length:].bool()
    # Reading the mask stalls an accelerator for a moment, as transformers' own masks do, and saves every layer the work
    # for padding that is not there.
    return None if values_exist(mask) and mask.all() else mask


def cover_cache(attention_mask, cache: Cache, length: int):
    """Extend a mask over the `length` new tokens to those in the cache, none of which is padding."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        return attention_mask
    return torch.nn.functional.pad(attention_mask, (int(cache.get_seq_length()), 0), value=1)


def scores_mask(
    config: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    cache: Cache | None,
    starts: torch.Tensor | None,
    window: int | None = None,
    past: int = 0,
    past_mask: torch.Tensor | None = None,
):
    """
    The mask of the attention's scores in the form that `config._attn_implementation` takes, or `None` where it needs
    none.

    Args:
        config (`PreTrainedConfig`): of the model; causal unless its `is_causal` says otherwise.
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`): embeddings.
        attention_mask: checked by [`read_attention_mask`], or the ready masks of compiled generation.
        cache (`Cache`, *optional*): keys of earlier calls.
        starts (`torch.Tensor` of shape `(batch, length)`, *optional*): `True` where a document begins.
        window (`int`, *optional*): number of positions back that a query sees.
        past (`int`, defaults to 0): number of keys before the input that are not in a cache.
        past_mask (`torch.Tensor` of shape `(batch, past)`, *optional*): `False` where one of those is padding.

    Raises:
        ValueError: keys outside a cache with an attention that takes no ready mask.
    """
    if isinstance(attention_mask, dict):
        return attention_mask.get("hybrid", attention_mask)["full_attention"]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        return _given_mask(config, hidden_states, attention_mask, starts, window)
    if starts is None and window is None and past == 0 and _sees_all(config, hidden_states, attention_mask, cache):
        return None
    if any(flags is not None and stands_for_many(flags) for flags in (attention_mask, starts)):
        if cache is not None:
            raise ValueError("Under a transform of torch.func a mask or position_ids of its own go without a cache.")
    elif past == 0:
        return _built_mask(config, hidden_states, attention_mask, cache, starts, window)
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"Memory works with eager and sdpa attention, not with {config._attn_implementation!r}: "
            "model.set_attn_implementation('sdpa')."
        )
    batch, length = hidden_states.shape[:2]
    real = None if attention_mask is None else attention_mask.bool()
    if past and (real is not None or past_mask is not None):
        ones = hidden_states.new_ones(batch, max(past, length), dtype=torch.bool)
        before = ones[:, :past] if past_mask is None else past_mask
        if real is not None and real.shape[1] == past + length:
            before = before & real[:, :past]
        real = torch.cat([before, ones[:, :length] if real is None else real[:, -length:]], dim=1)
    return _full_mask(config, hidden_states, past, real, starts, window)


def _sees_all(config: Any, hidden_states: torch.Tensor, attention_mask: Any, cache: Cache | None) -> bool:
    """Return whether this is a token that is known to see everything before it, by an attention that needs no mask."""
    if torch.compiler.is_compiling() or type(cache) is not DynamicCache or hidden_states.shape[1] != 1:
        return False
    if config._attn_implementation not in ("eager", "sdpa"):
        return False
    if attention_mask is None:
        return True
    return (
        isinstance(attention_mask, torch.Tensor) and values_can_be_read(attention_mask) and bool(attention_mask.all())
    )


def _built_mask(
    config: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    starts: torch.Tensor | None,
    window: int | None,
):
    """The mask without keys outside the cache, as transformers builds it for the attention in use."""
    arguments = {"config": config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
    rules = []
    if starts is not None:
        documents = starts.cumsum(1)
        # A static cache has more keys than tokens; causality hides the rest.
        last = documents.shape[1] - 1
        rules.append(lambda b, h, query, key: documents[b, query] == documents[b, key.clamp(max=last)])
    if window is not None:
        rules.append(lambda b, h, query, key: key >= query - window)
    if rules:
        arguments["and_mask_function"] = and_masks(*rules)
    if not getattr(config, "is_causal", True):
        return create_bidirectional_mask(**arguments)
    return create_causal_mask(**cache_kwarg(cache), position_ids=None, **arguments)


def _given_mask(
    config: Any, hidden_states: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor | None, window
) -> torch.Tensor:
    """A mask of four dimensions, in the place of causality, with what documents and the window hide besides."""
    if config._attn_implementation == "flex_attention":  # on a CPU, torch 2.13 writes outside its memory there
        raise ValueError(
            "flex_attention takes no tensor of four dimensions as attention_mask: give a BlockMask, or call "
            "model.set_attn_implementation('sdpa')."
        )
    mask = additive_mask(mask, hidden_states)
    lowest = torch.finfo(mask.dtype).min / 2
    length, keys = mask.shape[2:]
    if starts is not None:
        documents = starts.cumsum(1)
        of_keys = nn.functional.pad(documents, (0, keys - length), value=-1)
        mask = mask.masked_fill(documents[:, None, :, None] != of_keys[:, None, None, :], lowest)
    if window is not None:
        places = torch.arange(keys, device=mask.device)
        queries = places[keys - length :, None]
        mask = mask.masked_fill(places < queries - window, lowest)
    return mask


def _full_mask(
    config: Any,
    hidden_states: torch.Tensor,
    past: int,
    real: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """`(batch or 1, 1, length, past + length)`, `True` where a query may see a key. A query that would see nothing sees
    itself, so that no softmax is empty."""
    length, device = hidden_states.shape[1], hidden_states.device
    queries = torch.arange(past, past + length, device=device)[:, None]
    keys = torch.arange(past + length, device=device)[None, :]
    allowed = torch.ones(length, past + length, dtype=torch.bool, device=device)
    if getattr(config, "is_causal", True):
        allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys >= queries - window)
    allowed = allowed[None, None]
    if starts is not None:  # without a past, which continues every row's document
        documents = starts.cumsum(1)
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    if real is not None:
        allowed = allowed & real[:, None, None, :]
        allowed = allowed | ((keys == queries) & ~allowed.any(-1, keepdim=True))
    return allowed


def held_tokens(cache: Cache, mask: torch.Tensor, length: int, layer: int = 0) -> tuple[int, int | None]:
    """
    Args:
        cache (`Cache`): of the model, at a call of `length` tokens.
        mask (`torch.Tensor`): the attention mask that is given with it.
        layer (`int`, defaults to 0): the first layer that has keys.

    Returns:
        `tuple[int, int | None]`: number of tokens that the cache holds and, for a mask of four dimensions, number of
        keys, since a static cache has more.
    """
    held = cast(Any, cache.get_seq_length())
    if isinstance(held, torch.Tensor):  # of a static cache; not to be read while compiling
        held = max(mask.shape[-1] - length, 0) if torch.compiler.is_compiling() else int(held)
    return held, int(cache.get_mask_sizes(length, layer)[0]) if mask.dim() == 4 else None


def holds_tokens(cache: Cache) -> bool:
    """
    Return whether a cache holds an earlier part of the text. Where the number of tokens in a static cache cannot be
    read, as in compiled code, it does once it was written to.
    """
    if not cache.layers:  # made without a config, it grows as keys come
        return False
    layer: Any = cache.layers[0]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return cache.has_previous_state(0)
    held: Any = layer.get_seq_length()
    if isinstance(held, torch.Tensor) and not values_exist(held):
        return layer.is_initialized
    return int(held) != 0


def check_cache(cache: Any, batch: int, layer_types: list[str], state_size: int, model: str) -> None:
    """
    Check that a cache is one for this model and this batch.

    Args:
        cache (`Any`): what was given.
        batch (`int`): number of rows of the input.
        layer_types (`list[str]`): kind of each layer, as the config names it.
        state_size (`int`): width of a layer's state; 0 for a model without states.
        model (`str`): what a model with states is called in an error.

    Raises:
        TypeError: if it is no cache of transformers.
        ValueError: a cache of another kind of model, of another depth, width or batch size. One that holds no layers
            yet and grows as keys come, `DynamicCache()`, fits a model without states.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"cache must be a Cache of transformers, DynamicCache(config=model.config), not {type(cache).__name__}."
        )
    layers: Any = getattr(cache, "layers", [])
    depth = len(layer_types)
    has_states = layer_types[0] != "full_attention"
    if not (layers or has_states) and getattr(cache, "layer_class_to_replicate", None) is not None:
        return  # `DynamicCache()`, which grows layer by layer
    if len(layers) != depth or isinstance(layers[0], LinearAttentionCacheLayerMixin) != has_states:
        kind = type(cache).__name__
        if not has_states:
            raise ValueError(
                f"cache is a {kind} of {len(layers)} layers, but the model has {depth} layers that "
                f"keep keys and values alone: make it by {kind}(config=model.config)."
            )
        raise ValueError(
            f"cache is a {kind} of {len(layers)} layers, without a place for the states of this model's {depth} "
            f"layers: make it by {kind}(config=model.config). Prefix tuning, which hands over such a cache, does not "
            f"work with {model}: take LoRA or prompt tuning."
        )
    if not has_states or not cache.has_previous_state(0):
        return
    state: Any = layers[0].conv_states[0]
    if tuple(state.shape[:2]) != (batch, state_size):
        raise ValueError(
            f"cache holds states of shape {tuple(state.shape[:2])} (batch, state size), but the input and the model "
            f"want {(batch, state_size)}: each batch, and each model, begins with a cache of its own."
        )


def check_room(cache: Cache, length: int) -> None:
    """
    Check that a static cache has places for `length` more tokens.

    Raises:
        ValueError: if it has fewer, where the number of tokens that it holds can be read.
    """
    # Asked of the layer: `Cache.get_max_length` knows no bound where a layer has keys and a state.
    layer: Any = next((one for one in getattr(cache, "layers", []) if hasattr(one, "max_cache_len")), None)
    if layer is None:
        return
    held = layer.get_seq_length()
    if isinstance(held, torch.Tensor):
        if not values_can_be_read(held):
            return
        held = int(held)
    if held + length > layer.max_cache_len:
        raise ValueError(
            f"The cache holds {held} tokens of {layer.max_cache_len}, and {length} more do not fit: make it larger "
            "(max_cache_len), or begin a new one."
        )


class KeyPlace(NamedTuple):
    """The first layer of a model that attends, the number of its heads and their size."""

    layer: int
    heads: int
    head_size: int


def check_continuation(
    cache: Cache, place: KeyPlace | None, starts: torch.Tensor | None, hidden_states: torch.Tensor
) -> None:
    """
    Check a call that goes on from a cache.

    Args:
        cache (`Cache`): holds an earlier part of each row.
        place ([`KeyPlace`], *optional*): where it holds keys, and of what size.
        starts (`Tensor` of shape `(batch, length)`, *optional*): `True` where a document begins after the first token.
        hidden_states (`Tensor` of shape `(batch, length, width)`): embeddings.

    Raises:
        ValueError: for keys of another batch, of other heads or of another dtype, and for a document that begins.
    """
    if starts is not None and values_exist(starts):
        raise ValueError(
            "A document begins within a row that goes on from a cache (by position_ids, seq_idx or cu_seq_lens_q): "
            "give packed documents in one call, without a cache that holds anything."
        )
    keys: Any = None if place is None else getattr(cache.layers[place.layer], "keys", None)
    if place is None or keys is None or keys.numel() == 0:
        return
    if keys.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"cache holds keys of {keys.shape[0]} rows, but the input has {hidden_states.shape[0]}: each batch begins "
            "with a cache of its own."
        )
    if (keys.shape[1], keys.shape[3]) != place[1:]:
        raise ValueError(
            f"cache holds keys of shape {tuple(keys.shape)} (batch, heads, length, head size), but this model has "
            f"{place.heads} heads of size {place.head_size}: each model begins with a cache of its own."
        )
    has_room = DECODING_ROOM in cache.layers[place.layer].__dict__
    if not has_room and keys.dtype not in (hidden_states.dtype, compute_dtype(hidden_states)):
        raise ValueError(f"cache holds keys of {keys.dtype}, but the model computes in {compute_dtype(hidden_states)}.")


def first_and_last_tokens(
    config: Any, input_ids: torch.Tensor | None, attention_mask: Any, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find where the text of each row begins and ends.

    Args:
        config (`PreTrainedConfig`): with `pad_token_id`.
        input_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): where there is no mask, the padding id tells.
        attention_mask (`torch.Tensor`, *optional*): of two dimensions, or one that says nothing of padding.
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`): final states.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: index of the first and of the last real token, `(batch,)` each; both 0 in
        a row of nothing but padding.
    """
    batch, length = hidden_states.shape[:2]
    pad = config.pad_token_id
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    elif input_ids is not None and pad is not None:
        real = input_ids != pad
    else:
        real = hidden_states.new_ones(batch, length, dtype=torch.bool)
    places = torch.arange(length, device=hidden_states.device)
    last = (places * real).argmax(-1)
    first = ((length - places) * real).argmax(-1)
    return first, last
