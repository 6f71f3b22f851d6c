"""Untied position bias: the part of a self-attention logit that depends on positions alone.

Source: Ke, He, Liu, "Rethinking Positional Encoding in Language Pre-training" (TUPE), ICLR 2021, arXiv 2006.15595,
section 3. With a = U^Q p and c = U^K p the projected position vectors of one head of width D, s = 1 / sqrt(2 D) and
b the relative bias (TUPE-R),

    bias[i, j] = s a_i . c_j + b_{j-i}          for i, j >= 1
    bias[i, 0] = theta_2 for i >= 1,  bias[0, j] = theta_1          ([CLS] is untied from positions)
"""

import torch
from torch import Tensor

from .backend import define_custom_op, register_op, runs_as_plain_torch, select


OP_NAME = "untied_position_bias"


def _bucket_starts(num_buckets: int, max_distance: int) -> list[int]:
    """Smallest distance of each bucket after the exact ones. Bucket m of the logarithmic part starts at the least n
    with (n / E)^E >= (max_distance / E)^m, where E distances have a bucket of their own; the comparison is made in
    integers, so that no rounding of a logarithm can move an edge."""
    exact = num_buckets // 4
    starts = []
    for step in range(1, exact):
        distance = max(exact, int(exact * (max_distance / exact) ** (step / exact)) - 1)
        while distance**exact * exact**step < max_distance**step * exact**exact:
            distance += 1
        starts.append(distance)
    return starts


