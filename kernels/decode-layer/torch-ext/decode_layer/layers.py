"""Ops that take a layer's step of one token a row, in place."""

from collections.abc import Sequence

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
    weights: list[Tensor], settings: list[int], epsilons: list[float], filled: list[int], second: Tensor | None = None,
    source_keys: Sequence[Tensor] = (), source_values: Sequence[Tensor] = (), cross_mask: Tensor | None = None,
    buckets: Sequence[Tensor] = (), source_buckets: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """
    Run parts of layers one after the other: attention, cross attention and feed-forward, in any order.

    What a call costs beside reading weights is paid once: between two layers that stream their weights through the
    caches, an interpreter finds nothing of its own there.

    A part is one of six kinds:

    - 0, [`attention`];
    - 1, [`feed_forward`], which may have a branch of recurrences beside it: a norm of its own, a linear map to a few
      units, SRUs whose highway is scaled by sqrt(3), each with a linear map to a candidate and two gates, and a linear
      map back;
    - 2, [`attention`] whose keys begin with those of a source, which lie elsewhere and are only read;
    - 3, attention to a source alone: norm, a map to queries, attention, and a map of what it gives. A map is absent,
      linear, multiplicative, or a multiplicative layer with a convolution over its modules and the last tokens;
    - 4, [`attention`] by locality-sensitive hashing, and 5, the same behind a source. Queries are keys, the average of
      both maps where there are two, and keys are divided by the root of the mean of their squares. A token attends to
      itself, with 1e5 off its score, and to so many others: to those that share a bucket with it in any round, and to
      the latest of the rest. Behind a key's numbers lie two digits of each round's bucket, 256 times the first and
      the second, all first ones before all second ones; 1 for a token and 0 for padding; and 1 if the row hashes, which
      the first key of all decides. Rows that do not hash attend to all keys as they are.

    With one stream each part adds to what it reads. With two, `(a, b)` becomes `(b, a + part(b))`.

    Args:
        hidden (`Tensor` of shape `(rows, width)`): float32, changed in place; the first stream. In its shape there may
            be dimensions of 1.
        keys, values (`list[Tensor]`): of each part of kind 0, 2, 4 or 5; keys of the latter two have `head size + 2
            rounds + 2` numbers.
        states (`list[Tensor]`): float32, contiguous in each row, moved on by one token: of each part that has some,
            what convolutions see, `(rows, (window - 1) * width)`, for cross attention of queries and of output, and of
            a branch its states, `(rows, layers * units)`.
        mask (`Tensor` of shape `(rows, source + filled + 1)`, *optional*): float32, added to the scores of parts of
            kind 0, which have no source, and 2, and of rows that do not hash.
        weights (`list[Tensor]`): of each part. A branch's follow those of the feed-forward: weight and, of a LayerNorm,
            bias of the norm, and matrix and bias of each linear map. Those of cross attention are the norm's, and of
            both maps, as [`attention`] takes them, the map and then its convolution. Those of hashing begin with
            directions, float32 `(head size, rounds, half of the sum of factors)`; there may be no map of keys.
        settings (`list[int]`): of each part its kind, the numbers of its weights and of its settings, and its settings.
            Those of [`feed_forward`] may end with the number of SRUs; those of cross attention are heads, 1 for a
            LayerNorm and 0 for an RMSNorm, tokens and modules that convolutions see, and of each map the modules, its
            kind, and 1 for a convolution or 0. Those of hashing begin with the number of rounds, that of other tokens
            that one attends to, that of the factors of the number of buckets, and the factors, the first one's digit
            counting least.
        epsilons (`list[float]`): of each norm.
        filled (`list[int]`): number of tokens before this one, of each part of kind 0, 2, 4 or 5.
        second (`Tensor` of the shape of `hidden`, *optional*): float32, the second stream, changed in place.
        source_keys, source_values (`Sequence[Tensor]`): of each part of kind 2, 3 or 5, `(rows or 1, heads, source,
            size)`, each of the dtypes of [`attention`] and contiguous in the last two dimensions.
        cross_mask (`Tensor` of shape `(rows, source)`, *optional*): float32, added to the scores of cross attention.
        buckets (`Sequence[Tensor]`): of each part of kind 4 or 5, `(rows, heads, rounds, capacity)` in int16, buckets
            of the keys that are there, -1 at padding; this token's are written behind them.
        source_buckets (`Sequence[Tensor]`): of each part of kind 5, `(rows or 1, heads, rounds, source)` likewise.

    Raises:
        RuntimeError: if shapes, dtypes or settings do not fit together; says which. Nothing has changed then.
    """
    ops.layers.default(
        hidden, keys, values, states, mask, weights, settings, epsilons, filled, second, list(source_keys),
        list(source_values), cross_mask, list(buckets), list(source_buckets),
    )  # fmt: skip
