"""
What TUPE's attention is made of: the positional part of the logits, and the forms of the attention that takes it.

Source: arXiv 2006.15595, section 3; the layout of the position table is that of the authors' code (see
`modeling_tupe.py` for the list of deviations).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ...ops.position_bias import relative_position_bucket, untied_position_bias
from .configuration_tupe import TupeConfig


AUTO_ATTENTION = "tupe_auto"
# From here on padded rows attend one by one in inference on a CPU. Both forms are measured at lengths below and above
# in `training/results/encoder_speed.json`.
ROWWISE_MIN_LENGTH = 256


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of TUPE's attention: softmax(s q k^T + position_bias) v; (B, H, T, D) in, (B, T, H, D) out."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scaling, key.transpose(2, 3))  # (B, H, T, T)
    if position_bias is not None:
        # In place: a fresh (B, H, T, T) tensor costs more than the sum.
        scores = scores.add_(position_bias.to(scores.dtype))
    if attention_mask is not None:
        scores = mask_scores(scores, attention_mask)
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def mask_scores(scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Adds an additive mask, or drops to the lowest finite value where a boolean one is False: a row that masks
    everything stays finite."""
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    return scores + attention_mask


def auto_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor,
    dropout: float = 0.0,
    key_lengths: list[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The fastest exact form for the device and mode; all are measured in `training/results/encoder_speed.json`.

    On a CPU torch's fused kernel takes neither a bias that requires grad nor dropout; the general path that it then
    falls to is slower than the explicit product. Without them the fused kernel is the faster.
    `key_lengths` are those of [`real_key_lengths`], in place of a mask.
    """
    if key_lengths is not None:
        return _attend_by_rows(query, key, value, position_bias, kwargs.get("scaling"), key_lengths), None
    # Not by whether gradients are recorded now: reentrant checkpointing records none the first time that it runs a
    # layer and does the second time, and both have to round alike.
    unfused = query.device.type == "cpu" and (position_bias.requires_grad or dropout > 0.0)
    explicit = unfused or wants_weights(module.config, kwargs)
    attend = eager_attention_forward if explicit else ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(module, query, key, value, attention_mask, position_bias=position_bias, dropout=dropout, **kwargs)


def wants_weights(config: TupeConfig, options: Mapping[str, Any]) -> bool:
    """Whether a call is to return attention weights, by its own options or else by the config."""
    given = options.get("output_attentions")
    return bool(config.output_attentions if given is None else given)


def _is_recorded() -> bool:
    """Whether what runs becomes a graph for other inputs, in which no number read off this input may stand."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def real_key_lengths(attention_mask: torch.Tensor) -> list[int] | None:
    """
    The number of real tokens of each row, where it is faster to let each row attend to them alone.

    With a mask and a bias the fused kernel wants their sum, a (B, H, T, T) tensor, and computes products with padding,
    only to discard them. A call for each row has a cost of its own, which short inputs do not earn back.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, length)`): 1 for tokens, 0 for padding.

    Returns:
        `list[int]`, or `None` where the mask has to be used: short inputs, other devices than a CPU, compiled and
        traced code, padding inside a row, and rows of nothing but padding.
    """
    length, device = attention_mask.shape[1], attention_mask.device
    if length < ROWWISE_MIN_LENGTH or device.type != "cpu" or _is_recorded():
        return None
    real = attention_mask.bool()
    lengths = real.sum(1)
    if lengths.min() == 0 or not torch.equal(real, torch.arange(length, device=device) < lengths[:, None]):
        return None
    return lengths.tolist()


def _attend_by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_bias: torch.Tensor,
    scaling: float | None,
    key_lengths: list[int],
) -> torch.Tensor:
    """(B, H, T, D) in, (B, T, H, D) out; neighbouring rows of one length share a call."""
    output = query.new_empty(query.transpose(1, 2).shape)
    start = 0
    for keys, run in groupby(key_lengths):
        rows = slice(start, start := start + len(list(run)))
        bias = position_bias[..., :keys].to(query.dtype)
        attended = nn.functional.scaled_dot_product_attention(
            query[rows], key[rows, :, :keys], value[rows, :, :keys], attn_mask=bias, scale=scaling
        )
        output[rows] = attended.transpose(1, 2)
    return output


