"""LSH attention in plain torch, always available.

`ops/lsh_attention.py` has the formulas. Tokens are sorted by bucket and cut into chunks, so that attention is a product
of small dense matrices. Since rounds are weighted by their sums of exponentials, the whole is one softmax over the keys
of all rounds; the backward pass keeps each round's share of it and forms everything else anew, a few heads and chunks
at a time.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


# Logits that are held at once; a CPU's caches hold that many.
PIECE_LOGITS = {"cpu": 2**17, "cuda": 2**26}
PENALTY = 1e9
# A query's own key, 1e5 below the others, is seen where there is no other key.
OWN_PENALTY = 1e5 / PENALTY


class Form(NamedTuple):
    """Options of the attention, which the op takes one by one."""

    chunk_length: int
    chunks_before: int
    chunks_after: int
    causal: bool
    layout: str

    @property
    def windows(self) -> int:
        return self.chunks_before + 1 + self.chunks_after

    @property
    def keys(self) -> int:
        """Places that a query sees in one round."""
        return self.windows * self.chunk_length


class Chunks(NamedTuple):
    """Places of tokens: those of one round of one head (packed), or of all rounds of one head (original), make a group.

    The places of all groups are numbered through, and so are the tokens of all heads.
    """

    tokens: Tensor  # (groups, chunks, chunk length): the token at each place; any where a place is empty
    neighbours: Tensor  # (groups, chunks + windows - 1): chunks in order, with those that the outer ones look at
    positions: Tensor  # (groups, chunks, chunk length): of tokens in their text
    key_positions: Tensor  # (groups, chunks, keys)
    hidden: Tensor | None  # (groups, chunks, keys): 0 at keys that may be seen, else -1 or less
    places: Tensor  # (heads, rounds, length): the place of each token


def precision_of(query_key: Tensor, mask: Tensor | None, layout: str) -> torch.dtype:
    if layout == "original" and mask is not None:  # whose pads see one another through penalties of 1e9
        return torch.float64
    return torch.promote_types(query_key.dtype, torch.float32)


def sort_into_chunks(buckets: Tensor, mask: Tensor | None, form: Form, dtype: torch.dtype) -> Chunks:
    """
    Sort the tokens of each round by bucket, then by position.

    Args:
        buckets (`Tensor` of shape `(heads, rounds, length)`): heads of all rows, one after the other.
        mask (`Tensor` of shape `(heads, length)`, *optional*): `False` at padding.
        dtype (`torch.dtype`): of positions.
    """
    heads, rounds, length = buckets.shape
    device, packed, windows = buckets.device, form.layout == "packed", form.windows
    if mask is not None:
        # The largest of 8 or 16 bits may be a bucket, behind which padding has to come.
        buckets = buckets.to(torch.promote_types(buckets.dtype, torch.int32))
        buckets = buckets.masked_fill(~mask.unsqueeze(1), torch.iinfo(buckets.dtype).max)
    order = torch.sort(buckets, dim=-1, stable=True).indices
    sorted_tokens = order.flatten(0, 1) if packed else order.flatten(1)
    groups, size = sorted_tokens.shape
    filled = torch.full((1, 1), size, device=device)
    if packed and mask is not None:
        filled = mask.sum(-1).repeat_interleave(rounds).unsqueeze(1)
    chunks = -(-size // form.chunk_length)
    used = ((filled + form.chunk_length - 1) // form.chunk_length).clamp(min=1)

    every = torch.arange(chunks * form.chunk_length, device=device)
    empty = (every >= filled).expand(groups, -1)
    tokens = sorted_tokens.gather(1, torch.where(empty, 0, every))
    by_group = torch.arange(groups, device=device).unsqueeze(1)
    looked_at = torch.arange(chunks + windows - 1, device=device) - form.chunks_before
    neighbours = looked_at % used + by_group * chunks

    by_window = (looked_at[:chunks].unsqueeze(1) + torch.arange(windows, device=device)).flatten()
    by_window = (by_window % used + by_group * chunks).flatten()

    def seen(values: Tensor) -> Tensor:
        """(groups, places) -> (groups, chunks, windows, chunk length)"""
        by_chunk = values.reshape(groups * chunks, form.chunk_length).index_select(0, by_window)
        return by_chunk.view(groups, chunks, windows, form.chunk_length)

    positions = key_positions = tokens.to(dtype)
    absent = 4.0 * empty.to(dtype)  # further down than padding that is not yet to be seen either
    if not packed and mask is not None:
        pads = (~mask.gather(1, tokens)).to(dtype)
        absent = absent + pads
        key_positions = key_positions - 0.25 * pads  # a pad is not its own key, but as far in the text as it was
    hidden = None
    may_repeat = packed and (mask is not None or chunks < windows)
    if mask is not None or size % form.chunk_length or may_repeat:
        unseen = seen(absent)
        if packed:  # fewer chunks than windows: each is seen once
            repeats = torch.arange(windows, device=device) >= used
            unseen = unseen.masked_fill(repeats[:, None, :, None], 4.0)
        hidden = -unseen.flatten(2)

    inverse = torch.zeros_like(order).scatter(2, order, torch.arange(length, device=device).expand_as(order))
    firsts = torch.arange(heads * rounds, device=device) * chunks * form.chunk_length
    if not packed:
        firsts = torch.arange(heads, device=device).unsqueeze(1) * chunks * form.chunk_length
        firsts = firsts + torch.arange(rounds, device=device) * length
    head = by_group // rounds if packed else by_group
    return Chunks(
        (tokens + head * length).unflatten(1, (chunks, form.chunk_length)),
        neighbours,
        positions.unflatten(1, (chunks, form.chunk_length)),
        seen(key_positions).flatten(2),
        hidden,
        inverse + firsts.view(heads, rounds, 1),
    )


def normalised_keys(vectors: Tensor) -> Tensor:
    """Vectors of mean square 1, divided by the root of their size."""
    return vectors * key_scale(vectors)


def key_scale(vectors: Tensor) -> Tensor:
    return (vectors.square().mean(-1, keepdim=True) + 1e-6).rsqrt() / math.sqrt(vectors.shape[-1])


def _normalised_keys_backward(gradient: Tensor, vectors: Tensor) -> Tensor:
    scale = key_scale(vectors)
    along = (gradient * vectors).sum(-1, keepdim=True) * scale.square()
    return scale * (gradient - vectors * along)


class _Piece(NamedTuple):
    """Chunks of one group, or all chunks of all groups."""

    groups: slice = slice(None)
    chunks: slice = slice(None)
    is_all: bool = True

    def of(self, values: Tensor) -> Tensor:
        """(groups, chunks, ...) -> (groups times chunks of the piece, ...)"""
        if self.is_all:
            return values.flatten(0, 1)
        return values[self.groups, self.chunks].flatten(0, 1)

    def neighbours(self, at: Chunks, form: Form) -> Tensor:
        """The chunks of the piece and those beside them, `(groups, chunks + windows - 1)`."""
        if self.is_all:
            return at.neighbours
        return at.neighbours[self.groups, self.chunks.start : self.chunks.stop + form.windows - 1]


def _pieces(at: Chunks, form: Form, limit: int | None) -> Iterator[_Piece]:
    groups, chunks, chunk_length = at.tokens.shape
    size = chunk_length * form.keys
    if limit is None or groups * chunks * size <= limit:
        yield _Piece()
        return
    step = max(1, limit // size)
    for group in range(groups):
        for start in range(0, chunks, step):
            yield _Piece(slice(group, group + 1), slice(start, min(start + step, chunks)), False)


def _windows(vectors: Tensor, chunk_tokens: Tensor, form: Form) -> Tensor:
    """Rows of `vectors`, by chunk the columns that its queries see: `(chunks, width, keys)`, a view where it can be."""
    rows = vectors.index_select(0, chunk_tokens.flatten()).view(chunk_tokens.shape[0], -1, vectors.shape[1])
    return rows.unfold(1, form.keys, form.chunk_length).flatten(0, 1)


def _logits(query: Tensor, keys: Tensor, at: Chunks, piece: _Piece, causal: bool) -> Tensor:
    """(chunks, chunk length, width) x (chunks, width, keys) -> (chunks, chunk length, keys)"""
    distance = piece.of(at.positions).unsqueeze(2) - piece.of(at.key_positions).unsqueeze(1)
    penalty = (distance if causal else distance.abs()).sub_(OWN_PENALTY).clamp(-1.0, 0.0)
    if at.hidden is not None:
        penalty = penalty.add_(piece.of(at.hidden).unsqueeze(1))
    return torch.baddbmm(penalty, query, keys, beta=PENALTY)


def attend(
    query_key: Tensor, value: Tensor, buckets: Tensor, mask: Tensor | None, dropout_mask: Tensor | None, form: Form,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Attend within a few heads.

    Args:
        query_key, value (`Tensor` of shape `(heads, length, width)`): heads of all rows, one after the other.
        buckets (`Tensor` of shape `(heads, rounds, length)`), mask (`(heads, length)`): as above.
        limit (`int`, *optional*): logits to hold at once; without it all are, and autograd sees through.

    Returns:
        `tuple(Tensor, Tensor)`: the output, and each round's share of a query's weight, `(heads, rounds, length)`.
    """
    heads, length, _ = query_key.shape
    precision = precision_of(query_key, mask, form.layout)
    query_rows, value_rows = query_key.flatten(0, 1).to(precision), value.flatten(0, 1).to(precision)
    key_rows = normalised_keys(query_rows)
    at = sort_into_chunks(buckets, mask, form, precision)
    chunk_tokens = at.tokens.flatten(0, 1)
    outputs, maxima, shares = [], [], []
    for piece in _pieces(at, form, limit):
        seen = chunk_tokens[piece.neighbours(at, form)]
        query = query_rows.index_select(0, piece.of(at.tokens).flatten()).view(-1, form.chunk_length, key_rows.shape[1])
        logits = _logits(query, _windows(key_rows, seen, form), at, piece, form.causal)
        probabilities = logits.softmax(-1)
        maxima.append(logits.amax(-1).flatten())
        shares.append(probabilities.amax(-1).flatten())  # of the greatest logit: 1 / sum of exp(logit - maximum)
        if dropout_mask is not None:
            probabilities = probabilities * dropout_mask.to(precision)
        outputs.append(torch.bmm(probabilities, _windows(value_rows, seen, form).transpose(1, 2)).flatten(0, 1))
    output, maximum, share = torch.cat(outputs), torch.cat(maxima)[at.places], torch.cat(shares)[at.places]
    weights = (maximum - maximum.amax(1, keepdim=True)).exp() / share
    weights = weights / weights.sum(1, keepdim=True)  # by their own sum: far below 0 a logarithm would be too coarse
    total = value_rows.new_zeros(heads, length, value.shape[-1])
    for places, weight in zip(at.places.unbind(1), weights.unbind(1), strict=True):
        total = total + output.index_select(0, places.flatten()).view_as(total) * weight.unsqueeze(-1)
    if mask is not None and form.layout == "packed":
        total = torch.where(mask.unsqueeze(-1), total, 0.0)
        weights = torch.where(mask.unsqueeze(1), weights, 0.0)
    return total.to(value.dtype), weights


