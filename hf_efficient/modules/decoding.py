"""Decoding token by token on a CPU by compiled code, which a model asks for once a call.

A step of one token for a few rows spends most of its time outside the weights where each operator is called by itself,
and a cache that is concatenated copies all keys and values at every step. Here a model asks once a call whether its
layers may run compiled ([`decoding_step`]), and each layer whether its modules are as they were and nothing listens to
them ([`LayerDecoder`]). Where all of them say yes they run in one call
([`~hf_efficient.modules.stack_decoding.StackDecoder`]): weights that stream through the caches leave nothing of an
interpreter there, which has to come back from memory between two calls. Else each layer runs compiled by itself if it
can, and as it is written if not. Keys and values grow into room that is allocated ahead ([`KeyRoom`]), of which a
cache's layer shows the filled part, as tensors of the usual shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, LinearAttentionAndFullAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import output_capturing

from ..ops.backend import may_skip_dispatcher, note_reference, register_op, select
from ..ops.kernel_loader import load_implementation
from .decoding_weights import LayerWeights, layer_weights
from .few_rows import DTYPES, KERNEL, MOST_ROWS, something_looks_on
from .hashed_keys import HashedRoom, KeyDigits
from .key_room import KeyRoom
from .module_watch import ModuleWatch


OP_NAME = "decode_layer"

_IN_TORCH = register_op(
    OP_NAME,
    SimpleNamespace(),  # the layer as it is written
    {"cpu": partial(load_implementation, KERNEL, ("layers",), "cpu")},
)

_ATTENTION_FORMS = ("eager", "sdpa")
_CACHE_LAYERS = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


class DecodingStep(NamedTuple):
    """
    Things that the layers of a model share in a call that runs compiled.

    Args:
        kernel (`Any`): the compiled code.
        cache (`Cache`): whose layers get this token's keys, values and states.
        mask (`Tensor` of shape `(batch, keys)`, *optional*): float32, added to the scores.
        source (`Cache`, *optional*): keys and values that stand in front of those of `cache`.
        cross (`EncoderDecoderCache`, *optional*): whose cross part holds keys and values for cross attention.
        cross_mask (`Tensor` of shape `(batch, source)`, *optional*): of its scores, as `mask`.
    """

    kernel: Any
    cache: Cache
    mask: Tensor | None
    source: Cache | None = None
    cross: EncoderDecoderCache | None = None
    cross_mask: Tensor | None = None


def decoding_step(
    model: PreTrainedModel,
    hidden_states: Tensor,
    cache: Cache | None,
    mask: Any,
    *unsupported: Any,
    source: Cache | None = None,
    cross_mask: Any = None,
) -> DecodingStep | None:
    """
    Decide whether the layers of a model may run compiled in this call: on a CPU, in evaluation, without gradient,
    compiler or transform, one token a row, a few rows, with a cache that grows.

    Args:
        model (`PreTrainedModel`): the model.
        hidden_states (`Tensor` of shape `(batch, length, width)`): input of the first layer.
        cache (`Cache`, *optional*): keys and values of earlier calls; an `EncoderDecoderCache` for cross attention.
        mask: of the scores, as [`~hf_efficient.modules.causal_inputs.scores_mask`] gives it; with a `source` over its
            keys too.
        unsupported: padding in the input, documents and the like; anything but `None` says no.
        source, cross_mask (*optional*): see [`DecodingStep`].

    Returns:
        [`DecodingStep`]: what the layers need, or `None` where they are to run as they are written.
    """
    if torch.compiler.is_compiling():  # before sizes, which a compiler would guard
        return None
    step, cross = None, cache if isinstance(cache, EncoderDecoderCache) else None
    if cross is not None:
        cache = cross.self_attention_cache
    if cache is not None and may_skip_dispatcher(hidden_states) and hidden_states.shape[1] == 1:
        refused = (
            hidden_states.shape[0] > MOST_ROWS
            or not hidden_states.is_cpu
            or hidden_states.dtype not in DTYPES
            or model.training
            or any(one is not None for one in unsupported)
            or getattr(cache, "offloading", False)
            or model.config._attn_implementation not in _ATTENTION_FORMS
            or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward  # a library's own under the same name
            or something_looks_on()
            or _attentions_are_recorded()
            or not (_is_of_rows(mask) and _is_of_rows(cross_mask))
        )
        kernel = _IN_TORCH if refused else select(OP_NAME, hidden_states.device)
        if kernel is not _IN_TORCH:
            rows = hidden_states.shape[0]
            step = DecodingStep(kernel, cache, _rows_of(mask, rows), source, cross, _rows_of(cross_mask, rows))
    if step is None:
        note_reference(OP_NAME)
    return step


def _is_of_rows(mask: Any) -> bool:
    """Return whether a mask is none, or one for a query a row, the same for all heads."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1:3] == (1, 1))


