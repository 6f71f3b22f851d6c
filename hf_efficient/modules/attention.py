"""Attention written out, for models that take their form of attention from `config._attn_implementation`."""

import torch
from torch import nn


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling: float, dropout: float = 0.0, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(s q k^T + mask) v; (B, H, T, D) in, (B, T, H, D) and the weights out."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
