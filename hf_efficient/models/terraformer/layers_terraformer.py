"""Layers of Terraformer over two streams, those of the encoder-decoder with one, and what stands between them.

See modeling_terraformer.py for the source.
"""

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from ...modules.causal_window import TokenOrder
from ...modules.cross_attention import CrossAttention
from ...modules.decoding import DecodingStep, LayerDecoder
from ...modules.layer_states import keep_states, read_state, records_all
from ...modules.lsh_layers import LshAttention
from ...modules.sparse_blocks import FeedForwardBlock, FeedForwardHalf, SparseAttention, build_norm
from ...ops.rerun import Remembered
from ...ops.reversible import ReversibleChain
from ...ops.reversible_block import HalfResidual
from .configuration_terraformer import TerraformerConfig


def changed(config: TerraformerConfig, **fields: Any) -> TerraformerConfig:
    """A view of a config for one part of a model, of which nothing is checked."""
    view = copy.copy(config)
    view.__dict__.update(fields)
    return view


def sized(config: TerraformerConfig, factor: float) -> TerraformerConfig:
    sizes = {name: int(getattr(config, name) * factor) for name in ("hidden_size", "intermediate_size")}
    return config if factor == 1 else changed(config, **sizes)


def build_attention(
    config: TerraformerConfig, view: TerraformerConfig, layer_idx: int, is_causal: bool
) -> SparseAttention:
    """An attention of the sizes of a view, whose form is that of the config."""
    kind = config.decoder_long_attention if is_causal else config.encoder_long_attention
    if kind == "none":
        attention = SparseAttention(view, layer_idx)
    else:
        # A joined row holds a source and a target.
        longest = config.max_position_embeddings * (2 if is_causal and config.is_encoder_decoder else 1)
        after = 0 if is_causal else config.lsh_encoder_chunks_after
        attention = LshAttention(view, layer_idx, kind, longest, after)
    attention.config = config  # not the view: `set_attn_implementation` writes there
    attention.is_causal = is_causal
    return attention


def encoder_view(config: TerraformerConfig) -> TerraformerConfig:
    """A view whose attention is dense, as that of all encoders is."""
    dense = {"attention_type": "dense", "attention_sparsity": None, "attention_share_qk": False}
    return changed(config, **dense, attention_output="none", attention_value_input="shared")


class DecoderCall(NamedTuple):
    """
    Things that all layers of a decoder share in a call.

    Args:
        mask (`Tensor`, *optional*): of the scores.
        real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding.
        starts (`Tensor` of shape `(batch, length)`, *optional*): `True` where a document begins.
        order (`TokenOrder`, *optional*): where padding or documents come between tokens.
        cache (`Cache`, *optional*): whose layers take keys, values and states.
        source (`Cache`, *optional*): keys, values and states of what stands before all that `cache` holds.
        memory_mask (`Tensor`, *optional*): of the scores of cross attention.
        decoding ([`DecodingStep`], *optional*): what compiled code needs, in a call that it may run.
        lengths (`Tensor` of shape `(batch,)`, *optional*): tokens of whole texts that are read in several calls.
    """

    mask: Any = None
    real: Tensor | None = None
    starts: Tensor | None = None
    order: TokenOrder | None = None
    cache: Any = None
    source: Cache | None = None
    memory_mask: Any = None
    decoding: DecodingStep | None = None
    lengths: Tensor | None = None


