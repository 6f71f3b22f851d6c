"""Keys and values of a cache's layer, in room that is allocated ahead: a token costs no copy of those before it."""

from typing import Any

import torch
from torch import Tensor

from .causal_inputs import DECODING_ROOM


_LEAST_PLACES = 64


class KeyRoom:
    """
    Keys and values of a layer with places ahead for tokens to come.

    What a cache's layer shows of it nobody overwrites: a token is written behind that, and only while the layer holds
    what this room showed last. After a crop, a change of rows or a copy of the cache that is no longer so, and keys and
    values move to a new room.

    Args:
        keys, values (`Tensor` of shape `(batch, heads, tokens, head size)`, *optional*): what the room begins with.
        dtype (`torch.dtype`, *optional*): of the room.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, dtype: torch.dtype | None = None):
        self.rows = self.filled = self.places = 0
        self.shown_keys: Tensor | None = None
        self.shown_values: Tensor | None = None
        if keys is not None and values is not None:
            self.rows, self.filled = keys.shape[0], keys.shape[2]
            self.places = max(_LEAST_PLACES, 2 * self.filled)
            self.keys, self.values = (self._with_places(old, dtype) for old in (keys, values))

    def _with_places(self, old: Tensor, dtype: torch.dtype | None) -> Tensor:
        room = torch.empty(*old.shape[:2], self.places, old.shape[3], dtype=dtype)
        if dtype == torch.float16 and old.dtype != dtype:
            # As compiled code writes them: finite stays finite, since an infinite key makes NaN of what attends to it.
            most = torch.finfo(dtype).max
            old = old.where(old.isinf(), old.clamp(-most, most))
        room[:, :, : self.filled].copy_(old)
        return room

    def __reduce__(self):
        # A copy of a cache holds what its layers show; the places ahead belong to one of both.
        return KeyRoom, ()

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> "KeyRoom":
        """The room of a cache's layer, in `dtype`, with a place for one more token."""
        room = cls.shown_by(layer)
        if room is not None and room.fits(dtype):
            return room
        return cls(layer.keys, layer.values, dtype)

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether there is a place for one more token, in `dtype`."""
        return self.filled < self.places and self.keys.dtype == dtype

    @classmethod
    def shown_by(cls, layer: Any) -> "KeyRoom | None":
        """The room of which a cache's layer holds what it showed last, and nothing else."""
        room = layer.__dict__.get(DECODING_ROOM)
        if room is None or room.shown_keys is None:
            return None
        return room if layer.keys is room.shown_keys and layer.values is room.shown_values else None

    def show(self, layer: Any) -> None:
        """Let a cache's layer hold one token more, which was written."""
        self.filled += 1
        layer.keys = self.shown_keys = self.keys.narrow(2, 0, self.filled)
        layer.values = self.shown_values = self.values.narrow(2, 0, self.filled)
        layer.__dict__[DECODING_ROOM] = self
