"""Outputs and inputs of Terraformer: tokens of a source, a target and caches, and what a query sees of them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)

from ...modules.causal_inputs import check_cache, padding_mask
from ...modules.input_checks import (
    check_class_ids,
    check_has_values,
    check_one_input,
    check_per_token,
    check_tensor,
    known_ids,
    read_attention_mask,
    values_can_be_read,
)
from ...utils.cache_naming import CacheOutputMixin
from ...utils.labels import IGNORE_INDEX


# Since transformers 5.24 those of FP8 are a kind beside the others.
_QUANTIZED: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


@dataclass
class TerraformerEncoderOutput(BaseModelOutput):
    """`BaseModelOutput` with a `second_stream` of the shape of `last_hidden_state`, which is the first."""

    second_stream: torch.FloatTensor | None = None


@dataclass
class TerraformerModelOutput(CacheOutputMixin, Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` whose cache is called `cache` under every release of transformers, and the encoder's second
    stream."""

    encoder_second_stream: torch.FloatTensor | None = None


@dataclass
class TerraformerSeq2SeqLMOutput(CacheOutputMixin, Seq2SeqLMOutput):
    """`Seq2SeqLMOutput`, whose cache is called `cache` under every release of transformers."""


@dataclass
class TerraformerCausalModelOutput(CacheOutputMixin, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, whose cache is called `cache` under every release of transformers."""


@dataclass
class TerraformerCausalLMOutput(CacheOutputMixin, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, whose cache is called `cache` under every release of transformers."""


def as_encoder_output(given: Any) -> TerraformerEncoderOutput | None:
    """The encoder's output as it was handed over: by an earlier call, or as a tuple."""
    if given is None or isinstance(given, TerraformerEncoderOutput):
        return given
    if isinstance(given, (dict, BaseModelOutput)):
        return TerraformerEncoderOutput(**given)
    streams = [one for one in given if isinstance(one, Tensor)]
    return TerraformerEncoderOutput(
        last_hidden_state=streams[0], second_stream=streams[1] if len(streams) > 1 else None
    )


class TokensRead(NamedTuple):
    """
    Tokens of a call of the decoder.

    Args:
        vectors (`Tensor` of shape `(batch, length, width)`): embeddings with positions.
        mask (*optional*): for what a cache holds as well.
        real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding of this call.
        starts (`Tensor` of shape `(batch, length)`, *optional*): `True` where a document begins.
    """

    vectors: Tensor
    mask: Any
    real: Tensor | None
    starts: Tensor | None


def read_source(
    encoder: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Any,
    token_type_ids: Any,
) -> tuple[Any, Any, Tensor | None]:
    """
    Check a source.

    Args:
        encoder (`nn.Module`): has `config`, `embed_tokens` and their `width`.
        input_ids, inputs_embeds, attention_mask, token_type_ids: as the encoder is given them.

    Returns:
        `tuple`: ids, `None` for embeddings; the mask as [`read_attention_mask`] gives it; `False` at padding, `None`
        without any.

    Raises:
        TypeError: for an argument that is no tensor.
        ValueError: for input that does not fit, a source without tokens, and one with padding between them.
    """
    config = encoder.config
    inputs = check_one_input(input_ids, inputs_embeds, encoder.embed_tokens, "hidden_size", encoder.width)
    batch, length = inputs.shape[:2]
    if length == 0:
        raise ValueError("The source has length 0: give input_ids, or inputs_embeds, of at least one token.")
    check_per_token("token_type_ids", token_type_ids, batch, length)
    mask = read_flat_mask("attention_mask", attention_mask, inputs, config.num_attention_heads)
    real = padding_mask(mask, length)
    if real is not None and values_can_be_read(real):
        begins = real & ~nn.functional.pad(real[:, :-1], (1, 0))
        counts = begins.sum(1)
        if (counts == 0).any():
            row = int((counts == 0).nonzero()[0])
            raise ValueError(f"Row {row} of the source has no token: leave it out, or give it one.")
        if (counts > 1).any():
            row = int((counts > 1).nonzero()[0])
            raise ValueError(f"Row {row} of the source has padding between its tokens: put it before or behind them.")
    ids = None if input_ids is None else known_ids(input_ids, config.vocab_size, real)
    return ids, mask, real


def read_flat_mask(name: str, mask: Any, inputs: Tensor, heads: int, held: Any = 0) -> Tensor | None:
    """
    Read a mask that says which tokens are there and nothing else.

    Raises:
        TypeError, ValueError: see [`read_attention_mask`]; and for a mask of another form, such as one of four
            dimensions.
    """
    if isinstance(mask, Tensor):
        check_has_values(name, mask, inputs.device)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() == 4):
        got = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"{name} must have shape (batch, length), 1 for tokens and 0 for padding; got {got}. Which key a query "
            "sees cannot be given to an encoder-decoder of this family."
        )
    return read_attention_mask(mask, inputs.shape[0], inputs.shape[1], heads, held, name=name)