class AttentionHalf(nn.Module):
    """Norm and attention: what one stream adds to the other."""

    def __init__(self, config: TerraformerConfig, view: TerraformerConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.norm = build_norm(view)
        self.attention = build_attention(config, view, layer_idx, is_causal)

    def forward(
        self,
        x: Tensor,
        memory: Remembered,
        mask: Any = None,
        real: Tensor | None = None,
        order: TokenOrder | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(self.attention, LshAttention):
            kwargs |= {"real": real, "memory": memory}
        return self.attention(self.norm(x), mask, order=order, **kwargs)[0]


def new_memories(count: int) -> list[Remembered]:
    """Memories of the halves of a layer that gradient checkpointing may run twice."""
    return [Remembered() for _ in range(count)]


class TerraformerEncoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward over two streams, each of which is changed by what is seen of the other."""

    num_halves = 2

    def __init__(self, config: TerraformerConfig, view: TerraformerConfig, index: int):
        super().__init__()
        self.swaps_twice = config.encoder_swaps == 2
        # Behind those of the decoder, so that each attention hashes by directions of its own.
        self.attention = AttentionHalf(config, view, (config.num_hidden_layers or 0) + index, is_causal=False)
        self.feed_forward = FeedForwardHalf(view)

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        chain: ReversibleChain,
        mask: Any = None,
        is_token: Tensor | None = None,
        real: Tensor | None = None,
        memories: list[Remembered] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            first, second (`Tensor` of shape `(batch, length, width)`): streams.
            chain ([`~hf_efficient.ops.reversible.ReversibleChain`]): that they are on.
            mask (`Tensor`, *optional*): of the scores.
            is_token, real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding, for the attention and
                for recurrences, which in the authors' layout run over it.
            memories (`list[Remembered]`, *optional*): of its halves, where the layer may run twice.
        """
        attending, feeding = (None, None) if memories is None else memories
        halves = [
            HalfResidual(self.attention, {"mask": mask, "real": is_token, **kwargs}, memory=attending),
            HalfResidual(self.feed_forward, {"real": real}, swap=self.swaps_twice, memory=feeding),
        ]
        return chain.block(halves, first, second)


class PlainEncoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual connection."""

    def __init__(self, config: TerraformerConfig, view: TerraformerConfig, index: int):
        super().__init__()
        self.attention_norm = build_norm(view)
        self.attention = build_attention(config, view, (config.num_hidden_layers or 0) + index, is_causal=False)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = FeedForwardBlock(view)

    def forward(self, hidden_states: Tensor, mask: Any = None, real: Tensor | None = None, **kwargs: Any) -> Tensor:
        options = {**kwargs, "real": real} if isinstance(self.attention, LshAttention) else kwargs
        attended, _, _ = self.attention(self.attention_norm(hidden_states), mask, **options)
        hidden_states = hidden_states + self.dropout(attended)
        output, _ = self.feed_forward(hidden_states, None, real)
        return hidden_states + output


class _LayerStates:
    """States of the parts of a decoder layer in one layer of the cache: those before a call, and those after it."""

    def __init__(self, call: DecoderCall, layer_idx: int, sizes: list[int]):
        self.cache, self.layer_idx = call.cache, layer_idx
        if isinstance(self.cache, EncoderDecoderCache):
            self.cache = self.cache.self_attention_cache
        self.all_steps = records_all(self.cache, layer_idx)
        state = None
        if sum(sizes):
            state = read_state(self.cache, layer_idx)
            state = read_state(call.source, layer_idx) if state is None else state
        parts: Any = [None] * len(sizes) if state is None else state.split(sizes, dim=-1)
        self.before = [part if size else None for part, size in zip(parts, sizes, strict=True)]
        self.after: list[Tensor] = []

    def keep(self) -> None:
        keep_states(self.cache, self.layer_idx, self.after)


class TerraformerDecoderLayer(GradientCheckpointingLayer):
    """One or more causal attentions and a feed-forward over two streams, each changed by what is seen of the other."""

    def __init__(self, config: TerraformerConfig, view: TerraformerConfig, index: int):
        super().__init__()
        count = config.attentions_per_layer
        self.num_halves = count + 1
        self.layer_idx = index * count
        self.attentions = nn.ModuleList(
            AttentionHalf(config, view, self.layer_idx + place, is_causal=True) for place in range(count)
        )
        self.feed_forward = FeedForwardHalf(view)
        recurrences = config.ff_sru_layers * config.ff_sru_units
        self.state_sizes = [*(sum(half.attention.state_sizes) for half in self._attentions()), recurrences]
        self.decoder = LayerDecoder()

    def _attentions(self) -> list[Any]:
        return list(self.attentions)

    def parts(self) -> list[tuple[nn.Module, nn.Module]]:
        """Norm and module of each half."""
        halves = [(half.norm, half.attention) for half in self._attentions()]
        return [*halves, (self.feed_forward.norm, self.feed_forward)]

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        chain: ReversibleChain | None,
        call: DecoderCall,
        memories: list[Remembered] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            first, second (`Tensor` of shape `(batch, length, width)`): streams.
            chain ([`~hf_efficient.ops.reversible.ReversibleChain`], *optional*): `None` for a call with a cache, which
                keeps states.
            call ([`DecoderCall`]): masks, caches and the like.
            memories (`list[Remembered]`, *optional*): of its halves, where the layer may run twice.
        """
        if chain is None:
            step = call.decoding
            decoded = None if step is None else self.decoder(self, (first, second), step)
            return self._with_states(first, second, call, **kwargs) if decoded is None else (decoded[0], decoded[1])
        shared = {"mask": call.mask, "real": call.real, "order": call.order, **kwargs}
        kept: Any = [None] * self.num_halves if memories is None else memories
        halves = [
            HalfResidual(half, shared, memory=memory) for half, memory in zip(self._attentions(), kept, strict=False)
        ]
        halves.append(HalfResidual(self.feed_forward, {"real": call.real, "starts": call.starts}, memory=kept[-1]))
        return chain.block(halves, first, second)

    def _with_states(self, first: Tensor, second: Tensor, call: DecoderCall, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = _LayerStates(call, self.layer_idx, self.state_sizes)
        for half, state in zip(self._attentions(), states.before, strict=False):
            attention = half.attention
            source = None if call.source is None else call.source.layers[attention.layer_idx]
            more = (
                {**kwargs, "real": call.real, "lengths": call.lengths}
                if isinstance(attention, LshAttention)
                else kwargs
            )
            attended, _, after = attention(
                half.norm(second), call.mask, call.cache, state, call.order, states.all_steps, source, **more
            )
            first, second = second, first + attended
            states.after += after
        state, steps = states.before[-1], states.all_steps
        output, after = self.feed_forward.with_states(second, state, call.real, call.starts, steps)
        states.after += after
        states.keep()
        return second, first + output


class PlainDecoderLayer(GradientCheckpointingLayer):
    """Causal attention, attention to the encoder's output and feed-forward, each with a residual connection."""

    def __init__(self, config: TerraformerConfig, index: int):
        super().__init__()
        self.layer_idx = index
        self.attention_norm = build_norm(config)
        self.attention = build_attention(config, config, index, is_causal=True)
        self.cross_norm = build_norm(config)
        self.cross_attention = CrossAttention(config, index)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = FeedForwardBlock(config)
        recurrences = config.ff_sru_layers * config.ff_sru_units
        self.state_sizes = [sum(self.attention.state_sizes), sum(self.cross_attention.state_sizes), recurrences]
        self.decoder = LayerDecoder()

    def parts(self) -> list[tuple[nn.Module, nn.Module]]:
        """Norm and module of each part."""
        return [
            (self.attention_norm, self.attention),
            (self.cross_norm, self.cross_attention),
            (self.feed_forward.norm, self.feed_forward),
        ]

    def forward(self, hidden_states: Tensor, memory: Tensor | None, call: DecoderCall, **kwargs: Any) -> Tensor:
        """
        Args:
            hidden_states (`Tensor` of shape `(batch, length, width)`): of the target.
            memory (`Tensor` of shape `(batch, source length, width)`, *optional*): output of the encoder. It stands
                beside `call`, since checkpointing finds no gradient of a tensor inside of one.
            call ([`DecoderCall`]): masks, caches and the like.
        """
        decoded = None if call.decoding is None else self.decoder(self, (hidden_states,), call.decoding)
        if decoded is not None:
            return decoded[0]
        states = _LayerStates(call, self.layer_idx, self.state_sizes)
        attended, _, after = self.attention(
            self.attention_norm(hidden_states),
            call.mask,
            states.cache,
            states.before[0],
            call.order,
            states.all_steps,
            **kwargs,
        )
        states.after += after
        hidden_states = hidden_states + self.dropout(attended)
        attended, _, after = self.cross_attention(
            self.cross_norm(hidden_states),
            memory,
            call.memory_mask,
            call.cache,
            states.before[1],
            call.order,
            states.all_steps,
            **kwargs,
        )
        states.after += after
        hidden_states = hidden_states + self.dropout(attended)
        output, after = self.feed_forward(hidden_states, states.before[2], call.real, None, states.all_steps)
        states.after += after
        states.keep()
        return hidden_states + output


class Forgetting(nn.Module):
    """A linear map of the average of both streams, in the place of both."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        both = self.proj((first + second) / 2)
        return both, both


class Concatenation(nn.Module):
    """Both streams, one beside the other, in the place of both."""

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([first, second], dim=-1)
        return both, both


def width_factors(config: TerraformerConfig) -> list[float]:
    """Width of each decoder layer, and of what follows them, in parts of `hidden_size`."""
    half, double = config.half_width_layers, config.double_width_after
    factors = [
        (0.5 if layer < half else 1.0) * (2 if double is not None and layer > double else 1)
        for layer in range(config.num_decoder_layers)
    ]
    last = factors[-1] * (2 if double == config.num_decoder_layers - 1 else 1)
    return [*factors, last * (2 if half == config.num_decoder_layers else 1)]


class Between(nn.ModuleList):
    """Modules behind a layer, one after the other."""

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        for module in self:
            first, second = module(first, second)
        return first, second


def between_layers(forget_every: int, factors: list[float], hidden_size: int) -> dict[str, Between]:
    """
    Build what stands behind layers.

    Args:
        forget_every (`int`): see [`TerraformerConfig`]; a concatenation counts as a layer.
        factors (`list[float]`): width of each layer and of what follows them, in parts of `hidden_size`.
        hidden_size (`int`): that width.

    Returns:
        `dict[str, Between]`: by the layers' indices.
    """
    # For each block, a layer or a concatenation: its layer or that before it, whether it widens, its output's width.
    blocks: list[tuple[int, bool, float]] = []
    for layer, (factor, following) in enumerate(pairwise(factors)):
        blocks.append((layer, False, factor))
        if following != factor:
            blocks.append((layer, True, following))
    found: dict[str, Between] = {}
    for place, (layer, widens, factor) in enumerate(blocks, start=1):
        modules: list[nn.Module] = [Concatenation()] if widens else []
        if forget_every and place % forget_every == 0 and len(blocks) - place > 1:
            modules.append(Forgetting(int(hidden_size * factor)))
        if modules:
            found.setdefault(str(layer), Between()).extend(modules)
    return found
