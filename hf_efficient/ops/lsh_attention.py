"""Attention among tokens that are hashed alike: self-attention for long input, linear in its length.

Sources: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, arXiv 2001.04451, section 2; as
used in Terraformer: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, and
the authors' code. One vector serves as query and as key, q_i and k_i = q_i / sqrt(mean(q_i^2) + 1e-6) / sqrt(D). A
round hashes q by random directions R to a bucket, argmax [q R, -q R], sorts tokens by bucket and then by position, and
cuts them into chunks; a token sees its own chunk and those beside it, the last chunk beside the first. With K_ir the
keys that token i sees in round r, each counted as often as it is met,

    y_i = sum over r, j in K_ir of p_irj v_j,    p_irj = exp(q_i . k_j - c_ij) / sum over r, j of the same,

which is a softmax of each round, the rounds weighted by their sums of exponentials. c_ij is 1e5 for j = i, so that a
token sees itself where it sees nothing else, and 1e9 for a key that must not be seen.

`lsh_attention_naive.py` states it key by key; `lsh_attention_reference.py` is the fast form in plain torch.
"""

import torch
from torch import Tensor

from .backend import define_custom_op, is_onnx_export, is_transformed, plain_gradients
from .lsh_attention_reference import PIECE_LOGITS, Form, attend, attend_backward, precision_of
from .lsh_decode_reference import decode


OP_NAME = "lsh_attention"
LAYOUTS = ("packed", "original")


def _slices(batch: int, heads: int, count: int):
    """Rows and heads, `count` together where there are so many."""
    if count >= heads:
        rows = count // heads
        yield from ((slice(row, row + rows), slice(None)) for row in range(0, batch, rows))
    else:
        for row in range(batch):
            yield from ((slice(row, row + 1), slice(head, head + count)) for head in range(0, heads, count))


