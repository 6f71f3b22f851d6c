"""Attention written out, for models that take their form of attention from `config._attn_implementation`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def attend_in_parts(
    module: nn.Module,
    query: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """
    Attend to keys that lie in several tensors as if they stood one behind the other, without putting them together.

    Args:
        module (`nn.Module`): whose `training` decides on dropout.
        query (`Tensor` of shape `(batch, heads, length, head size)`)
        parts (`Sequence[tuple[Tensor, Tensor]]`): keys and values, `(batch, heads, keys, head size)` each.
        attention_mask (`Tensor`, *optional*): broadcast to `(batch, heads, length, all keys)`; boolean, `False` where a
            query does not see a key, or added to the scores.
        scaling (`float`): of the scores.
        dropout (`float`, defaults to 0.0): of the weights.

    Returns:
        `tuple(Tensor, Tensor)`: output `(batch, length, heads, head size)` and weights `(batch, heads, length, all
        keys)`.
    """
    all_scores = [torch.matmul(query, key.transpose(2, 3)) for key, _ in parts]
    scores = (all_scores[0] if len(parts) == 1 else torch.cat(all_scores, dim=-1)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    each = weights.split([key.shape[2] for key, _ in parts], dim=-1)
    outputs = [torch.matmul(share, value) for share, (_, value) in zip(each, parts, strict=True)]
    return sum(outputs[1:], outputs[0]).transpose(1, 2).contiguous(), weights


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling: float, dropout: float = 0.0, **kwargs
) -> tuple[Tensor, Tensor]:
    """softmax(s q k^T + mask) v; (B, H, T, D) in, (B, T, H, D) and the weights out."""
    return attend_in_parts(module, query, [(key, value)], attention_mask, scaling, dropout)
