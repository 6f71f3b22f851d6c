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
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import output_capturing

from ..ops.backend import may_skip_dispatcher, note_reference, register_op, select
from ..ops.kernel_loader import load_implementation
from .decoding_weights import LayerWeights, layer_weights
from .few_rows import DTYPES, KERNEL, MOST_ROWS, something_looks_on
from .key_room import KeyRoom
from .module_watch import ModuleWatch


OP_NAME = "decode_layer"

_IN_TORCH = SimpleNamespace()  # the layer as it is written
register_op(
    OP_NAME,
    _IN_TORCH,
    {"cpu": partial(load_implementation, KERNEL, ("layers",), "cpu")},
)

_ATTENTION_FORMS = ("eager", "sdpa")
_CACHE_LAYERS = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


class DecodingStep(NamedTuple):
    """
    Things that the layers of a model share in a call that runs compiled.

    Args:
        kernel (`Any`): the compiled code.
        mask (`Tensor` of shape `(batch, keys)`, *optional*): float32, added to the scores.
    """

    kernel: Any
    mask: Tensor | None


def decoding_step(
    model: PreTrainedModel, hidden_states: Tensor, cache: Cache | None, mask: Any, *unsupported: Any
) -> DecodingStep | None:
    """
    Decide whether the layers of a model may run compiled in this call: on a CPU, in evaluation, without gradient,
    compiler or transform, one token a row, a few rows, with a cache that grows.

    Args:
        model (`PreTrainedModel`): the model.
        hidden_states (`Tensor` of shape `(batch, length, width)`): input of the first layer.
        cache (`Cache`, *optional*): keys and values of earlier calls.
        mask: of the scores, as [`~hf_efficient.modules.causal_inputs.scores_mask`] gives it.
        unsupported: padding in the input, documents and the like; anything but `None` says no.

    Returns:
        [`DecodingStep`]: what the layers need, or `None` where they are to run as they are written.
    """
    if torch.compiler.is_compiling():  # before sizes, which a compiler would guard
        return None
    step = None
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
        )
        if not refused:
            step = _step(hidden_states.device, mask)
    if step is None:
        note_reference(OP_NAME)
    return step


def _step(device: torch.device, mask: Any) -> DecodingStep | None:
    rows = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
            return None
        rows = mask[:, 0, 0]
        if rows.dtype == torch.bool:
            rows = torch.zeros(rows.shape).masked_fill_(~rows, -torch.inf)
        rows = rows.float().contiguous()
    kernel = select(OP_NAME, device)
    return None if kernel is _IN_TORCH else DecodingStep(kernel, rows)


def _attentions_are_recorded() -> bool:
    recorded = output_capturing._active_collector.get()
    return bool(recorded) and any(name != "hidden_states" and name[0] != "_" for name in recorded)


@dataclass(eq=False)
class StackWeights:
    """
    Weights of some layers of a model in the order in which compiled code takes them.

    Args:
        weights (`list[Tensor]`): of a layer those of its attention and those of its feed-forward.
        settings (`list[int]`): of a layer four counts and the settings of both.
        epsilons (`list[float]`): two of each layer.
    """

    weights: list[Tensor]
    settings: list[int]
    epsilons: list[float]

    @classmethod
    def of_layers(cls, layers: list[LayerWeights]) -> "StackWeights":
        found = cls([], [], [])
        for one in layers:
            found.weights.extend(one.attention + one.feed_forward)
            found.settings.extend([len(one.attention), len(one.attention_settings)])
            found.settings.extend([len(one.feed_forward), len(one.feed_forward_settings)])
            found.settings.extend(one.attention_settings + one.feed_forward_settings)
            found.epsilons.extend([one.attention_epsilon, one.feed_forward_epsilon])
        return found

    def run(self, ready: Sequence["ReadyLayer"], hidden_states: Tensor, step: DecodingStep) -> Tensor | None:
        """Run the layers one after the other, and let the cache hold what they wrote; `None`, with nothing changed,
        where some have a state and some have none."""
        states = [one.state for one in ready if one.state is not None]
        if states and len(states) != len(ready):
            return None
        if hidden_states.dtype == torch.float32 and hidden_states.is_contiguous():
            hidden = hidden_states.clone()
        else:
            hidden = hidden_states.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        step.kernel.layers(
            hidden, [one.room.keys for one in ready], [one.room.values for one in ready], states, step.mask,
            self.weights, self.settings, self.epsilons, [one.room.filled for one in ready],
        )  # fmt: skip
        for one in ready:
            one.keep()
        return hidden.to(hidden_states.dtype)


