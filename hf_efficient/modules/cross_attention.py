"""Attention of a decoder to an encoder's output, with dense or sparse maps.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, and the authors'
code (`enc_dec_attention_sparsity`). Keys and values have dense maps always: decoding computes them once.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import eager_attention_forward
from .causal_window import CausalWindow, TokenOrder
from .sparse_layers import ModuleConv, MultiplicativeDense


class WindowedProjection(nn.Module):
    """
    A multiplicative layer and a convolution over its modules and the last tokens.

    Args:
        width (`int`): of input and output.
        modules (`int`): of the layer.
        window (`int`): tokens that the convolution sees, the current one and those before it.
        kernel_width (`int`): modules that it sees.
    """

    def __init__(self, width: int, modules: int, window: int, kernel_width: int):
        super().__init__()
        self.shared = MultiplicativeDense(width, width, modules)
        self.conv = ModuleConv(width // modules, width // modules, window, kernel_width)
        self.window = CausalWindow(window, width)

    def forward(
        self, x: Tensor, state: Tensor | None, order: TokenOrder | None, all_states: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Output of the shape of `x`, and states; the arguments are those of [`CausalWindow`]."""
        windows, states = self.window(self.shared(x), state, order, all_states)
        return self.conv(windows), [] if states is None else [states]


class CrossAttention(nn.Module):
    """
    Attention of a decoder's tokens to an encoder's, with queries and outputs of a kind each.

    Args:
        config (`PreTrainedConfig`): has `hidden_size`, `num_attention_heads`, `cross_query_type`,
            `cross_query_sparsity`, `cross_output_type`, `cross_output_sparsity`, `attention_window` and
            `attention_kernel_width`.
        layer_idx (`int`): in the cache.
    """

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.q_proj = self._build(config, config.cross_query_type, config.cross_query_sparsity)
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.o_proj = self._build(config, config.cross_output_type, config.cross_output_sparsity)

    @staticmethod
    def _build(config: Any, kind: str, modules: int | None) -> nn.Module | None:
        width = config.hidden_size
        if kind == "none":
            return None
        if kind == "dense" or modules is None:
            return nn.Linear(width, width)
        return WindowedProjection(width, modules, config.attention_window, config.attention_kernel_width)

    @property
    def state_sizes(self) -> tuple[int, int]:
        """Numbers of a row that the windows of queries and of output keep for the next call."""
        first, second = (
            module.window.state_size if isinstance(module, WindowedProjection) else 0
            for module in (self.q_proj, self.o_proj)
        )
        return first, second

    @staticmethod
    def _mapped(module: nn.Module | None, x: Tensor, *window: Any) -> tuple[Tensor, list[Tensor]]:
        if isinstance(module, WindowedProjection):
            return module(x, *window)
        return (x if module is None else module(x)), []

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(self, source: Tensor | None, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, which a cache holds from its first call on."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            held: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return held.keys, held.values
        key, value = self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value

    def forward(
        self,
        hidden_states: Tensor,
        source: Tensor | None,
        source_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        state: Tensor | None = None,
        order: TokenOrder | None = None,
        all_states: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, length, width)`): of the decoder.
            source (`Tensor` of shape `(batch, source length, width)`): of the encoder; not read where a cache has its
                keys and values.
            source_mask (`Tensor`, *optional*): of the scores, in the form that the attention in use takes.
            cache (`EncoderDecoderCache`, *optional*): keys and values of earlier calls.
            state, order, all_states: see [`~hf_efficient.modules.sparse_blocks.SparseAttention`].

        Returns:
            `tuple`: output of the shape of `hidden_states`, the weights where the attention gives them, and states.
        """
        first, second = (None, None) if state is None else state.split(self.state_sizes, dim=-1)
        query, states = self._mapped(self.q_proj, hidden_states, first, order, all_states)
        key, value = self._keys_and_values(source, cache)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(
            self, self._heads(query), key, value, source_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output, after = self._mapped(self.o_proj, output.flatten(2), second, order, all_states)
        return output, weights, states + after
