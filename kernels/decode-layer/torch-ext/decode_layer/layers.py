"""Ops that take a layer's step of one token a row, in place."""

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops


torch.library.register_fake(add_op_namespace_prefix("attention"), lambda *arguments: None)
torch.library.register_fake(add_op_namespace_prefix("feed_forward"), lambda *arguments: None)
torch.library.register_fake(add_op_namespace_prefix("layers"), lambda *arguments: None)


def attention(
    hidden: Tensor, keys: Tensor, values: Tensor, state: Tensor | None, mask: Tensor | None, weights: list[Tensor],
    settings: list[int], epsilon: float, filled: int,
) -> None:  # fmt: skip
    """
    Add to each row what a layer's attention gives for one more token: norm, projections, attention over the tokens
    before and this one, and the output projection.

    Projections are dense or multiplicative; or one multiplicative layer is shared, and queries, keys and values are
    convolutions over the last tokens and the modules of what it gives. Matrices may have any format of the package,
    each its own; gating and projection of a multiplicative layer are both in floating point or both in int8, and a
    convolution is in floating point or int8. Keys and values are read only as far as they are filled.

    Args:
        hidden (`Tensor` of shape `(rows, width)`): float32, changed in place. In its shape, and that of `state`, there
            may be dimensions of 1.
        keys, values (`Tensor` of shape `(rows, heads, capacity, head size)`): both float32, bfloat16 or float16,
            contiguous in the last two dimensions; this token's are written behind the first `filled`, in float16
            finite numbers beyond 65,504 as that one.
        state (`Tensor` of shape `(rows, (window - 1) * width)`, *optional*): float32, what convolutions see of the
            tokens before; moved on by one token.
        mask (`Tensor` of shape `(rows, filled + 1)`, *optional*): float32, added to the scores.
        weights (`list[Tensor]`): weight and, of a LayerNorm, bias of the norm; then of each projection the matrix, or
            gating and projection, and the bias, if it has one; scales follow their codes. The order is query, key,
            value, output; or shared, convolutions of query, key and value, output.
        settings (`list[int]`): heads; 1 for a LayerNorm and 0 for an RMSNorm; tokens and modules that convolutions see;
            modules of multiplicative layers; and the kind of each of the 4 or 5 projections: 0 for none, 1 for a
            matrix, 3 for a multiplicative layer, one more with a bias; of a convolution 1.
        epsilon (`float`): of the norm.
        filled (`int`): number of tokens before this one.

    Raises:
        RuntimeError: if shapes, dtypes or settings do not fit together; says which. Nothing has changed then.
    """
    ops.attention.default(hidden, keys, values, state, mask, weights, settings, epsilon, filled)


def feed_forward(hidden: Tensor, weights: list[Tensor], settings: list[int], epsilon: float) -> None:
    """
    Add to each row what a feed-forward layer, dense or sparse, makes of its norm.

    Matrices may have any format of the package, each its own. Of units that the activation makes 0 the second row is
    not read.

    Args:
        hidden (`Tensor` of shape `(rows, width)`): float32, changed in place. In its shape there may be further
            dimensions.
        weights (`list[Tensor]`): weight and, of a LayerNorm, bias of the norm; then, scales following their codes, of a
            dense layer the first matrix, `(units, width)`, its bias, the second one, `(width, units)`, and the bias. Of
            a sparse layer both matrices and the bias of the controller, as [`sparse_feed_forward`] takes them; in
            floating point both matrices of the units, `(blocks, units, width)`, else their records; and the bias and
            the inner bias. Biases of the layer are there where `settings` says so.
        settings (`list[int]`): 1 for a LayerNorm and 0 for an RMSNorm; 1 for a sparse layer; the activation, 0 to 3 for
            ReLU, GELU, GELU by tanh and SiLU; 1 to multiply by the winner's probability; 1 for a bias; and 1 for an
            inner bias.
        epsilon (`float`): of the norm.

    Raises:
        RuntimeError: if shapes, dtypes or settings do not fit together; says which. Nothing has changed then.
    """
    ops.feed_forward.default(hidden, weights, settings, epsilon)


def layers(
    hidden: Tensor, keys: list[Tensor], values: list[Tensor], states: list[Tensor], mask: Tensor | None,
    weights: list[Tensor], settings: list[int], epsilons: list[float], filled: list[int],
) -> None:  # fmt: skip
    """
    Run [`attention`] and then [`feed_forward`] of one layer after the other.

    What a call costs beside reading weights is paid once: between two layers that stream their weights through the
    caches, an interpreter finds nothing of its own there.

    Args:
        hidden (`Tensor` of shape `(rows, width)`): float32, changed in place.
        keys, values (`list[Tensor]`): of each layer.
        states (`list[Tensor]`): of each layer, or none.
        mask (`Tensor` of shape `(rows, filled + 1)`, *optional*): float32, added to the scores of each layer.
        weights (`list[Tensor]`): of a layer those of its attention and those of its feed-forward, and then the next's.
        settings (`list[int]`): of each layer four counts, of its attention's weights and settings and of its
            feed-forward's, and then both settings.
        epsilons (`list[float]`): two of each layer.
        filled (`list[int]`): number of tokens before this one, of each layer.

    Raises:
        RuntimeError: if shapes, dtypes or settings do not fit together; says which. Nothing has changed then.
    """
    ops.layers.default(hidden, keys, values, states, mask, weights, settings, epsilons, filled)
