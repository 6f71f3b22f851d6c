"""Decoding of all layers of a model in one compiled call, and what holds from one token to the next."""

import weakref
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from .decoding import DecodingStep, LayerDecoder, ReadyLayer, StackWeights
from .decoding_weights import LayerWeights
from .hashed_keys import HashedRoom
from .module_watch import ModuleWatch


_keys, _values = attrgetter("keys"), attrgetter("values")
_shown_keys, _shown_values = attrgetter("shown_keys"), attrgetter("shown_values")
_records = attrgetter("record_past")
_STACK = "_decoding_stack"  # where a cache keeps what the next step may take up


class FoundStack(NamedTuple):
    """
    Weights of all layers of a model.

    Args:
        layers (`list[nn.Module]`): of the model.
        watch ([`ModuleWatch`]): of all of them.
        each (`list[LayerWeights]`): of each layer.
        weights ([`StackWeights`]): of all together.
    """

    layers: list[nn.Module]
    watch: ModuleWatch
    each: list[LayerWeights]
    weights: StackWeights

    @classmethod
    def of(cls, layers: list[Any]) -> "FoundStack | None":
        all_found = [layer.decoder.current(layer) for layer in layers]
        each = [found.weights for found in all_found if found is not None and found.weights is not None]
        if not layers or len(each) < len(layers):
            return None
        watch = ModuleWatch.joined((found.watch for found in all_found), layers)
        return cls(layers, watch, each, StackWeights.of_layers(each))


class ReadyStack:
    """
    The layers of a cache as a step left them, with room for more: where nothing has touched them the next step asks
    none of them again, only whether that is so. A cache holds this; its copies and pickles hold an empty one.

    Args:
        weights ([`StackWeights`], *optional*): of the model, which this does not keep alive.
        layers (`Sequence[ReadyLayer]`): of the cache.
        dtype (`torch.dtype`, *optional*): of the model's hidden states.
    """

    def __init__(
        self,
        weights: StackWeights | None = None,
        layers: Sequence[ReadyLayer] = (),
        dtype: torch.dtype | None = None,
    ):
        self._weights = None if weights is None else weakref.ref(weights)
        self.layers, self.dtype = layers, dtype
        self._held = [held for one in layers for held in one.held]
        self._rooms = [room for one in layers for room in one.rooms]
        self._hashed_rooms = [room for room in self._rooms if isinstance(room, HashedRoom)]
        self._sources = [source for one in layers for source in one.sources]
        self._with_states = [one for one in layers if one.state is not None]

    def __reduce__(self):
        return ReadyStack, ()

    def is_current(self, weights: StackWeights, hidden_states: Tensor, step: DecodingStep) -> bool:
        """Return whether a step may go on from here: of the same model, in a cache whose layers hold what the last one
        left in them, with a place for a token in each."""
        if self._weights is None or self._weights() is not weights or self.dtype != hidden_states.dtype:
            return False
        held, rooms = self._held, self._rooms
        filled = rooms[0].filled
        return (
            rooms[0].rows == hidden_states.shape[0]
            and (step.mask is None or step.mask.shape[1] == self._keys_before(step) + filled + 1)
            and all(room.filled == filled < room.places for room in rooms)
            and _are_same(step.cache.layers, held)
            and all(map(is_, map(_keys, held), map(_shown_keys, rooms)))
            and all(map(is_, map(_values, held), map(_shown_values, rooms)))
            and all(map(HashedRoom.is_unchanged, self._hashed_rooms))
            and (not self._sources or self._sources_are_current(step))
            and (not self._with_states or self._states_are_current())
        )

    def _keys_before(self, step: DecodingStep) -> int:
        return 0 if step.source is None else self._sources[0].keys.shape[2]

    def _sources_are_current(self, step: DecodingStep) -> bool:
        cache = step.source
        if cache is None and step.cross is not None:
            cache = step.cross.cross_attention_cache
            # The cache may have been reset, and hold the keys of the source before until it reads the next one.
            if not all(step.cross.is_updated.values()):
                return False
        if cache is None or not _are_same(cache.layers, [source.held for source in self._sources]):
            return False
        keys = self._sources[0].keys.shape[2]
        fits = step.cross_mask is None or step.cross_mask.shape[1] == keys
        return fits and all(source.is_current() for source in self._sources)

    def _states_are_current(self) -> bool:
        recorded = any(_records(one.held[0]) for one in self._with_states)
        return not recorded and all(one.held[0].conv_states[0] is one.state for one in self._with_states)


class StackDecoder:
    """
    The decoding of all layers of a model in one compiled call. Copies and pickles are empty.

    Args:
        layer_class (`type`): of layers whose forward pass
            [`~hf_efficient.modules.decoding.LayerDecoder`] knows, in their attribute `decoder`.
    """

    def __init__(self, layer_class: type):
        self.layer_class = layer_class
        self._found: FoundStack | None = None

    def __reduce__(self):
        return StackDecoder, (self.layer_class,)

    def __call__(
        self, layers: nn.ModuleList, streams: Sequence[Tensor], step: DecodingStep
    ) -> tuple[Tensor, ...] | None:
        """
        Args:
            layers (`nn.ModuleList`): of the model.
            streams (`Sequence[Tensor]`, one or two of shape `(batch, 1, width)`): input of the first one, which stays
                as it is.
            step ([`DecodingStep`]): of this call of the model.

        Returns:
            `tuple[Tensor, ...]`: what the last layer gives; `None`, with nothing changed, where layers have to be
            called one by one.
        """
        if output_capturing._active_collector.get():
            return None
        modules: list[Any] = list(layers._modules.values())
        found = self._current(modules)
        if found is None:
            return None
        stack = step.cache.__dict__.get(_STACK)
        if stack is None or not stack.is_current(found.weights, streams[0], step):
            ready = []
            for layer, weights in zip(modules, found.each, strict=True):
                one = layer.decoder.prepare(weights, layer, streams[0], step)
                if one is None:
                    return None
                ready.append(one)
            stack = ReadyStack(found.weights, ready, streams[0].dtype)
            step.cache.__dict__[_STACK] = stack
        return found.weights.run(stack.layers, streams, step)

    def forget(self) -> None:
        """Let go of the layers' weights, which are about to be replaced; they are found again when they are needed."""
        self._found = None

    def _current(self, layers: list[Any]) -> FoundStack | None:
        """Find the weights of all layers; `None` where a call of one would be more than its class's forward pass, or it
        cannot run compiled."""
        if not all(map(is_, map(type, layers), repeat(self.layer_class))):
            return None
        found = self._found
        if found is None or not _are_same(layers, found.layers) or found.watch.has_changed():
            found = self._found = FoundStack.of(layers)
        if found is None or found.watch.is_looked_at() or any(weights.is_refused() for weights in found.each):
            return None
        return found


def forget_weights(model: nn.Module) -> None:
    """Let compiled decoding release the weights that it found, before others take their place."""
    for module in model.modules():
        decoder = getattr(module, "decoder", None)
        if isinstance(decoder, (LayerDecoder, StackDecoder)):
            decoder.forget()


def _are_same(found: list[Any], known: list[Any]) -> bool:
    return len(found) == len(known) and all(map(is_, found, known))


__all__ = ["FoundStack", "ReadyStack", "StackDecoder", "forget_weights"]
