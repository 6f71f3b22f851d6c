"""Memory of segments, masks of SRU++ (padding, packed documents, causality), and checks of inputs."""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import and_masks, create_bidirectional_mask, create_causal_mask

from ...modules.input_checks import check_ids, check_one_input, stands_for_many, values_can_be_read
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
    # On an accelerator too, as transformers' own masks do: it saves every layer the work for padding that is not there.
    return None if values_can_be_read(mask) and mask.all() else mask


def cover_cache(attention_mask, cache: Cache, length: int):
    """Extend a mask over the `length` new tokens to those in the cache, none of which is padding."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] != length:
        return attention_mask
    return torch.nn.functional.pad(attention_mask, (int(cache.get_seq_length()), 0), value=1)


def document_starts(
    position_ids: torch.Tensor | None, real: torch.Tensor | None, batch: int, length: int
) -> torch.Tensor | None:
    """
    Args:
        position_ids (`Tensor` of shape `(batch or 1, length)`, *optional*): restart at 0 with each document.
        real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding, where positions mean nothing.

    Returns:
        `Tensor` of shape `(batch, length)`: `True` where a document begins; `None` where each row is one document.
    """
    if position_ids is None or length == 1:
        return None
    starts = (position_ids == 0).expand(batch, -1)
    if real is not None:
        starts = starts & real
    if values_can_be_read(starts):
        tokens = starts.new_ones(batch, length) if real is None else real
        if not (starts & (tokens.cumsum(1) > 1)).any():
            return None
    return starts


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
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    batch, length = hidden_states.shape[:2]
    real = None if attention_mask is None else attention_mask.bool()
    if memory is not None and (real is not None or memory.mask is not None):
        ones = hidden_states.new_ones(batch, max(past, length), dtype=torch.bool)
        before = ones[:, :past] if memory.mask is None else memory.mask
        if real is not None and real.shape[1] == past + length:
            before = before & real[:, :past]
        real = torch.cat([before, ones[:, :length] if real is None else real[:, -length:]], dim=1)
    return _segment_mask(config, hidden_states, past, real, starts, window)


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
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask,
    memory: SegmentMemory | None,
    cache: Cache | None = None,
    position_ids: torch.Tensor | None = None,
    return_memory: bool = False,
) -> None:
    """
    Raises:
        ValueError: neither or both inputs, an input without tokens or of the wrong width, an id outside the vocabulary
            (looked at on a CPU only: it would stall an accelerator), or a mask or memory that does not fit.
    """
    inputs = check_one_input(input_ids, inputs_embeds, "embedding_size")
    batch, length = inputs.shape[:2]
    if length == 0:
        raise ValueError("The input has length 0; give at least one token.")
    if inputs_embeds is not None and inputs_embeds.shape[2] != config.embedding_size:
        raise ValueError(
            f"inputs_embeds is {inputs_embeds.shape[2]} wide, but embedding_size is {config.embedding_size}."
        )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        _check_mask(attention_mask, batch, length, memory, cache)
    if (memory is not None or return_memory) and position_ids is not None:
        raise ValueError("Memory continues every row's document; position_ids, which begin new ones, do not fit.")
    if memory is not None:
        check_memory(config, memory, batch, cache is not None)
    if input_ids is not None:
        check_ids(input_ids, config.vocab_size)


def _check_mask(mask: torch.Tensor, batch: int, length: int, memory: SegmentMemory | None, cache: Cache | None) -> None:
    before = 0 if memory is None else memory.length
    if cache is not None:
        before = cache.get_seq_length()
        if isinstance(before, torch.Tensor):  # of a static cache; not to be read while compiling
            before = max(mask.shape[1] - length, 0) if torch.compiler.is_compiling() else int(before)
    if mask.shape[0] != batch or mask.shape[1] not in (length, before + length):
        wanted = " or ".join(f"{(batch, size)}" for size in sorted({length, before + length}))
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but must have shape {wanted}: (batch, length), the length "
            "of the input alone or with what the cache or the memory holds."
        )


def check_memory(config: SruppConfig, memory: SegmentMemory, batch: int, has_past: bool) -> None:
    """
    Raises:
        ValueError: memory beside a cache, of another depth, batch or width, or of layers that differ in length.
    """
    if has_past:
        raise ValueError("Give memory (training by segments) or cache (generation), not both.")
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
    "cover_cache",
    "document_starts",
    "padding_mask",
    "scores_mask",
]
