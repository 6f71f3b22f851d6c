"""
The layer of SRU++: a projection, with attention or without, and the recurrence.

Source: arXiv 2102.12459, section 2, and the author's code; see `modeling_srupp.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ...ops.sru import sru_recurrence
from .configuration_srupp import SruppConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
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


class SruppAttention(nn.Module):
    """Attention among projected vectors z, which are the queries themselves. Heads share d'.

    With one head, as all published models have, (W_k z_j) . z_i = z_j . (W_k^T z_i) and the sum of W_v z_j is W_v of
    the sum. So z itself serves as key and value: half the cache, and nothing to compute anew for memory. `q_proj` then
    holds W_k transposed. With more heads there are keys and values as usual.
    """

    num_key_value_groups = 1

    def __init__(self, config: SruppConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        size = config.projection_sizes[layer_idx]
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.single_head = config.num_attention_heads == 1
        if self.single_head:
            self.q_proj = nn.Linear(size, size, bias=False)
        else:
            self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(*tensor.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _keys_and_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache keeps. A single head's values are its keys, so that theirs has no width."""
        if self.single_head:
            key = self._heads(hidden_states)
            return key, key[..., :0]
        return self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))

    def _through_cache(self, key, value, remembered, past_key_values: Cache):
        """Keys and values of the cache, with this call's own. What the cache keeps of this call is made of `remembered`
        where that is given: under an outer pre-norm a token's key changes once its call is over."""
        if remembered is None:
            return past_key_values.update(key, value, self.layer_idx)
        # Before the update: a static cache's length is a tensor that the update changes.
        places = torch.arange(key.shape[2], device=key.device) + past_key_values.get_seq_length(self.layer_idx)
        keys, values = past_key_values.update(*self._keys_and_values(remembered), self.layer_idx)
        return keys.index_copy(2, places, key), values.index_copy(2, places, value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        remembered: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self._heads(self.q_proj(hidden_states) if self.single_head else hidden_states)
        everything = hidden_states if memory is None else torch.cat([memory, hidden_states], dim=1)
        key, value = self._keys_and_values(everything)
        if past_key_values is not None:
            key, value = self._through_cache(key, value, remembered, past_key_values)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            key if self.single_head else value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(hidden_states.shape)
        return self.v_proj(output) if self.single_head else output, weights


class SruppProjection(nn.Module):
    """From a layer's input to the pre-activations of its recurrence: one linear map, or two with attention or nothing
    between them."""

    def __init__(self, config: SruppConfig, layer_idx: int):
        super().__init__()
        self.num_directions = config.num_directions
        inputs, size = config.input_sizes[layer_idx], config.projection_sizes[layer_idx]
        # The highway needs a matrix of its own where input and output differ in width.
        self.num_parts = 4 if config.has_skip_term and inputs != config.hidden_size else 3
        self.normalize_after = config.attention_normalize_after
        attends = layer_idx in config.attending
        self.down_proj = nn.Linear(inputs, size, bias=False) if size else None
        self.attention = SruppAttention(config, layer_idx) if attends else None
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps) if size and config.attention_layer_norm else None
        rate = config.dropout if config.projection_dropout is None else config.projection_dropout
        self.dropout = nn.Dropout(rate if size else 0.0)
        self.out_proj = nn.Linear(size or inputs, self.num_parts * config.hidden_size, bias=False)

    def _project(self, hidden_states: torch.Tensor | None) -> torch.Tensor | None:
        """What attention sees of a tensor that only it sees."""
        if hidden_states is None or self.down_proj is None:
            return None
        projected = self.down_proj(hidden_states)
        return projected if self.norm is None or self.normalize_after else self.norm(projected)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        remembered: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(B, L, input size)` -> `(B, L, directions, 3 or 4, width of a direction)`."""
        if self.down_proj is not None:
            hidden_states = self.down_proj(hidden_states)
            before = self.norm is not None and not self.normalize_after and self.attention is not None
            if self.attention is not None:
                seen = self.norm(hidden_states) if before and self.norm is not None else hidden_states
                attended, _ = self.attention(
                    seen, self._project(memory), attention_mask, past_key_values, self._project(remembered), **kwargs
                )
                hidden_states = torch.addcmul(hidden_states, attended, self.attention.alpha.to(attended.dtype))
            if self.norm is not None and not before:
                hidden_states = self.norm(hidden_states)
            hidden_states = self.dropout(hidden_states)
        return self.out_proj(hidden_states).unflatten(-1, (self.num_directions, self.num_parts, -1))


class SruRecurrence(nn.Module):
    """[`sru_recurrence`] as a module without parameters, which `kernels.kernelize` can replace.

    Returns the output and c of all steps, `(B, L, d)`, or of the last one alone, `(B, 1, d)`. The names below are what
    `kernels.use_kernel_forward_from_hub("SruRecurrence")` would set, without that library.
    """

    kernel_layer_name = "SruRecurrence"
    kernel_condition = staticmethod(lambda module: True)

    def forward(
        self,
        u: torch.Tensor,
        x: torch.Tensor | None = None,
        weight_c: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        c0: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        dropout_mask: torch.Tensor | None = None,
        scale_x: float = 1.0,
        activation: str = "identity",
        reverse: bool = False,
        all_states: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, states = sru_recurrence(
            u,
            x,
            weight_c,
            bias,
            c0,
            mask,
            document_start,
            dropout_mask,
            scale_x=scale_x,
            activation=activation,
            reverse=reverse,
            return_all_states=all_states,
        )
        return output, states if all_states else states.unsqueeze(1)


class SruppLayer(GradientCheckpointingLayer):
    """Projection and recurrence. Returns the output and c after the last step, `(B, L, d)` and `(B, d)`."""

    def __init__(self, config: SruppConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.counts_tokens = layer_idx == 0 and not config.attending  # see `SruppConfig.layer_types`
        self.width = config.hidden_size // config.num_directions
        self.num_directions = config.num_directions
        self.activation = config.recurrence_activation
        self.normalize_before = config.layer_norm and not config.normalize_after
        self.input_dropout = config.input_dropout
        self.cell_dropout = config.dropout if layer_idx < config.num_hidden_layers - 1 else 0.0
        inputs = config.input_sizes[layer_idx]
        self.projection = SruppProjection(config, layer_idx)
        self.recurrence = SruRecurrence()
        self.takes_highway = config.has_skip_term and self.projection.num_parts == 3
        self.scale = math.sqrt(1.0 + 2.0 * math.exp(config.highway_bias)) if config.rescale else 1.0
        self.weight_c = nn.Parameter(torch.empty(2, config.hidden_size), requires_grad=config.use_peephole)
        self.bias = nn.Parameter(torch.empty(2, config.hidden_size))
        self.use_peephole = config.use_peephole
        self.norm = None
        if config.layer_norm:
            width = inputs if self.normalize_before else config.hidden_size
            self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def _shared_mask(self, like: torch.Tensor, width: int, rate: float) -> torch.Tensor | None:
        """One dropout mask for all time steps, `(B, width)`."""
        if not self.training or rate == 0.0:
            return None
        return nn.functional.dropout(like.new_ones(like.shape[0], width), rate)

    def _recur(
        self,
        u: torch.Tensor,
        x: torch.Tensor,
        state: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        document_start: torch.Tensor | None,
        all_states: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All directions: the output, `(B, L, d)`, and c of all steps, or of each direction's last step alone."""
        dropout_mask = self._shared_mask(x, self.num_directions * self.width, self.cell_dropout)
        highway = x if self.takes_highway else None
        weight_c = self.weight_c if self.use_peephole else None
        options = {"scale_x": self.scale, "activation": self.activation, "all_states": all_states}
        if self.num_directions == 1:
            # No slices: the gradient of one is a tensor of zeros with the slice in it.
            u = u.squeeze(2)
            return self.recurrence(
                u, highway, weight_c, self.bias, state, padding_mask, document_start, dropout_mask, **options
            )
        # Backwards in time a document begins with its last token.
        ends = None if document_start is None else nn.functional.pad(document_start[:, 1:], (0, 1))
        halves = [
            (None, None) if tensor is None else tensor.chunk(2, dim=-1)
            for tensor in (highway, weight_c, self.bias, state, dropout_mask)
        ]
        outputs = []
        for direction, (part, starts) in enumerate(zip(u.unbind(2), (document_start, ends), strict=True)):
            x_half, weight_half, bias_half, state_half, dropout_half = (half[direction] for half in halves)
            outputs.append(
                self.recurrence(
                    part,
                    x_half,
                    weight_half,
                    bias_half,
                    state_half,
                    padding_mask,
                    starts,
                    dropout_half,
                    reverse=direction == 1,
                    **options,
                )
            )
        hidden_states, states = zip(*outputs, strict=True)
        return torch.cat(hidden_states, -1), torch.cat(states, -1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        branch = hidden_states
        if self.norm is not None and self.normalize_before:
            branch = self.norm(branch)
        shared = self._shared_mask(branch, branch.shape[-1], self.input_dropout)
        branch = branch if shared is None else branch * shared.unsqueeze(1)
        remembered = hidden_states if past_key_values is not None and self.normalize_before else None
        u = self.projection(branch, memory, attention_mask, past_key_values, remembered, **kwargs)
        if past_key_values is not None and self.counts_tokens:
            marks = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1, dtype=torch.bool)
            past_key_values.update(marks, marks[..., :0], self.layer_idx)
        if past_key_values is not None and past_key_values.has_previous_state(self.layer_idx):
            # `[..., -1]`: after assisted decoding recorded several, the last is the current one. Read from the cache's
            # layer: `Cache.get_conv_state` is not in transformers 5.17.
            cached: Any = past_key_values.layers[self.layer_idx]
            state = cached.conv_states[0][..., -1]
        # A cache may be asked to go back by some steps, and a backward pass reads them all.
        all_states = past_key_values is not None or torch.is_grad_enabled()
        output, states = self._recur(u, hidden_states, state, padding_mask, document_start, all_states)
        if past_key_values is not None:
            # A kernel of size 1 keeps the last state, and all of them while a rollback may be asked for.
            past_key_values.update_conv_state(states.transpose(1, 2), self.layer_idx, conv_kernel_size=1)
        if self.norm is not None and not self.normalize_before:
            output = self.norm(output)
        # A copy: what is carried to the next segment or call must not keep the states of all steps.
        last = states[:, -1].clone()
        if self.num_directions == 2:
            last = torch.cat([last[:, : self.width], states[:, 0, self.width :]], -1)
        return output, last


__all__ = ["SruRecurrence", "SruppAttention", "SruppLayer", "SruppProjection", "eager_attention_forward"]