def real_source_tokens(
    encoded: Any, attention_mask: Any, target: Tensor, heads: int, cache: Any = None
) -> Tensor | None:
    """`False` at the source's padding, `(batch, source length)`, as it was given; `None` without any."""
    if encoded is not None:
        source: Any = encoded.last_hidden_state
    elif isinstance(attention_mask, Tensor):
        layer = cache.cross_attention_cache.layers[0]
        held, given = layer.keys.shape[2], attention_mask.shape[-1]
        # A static cache may exceed its source.
        if given > held or (given < held and getattr(layer, "max_cache_len", None) is None):
            raise ValueError(f"attention_mask covers {given} tokens, but the source in the cache has {held}.")
        source = target[:, :0].new_empty(target.shape[0], given, 0)
    else:
        return None
    if source.shape[0] != target.shape[0]:
        raise ValueError(
            f"input_ids or encoder_outputs have {source.shape[0]} rows, but decoder_input_ids {target.shape[0]}: give "
            "one target for each source."
        )
    mask = read_flat_mask("attention_mask", attention_mask, source, heads)
    return padding_mask(mask, source.shape[1])


def holds_source(cache: EncoderDecoderCache) -> bool:
    """Return whether a cache has keys of a source. Its own marks say so, since a layer may have room for states that no
    source has."""
    return bool(cache.is_updated.get(0))


def refuse_quantized(config: Any, cache: Any) -> None:
    """
    Raise where keys must be held as they are: beside buckets of hashing, and those of a source, which no step copies.

    Args:
        config (`TerraformerConfig`): of the model.
        cache (`Any`): a cache, or the `cache_implementation` of generation.

    Raises:
        ValueError: for a quantised cache.
    """
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for part in (cache, *parts) for layer in getattr(part, "layers", [])]
    is_quantized = cache == "quantized" if isinstance(cache, str) else any(isinstance(x, _QUANTIZED) for x in layers)
    if is_quantized and (config.is_encoder_decoder or config.decoder_long_attention != "none"):
        raise ValueError(
            "A quantised cache does not work with an encoder-decoder or hashing of this family, which read keys where "
            "they lie: take the default one, or bfloat16 weights, which halve it."
        )


def check_both_parts(cache: Any, decoder: Any, rows: int) -> None:
    """
    Check that a cache is one of an encoder-decoder, and holds a source of this model and batch if it holds any.

    Args:
        cache (`Any`): what was given.
        decoder (`nn.Module`): has `is_joined`, `layer_types` and `state_size`.
        rows (`int`): of the target.

    Raises:
        TypeError: for a cache of another kind.
        ValueError: for one of another model or batch.
    """
    if not isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            "cache must be an EncoderDecoderCache of transformers, whose parts know this model: "
            "EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config)), not "
            f"{type(cache).__name__}."
        )
    refuse_quantized(decoder.config, cache)
    source: Any = cache.cross_attention_cache
    if decoder.is_joined:
        check_cache(source, rows, decoder.layer_types, decoder.state_size, "this family")
    held = source.layers[0].keys.shape[0] if holds_source(cache) else rows
    if held != rows:
        raise ValueError(
            f"cache holds a source of {held} rows, but the target has {rows}: each batch begins with a "
            "cache of its own."
        )


def cover_places(real: Tensor | None, memory: Tensor | None, source: Any) -> Tensor | None:
    """Extend the mask of a source's padding to the places of a static cache, of which it may fill some."""
    places = getattr(source.layers[0], "max_cache_len", None) if source.layers else None
    if places is None:
        return real
    if real is not None:
        return nn.functional.pad(real, (0, places - real.shape[1]))
    if memory is None:
        keys = source.layers[0].keys
        return (torch.arange(places, device=keys.device) < source.get_seq_length()).expand(keys.shape[0], -1)
    if memory.shape[1] == places:
        return None
    return (torch.arange(places, device=memory.device) < memory.shape[1]).expand(memory.shape[0], -1)