def relative_position_bucket(offsets: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """
    T5's bidirectional buckets of relative positions (Raffel et al. 2020, section 2.1), as TUPE-R uses them.

    Args:
        offsets (`Tensor`): integers of any shape, key position minus query position.
        num_buckets (`int`): number of buckets; one half serves keys to the left, one half keys to the right. A
            multiple of 4.
        max_distance (`int`): distances from here on share the last bucket of their half.

    Returns:
        `Tensor`: bucket indices in `[0, num_buckets)`, shape of `offsets`. Bucket `num_buckets // 2` (a key to the
        right at distance 0) never occurs.
    """
    distance = offsets.abs()
    bucket = distance.clamp(max=num_buckets // 4)
    for start in _bucket_starts(num_buckets, max_distance):
        bucket = bucket + (distance >= start)
    return bucket + (num_buckets // 2) * (offsets > 0)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _toeplitz(relative: Tensor, length: int) -> Tensor:
    """(H, 2T - 1) -> (H, T, T): row i is the window of `relative` that starts at T - 1 - i."""
    if torch.compiler.is_exporting():  # `unfold` would fix the length of an exported program
        places = torch.arange(length, device=relative.device)
        return relative[:, places - places[:, None] + (length - 1)]
    return relative.unfold(-1, length, 1).flip(1)


def _reference(query, key, relative, first_column, first_row, scale: float) -> Tensor:
    dtype = _accumulation_dtype(query.dtype)
    scaled_query, key_t = query.to(dtype) * scale, key.to(dtype).transpose(1, 2)
    if relative is None:
        bias = torch.bmm(scaled_query, key_t)
    else:
        # Contiguous: a table of buckets comes with heads innermost, and (H, T, T) in that order is slow to read.
        bias = torch.baddbmm(_toeplitz(relative.to(dtype).contiguous(), query.shape[1]), scaled_query, key_t)
    if first_column is not None and first_row is not None:
        is_cls = torch.arange(query.shape[1], device=query.device) == 0
        # The row's value comes first: theta_1 also stands at (0, 0).
        theta = torch.where(is_cls[:, None], first_row[:, None, None], first_column[:, None, None])
        bias = torch.where(is_cls | is_cls[:, None], theta.to(dtype), bias)
    return bias.to(query.dtype)


def _in_place(query, key, relative, first_column, first_row, scale: float) -> Tensor:
    """[`_reference`] in one (H, T, T) tensor, whose pages cost more than the sums: for the op, into which neither
    autograd nor a transform sees."""
    if relative is None:
        return _reference(query, key, relative, first_column, first_row, scale)
    dtype = _accumulation_dtype(query.dtype)
    bias = _toeplitz(relative.to(dtype).contiguous(), query.shape[1])
    bias.baddbmm_(query.to(dtype) * scale, key.to(dtype).transpose(1, 2))
    if first_column is not None and first_row is not None:
        bias[:, :, 0] = first_column[:, None]
        bias[:, 0] = first_row[:, None]
    return bias.to(query.dtype)


def _forward(
    query: Tensor,
    key: Tensor,
    relative: Tensor | None,
    first_column: Tensor | None,
    first_row: Tensor | None,
    scale: float,
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        return select(OP_NAME, query.device)(query, key, relative, first_column, first_row, scale)


def _fake(query, key, relative, first_column, first_row, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], query.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    query, key, relative, first_column, _, scale = inputs
    ctx.save_for_backward(query, key)
    ctx.scale = scale
    ctx.has_relative = relative is not None
    ctx.has_reset = first_column is not None


def _sum_diagonals(matrix: Tensor) -> Tensor:
    """(H, T, T) -> (H, 2T - 1): sums over the diagonals j - i = -(T-1) ... T-1.

    Rows are reversed and padded to 2T; read with a row length of 2T - 1 instead, each row slides one place to the
    right of the one above, so that diagonals stand in columns."""
    heads, length, _ = matrix.shape
    padded = torch.nn.functional.pad(matrix.flip(1), (0, length)).reshape(heads, -1)
    return padded[:, : length * (2 * length - 1)].view(heads, length, 2 * length - 1).sum(1)


def _backward(ctx, grad: Tensor):
    """Written by hand: autograd would keep (H, T, T) copies and scatter the relative bias entry by entry."""
    query, key = ctx.saved_tensors
    with torch.autocast(query.device.type, enabled=False):
        return _gradients(ctx, query, key, grad)


def _gradients(ctx, query: Tensor, key: Tensor, grad: Tensor):
    dtype = _accumulation_dtype(query.dtype)
    inner = grad.to(dtype)
    grad_column = grad_row = grad_relative = None
    if ctx.has_reset:
        grad_row = inner[:, 0].sum(-1).to(grad.dtype)
        grad_column = inner[:, 1:, 0].sum(-1).to(grad.dtype)
        inner = torch.nn.functional.pad(inner[:, 1:, 1:], (1, 0, 1, 0))
    if ctx.has_relative:
        grad_relative = _sum_diagonals(inner).to(grad.dtype)
    grad_query = (torch.bmm(inner, key.to(dtype)) * ctx.scale).to(query.dtype)
    grad_key = (torch.bmm(inner.transpose(1, 2), query.to(dtype)) * ctx.scale).to(key.dtype)
    return grad_query, grad_key, grad_relative, grad_column, grad_row, None


register_op(OP_NAME, _in_place)
_custom_op = define_custom_op(OP_NAME, _forward, _fake, _setup_context, _backward)


def untied_position_bias(
    query: Tensor,
    key: Tensor,
    relative: Tensor | None = None,
    first_column: Tensor | None = None,
    first_row: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """
    The bias that untied positions add to the attention logits of every layer and every batch row.

    Sums are taken in float32 (float64 for float64 input) and rounded once to the input's dtype.

    Args:
        query (`Tensor` of shape `(heads, length, head_dim)`): position vectors through U^Q.
        key (`Tensor` of shape `(heads, length, head_dim)`): position vectors through U^K.
        relative (`Tensor` of shape `(heads, 2 * length - 1)`, *optional*): bias by offset `j - i`, from
            `-(length - 1)` to `length - 1`; not scaled.
        first_column (`Tensor` of shape `(heads,)`, *optional*): replaces `bias[:, 1:, 0]` (any token to [CLS]).
        first_row (`Tensor` of shape `(heads,)`, *optional*): replaces `bias[:, 0, :]` ([CLS] to any token). Given
            together with `first_column`, or neither is.
        scale (`float`): factor of the product `query @ key^T`; `1 / sqrt(2 * head_dim)` in the paper.

    Returns:
        `Tensor` of shape `(heads, length, length)`: `[h, i, j]` for query position i and key position j.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    _check(query, key, relative, first_column, first_row)
    if runs_as_plain_torch(OP_NAME) or torch.compiler.is_exporting():
        # An exported program should run where this package is not installed.
        return _reference(query, key, relative, first_column, first_row, scale)
    return _custom_op(query, key, relative, first_column, first_row, scale)


def _check(query, key, relative, first_column, first_row) -> None:
    if query.dim() != 3 or query.shape != key.shape:
        raise ValueError(
            f"query and key must both be (heads, length, head_dim); got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    heads, length, _ = query.shape
    if length == 0:
        raise ValueError("The position bias of length 0 does not exist: give at least one position.")
    if (first_column is None) != (first_row is None):
        raise ValueError("first_column and first_row untie [CLS] together: give both or neither.")
    expected = {
        "key": (key, (heads, length, query.shape[2])),
        "relative": (relative, (heads, 2 * length - 1)),
        "first_column": (first_column, (heads,)),
        "first_row": (first_row, (heads,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}.")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but query is {query.dtype}; give one dtype.")