def _rows_of(mask: Tensor | None, count: int) -> Tensor | None:
    if mask is None:
        return None
    rows = mask[:, 0, 0].expand(count, -1)
    if rows.dtype == torch.bool:
        rows = torch.zeros(rows.shape).masked_fill_(~rows, -torch.inf)
    return rows.float().contiguous()


def _attentions_are_recorded() -> bool:
    recorded = output_capturing._active_collector.get()
    return bool(recorded) and any(name != "hidden_states" and name[0] != "_" for name in recorded)


@dataclass(eq=False)
class StackWeights:
    """
    Weights of some layers of a model in the order in which compiled code takes them.

    Args:
        weights (`list[Tensor]`): of each part of each layer.
        settings, settings_behind_source (`list[int]`): of each part its kind, two counts and its settings, in calls
            without a source in front and with one.
        epsilons (`list[float]`): of each norm.
    """

    weights: list[Tensor]
    settings: list[int]
    settings_behind_source: list[int]
    epsilons: list[float]

    @classmethod
    def of_layers(cls, layers: list[LayerWeights]) -> "StackWeights":
        found = cls([], [], [], [])
        for part in (part for layer in layers for part in layer.parts):
            found.weights.extend(part.tensors)
            found.settings.extend(part.numbers(behind_source=False))
            found.settings_behind_source.extend(part.numbers(behind_source=True))
            found.epsilons.extend(part.epsilons)
        return found

    def run(self, ready: Sequence["ReadyLayer"], streams: Sequence[Tensor], step: DecodingStep) -> tuple[Tensor, ...]:
        """Run the layers one after the other over one or two streams, and let the cache hold what they wrote."""
        hidden = tuple(map(_in_floats, streams))
        rooms = [room for one in ready for room in one.rooms]
        sources = [source for one in ready for source in one.sources]
        step.kernel.layers(
            hidden[0], [room.keys for room in rooms], [room.values for room in rooms],
            [state for one in ready for state in one.states], step.mask, self.weights,
            self.settings if step.source is None else self.settings_behind_source, self.epsilons,
            [room.filled for room in rooms], hidden[1] if len(hidden) > 1 else None,
            [source.keys for source in sources], [source.values for source in sources], step.cross_mask,
            [room.buckets for room in rooms if isinstance(room, HashedRoom)],
            [source.buckets for source in sources if source.buckets is not None],
        )  # fmt: skip
        for one in ready:
            one.keep()
        return tuple(after.to(before.dtype) for after, before in zip(hidden, streams, strict=True))


