"""Attention and feed-forward of the Scaling Transformer and of Terraformer, each in its dense and its sparse kinds.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, sections 3 and 4,
and the authors' code. Both are built from a config; [`ScalingTransformerConfig`] says what its fields mean.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.backend import attention_context
from ..ops.rerun import Remembered
from ..ops.sru import sru_recurrence
from .attention import attend_in_parts, eager_attention_forward
from .causal_window import CausalWindow, TokenOrder
from .sparse_layers import ModularDense, ModuleConv, MultiplicativeDense, SparseFeedForward, UnitDraws


def build_norm(config: Any) -> nn.Module:
    """LayerNorm, or RMSNorm for a config without `layer_norm_center`."""
    if config.layer_norm_center:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)


def shared_dropout(x: Tensor, rate: float, training: bool, shape: tuple[int, ...]) -> Tensor:
    """Dropout by one mask of `shape`, which is broadcast to `x`."""
    if not training or rate == 0.0:
        return x
    return x * nn.functional.dropout(x.new_ones(shape), rate)


class ConvProjections(nn.Module):
    """
    Queries, keys and values of multiplicative-conv attention: one multiplicative layer, and a convolution for each.

    Args:
        config (`PreTrainedConfig`): has `hidden_size`, `attention_sparsity`, `attention_window`,
            `attention_kernel_width`, `attention_share_qk` and `attention_value_input`.
    """

    def __init__(self, config: Any):
        super().__init__()
        width, self.modules_count = config.hidden_size, config.attention_sparsity
        size, window = width // self.modules_count, config.attention_window
        self.value_input = config.attention_value_input
        self.shared = MultiplicativeDense(width, width, self.modules_count)
        self.query_conv = ModuleConv(size, size, window, config.attention_kernel_width)
        self.key_conv = (
            None if config.attention_share_qk else ModuleConv(size, size, window, config.attention_kernel_width)
        )
        self.value_conv = ModuleConv(size if self.value_input == "shared" else 2 * size, size, window, 1)
        self.window = CausalWindow(window, width if self.value_input == "shared" else 2 * width)

    def _value_windows(self, windows: Tensor) -> Tensor:
        """Put the modules of both halves side by side, or leave one behind the other, as the weights have it."""
        if self.value_input != "by_module":
            return windows
        halves = windows.unflatten(-1, (2, self.modules_count, -1))
        return halves.transpose(-3, -2).flatten(-3)

    def forward(
        self, x: Tensor, state: Tensor | None, order: TokenOrder | None, all_states: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries, keys, values and states; the arguments are those of [`CausalWindow`]."""
        shared = self.shared(x)
        values = shared if self.value_input == "shared" else torch.cat([shared, x], dim=-1)
        windows, states = self.window(values, state, order, all_states)
        first = windows[..., : x.shape[-1]]
        query = self.query_conv(first)
        key = query if self.key_conv is None else self.key_conv(first)
        return query, key, self.value_conv(self._value_windows(windows)), states


