"""Memory of segments, masks of SRU++ (padding, packed documents, causality), and checks of inputs."""

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import and_masks, create_bidirectional_mask, create_causal_mask

from ...modules.input_checks import (
    additive_mask,
    check_count,
    check_has_values,
    check_one_input,
    check_per_token,
    compute_dtype,
    known_ids,
    read_attention_mask,
    stands_for_many,
    values_exist,
)
from ...modules.packing import Packing
from ...utils.cache_naming import cache_kwarg
from .configuration_srupp import SruppConfig


class SegmentMemory(NamedTuple):
    """
    The memory of SRU++'s training and evaluation by segments (section 3 of the paper, and its code): the states of all
    layers, which reach back without limit, and the inputs that attending layers had in the previous segment alone.

    Args:
        cell_states (`tuple(Tensor)`): per layer c after the segment, `(batch, hidden_size)`, float32. In a
            bidirectional model, whose second half runs backwards, these are initial states and nothing that a text's
            next segment could go on from.
        layer_inputs (`tuple(Tensor or None)`): per layer its input in the segment, before any norm, `(batch, length,
            input size)`; `None` for layers that do not attend. Gradients flow through the projections of memory; detach
            it to keep them within a segment, as the paper does.
        mask (`Tensor` of shape `(batch, length)`, *optional*): `False` where the segment had padding.
    """

    cell_states: tuple[torch.Tensor, ...]
    layer_inputs: tuple[torch.Tensor | None, ...]
    mask: torch.Tensor | None = None

    def detach(self) -> "SegmentMemory":
        """Detach all tensors from their gradient history."""
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in self.layer_inputs)
        return SegmentMemory(tuple(state.detach() for state in self.cell_states), inputs, self.mask)

    @property
    def length(self) -> int:
        """Number of positions that can be attended to."""
        return next((tensor.shape[1] for tensor in self.layer_inputs if tensor is not None), 0)


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


def _scores_mask(
    config: SruppConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    starts: torch.Tensor | None,
    window: int | None,
):
    """The mask without memory, as transformers builds it for the attention in use."""
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
    if not config.is_causal:
        return create_bidirectional_mask(**arguments)
    return create_causal_mask(**cache_kwarg(cache), position_ids=None, **arguments)


def scores_mask(
    config: SruppConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    cache: Cache | None,
    starts: torch.Tensor | None,
    memory: SegmentMemory | None,
    window: int | None,
):
    """
    The mask of the attention's scores in the form that `config._attn_implementation` takes, or `None` where it needs
    none.

    Raises:
        ValueError: memory with an attention that takes no ready mask.
    """
    if not config.attention_layer_indices:
        return None
    if isinstance(attention_mask, dict):
        return attention_mask.get("hybrid", attention_mask)["full_attention"]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        return _given_mask(config, hidden_states, attention_mask, starts, window)
    past = 0 if memory is None else memory.length
    if any(flags is not None and stands_for_many(flags) for flags in (attention_mask, starts)):
        if cache is not None:
            raise ValueError("Under a transform of torch.func a mask or position_ids of its own go without a cache.")
    elif past == 0:
        return _scores_mask(config, hidden_states, attention_mask, cache, starts, window)
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"Memory works with eager and sdpa attention, not with {config._attn_implementation!r}: "
            "model.set_attn_implementation('sdpa')."
        )
    batch, length = hidden_states.shape[:2]
    real = None if attention_mask is None else attention_mask.bool()
    if memory is not None and (real is not None or memory.mask is not None):
        ones = hidden_states.new_ones(batch, max(past, length), dtype=torch.bool)
        before = ones[:, :past] if memory.mask is None else memory.mask
        if real is not None and real.shape[1] == past + length:
            before = before & real[:, :past]
        real = torch.cat([before, ones[:, :length] if real is None else real[:, -length:]], dim=1)
    return _segment_mask(config, hidden_states, past, real, starts, window)