def _in_floats(stream: Tensor) -> Tensor:
    """A contiguous copy in float32."""
    if stream.dtype == torch.float32 and stream.is_contiguous():
        return stream.clone()
    return stream.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class SourceKeys(NamedTuple):
    """
    Keys and values of a source for one attention, which are only read.

    Args:
        held (`Any`): the cache's layer.
        keys, values (`Tensor` of shape `(batch, heads, source, head size)`): what it holds.
        digits ([`KeyDigits`], *optional*): of keys with the digits of their buckets behind them.
        buckets (`Tensor` of shape `(batch, heads, rounds, source)`, *optional*): of those.
    """

    held: Any
    keys: Tensor
    values: Tensor
    digits: KeyDigits | None = None
    buckets: Tensor | None = None

    @classmethod
    def of(cls, cache: Cache, layer_idx: int, rows: int, digits: KeyDigits | None = None) -> "SourceKeys | None":
        """Find those of a cache's layer; `None` where it has none that compiled code reads."""
        held: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        if held is None or not _has_keys_to_read(held) or held.keys.shape[0] not in (1, rows):
            return None
        # Tokens of a head one after the other, whatever lies between heads and rows.
        in_line = all(tensor[:1, :1].is_contiguous() for tensor in (held.keys, held.values))
        if not in_line or (digits is not None and not digits.fit(held.keys)):
            return None
        buckets = None if digits is None else digits.read_once(held).buckets
        return cls(held, held.keys, held.values, digits, buckets)

    def is_current(self) -> bool:
        """Return whether the cache's layer still holds them."""
        if self.held.keys is not self.keys or self.held.values is not self.values:
            return False
        return self.digits is None or self.digits.read_once(self.held).buckets is self.buckets


class ReadyLayer(NamedTuple):
    """
    Arguments of compiled code for one layer beside its weights.

    Args:
        held (`list[Any]`): the cache's layers, one of each attention, of which the first one holds states.
        rooms (`list[KeyRoom]`): of their keys and values, with a place for one more token.
        sources (`list[SourceKeys]`): of each attention behind a source, and of each cross attention.
        state (`Tensor` of shape `(batch, size, 1)`, *optional*): what convolutions saw and recurrences hold, which
            moves on by a token.
        states (`list[Tensor]`): its parts.
        records (`bool`): whether it is a copy which the cache has to be given.
    """

    held: list[Any]
    rooms: list[KeyRoom]
    sources: list[SourceKeys]
    state: Tensor | None
    states: Sequence[Tensor]
    records: bool

    def keep(self) -> None:
        """Let the cache hold what compiled code wrote."""
        for held, room in zip(self.held, self.rooms, strict=True):
            room.show(held)
        if self.records:
            self.held[0].update_conv_state(self.state, conv_kernel_size=1)


class FoundLayer(NamedTuple):
    """
    A layer's weights.

    Args:
        watch ([`ModuleWatch`]): tells whether they still are.
        weights ([`LayerWeights`], *optional*): `None` where the layer has no compiled form.
        alone ([`StackWeights`], *optional*): of this layer.
    """

    watch: ModuleWatch
    weights: LayerWeights | None
    alone: StackWeights | None

    @classmethod
    def of(cls, layer: nn.Module) -> "FoundLayer":
        weights = layer_weights(layer)
        return cls(ModuleWatch.below(layer), weights, None if weights is None else StackWeights.of_layers([weights]))