def behind_places(
    streams: tuple[Tensor, Tensor], real_source: Tensor | None, target: Tensor, real_target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """
    Put a target behind the last place of its source.

    Args:
        streams (`tuple(Tensor)` of shape `(batch, source length, width)`): what the encoder returns.
        real_source, real_target (`Tensor` of shape `(batch, source or target length)`, *optional*): `False` at padding.
        target (`Tensor` of shape `(batch, target length, width)`): embeddings with positions.

    Returns:
        `tuple`: both streams of source and target, of which the target's part is the same; `False` at padding of both,
        `None` without any; places of the target `(batch, target length)`.
    """
    batch, before, length = *streams[0].shape[:2], target.shape[1]
    places = torch.arange(before, before + length, device=target.device).expand(batch, -1)
    first, second = (torch.cat([stream, target], dim=1) for stream in streams)
    if real_source is None and real_target is None:
        return first, second, None, places
    parts = zip((real_source, real_target), (streams[0], target), strict=True)
    real = [target.new_ones(part.shape[:2], dtype=torch.bool) if one is None else one for one, part in parts]
    return first, second, torch.cat(real, dim=1), places


def behind_tokens(
    streams: tuple[Tensor, Tensor], real_source: Tensor | None, target: Tensor, real_target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """
    Put a target behind the last token of its source, as the authors' code does: the source's padding stands behind the
    target, which never sees it. Arguments and returns are those of [`behind_places`].
    """
    batch, before, length = *streams[0].shape[:2], target.shape[1]
    end = before if real_source is None else real_source.sum(1, keepdim=True)
    places = (torch.arange(length, device=target.device) + end).expand(batch, -1)
    index = places.unsqueeze(-1).expand_as(target)
    first, second = (nn.functional.pad(stream, (0, 0, 0, length)).scatter(1, index, target) for stream in streams)
    if real_target is not None:
        real_target = real_target.new_ones(batch, before + length).scatter(1, places, real_target)
    return first, second, real_target, places


def mask_behind_source(
    real_source: Tensor | None, mask: Tensor | None, target: Tensor, held: Cache, source: Any
) -> Tensor | None:
    """Keys of the source and of the target that each query of a target sees, `(batch or 1, 1, length, keys)`."""
    length, device = target.shape[1], target.device
    if real_source is None and mask is None and length == 1 and type(held) is DynamicCache:
        return None
    past: Any = held.get_seq_length() if held.layers else 0
    keys = held.get_mask_sizes(length, 0)[0] if held.layers else length
    queries = past + torch.arange(length, device=device)
    seen = torch.arange(keys, device=device) <= queries[:, None]
    if mask is not None:
        seen = seen & nn.functional.pad(mask, (0, keys - mask.shape[1]))[:, None]
    seen = seen.view(-1, 1, *seen.shape[-2:])
    keys = source.layers[0].keys.shape[2]
    if real_source is None:
        before = (torch.arange(keys, device=device) < source.get_seq_length())[None]
    else:
        before = nn.functional.pad(real_source, (0, keys - real_source.shape[1]))
    batch = max(before.shape[0], seen.shape[0])
    before = before[:, None, None].expand(batch, 1, length, -1)
    return torch.cat([before, seen.expand(batch, -1, -1, -1)], dim=-1)


def check_source_chunk_size(size: Any, is_joined: bool) -> None:
    """
    Raise where a source cannot be read so many tokens at a time.

    Args:
        size (`Any`): as it was given, `None` for all at once.
        is_joined (`bool`): whether the decoder reads the source.
    """
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"source_chunk_size (prefill_chunk_size of generate) must be 1 or more, not {size!r}.")
    if not is_joined:
        raise ValueError(
            "source_chunk_size (prefill_chunk_size of generate) wants decoder_type='joined', whose decoder reads the "
            "source; with cross attention there is nothing to cut: leave it out."
        )


def check_targets(labels: Any, vocab_size: int, device: torch.device) -> None:
    """Raise where labels cannot be moved to be the decoder's input."""
    check_tensor("labels", labels)
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape (batch, target length); got {tuple(labels.shape)}.")
    check_class_ids(labels, vocab_size, device)


def mask_of_targets(labels: Tensor) -> Tensor:
    """
    Tell tokens of targets, `(batch, length)`, from what stands behind the last one that is learned, so that it takes no
    place among tokens that are hashed.
    """
    return (labels != IGNORE_INDEX).flip(1).cumsum(1).flip(1) > 0
