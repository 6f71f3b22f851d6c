"""Decoding by LSH attention in plain torch, always available; see `ops/lsh_attention.py`."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .backend import is_transformed, may_skip_dispatcher
from .lsh_attention_reference import OWN_PENALTY, PENALTY, PIECE_LOGITS, key_scale


# Rank of a slot that shares a bucket with the query above one that does not; more than there are slots.
SHARED_RANK = 2**29


def decode(
    query_key: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], buckets: Tensor, mask: Tensor | None,
    first: int | Tensor, count: int, packed: bool, memory_length: int | None,
) -> Tensor:  # fmt: skip
    """
    Attend from new tokens, a few at once; see [`~hf_efficient.ops.lsh_attention.lsh_decode`].

    Args:
        keys, values (`Sequence[Tensor]`): of slots that lie in several tensors, one behind the other.
        first (`int` or `Tensor`): slot of the first new token.
        count (`int`): places for keys.
    """
    batch, heads, new, width = query_key.shape
    slots = buckets.shape[3]
    step = new
    if new > 1 and not torch.compiler.is_compiling():  # a compiler would tie the program to some lengths
        limit = PIECE_LOGITS.get(buckets.device.type, PIECE_LOGITS["cuda"])
        step = max(1, limit // (max(1, batch * heads) * max(slots, (min(count, slots) + 1) * width)))
    outputs = []
    for start in range(0, new, step):
        query = query_key if step == new else query_key[:, :, start : start + step]
        own = torch.arange(start, start + query.shape[2], device=buckets.device) + first
        found = None
        if new == 1 and packed and mask is None and isinstance(first, int) and may_skip_dispatcher(buckets):
            found = _candidates_of_one(buckets, first, count) if buckets.is_cpu else None
        index, is_seen = found or _candidates(buckets, mask, own, count, packed, memory_length)
        outputs.append(_attend_to(query, keys, values, own, index, is_seen))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    if mask is None:
        return output
    is_token = mask.index_select(1, torch.arange(new, device=buckets.device) + first)
    return torch.where(is_token[:, None, :, None], output, 0.0)


def _candidates_of_one(buckets: Tensor, own: int, count: int) -> tuple[Tensor, Tensor] | None:
    """Candidates as [`_candidates`] finds them, of one new token without padding before it, by passes over flags in the
    place of a search for the largest ranks; `None` where more than `count` share a bucket with it in some head."""
    batch, heads = buckets.shape[:2]
    of_query, held = buckets[..., own : own + 1], buckets[..., :own]
    taken = min(count, own)
    everything = torch.ones((), dtype=torch.bool).expand(batch, heads, 1, taken)
    if taken == own:
        return torch.arange(own).expand(batch, heads, 1, own), everything
    first, *others = (slots == new for slots, new in zip(held.unbind(2), of_query.unbind(2), strict=True))
    chosen = reduce(torch.bitwise_or, others, first)
    left = taken - chosen.sum(-1, keepdim=True)
    if int(left.min()) < 0:
        return None
    # The latest others are among the last slots that there are places for.
    latest = chosen[..., own - taken :]
    does_not_share = ~latest
    behind = does_not_share.flip(-1).cumsum(-1).flip(-1)
    latest |= does_not_share & (behind <= left)
    return chosen.nonzero()[:, 2].view(batch, heads, 1, taken), everything


def _candidates(
    buckets: Tensor, mask: Tensor | None, own: Tensor, count: int, packed: bool, memory_length: int | None
) -> tuple[Tensor, Tensor]:
    """Slots before `own`, those of the new tokens, by rank, and which count, `(batch, heads, new, candidates)`."""
    slots = torch.arange(buckets.shape[3], dtype=torch.int32, device=buckets.device)
    of_queries = buckets.index_select(3, own)
    first, *others = (
        held.unsqueeze(2) == new.unsqueeze(3) for held, new in zip(buckets.unbind(2), of_queries.unbind(2), strict=True)
    )
    shares = reduce(torch.bitwise_or, others, first)
    is_held = slots < own.unsqueeze(1)
    if mask is not None:
        is_held = is_held & mask[:, None, None]
    rank = torch.add(torch.where(is_held, slots, -2 * SHARED_RANK), shares, alpha=SHARED_RANK)
    if torch.compiler.is_compiling():  # whatever the number of slots
        rank = torch.nn.functional.pad(rank, (0, count), value=-1)
    top = rank.topk(min(count, rank.shape[3]), sorted=not packed)
    is_seen = top.values >= 0
    if not packed:  # the query takes the first place, and the empty slot behind it one before its equals
        left = torch.full_like(own, count - 1).expand(of_queries[:, :, 0].shape)
        sharing = (top.values >= SHARED_RANK).sum(-1)
        next_is_taken = (of_queries[:, :, 0] == 0) | (sharing < left)
        if memory_length is not None:
            next_is_taken = next_is_taken & (own + 1 < memory_length)
        left = left - next_is_taken.to(left.dtype)
        is_seen = is_seen & (torch.arange(is_seen.shape[-1], device=own.device) < left.unsqueeze(-1))
    # Slots that do not count may hold anything; the query's own stands in.
    return torch.where(is_seen, top.indices, own.unsqueeze(1)), is_seen


def _attend_to(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], own: Tensor, index: Tensor, is_seen: Tensor
) -> Tensor:
    """Softmax over the slots of `index` that are seen and each query's own."""
    batch, heads = index.shape[:2]
    index = torch.cat([index, own.view(1, 1, -1, 1).expand(batch, heads, -1, -1)], -1)
    precision = torch.promote_types(query.dtype, torch.float32)
    penalty = torch.where(is_seen, 0.0, -PENALTY).to(precision)
    penalty = torch.nn.functional.pad(penalty, (0, 1), value=-PENALTY * OWN_PENALTY)
    key = _gather_from(keys, index).to(precision)
    logits = (query.to(precision).unsqueeze(-2) @ key.transpose(-1, -2)).squeeze(-2)
    logits = logits * key_scale(key).squeeze(-1) + penalty
    value = _gather_from(values, index).to(precision)
    return (logits.softmax(-1).unsqueeze(-2) @ value).squeeze(-2).to(values[0].dtype)