AttentionInterface.register(AUTO_ATTENTION, auto_attention_forward)
AttentionMaskInterface.register(AUTO_ATTENTION, sdpa_mask)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off, where the device has it at all (the meta device has not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _BiasCache:
    """The last position bias that was computed in evaluation: what it was computed from, and the bias.

    The entry is one attribute, so that threads that serve inputs of different lengths see all of it or nothing, and it
    holds the weights themselves, so that no other tensor can get their ids. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.entry: tuple[tuple, torch.Tensor, list[nn.Parameter]] | None = None

    def __reduce__(self):
        return _BiasCache, ()


class TupePositionBias(nn.Module):
    """
    The positional part of the attention logits, shared by all layers and all rows of a batch.

    Rows of the position table: row 0 gives theta_1 ([CLS] to anything), row 1 gives theta_2 (anything to [CLS]), and
    token i >= 1 uses row i + 1. Without `untie_cls` row 0 is unused.
    """

    _cacheable = (nn.Linear, nn.LayerNorm, nn.Embedding)

    def __init__(self, config: TupeConfig):
        super().__init__()
        self._cache = _BiasCache()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = (config.attention_scale_factor * self.head_dim) ** -0.5
        self.untie_cls = config.untie_cls
        self.max_distance = config.relative_attention_max_distance
        self.num_buckets = config.relative_attention_num_buckets
        self.position_embeddings = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.relative_attention_bias = (
            nn.Embedding(self.num_buckets + 1, self.num_heads) if config.relative_attention else None
        )

    def forward(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """
        Args:
            length (`int`): number of tokens T, [CLS] included.
            device (`torch.device`, *optional*): where the model computes; by default where the weights are. The two
                differ when weights are offloaded.

        Returns:
            `torch.Tensor` of shape `(heads, T, T)`, in the parameters' dtype even under autocast: it is computed once
            and read by every layer. In evaluation without grad it is kept for the next call of the same length. A
            change of weights in place through `.data`, which torch does not count, is not seen: call `eval()` after.
        """
        weights = list(self.parameters())
        key = self._cache_key(length, weights)
        entry = self._cache.entry
        if key is not None and entry is not None and key == entry[0]:
            return entry[1]
        device = self.norm.weight.device if device is None else device
        with _without_autocast(device.type):
            bias = self._compute(length, device)
        if key is not None:
            self._cache.entry = key, bias, weights
        return bias

    def train(self, mode: bool = True):
        self._cache.entry = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        # What `to`, `half` and the like go through; they replace the storage without a trace on the parameter.
        self._cache.entry = None
        return super()._apply(fn, recurse)

    def __setattr__(self, name, value):
        if isinstance(value, nn.Module):
            # An adapter that is put around a layer may be merged into its weights later, through `.data`.
            self._cache.entry = None
        super().__setattr__(name, value)

    def _cache_key(self, length: int, weights: list[nn.Parameter]) -> tuple | None:
        """What the bias depends on; `None` where it must not be kept: with grad, while tracing, or when the output of
        a layer can change without its weights (an adapter, a quantised or parametrised layer, one with hooks)."""
        if self.training or torch.is_grad_enabled() or _is_recorded():
            return None
        for module in self.children():
            if type(module) not in self._cacheable or module._forward_hooks or module._forward_pre_hooks:
                return None
        # No weights: a replica of DataParallel, or sharded parameters that are views of a flat one.
        if not weights or any(weight.is_inference() or weight.device.type == "meta" for weight in weights):
            return None
        try:
            # An in-place change raises the version, any other change moves or replaces the storage.
            return (length, *((id(w), w.data_ptr(), w.dtype, w._version) for w in weights))
        except RuntimeError:  # a tensor without storage of its own, as under vmap
            return None

    def _compute(self, length: int, device: torch.device) -> torch.Tensor:
        rows = torch.arange(0 if self.untie_cls else 1, length + 1, device=device)
        table = self.norm(self.position_embeddings(rows))
        query, key = self._heads(self.query(table)), self._heads(self.key(table))
        relative = to_cls = from_cls = None
        if self.relative_attention_bias is not None:
            offsets = torch.arange(1 - length, length, device=device)
            buckets = relative_position_bucket(offsets, self.num_buckets, self.max_distance)
            relative = self.relative_attention_bias(buckets).t()  # (H, 2T - 1)
        if self.untie_cls:
            thetas = self.scaling * (query[:, :2] * key[:, :2]).sum(-1)
            from_cls, to_cls = thetas.unbind(1)  # theta_1, theta_2
            if self.relative_attention_bias is not None:
                # The formula never gives bucket num_buckets // 2, so [CLS]'s own row uses it.
                cls_buckets = torch.tensor([self.num_buckets // 2, self.num_buckets], device=device)
                from_bucket, to_bucket = self.relative_attention_bias(cls_buckets)
                from_cls, to_cls = from_cls + from_bucket, to_cls + to_bucket
            query, key = query[:, 1:], key[:, 1:]
        return untied_position_bias(query, key, relative, to_cls, from_cls, scale=self.scaling)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(-1, self.num_heads, self.head_dim).transpose(0, 1)
