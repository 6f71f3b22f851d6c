"""Attention among tokens that are hashed alike, with the maps of sparse or dense attention, for texts and for decoding.

Sources: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, arXiv 2001.04451; Jaszczur et al.,
"Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 5, and the authors' code. The
mathematics is in ops/lsh_attention.py.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..ops.lsh_attention import lsh_attention, lsh_decode
from ..ops.lsh_hashing import bucket_factors, draw_rotations, hash_buckets
from ..ops.rerun import Remembered
from .attention import attend_in_parts
from .causal_window import TokenOrder
from .hashed_keys import KeyDigits, forget_buckets
from .sparse_blocks import SparseAttention


class LshAttention(SparseAttention):
    """
    Self-attention by locality-sensitive hashing, in which queries are keys; or, mixed, that for long rows and attention
    to all keys for short ones, so that a model that learned from short texts can go on with long ones.

    With two maps for queries and keys both are averaged. A row's kind is decided by its own length when it is first
    read, padding left out, and kept in decoding. A cache holds keys with the digits of their buckets behind them, so
    that whatever is done to rows and tokens of a cache is done to those as well.

    Args:
        config (`PreTrainedConfig`): see [`SparseAttention`], and has `lsh_chunk_length`, `lsh_rounds`,
            `lsh_eval_rounds`, `lsh_buckets`, `lsh_chunks_before`, `lsh_full_length`, `lsh_layout` and `lsh_seed`.
        layer_idx (`int`): in the cache.
        kind (`str`): `"lsh"` or `"mixed"`.
        max_length (`int`): tokens of the longest text, which the number of buckets is made for.
        chunks_after (`int`, defaults to 0): chunks behind its own that a token sees; none in a causal text.
    """

    def __init__(self, config: Any, layer_idx: int, kind: str, max_length: int, chunks_after: int = 0):
        super().__init__(config, layer_idx)
        self.full_length = config.lsh_full_length if kind == "mixed" else 0
        self.chunk_length, self.chunks_before = config.lsh_chunk_length, config.lsh_chunks_before
        self.chunks_after = chunks_after
        self.rounds = config.lsh_rounds
        self.eval_rounds = config.lsh_eval_rounds or config.lsh_rounds
        self.factors = config.lsh_buckets or bucket_factors(max_length, self.chunk_length)
        # No buffer: those of a model are cast with it, and a rounded direction hashes to other buckets.
        rounds = max(self.rounds, self.eval_rounds)
        self.rotations = draw_rotations(config.lsh_seed, self.head_dim, rounds, self.factors, layer=layer_idx)

    @property
    def layout(self) -> str:
        """The cut of texts into chunks, by the config, where it may be changed."""
        return self.config.lsh_layout

    @property
    def places(self) -> int:
        """Tokens that one attends to in decoding, beside itself."""
        return self.eval_rounds * self.chunk_length * (1 + self.chunks_before)

    def digits(self, rounds: int) -> KeyDigits:
        """The form of keys in a cache, with their buckets in 16 bits where those hold them."""
        fits = math.prod(self.factors) - 1 <= torch.iinfo(torch.int16).max
        return KeyDigits(self.head_dim, rounds, torch.int16 if fits else torch.int32)

    @property
    def key_size(self) -> int:
        """Numbers of a key that a cache holds."""
        return self.digits(self.eval_rounds).key_size

    def _rotations(self, device: torch.device, rounds: int | None = None) -> Tensor:
        if self.rotations.device != device:
            self.rotations = self.rotations.to(device)
        return self.rotations_of(rounds or (self.rounds if self.training else self.eval_rounds))

    def rotations_of(self, rounds: int) -> Tensor:
        """Directions of the first rounds, `(head size, rounds, half of the sum of factors)`."""
        return self.rotations[:, :rounds]

    def _query_key(self, query: Tensor, key: Tensor) -> Tensor:
        shares = self.k_proj is None if self.projections is None else self.projections.key_conv is None
        return query if shares else (query + key) / 2

    def _rows_that_hash(self, query_key: Tensor, real: Tensor | None, lengths: Tensor | None = None) -> Tensor | bool:
        """Find which rows are long enough; one answer where it is the same for all."""
        if not self.full_length:
            return True
        if lengths is None:
            if real is None:
                return query_key.shape[2] > self.full_length
            lengths = real.sum(1)
        rows = lengths > self.full_length
        if torch.compiler.is_compiling():
            return rows
        return bool(rows[0]) if bool((rows == rows[0]).all()) else rows

    def _hash(self, query_key: Tensor, memory: Remembered | None) -> Tensor:
        def make() -> Tensor:
            buckets = hash_buckets(query_key, self._rotations(query_key.device), self.factors)
            return buckets.to(self.digits(buckets.shape[2]).dtype)

        return make() if memory is None else memory.remember("buckets", make)

    def _attend_hashed(self, query_key: Tensor, value: Tensor, buckets: Tensor, real: Tensor | None) -> Tensor:
        dropout_mask = None
        if self.training and self.dropout:
            keys = self.chunk_length * (self.chunks_before + 1 + self.chunks_after)
            # One mask for all chunks, rounds, heads and rows, as in the authors' code.
            dropout_mask = nn.functional.dropout(query_key.new_ones(self.chunk_length, keys), self.dropout)
        output = lsh_attention(
            query_key,
            value,
            buckets,
            chunk_length=self.chunk_length,
            chunks_before=self.chunks_before,
            chunks_after=self.chunks_after,
            causal=self.is_causal,
            mask=real,
            dropout_mask=dropout_mask,
            layout=self.layout,
        )
        return output.transpose(1, 2)

    def attend_alone(
        self,
        query_key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        real: Tensor | None,
        memory: Remembered | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Output `(batch, length, heads, head size)` of a text that is read as a whole."""
        rows = self._rows_that_hash(query_key, real)
        if rows is False:
            return self.attend(query_key, query_key, value, attention_mask, **kwargs)[0]
        buckets = self._hash(query_key, memory)
        if rows is True:
            return self._attend_hashed(query_key, value, buckets, real)
        short = self.attend(query_key, query_key, value, attention_mask, **kwargs)[0]
        return torch.where(rows[:, None, None, None], self._attend_hashed(query_key, value, buckets, real), short)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        state: Tensor | None = None,
        order: TokenOrder | None = None,
        all_states: bool = False,
        source: Any = None,
        real: Tensor | None = None,
        memory: Remembered | None = None,
        lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """
        Args:
            real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding.
            memory (`Remembered`, *optional*): of buckets, for a second run of the same call.
            lengths (`Tensor` of shape `(batch,)`, *optional*): tokens of whole rows that a cache reads in several
                calls. A row's kind is then decided by these, and rows that hash are read as by decoding, from the first
                call on, so that the sizes of calls change nothing.

        The others, and what is returned, are those of [`SparseAttention`]; there are no weights to return.
        """
        first, second = (None, None) if state is None else state.split(self.state_sizes, dim=-1)
        query, key, value, states = self.project(hidden_states, first, order, all_states)
        query_key = self._query_key(query, key)
        if cache is None:
            attended = self.attend_alone(query_key, value, attention_mask, real, memory, **kwargs)
        else:
            attended = self._attend_from_cache(query_key, value, attention_mask, real, cache, source, lengths, **kwargs)
        output, after = self.finish(attended, second, order, all_states)
        return output, None, states + after

    def _attend_from_cache(
        self,
        query_key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        real: Tensor | None,
        cache: Cache,
        source: Any,
        lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        past = int(cache.get_seq_length(self.layer_idx)) if self.layer_idx < len(cache.layers) else 0
        begins = past == 0 and source is None
        rounds, hashes = None, None
        if not begins:
            held: Any = source if source is not None else cache.layers[self.layer_idx]
            rounds, hashes = self._rounds_of(held.keys), held.keys[:, 0, 0, -1]
        buckets = hash_buckets(query_key, self._rotations(query_key.device, rounds), self.factors)
        digits = self.digits(buckets.shape[2])
        if hashes is None:
            rows = self._rows_that_hash(query_key, real, lengths)
            hashes = query_key.new_full((query_key.shape[0],), float(rows)) if isinstance(rows, bool) else rows
        stored, values = cache.update(digits.write(query_key, buckets, hashes, real), value, self.layer_idx)
        if begins:
            forget_buckets(cache.layers[self.layer_idx])  # of a text before, in a cache that was reset
        if begins and lengths is None:
            return self.attend_alone(query_key, value, attention_mask, real, **kwargs)
        hashes = hashes > 0
        parts = [(stored, values)] if source is None else [(source.keys, source.values), (stored, values)]
        keys = [(part[..., : self.head_dim], values) for part, values in parts]

        def to_all() -> Tensor:
            if begins:  # the mask may leave causality to the attention
                return self.attend(query_key, query_key, value, attention_mask, **kwargs)[0]
            return attend_in_parts(self, query_key, keys, attention_mask, self.scaling)[0]

        if not bool(hashes.any()):
            return to_all()
        held_source = None if source is None else keys[0]
        all_buckets, mask = self._buckets_and_tokens(source, stored, digits)
        before = 0 if source is None else source.keys.shape[2]
        found = lsh_decode(
            query_key,
            *keys[-1],
            all_buckets,
            chunk_length=self.chunk_length,
            chunks_before=self.chunks_before,
            mask=mask,
            position=before + past,
            layout=self.layout,
            source=held_source,
        ).transpose(1, 2)
        return found if bool(hashes.all()) else torch.where(hashes[:, None, None, None], found, to_all())

    def _rounds_of(self, keys: Tensor) -> int:
        """Rounds by which the keys that are held were hashed, with which their text goes on: a model may have been in
        evaluation then, and train now."""
        rounds = self.digits(0).rounds_of(keys)
        if rounds is None or rounds > self.rotations.shape[1]:
            most = self.digits(self.rotations.shape[1]).key_size
            raise ValueError(
                f"The cache holds keys of {keys.shape[3]} numbers in layer {self.layer_idx}, where attention by "
                f"hashing keeps {self.head_dim} and the buckets of each round behind them, at most {most} in all; it "
                "was filled by another model, or before the config was changed. Begin with a new cache."
            )
        return rounds

    @staticmethod
    def _buckets_and_tokens(source: Any, stored: Tensor, digits: KeyDigits) -> tuple[Tensor, Tensor | None]:
        """Buckets of all slots, and which are tokens; `None` where all are."""
        parts = [digits.read(stored)]
        if source is None:
            return parts[0].buckets, parts[0].tokens
        parts.insert(0, digits.read_once(source))
        buckets = torch.cat([part.buckets for part in parts], dim=3)
        if all(part.tokens is None for part in parts):
            return buckets, None
        return buckets, buckets[:, 0, 0] >= 0


__all__ = ["LshAttention"]