class LayerDecoder:
    """
    One layer's decoding, with its weights in the order in which compiled code takes them: found once, and kept while
    the layer's modules and parameters are the same objects. Values and dtypes may change. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._found: FoundLayer | None = None

    def __reduce__(self):
        return LayerDecoder, ()

    def __call__(self, layer: nn.Module, streams: Sequence[Tensor], step: DecodingStep) -> tuple[Tensor, ...] | None:
        """
        Args:
            layer (`nn.Module`): the one that this belongs to, with `layer_idx` and `parts`.
            streams (`Sequence[Tensor]`, one or two of shape `(batch, 1, width)`): its input, which stays as it is.
            step ([`DecodingStep`]): of this call of the model.

        Returns:
            `tuple[Tensor, ...]`: of the shapes and dtypes of `streams`; `None`, with nothing changed, where the layer
            has to run as it is written.
        """
        found = self.current(layer)
        weights = None if found is None else found.weights
        ready = None if weights is None else self.prepare(weights, layer, streams[0], step)
        if found is None or found.alone is None or ready is None:
            note_reference(OP_NAME)
            return None
        return found.alone.run([ready], streams, step)

    def forget(self) -> None:
        """Let go of the layer's weights, which are about to be replaced; they are found again when they are needed."""
        self._found = None

    def current(self, layer: nn.Module) -> FoundLayer | None:
        """Find the layer's weights; `None` where it has no compiled form, a module in it trains, or anything listens to
        one of them or stands in the place of its forward pass."""
        found = self._found
        if found is None or found.watch.has_changed():
            # Whole, and then kept: another thread may decode meanwhile.
            found = self._found = FoundLayer.of(layer)
        if found.weights is None or found.watch.is_looked_at() or found.weights.is_refused():
            return None
        return found

    def prepare(
        self, weights: LayerWeights, layer: Any, hidden_states: Tensor, step: DecodingStep
    ) -> ReadyLayer | None:
        """Put together what compiled code needs in a call; `None` where the cache holds nothing to go on from there."""
        sources = self._sources(weights, hidden_states.shape[0], step)
        if sources is None:
            return None
        before = 0 if step.source is None else sources[0].keys.shape[2]
        all_held = [self._held(part.layer_idx, before, hidden_states, step) for part in weights.attentions]
        if not all_held or any(held is None for held in all_held):
            return None
        state, records, sizes = None, False, weights.state_sizes
        if sizes:
            keeper = all_held[0]
            if weights.attentions[0].layer_idx != layer.layer_idx or not keeper.has_previous_state[0]:
                return None
            state, records = keeper.conv_states[0], keeper.record_past
            if state.dtype != torch.float32 or state.shape[1] != sum(sizes) or state.shape[2] == 0:
                return None
            if records or not state.is_contiguous():
                # Of several that assisted decoding recorded the last is the current one.
                state, records = state[..., -1:].clone(memory_format=torch.contiguous_format), True
        rooms = []
        for held, part in zip(all_held, weights.attentions, strict=True):
            dtype = weights.room_dtype(held.keys.dtype, hidden_states.dtype)
            if part.digits is None:
                rooms.append(KeyRoom.of(held, dtype))
            elif part.digits.fit(held.keys):
                rooms.append(HashedRoom.of(held, dtype, part.digits))
            else:
                return None
        return ReadyLayer(all_held, rooms, sources, state, () if state is None else state.split(sizes, 1), records)

    @staticmethod
    def _sources(weights: LayerWeights, rows: int, step: DecodingStep) -> list[SourceKeys] | None:
        """Keys and values of sources in the order of the layer's parts; `None` where some are not there to be read."""
        found = []
        if step.source is not None:
            found += [SourceKeys.of(step.source, part.layer_idx, rows, part.digits) for part in weights.attentions]
        for part in weights.cross_attentions:
            if step.cross is None or not step.cross.is_updated.get(part.layer_idx):
                return None
            source = SourceKeys.of(step.cross.cross_attention_cache, part.layer_idx, rows)
            if source is None or (step.cross_mask is not None and step.cross_mask.shape[1] != source.keys.shape[2]):
                return None
            found.append(source)
        sources = [source for source in found if source is not None]
        return sources if len(sources) == len(found) else None

    @staticmethod
    def _held(layer_idx: int, before: int, hidden_states: Tensor, step: DecodingStep) -> Any:
        """The cache's layer, if it holds tokens that compiled code can go on from, behind `before` of a source."""
        if layer_idx >= len(step.cache.layers):
            return None
        held: Any = step.cache.layers[layer_idx]
        room = KeyRoom.shown_by(held)
        if room is not None:
            rows, tokens = room.rows, room.filled
        elif _has_keys_to_read(held):
            rows, tokens = held.keys.shape[0], held.keys.shape[2]
        else:
            return None
        keys = before + tokens + 1
        fits = rows == hidden_states.shape[0] and (step.mask is None or step.mask.shape[1] == keys)
        return held if fits else None


def _has_keys_to_read(held: Any) -> bool:
    """Return whether a cache's layer holds keys of a kind that compiled code reads."""
    if type(held) not in _CACHE_LAYERS or not held.is_initialized:
        return False
    return held.keys.dim() == 4 and held.keys.dtype in DTYPES and held.keys.is_cpu


__all__ = ["DecodingStep", "LayerDecoder", "ReadyLayer", "SourceKeys", "StackWeights", "decoding_step"]