class ReadyLayer(NamedTuple):
    """
    Arguments of compiled code for one layer beside its weights.

    Args:
        held (`Any`): the cache's layer.
        room ([`KeyRoom`]): of its keys and values, with a place for one more token.
        state (`Tensor`, *optional*): what convolutions saw, which moves on by a token.
        records (`bool`): whether that is a copy which the cache has to be given.
    """

    held: Any
    room: KeyRoom
    state: Tensor | None
    records: bool

    def keep(self) -> None:
        """Let the cache hold what compiled code wrote."""
        self.room.show(self.held)
        if self.records:
            self.held.update_conv_state(self.state, conv_kernel_size=1)


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

    def __call__(
        self, layer: nn.Module, hidden_states: Tensor, cache: Cache | None, step: DecodingStep
    ) -> Tensor | None:
        """
        Args:
            layer (`nn.Module`): the one that this belongs to, with `layer_idx`.
            hidden_states (`Tensor` of shape `(batch, 1, width)`): its input, which stays as it is.
            cache (`Cache`): whose layer gets this token's key, value and state.
            step ([`DecodingStep`]): of this call of the model.

        Returns:
            `Tensor`: of the shape and dtype of `hidden_states`; `None`, with nothing changed, where the layer has to
            run as it is written.
        """
        found = self.current(layer)
        weights = None if found is None else found.weights
        ready = None if weights is None else self.prepare(weights, layer, hidden_states, cache, step)
        if found is None or found.alone is None or ready is None:
            note_reference(OP_NAME)
            return None
        return found.alone.run([ready], hidden_states, step)

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
        if found.weights is None or found.watch.is_looked_at() or found.weights.is_observed():
            return None
        return found

    def prepare(
        self, weights: LayerWeights, layer: nn.Module, hidden_states: Tensor, cache: Cache | None, step: DecodingStep
    ) -> ReadyLayer | None:
        """Put together what compiled code needs in a call; `None` where the cache holds nothing to go on from there."""
        held = self._held(layer, hidden_states, cache, step)
        if held is None:
            return None
        state, records = None, False
        if weights.state_size:
            if not held.has_previous_state[0] or held.conv_states[0].dtype != torch.float32:
                return None
            state, records = held.conv_states[0], held.record_past
            if records or not state.is_contiguous():
                # Of several that assisted decoding recorded the last is the current one.
                state, records = state[..., -1:].clone(memory_format=torch.contiguous_format), True
        room = KeyRoom.of(held, weights.room_dtype(held.keys.dtype, hidden_states.dtype))
        return ReadyLayer(held, room, state, records)

    @staticmethod
    def _held(layer: Any, hidden_states: Tensor, cache: Any, step: DecodingStep) -> Any:
        """The cache's layer, if it holds tokens that compiled code can go on from."""
        if layer.layer_idx >= len(cache.layers):
            return None
        held = cache.layers[layer.layer_idx]
        room = KeyRoom.shown_by(held)
        if room is not None:
            rows, tokens = room.rows, room.filled
        elif _has_keys_to_read(held):
            rows, tokens = held.keys.shape[0], held.keys.shape[2]
        else:
            return None
        fits = rows == hidden_states.shape[0] and (step.mask is None or step.mask.shape[1] == tokens + 1)
        return held if fits else None


def _has_keys_to_read(held: Any) -> bool:
    """Return whether a cache's layer holds keys of a kind that compiled code reads."""
    if type(held) not in _CACHE_LAYERS or not held.is_initialized:
        return False
    return held.keys.dim() == 4 and held.keys.dtype in DTYPES and held.keys.is_cpu


__all__ = ["DecodingStep", "LayerDecoder", "ReadyLayer", "StackWeights", "decoding_step"]