class SparseAttention(nn.Module):
    """
    Causal self-attention with dense, multiplicative, modular or multiplicative-conv projections.

    The last has no output projection but where `attention_output` asks for one. Beyond keys and values its cache holds
    the last tokens that the convolutions see, of each row.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width, self.kind = config.hidden_size, config.attention_type
        self.head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.projections = ConvProjections(config) if self.kind == "multiplicative_conv" else None
        self.o_proj: nn.Module | None = None
        self.output_conv: nn.Module | None = None
        self.output_window: CausalWindow | None = None
        if self.projections is None:
            into, out_of = self._projections_of(config)
            self.q_proj = into()
            self.k_proj = None if config.attention_share_qk else into()
            self.v_proj, self.o_proj = into(), out_of()
            return
        if "multiplicative" in config.attention_output:
            self.o_proj = MultiplicativeDense(width, width, config.attention_sparsity)
        if "conv" in config.attention_output:
            size, window = width // config.attention_sparsity, config.attention_window
            self.output_conv = ModuleConv(size, size, window, config.attention_kernel_width)
            self.output_window = CausalWindow(window, width)

    def _projections_of(self, config: Any) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
        """Makers of a map into the heads and of the one out of them."""
        width, sparsity = config.hidden_size, config.attention_sparsity
        if self.kind == "dense":
            inner, bias = self.head_dim * config.num_attention_heads, getattr(config, "attention_bias", True)
            return lambda: nn.Linear(width, inner, bias), lambda: nn.Linear(inner, width, bias)
        if self.kind == "multiplicative":
            return (lambda: MultiplicativeDense(width, width, sparsity),) * 2
        return (lambda: ModularDense(width, sparsity),) * 2

    @property
    def state_sizes(self) -> tuple[int, int]:
        """Numbers of a row that the windows of projections and of output keep for the next call."""
        windows = (None if self.projections is None else self.projections.window, self.output_window)
        first, second = (0 if window is None else window.state_size for window in windows)
        return first, second

    @property
    def key_size(self) -> int:
        """Numbers of a key that a cache holds."""
        return self.head_dim

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(
        self, hidden_states: Tensor, state: Tensor | None, order: TokenOrder | None, all_states: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Queries, keys and values, `(batch, heads, length, head size)`, and the states of their convolutions."""
        if self.projections is None:
            query, value = self.q_proj(hidden_states), self.v_proj(hidden_states)
            key, after = query if self.k_proj is None else self.k_proj(hidden_states), None
        else:
            query, key, value, after = self.projections(hidden_states, state, order, all_states)
        return self._heads(query), self._heads(key), self._heads(value), [] if after is None else [after]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output `(batch, length, heads, head size)`, and the weights where the attention in use gives them."""
        function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        with attention_context(query, key, value):
            return function(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def finish(
        self, attended: Tensor, state: Tensor | None, order: TokenOrder | None, all_states: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Output `(batch, length, width)` of the heads' `(batch, length, heads, head size)`, and the states of its
        convolution."""
        output = attended.flatten(2)
        if self.o_proj is not None:
            output = self.o_proj(output)
        if self.output_conv is None or self.output_window is None:
            return output, []
        windows, after = self.output_window(output, state, order, all_states)
        return self.output_conv(windows), [] if after is None else [after]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        state: Tensor | None = None,
        order: TokenOrder | None = None,
        all_states: bool = False,
        source: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, length, width)`): input.
            attention_mask (`Tensor`, *optional*): of the scores, in the form that the attention in use takes; with a
                `source` boolean, and over its keys too.
            cache (`Cache`, *optional*): keys and values of earlier calls.
            state (`Tensor` of shape `(batch, sum(state_sizes))`, *optional*): of the convolutions, after earlier calls.
            order (`TokenOrder`, *optional*): where padding or documents come between tokens.
            all_states (`bool`, defaults to `False`): give states after every token, or after the last one.
            source (`Any`, *optional*): layer of another cache, whose keys and values stand in front of all others.

        Returns:
            `tuple`: output of the shape of `hidden_states`, the weights where the attention gives them, and states.
        """
        first, second = (None, None) if state is None else state.split(self.state_sizes, dim=-1)
        query, key, value, states = self.project(hidden_states, first, order, all_states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if source is None:
            attended, weights = self.attend(query, key, value, attention_mask, **kwargs)
        else:
            parts, dropout = [(source.keys, source.values), (key, value)], self.dropout if self.training else 0.0
            attended, weights = attend_in_parts(self, query, parts, attention_mask, self.scaling, dropout)
        output, after = self.finish(attended, second, order, all_states)
        return output, weights, states + after


class SruBranch(nn.Module):
    """
    Branch of recurrences beside a feed-forward layer: norm, a map to a few units, SRUs, and back.

    Its SRU differs from that of SRU++: gates do not look at the state, and the highway is scaled by sqrt(3).
    """

    def __init__(self, config: Any):
        super().__init__()
        units = self.units = config.ff_sru_units
        self.norm = build_norm(config)
        self.in_proj = nn.Linear(config.hidden_size, units)
        self.layers = nn.ModuleList(nn.Linear(units, 3 * units) for _ in range(config.ff_sru_layers))
        self.out_proj = nn.Linear(units, config.hidden_size)

    def forward(
        self, x: Tensor, state: Tensor | None, real: Tensor | None, starts: Tensor | None, all_states: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            x (`Tensor` of shape `(batch, length, width)`): input.
            state (`Tensor` of shape `(batch, layers * units)`, *optional*): of each SRU, after earlier calls.
            real, starts (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding, where the state stays as
                it was; `True` where a document begins, at which it is 0.
            all_states (`bool`): give states after every token, or after the last one.

        Returns:
            `tuple`: output of the shape of `x`, and of each SRU the states, `(batch, length or 1, units)`.
        """
        hidden, found = self.in_proj(self.norm(x)), []
        # In training by the same kernel with and without a graph: a layer that is run again must round alike.
        keeps_all = all_states or self.training or torch.is_grad_enabled()
        before = [None] * len(self.layers) if state is None else state.split(self.units, dim=-1)
        for layer, c0 in zip(self.layers, before, strict=True):
            u = layer(hidden).unflatten(-1, (3, -1))
            hidden, states = sru_recurrence(
                u, hidden, None, None, c0, real, starts, scale_x=math.sqrt(3.0), return_all_states=keeps_all
            )
            states = states if keeps_all else states.unsqueeze(1)
            found.append(states if all_states else states[:, -1:])
        return self.out_proj(hidden.to(x.dtype)), found


class FeedForwardBlock(nn.Module):
    """
    Norm, dense or sparse feed-forward layer, dropout, and the branch of recurrences beside them; no residual.

    In training with `ff_chunk_size`, norm, layer and dropout run in pieces of so many tokens, which are recomputed in
    the backward pass and draw for themselves. The last piece may be shorter; the original runs one piece where they do
    not divide.
    """

    def __init__(self, config: Any):
        super().__init__()
        width, units = config.hidden_size, config.intermediate_size
        self.norm = build_norm(config)
        self.chunk_size = config.ff_chunk_size
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.shares_dropout = config.share_dropout
        self.sparse: SparseFeedForward | None = None
        if config.ff_sparsity:
            self.sparse = SparseFeedForward(
                width,
                units,
                config.ff_sparsity,
                config.ff_rank,
                activation=config.hidden_act,
                temperature=config.ff_temperature,
                hard_probability=config.ff_hard_probability,
                multiply_by_controller=config.ff_multiply_by_controller,
                inner_bias=config.ff_inner_bias,
                scaled_init=config.ff_scaled_init,
            )
        else:
            self.up_proj, self.down_proj = nn.Linear(width, units), nn.Linear(units, width)
            self.act = ACT2FN[config.hidden_act]
        self.sru = SruBranch(config) if config.ff_sru_layers else None

    def _layer(self, x: Tensor, draws: UnitDraws | None, real: Tensor | None) -> Tensor:
        normalized = self.norm(x)
        if self.sparse is not None:
            output = self.sparse(normalized, draws, real)
            # The original's layer sees tokens of all rows in a line: one mask for all of them.
            shape = (1,) * (x.dim() - 1) if self.shares_dropout else x.shape[:-1]
        else:
            hidden = self.up_proj(normalized)
            # Before the activation, one mask for all tokens of a row.
            rows = (*hidden.shape[:-2], 1, hidden.shape[-1])
            hidden = self.act(shared_dropout(hidden, self.activation_dropout, self.training, rows))
            output = self.down_proj(hidden)
            shape = (*x.shape[:-2], 1) if self.shares_dropout else x.shape[:-1]
        return shared_dropout(output, self.dropout, self.training, (*shape, x.shape[-1]))

    def _in_pieces(self, x: Tensor, draws: list[UnitDraws], real: Tensor | None) -> Tensor:
        pieces = x.flatten(0, -2).split(self.chunk_size)
        reals: Any = [None] * len(pieces) if real is None else real.flatten().split(self.chunk_size)
        draws.extend(UnitDraws() for _ in pieces[len(draws) :])
        outputs = [
            checkpoint(self._layer, piece, drawn, real_piece, use_reentrant=False)
            for piece, drawn, real_piece in zip(pieces, draws, reals, strict=True)
        ]
        return torch.cat(outputs).view_as(x)

    def forward(
        self,
        hidden_states: Tensor,
        state: Tensor | None = None,
        real: Tensor | None = None,
        starts: Tensor | None = None,
        all_states: bool = False,
        draws: list[UnitDraws] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, length, width)`): input.
            state, real, starts, all_states: see [`SruBranch`]; `real` for [`SparseFeedForward`] too.
            draws (`list[UnitDraws]`, *optional*): of each piece in training. The first run fills an empty list; given
                again, it makes a second run choose the same units.

        Returns:
            `tuple`: output of the shape of `hidden_states`, and the states of the recurrences.
        """
        if draws is None or (torch.compiler.is_compiling() and not draws):  # see SparseFeedForward
            draws = []
        if self.training and self.chunk_size:
            output = self._in_pieces(hidden_states, draws, real)
        else:
            draws.extend(UnitDraws() for _ in range(1 - len(draws)))
            output = self._layer(hidden_states, draws[0], real)
        if self.sru is None:
            return output, []
        branch, states = self.sru(hidden_states, state, real, starts, all_states)
        return output + branch, states


class FeedForwardHalf(FeedForwardBlock):
    """A feed-forward block as what one stream of two adds to the other."""

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Remembered, real: Tensor | None = None, starts: Tensor | None = None
    ) -> Tensor:
        return self.with_states(x, None, real, starts, draws=memory.remember("draws", list))[0]

    def with_states(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Output and states, as [`FeedForwardBlock`] gives them."""
        return super().forward(x, *args, **kwargs)