def _given_mask(
    config: SruppConfig, hidden_states: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor | None, window
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


def _segment_mask(
    config: SruppConfig,
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
    if config.is_causal:
        allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys >= queries - window)
    allowed = allowed[None, None]
    if starts is not None:  # without memory, which continues every row's document
        documents = starts.cumsum(1)
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    if real is not None:
        allowed = allowed & real[:, None, None, :]
        allowed = allowed | ((keys == queries) & ~allowed.any(-1, keepdim=True))
    return allowed


def check_inputs(
    config: SruppConfig,
    embeddings: nn.Module,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: Any,
    packing: Packing,
    memory: SegmentMemory | None,
    cache: Cache | None,
    attention_window: int | None,
    token_type_ids: torch.Tensor | None,
) -> tuple[Any, Any, torch.Tensor | None]:
    """
    Returns:
        `tuple`: `input_ids` with 0 where the mask hides an id, whatever that is; the attention mask in the form that
        [`read_attention_mask`] gives it; and the [`padding_mask`].

    Raises:
        TypeError: an argument that is no tensor, cache or memory.
        ValueError: neither or both inputs, an input without tokens or of the wrong width or dtype, an id outside the
            vocabulary, or a mask, documents, a memory or a cache that do not fit.
    """
    inputs = check_one_input(input_ids, inputs_embeds, embeddings, "embedding_size", config.embedding_size)
    batch, length = inputs.shape[:2]
    if isinstance(attention_mask, torch.Tensor):
        check_has_values("attention_mask", attention_mask, inputs.device)
    if length == 0:
        raise ValueError("The input has length 0; give at least one token.")
    if attention_window is not None:
        check_count("attention_window", attention_window)
    if memory is not None:
        check_memory(config, memory, batch, cache is not None)
    if cache is not None:
        check_cache(config, cache, batch)
    packing.check(batch, length)
    check_per_token("token_type_ids", token_type_ids, batch, length)
    held, key_length = _held(config, attention_mask, length, memory, cache)
    mask = read_attention_mask(attention_mask, batch, length, config.num_attention_heads, held, key_length)
    real = padding_mask(mask, length)
    return None if input_ids is None else known_ids(input_ids, config.vocab_size, real), mask, real


def _held(
    config: SruppConfig, mask: Any, length: int, memory: SegmentMemory | None, cache: Cache | None
) -> tuple[int, int | None]:
    """Number of tokens that a cache or a memory holds, and number of keys if a static cache has more."""
    if cache is None or not isinstance(mask, torch.Tensor):
        return 0 if memory is None else memory.length, None
    held = cast(Any, cache.get_seq_length())
    if isinstance(held, torch.Tensor):  # of a static cache; not to be read while compiling
        held = max(mask.shape[-1] - length, 0) if torch.compiler.is_compiling() else int(held)
    if mask.dim() != 4:
        return held, None
    first = min(config.attention_layer_indices, default=0)
    return held, int(cache.get_mask_sizes(length, first)[0])


def check_cache(config: SruppConfig, cache: Any, batch: int) -> None:
    """
    Raises:
        TypeError: if it is no cache of transformers.
        ValueError: a cache of another kind of model, of another depth, width or batch size, or beside a model that
            keeps none.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"cache must be a Cache of transformers, DynamicCache(config=model.config), not {type(cache).__name__}."
        )
    if not config.is_causal:
        raise ValueError("An SRU++ that sees both sides keeps no cache: it reads a text in one call.")
    layers: Any = getattr(cache, "layers", [])
    depth = config.num_hidden_layers
    if len(layers) != depth or not isinstance(layers[0], LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"cache is a {type(cache).__name__} of {len(layers)} layers, without a place for the states of this "
            f"model's {depth} layers: make it by {type(cache).__name__}(config=model.config). Prefix tuning, which "
            "hands over such a cache, does not work with SRU++: take LoRA or prompt tuning."
        )
    if not cache.has_previous_state(0):
        return
    state: Any = layers[0].conv_states[0]
    if tuple(state.shape[:2]) != (batch, config.hidden_size):
        raise ValueError(
            f"cache holds states of shape {tuple(state.shape[:2])} (batch, hidden_size), but the input and the model "
            f"want {(batch, config.hidden_size)}: each batch, and each model, begins with a cache of its own."
        )


class KeyPlace(NamedTuple):
    """The first layer of a model that attends, the number of its heads and their size."""

    layer: int
    heads: int
    head_size: int

    @classmethod
    def of(cls, config: SruppConfig) -> "KeyPlace | None":
        """Return that of a model of this config; `None` where no layer attends."""
        layer, heads = min(config.attention_layer_indices, default=None), config.num_attention_heads
        return None if layer is None else cls(layer, heads, config.projection_sizes[layer] // heads)


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
        ValueError: for keys of other heads or of another dtype, and for a document that begins.
    """
    if starts is not None and values_exist(starts):
        raise ValueError(
            "A document begins within a row that goes on from a cache (by position_ids, seq_idx or cu_seq_lens_q): "
            "give packed documents in one call, without a cache that holds anything."
        )
    keys: Any = None if place is None else getattr(cache.layers[place.layer], "keys", None)
    if place is None or keys is None or keys.numel() == 0:
        return
    if (keys.shape[1], keys.shape[3]) != place[1:]:
        raise ValueError(
            f"cache holds keys of shape {tuple(keys.shape)} (batch, heads, length, head size), but this model has "
            f"{place.heads} heads of size {place.head_size}: each model begins with a cache of its own."
        )
    if keys.dtype not in (hidden_states.dtype, compute_dtype(hidden_states)):
        raise ValueError(f"cache holds keys of {keys.dtype}, but the model computes in {compute_dtype(hidden_states)}.")


def check_memory(config: SruppConfig, memory: SegmentMemory, batch: int, has_past: bool) -> None:
    """
    Raises:
        ValueError: memory beside a cache, of another depth, batch or width, or of layers that differ in length.
    """
    if has_past:
        raise ValueError("Give memory (training by segments) or cache (generation), not both.")
    if not (hasattr(memory, "cell_states") and hasattr(memory, "layer_inputs")):
        raise TypeError(f"memory must be what a call returned as output.memory, not {type(memory).__name__}.")
    depth = config.num_hidden_layers
    if len(memory.cell_states) != depth or len(memory.layer_inputs) != depth:
        raise ValueError(
            f"memory is of {len(memory.cell_states)} states and {len(memory.layer_inputs)} inputs, but the model has "
            f"{depth} layers. Hand on output.memory as it came."
        )
    for layer, state in enumerate(memory.cell_states):
        if tuple(state.shape) != (batch, config.hidden_size):
            raise ValueError(
                f"memory.cell_states[{layer}] must have shape {(batch, config.hidden_size)}; got {tuple(state.shape)}."
            )
    for layer in config.attention_layer_indices:
        inputs, width = memory.layer_inputs[layer], config.input_sizes[layer]
        if inputs is None and memory.length == 0:
            continue
        if inputs is None or tuple(inputs.shape) != (batch, memory.length, width):
            got = None if inputs is None else tuple(inputs.shape)
            raise ValueError(
                f"memory.layer_inputs[{layer}] must have shape {(batch, memory.length, width)}; got {got}."
            )


def check_memory_dtype(memory: SegmentMemory, hidden_states: torch.Tensor) -> None:
    """
    Raises:
        ValueError: layer inputs of another dtype than the embeddings, where no autocast makes them agree.
    """
    if torch.is_autocast_enabled(hidden_states.device.type):
        return
    for layer, inputs in enumerate(memory.layer_inputs):
        if inputs is not None and inputs.dtype != hidden_states.dtype:
            raise ValueError(
                f"memory.layer_inputs[{layer}] is of {inputs.dtype}, but the model computes in {hidden_states.dtype}. "
                "Convert layer_inputs (cell_states stay as they are), or begin without memory."
            )


__all__ = [
    "KeyPlace",
    "SegmentMemory",
    "check_cache",
    "check_continuation",
    "check_inputs",
    "check_memory",
    "check_memory_dtype",
    "cover_cache",
    "padding_mask",
    "scores_mask",
]
