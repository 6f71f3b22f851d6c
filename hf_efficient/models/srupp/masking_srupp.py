"""Who sees whom: padding, documents packed into a row, causality, and the memory of the segment before."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import and_masks, create_bidirectional_mask, create_causal_mask

from ...utils.cache_naming import cache_kwarg
from .configuration_srupp import SruppConfig
from .memory_srupp import SegmentMemory


def _values_can_be_read(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values to look at now. It stalls an accelerator for a moment, as transformers' own masks do,
    and saves every layer the work for padding or documents that are not there."""
    return tensor.device.type != "meta" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


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
    return None if _values_can_be_read(mask) and mask.all() else mask


def cover_cache(attention_mask, cache: Cache, length: int):
    """A mask over the `length` new tokens alone, extended over what the cache holds: none of that is padding."""
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
    if _values_can_be_read(starts):
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
    """Without memory: what transformers makes for the attention in use."""
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
    if not config.attending:
        return None
    if isinstance(attention_mask, dict):
        return attention_mask.get("hybrid", attention_mask)["full_attention"]
    past = 0 if memory is None else memory.length
    if past == 0:
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
    return _segment_mask(config, hidden_states, past, real, window)


def _segment_mask(
    config: SruppConfig, hidden_states: torch.Tensor, past: int, real: torch.Tensor | None, window: int | None
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
    if real is not None:
        allowed = allowed & real[:, None, None, :]
        allowed = allowed | ((keys == queries) & ~allowed.any(-1, keepdim=True))
    return allowed


__all__ = ["cover_cache", "document_starts", "padding_mask", "scores_mask"]
