"""Buckets of the keys that attention by hashing holds: digits behind each key, and a list that grows with the keys."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .key_room import KeyRoom


_BASE = 256  # of the digits of a bucket's number among a key's numbers, which 16 bits hold exactly
_BUCKETS = "_lsh_buckets"  # where a cache's layer keeps them as integers, and which slots are tokens


class HeldBuckets(NamedTuple):
    """
    Digits and flags that stand behind the numbers of keys.

    Args:
        buckets (`Tensor` of shape `(batch, heads, rounds, slots)`): integers; -1 at padding.
        tokens (`Tensor` of shape `(batch, slots)`, *optional*): `False` at padding; `None` where there is no padding.
    """

    buckets: Tensor
    tokens: Tensor | None


class KeyDigits(NamedTuple):
    """
    Layout of keys with the digits of their buckets behind them: two digits a round, all first ones before all
    second ones, whether it is a token, and whether its row hashes.

    Args:
        head_dim (`int`): numbers of a key itself.
        rounds (`int`): of hashing.
        dtype (`torch.dtype`): of buckets that are read.
    """

    head_dim: int
    rounds: int
    dtype: torch.dtype

    @property
    def key_size(self) -> int:
        return self.head_dim + 2 * self.rounds + 2

    def rounds_of(self, keys: Tensor) -> int | None:
        """Find the rounds by which keys that are held were hashed; `None` where no digits stand behind them."""
        digits = keys.shape[3] - self.head_dim - 2
        return digits // 2 if digits > 0 and digits % 2 == 0 else None

    def fit(self, keys: Tensor) -> bool:
        """Return whether keys that are held have this form, and there is one at least."""
        return keys.shape[3] == self.key_size and keys.shape[2] > 0

    def write(self, query_key: Tensor, buckets: Tensor, hashes: Tensor, real: Tensor | None) -> Tensor:
        """
        Args:
            query_key (`Tensor` of shape `(batch, heads, length, head_dim)`): keys.
            buckets (`Tensor` of shape `(batch, heads, rounds, length)`): of them.
            hashes (`Tensor` of shape `(batch,)` or `(1,)`): which rows hash.
            real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding.

        Returns:
            `Tensor` of shape `(batch, heads, length, key_size)`.
        """
        batch, heads, length, _ = query_key.shape
        digits = torch.stack([buckets // _BASE, buckets % _BASE], dim=2).flatten(2, 3).transpose(2, 3)
        tokens = query_key.new_ones(batch, length) if real is None else real.to(query_key.dtype)
        flags = torch.stack([tokens, hashes.to(query_key.dtype)[:, None].expand(batch, length)], dim=-1)
        flags = flags[:, None].expand(batch, heads, length, 2)
        return torch.cat([query_key, digits.to(query_key.dtype), flags], dim=-1)

    def read(self, keys: Tensor) -> HeldBuckets:
        """Read the buckets of keys that are held."""
        behind = keys[..., self.head_dim : self.head_dim + 2 * self.rounds].int().transpose(2, 3)
        high, low = behind.chunk(2, dim=2)
        buckets = (high * _BASE + low).to(self.dtype).contiguous()
        tokens = keys[:, 0, :, -2] > 0
        if bool(tokens.all()):
            return HeldBuckets(buckets, None)
        return HeldBuckets(buckets.masked_fill(~tokens[:, None, None], -1), tokens)

    def read_once(self, held: Any) -> HeldBuckets:
        """Read the buckets of a cache's layer once, while its keys are the same tensor with the same values."""
        known = held.__dict__.get(_BUCKETS)
        if known is None or known[0] is not held.keys or known[1] != _version(held.keys) or known[2] != self:
            known = held.__dict__[_BUCKETS] = (held.keys, _version(held.keys), self, self.read(held.keys))
        return known[3]


def forget_buckets(held: Any) -> None:
    """Let a cache's layer hold no buckets of a text before."""
    held.__dict__.pop(_BUCKETS, None)


def _version(keys: Tensor) -> int | None:
    """The count of changes in place; there is none in inference mode."""
    return None if keys.is_inference() else keys._version


class HashedRoom(KeyRoom):
    """
    Keys with digits behind them and values, with places ahead, and their buckets beside them.

    Args:
        keys, values, dtype (*optional*): see [`KeyRoom`].
        digits ([`KeyDigits`], *optional*): of the keys.
    """

    def __init__(
        self,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        dtype: torch.dtype | None = None,
        digits: KeyDigits | None = None,
    ):
        super().__init__(keys, values, dtype)
        self.version: int | None = None
        if keys is not None and digits is not None:
            held = digits.read(keys).buckets
            self.buckets = held.new_empty(*held.shape[:3], self.places)
            self.buckets[..., : self.filled] = held

    def __reduce__(self):
        return HashedRoom, ()

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype, digits: KeyDigits | None = None) -> "HashedRoom":
        room = cls.shown_by(layer)
        if isinstance(room, HashedRoom) and room.is_unchanged() and room.fits(dtype):
            return room
        return cls(layer.keys, layer.values, dtype, digits)

    def is_unchanged(self) -> bool:
        """Return whether nothing has written into the keys since the last token, of which the buckets are."""
        return self.version == _version(self.keys)

    def show(self, layer: Any) -> None:
        super().show(layer)
        self.version = _version(self.keys)


__all__ = ["HashedRoom", "HeldBuckets", "KeyDigits", "forget_buckets"]