def attend_backward(
    gradient: Tensor, output: Tensor, weights: Tensor, query_key: Tensor, value: Tensor, buckets: Tensor,
    mask: Tensor | None, dropout_mask: Tensor | None, form: Form, limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `query_key` and `value` from that of [`attend`]'s output; `weights` are its second result."""
    width = query_key.shape[-1]
    precision = precision_of(query_key, mask, form.layout)
    query_rows, value_rows = query_key.flatten(0, 1).to(precision), value.flatten(0, 1).to(precision)
    key_rows = normalised_keys(query_rows)
    at = sort_into_chunks(buckets, mask, form, precision)
    chunk_tokens = at.tokens.flatten(0, 1)
    gradient = gradient.to(precision)
    if mask is not None and form.layout == "packed":
        gradient = torch.where(mask.unsqueeze(-1), gradient, 0.0)
        output = torch.where(mask.unsqueeze(-1), output, 0.0)
    mean = (gradient * output.to(precision)).sum(-1).flatten()  # sum of a query's probabilities times their gradients
    gradient_rows = gradient.flatten(0, 1)
    dropout = None if dropout_mask is None else dropout_mask.to(precision)
    share = weights.new_zeros(at.tokens.numel()).scatter_(0, at.places.flatten(), weights.flatten())
    share = share.view_as(at.tokens)  # nothing at places that are empty, in whose stead some token was read

    to_query = query_rows.new_empty(at.tokens.numel(), width)
    to_key = query_rows.new_zeros(len(chunk_tokens), form.chunk_length * width)
    to_value = value_rows.new_zeros(len(chunk_tokens), form.chunk_length * value.shape[-1])
    done = 0
    for piece in _pieces(at, form, limit):
        neighbours = piece.neighbours(at, form)
        seen, tokens, weight = chunk_tokens[neighbours], piece.of(at.tokens), piece.of(share).unsqueeze(-1)
        query = query_rows.index_select(0, tokens.flatten()).view(*tokens.shape, width)
        arriving = gradient_rows.index_select(0, tokens.flatten()).view(*tokens.shape, -1) * weight
        keys, values = _windows(key_rows, seen, form), _windows(value_rows, seen, form)
        probabilities = _logits(query, keys, at, piece, form.causal).softmax(-1)
        dropped = probabilities if dropout is None else probabilities * dropout
        _add_windows(to_value, torch.bmm(dropped.transpose(1, 2), arriving), neighbours, form)
        to_logits = torch.bmm(arriving, values)
        if dropout is not None:
            to_logits = to_logits.mul_(dropout)
        to_logits = to_logits.sub_(mean[tokens].unsqueeze(-1) * weight).mul_(probabilities)
        _add_windows(to_key, torch.bmm(to_logits.transpose(1, 2), query), neighbours, form)
        count = tokens.numel()
        torch.bmm(to_logits, keys.transpose(1, 2), out=to_query[done : done + count].view(*tokens.shape, width))
        done += count
    to_query_rows = _sum_rounds(to_query, at.places)
    to_key_rows = _sum_rounds(to_key.view(-1, width), at.places)
    to_value_rows = _sum_rounds(to_value.view(-1, value.shape[-1]), at.places)
    to_query_rows += _normalised_keys_backward(to_key_rows, query_rows)
    if mask is not None and form.layout == "packed":
        is_pad = ~mask.flatten().unsqueeze(-1)
        to_query_rows.masked_fill_(is_pad, 0.0)
        to_value_rows.masked_fill_(is_pad, 0.0)
    return to_query_rows.view_as(query_key).to(query_key.dtype), to_value_rows.view_as(value).to(value.dtype)


def _add_windows(total: Tensor, part: Tensor, neighbours: Tensor, form: Form) -> None:
    """Add rows of windows, `(chunks, keys, width)`, to the chunks that they were read from."""
    groups, chunks = neighbours.shape[0], neighbours.shape[1] - form.windows + 1
    part = part.view(groups, chunks, form.windows, total.shape[1])
    for window in range(form.windows):
        target = neighbours[:, window : window + chunks].flatten()
        total.index_add_(0, target, part[:, :, window].flatten(0, 1))


def _sum_rounds(by_place: Tensor, places: Tensor) -> Tensor:
    """(places, width) -> (heads times length, width)"""
    first, *others = places.transpose(0, 1).flatten(1).unbind()
    total = by_place.index_select(0, first)
    for place in others:
        total += by_place.index_select(0, place)
    return total