def _gather_from(parts: Sequence[Tensor], index: Tensor) -> Tensor:
    """Gather from slots that lie in several tensors, one behind the other."""
    found, before = _gather(parts[0], index.clamp(max=parts[0].shape[2] - 1)), parts[0].shape[2]
    for part in parts[1:]:
        here = index - before
        inside = (here >= 0).unsqueeze(-1)
        found = torch.where(inside, _gather(part, here.clamp(0, part.shape[2] - 1)), found)
        before += part.shape[2]
    return found


def _gather(vectors: Tensor, index: Tensor) -> Tensor:
    """(batch, heads, slots, width) by (batch, heads, new, candidates) -> (batch, heads, new, candidates, width)"""
    batch, heads, _, width = vectors.shape
    row = torch.arange(batch, device=index.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=index.device).view(1, -1, 1, 1)
    *strides, pitch, last = vectors.stride()
    is_table = last == 1 and pitch > 0 and not any(stride % pitch for stride in strides)
    if torch.compiler.is_compiling() or is_transformed() or not is_table:
        return vectors[row, head, index]
    # Rows of one table, however batch, heads and slots lie in it, which is several times as quick.
    strides = [stride // pitch for stride in strides]
    rows = vectors.shape[2] + sum((size - 1) * stride for size, stride in zip(vectors.shape, strides, strict=False))
    at = row * strides[0] + head * strides[1] + index
    return vectors.as_strided((rows, width), (pitch, 1)).index_select(0, at.flatten()).view(*index.shape, width)
