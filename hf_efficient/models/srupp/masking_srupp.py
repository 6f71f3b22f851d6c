"""Memory of segments, the mask of SRU++'s attention, and checks of inputs."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...modules.causal_inputs import KeyPlace, check_cache, check_room, held_tokens, padding_mask
from ...modules.causal_inputs import scores_mask as causal_inputs_mask
from ...modules.input_checks import (
    check_count,
    check_has_values,
    check_one_input,
    check_per_token,
    known_ids,
    read_attention_mask,
)
from ...modules.packing import Packing
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


def scores_mask(
    config: SruppConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    cache: Cache | None,
    starts: torch.Tensor | None,
    memory: SegmentMemory | None,
    window: int | None,
):
    """See [`~hf_efficient.modules.causal_inputs.scores_mask`]; `None` where no layer attends."""
    if not config.attention_layer_indices:
        return None
    past, past_mask = (0, None) if memory is None else (memory.length, memory.mask)
    return causal_inputs_mask(config, hidden_states, attention_mask, cache, starts, window, past, past_mask)


def key_place(config: SruppConfig) -> KeyPlace | None:
    """Return where a model of this config keeps keys; `None` where no layer attends."""
    layer, heads = min(config.attention_layer_indices, default=None), config.num_attention_heads
    return None if layer is None else KeyPlace(layer, heads, config.projection_sizes[layer] // heads)


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
        if not config.is_causal and isinstance(cache, Cache):
            raise ValueError("An SRU++ that sees both sides keeps no cache: it reads a text in one call.")
        check_cache(cache, batch, config.layer_types, config.hidden_size, "SRU++")
        check_room(cache, length)
    packing.check(batch, length)
    check_per_token("token_type_ids", token_type_ids, batch, length)
    held, key_length = 0 if memory is None else memory.length, None
    if cache is not None and isinstance(attention_mask, torch.Tensor):
        first = min(config.attention_layer_indices, default=0)
        held, key_length = held_tokens(cache, attention_mask, length, first)
    mask = read_attention_mask(attention_mask, batch, length, config.num_attention_heads, held, key_length)
    real = padding_mask(mask, length)
    return None if input_ids is None else known_ids(input_ids, config.vocab_size, real), mask, real


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
    "SegmentMemory",
    "check_inputs",
    "check_memory",
    "check_memory_dtype",
    "key_place",
    "scores_mask",
]