def _parts(query_key: Tensor, mask: Tensor | None, rounds: int, form: Form):
    """Rows, heads and the mask of each head among them, such that their logits fit into one piece."""
    batch, heads, length, _ = query_key.shape
    limit = PIECE_LOGITS.get(query_key.device.type, PIECE_LOGITS["cuda"])
    for rows, some in _slices(batch, heads, max(1, limit // (rounds * length * form.keys))):
        count = len(range(heads)[some])
        yield rows, some, None if mask is None else mask[rows].repeat_interleave(count, 0), limit


def _forward(query_key, value, buckets, mask, dropout_mask, *options) -> tuple[Tensor, Tensor]:
    form = Form(*options)
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    weights = query_key.new_empty(buckets.shape, dtype=precision_of(query_key, mask, form.layout))
    with torch.autocast(query_key.device.type, enabled=False):
        for rows, some, real, limit in _parts(query_key, mask, buckets.shape[2], form):
            query, values, hashed = (tensor[rows, some].flatten(0, 1) for tensor in (query_key, value, buckets))
            found, weight = attend(query, values, hashed, real, dropout_mask, form, limit)
            output[rows, some] = found.view_as(output[rows, some])
            weights[rows, some] = weight.view_as(weights[rows, some])
    return output, weights


def _fake(query_key, value, buckets, mask, dropout_mask, *options) -> tuple[Tensor, Tensor]:
    precision = precision_of(query_key, mask, Form(*options).layout)
    output = torch.empty_like(value, memory_format=torch.contiguous_format)
    return output, query_key.new_empty(buckets.shape, dtype=precision)


def _gradients(gradient, output, weights, query_key, value, buckets, mask, dropout_mask, *options):
    form = Form(*options)
    to_query_key, to_value = _gradients_fake(gradient, output, weights, query_key, value)
    with torch.autocast(query_key.device.type, enabled=False):
        for rows, some, real, limit in _parts(query_key, mask, buckets.shape[2], form):
            arrived, gave, shares, query, values, hashed = (
                tensor[rows, some].flatten(0, 1) for tensor in (gradient, output, weights, query_key, value, buckets)
            )
            found = attend_backward(arrived, gave, shares, query, values, hashed, real, dropout_mask, form, limit)
            for total, part in zip((to_query_key, to_value), found, strict=True):
                total[rows, some] = part.view_as(total[rows, some])
    return to_query_key, to_value


def _gradients_fake(gradient, output, weights, query_key, value, *rest) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(query_key, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
    )


def _plain(query_key, value, buckets, mask, dropout_mask, *options) -> Tensor:
    """The op out of operators that autograd and transforms see through, with all logits at once."""
    batch, heads = query_key.shape[:2]
    real = None if mask is None else mask.repeat_interleave(heads, 0)
    with torch.autocast(query_key.device.type, enabled=False):
        output, _ = attend(
            query_key.flatten(0, 1), value.flatten(0, 1), buckets.flatten(0, 1), real, dropout_mask, Form(*options)
        )
    return output.unflatten(0, (batch, heads))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    query_key, value, buckets, mask, dropout_mask, *ctx.options = inputs
    ctx.save_for_backward(*output, query_key, value, buckets, mask, dropout_mask)


def _backward(ctx, gradient: Tensor | None, _):
    output, weights, *tensors = ctx.saved_tensors
    unused = (None,) * (len(tensors) - 2 + len(ctx.options))
    if gradient is None:
        return None, None, *unused
    if torch.is_grad_enabled() or is_transformed():
        return plain_gradients(_plain, (*tensors, *ctx.options), (gradient,))
    return *_gradients_op(gradient, output, weights, *tensors, *ctx.options), *unused


_ARGUMENTS = (
    "Tensor query_key, Tensor value, Tensor buckets, Tensor? mask, Tensor? dropout_mask, int chunk_length, "
    "int chunks_before, int chunks_after, bool causal, str layout"
)
_gradients_op = define_custom_op(
    f"{OP_NAME}_backward",
    _gradients,
    _gradients_fake,
    schema=f"(Tensor gradient, Tensor output, Tensor weights, {_ARGUMENTS}) -> (Tensor, Tensor)",
)
_op = define_custom_op(
    OP_NAME, _forward, _fake, _setup_context, _backward, schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)


def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    *,
    chunk_length: int,
    chunks_before: int = 1,
    chunks_after: int = 0,
    causal: bool,
    mask: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    layout: str = "packed",
) -> Tensor:
    """
    Attend from each token to those that [`~hf_efficient.ops.lsh_hashing.hash_buckets`] put near it.

    Computed in float32 (float64 for float64 input), under autocast too. Memory beside input and output is that of a few
    chunks' logits and of the rounds of one head, in the backward pass too, which keeps input, output, buckets and one
    number for each token, head and round. Under the transforms of `torch.func`, in an export to ONNX and in a backward
    pass with `create_graph=True` it runs out of plain operators and holds all logits, `chunk_length * (chunks_before +
    1 + chunks_after)` numbers for each token, head and round.

    Args:
        query_key (`Tensor` of shape `(batch, heads, length, head_size)`): q, which serves as key as well.
        value (`Tensor` of shape `(batch, heads, length, value_size)`): v.
        buckets (`Tensor` of shape `(batch, heads, rounds, length)`): integers from
            [`~hf_efficient.ops.lsh_hashing.hash_buckets`]. They have no gradient. Where a forward pass is repeated, in
            recomputation or a reversible backward pass, give those of the first: hashed anew, a vector that is rounded
            differently may fall into another bucket.
        chunk_length (`int`): tokens of a chunk; the text may be shorter.
        chunks_before, chunks_after (`int`, default to 1 and 0): chunks that a token sees besides its own.
        causal (`bool`): let a token see none of those after it.
        mask (`Tensor` of shape `(batch, length)`, *optional*): boolean, `False` at padding, which may stand anywhere.
        dropout_mask (`Tensor` of shape `(chunk_length, keys)`, *optional*): factors of probabilities by the place of
            the query in its chunk and of the key among the `chunk_length * (chunks_before + 1 + chunks_after)` that
            the chunk sees; the same for all chunks, rounds, heads and rows. No gradient.
        layout (`str`, defaults to `"packed"`): how rounds are cut into chunks.

            - `"packed"`: each round by itself, a text's own tokens alone, the last chunk being shorter. A row gives the
              same alone as beside longer ones, wherever its padding stands and whatever that holds, NaN included;
              the output at padding is 0. A text of fewer chunks than a token could see has each seen once.
            - `"original"`: all rounds in one row, so that a chunk may hold the end of one and the beginning of the
              next, the first looking at the end of the last; padding at the end of each round takes places and is
              hidden as keys; its queries attend too. What a row gives depends on the length that it is padded to, and
              padding must be finite. With a mask computed in float64.

    Returns:
        `Tensor` of shape `(batch, heads, length, value_size)`, in the dtype of `value`.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
    """
    _check(query_key, value, buckets, chunk_length, chunks_before, chunks_after, mask, layout)
    keys = chunk_length * (chunks_before + 1 + chunks_after)
    if dropout_mask is not None and dropout_mask.shape != (chunk_length, keys):
        raise ValueError(
            f"dropout_mask must have shape ({chunk_length}, {keys}), chunk_length by the keys that a chunk sees; got "
            f"{tuple(dropout_mask.shape)}."
        )
    options = (chunk_length, chunks_before, chunks_after, causal, layout)
    arguments = (query_key, value, buckets, mask, dropout_mask, *options)
    if is_transformed() or is_onnx_export():
        return _plain(*arguments)
    return _op(*arguments)[0]


def lsh_decode(
    query_key: Tensor,
    keys: Tensor,
    values: Tensor,
    buckets: Tensor,
    *,
    chunk_length: int,
    chunks_before: int = 1,
    mask: Tensor | None = None,
    position: int | Tensor | None = None,
    layout: str = "packed",
    memory_length: int | None = None,
    source: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """
    Attend from new tokens of a text to those held, `rounds * chunk_length * (1 + chunks_before)` at most: tokens that
    share a bucket with the new one in any round come first, then the latest ones. The softmax counts each once.

    Several tokens in one call give what they would give one after the other. It is not what [`lsh_attention`] gives for
    the same token, since chunks of a whole text depend on the tokens that come later. Only the keys and values that are
    attended to are read.

    Args:
        query_key (`Tensor` of shape `(batch, heads, new, head_size)`): q of the new tokens.
        keys (`Tensor` of shape `(batch, heads, slots, head_size)`): q, not normalised, of all tokens, the new ones
            included.
        values (`Tensor` of shape `(batch, heads, slots, value_size)`), buckets (`(batch, heads, rounds, slots)`): of
            all tokens likewise; integers from [`~hf_efficient.ops.lsh_hashing.hash_buckets`].
        chunk_length, chunks_before (`int`): see [`lsh_attention`].
        mask (`Tensor` of shape `(batch, slots)`, *optional*): boolean, `False` at padding, which may hold anything.
            The output of new tokens that are padding is 0.
        position (`int` or integer `Tensor` without dimensions, *optional*): slot of the first new token, where slots
            behind the new tokens are still empty; they may hold anything. By default there are none.
        layout (`str`, defaults to `"packed"`): in the layout `"original"` the new token takes one of the places, and so
            does the slot behind it, which holds zeros and lies in bucket 0 of round 0; both are wasted.
        memory_length (`int`, *optional*): in the layout `"original"`, the slots that there are: a token in the last has
            none behind it. Unlimited by default.
        source (`tuple[Tensor, Tensor]`, *optional*): keys and values of slots before the first of `keys`, which are
            read where they lie. Buckets, mask and position count them too.

    Returns:
        `Tensor` of shape `(batch, heads, new, value_size)`, in the dtype of `values`.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
    """
    all_keys: tuple[Tensor, ...] = (keys,)
    all_values: tuple[Tensor, ...] = (values,)
    if source is None:
        _check(keys, values, buckets, chunk_length, chunks_before, 0, mask, layout)
    else:
        before = source[0].shape[2]
        _check(*source, buckets[..., :before], chunk_length, chunks_before, 0, None, layout)
        _check(keys, values, buckets[..., before:], chunk_length, chunks_before, 0, None, layout)
        all_keys, all_values = (source[0], keys), (source[1], values)
    batch, heads, _, size = keys.shape
    slots = buckets.shape[3]
    new = query_key.shape[2] if query_key.dim() == 4 else 0
    if tuple(query_key.shape) != (batch, heads, new, size) or not 1 <= new <= slots:
        raise ValueError(
            f"query_key must have shape ({batch}, {heads}, 1 to {slots}, {size}) beside keys of shape "
            f"{tuple(keys.shape)}, which hold the new tokens too; got {tuple(query_key.shape)}."
        )
    if isinstance(position, int) and not 0 <= position <= slots - new:
        raise ValueError(f"{new} new tokens from slot {position} do not fit into {slots} slots.")
    first = slots - new if position is None else position
    count = buckets.shape[2] * chunk_length * (1 + chunks_before)
    with torch.autocast(keys.device.type, enabled=False):
        return decode(query_key, all_keys, all_values, buckets, mask, first, count, layout == "packed", memory_length)


def _check(query_key, value, buckets, chunk_length, chunks_before, chunks_after, mask, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}.")
    if chunk_length < 1 or chunks_before < 0 or chunks_after < 0:
        raise ValueError(
            "chunk_length must be at least 1, chunks_before and chunks_after at least 0; got "
            f"{chunk_length}, {chunks_before} and {chunks_after}."
        )
    if query_key.dim() != 4 or query_key.shape[2] == 0:
        raise ValueError(f"Give at least one token, (batch, heads, length, head_size); got {tuple(query_key.shape)}.")
    batch, heads, length, _ = query_key.shape
    if value.dim() != 4 or value.shape[:3] != query_key.shape[:3]:
        shape = tuple(value.shape)
        raise ValueError(f"Values must have shape ({batch}, {heads}, {length}, value_size) as keys have; got {shape}.")
    if not query_key.is_floating_point() or query_key.dtype != value.dtype:
        raise ValueError(f"Keys and values must be of one floating-point dtype, not {query_key.dtype}, {value.dtype}.")
    rounds = buckets.shape[2] if buckets.dim() == 4 else 0
    if tuple(buckets.shape) != (batch, heads, rounds, length) or rounds == 0:
        shape = tuple(buckets.shape)
        raise ValueError(f"buckets must have shape ({batch}, {heads}, rounds, {length}), 1 round or more; got {shape}.")
    if buckets.is_floating_point() or buckets.dtype == torch.bool:
        raise ValueError(f"buckets must be integers, not {buckets.dtype}.")
    if mask is not None and (tuple(mask.shape) != (batch, length) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be boolean of shape ({batch}, {length}); got {mask.dtype}, {tuple(mask.shape)}.")
