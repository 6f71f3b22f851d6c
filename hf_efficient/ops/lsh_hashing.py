"""Locality-sensitive hashing: vectors of similar direction fall into one bucket, more often than others.

Source: Andoni et al., "Practical and Optimal LSH for Angular Distance", NeurIPS 2015, arXiv 1509.02897, as used in
Reformer (Kitaev, Kaiser, Levskaya, ICLR 2020, arXiv 2001.04451, section 2) and the authors' code. A round hashes x by
random directions R to argmax [x R, -x R]. Many buckets are made of several such digits, each with directions of its
own, of which far fewer are drawn than there are buckets.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .counter_rng import counter_based_uniforms


# Of bucket counts up to here a single factor is made, as in the original.
LARGEST_FACTOR = 128
_STREAM = 0x4C5348  # of random numbers, apart from other uses of a seed


def bucket_factors(max_length: int, chunk_length: int) -> list[int]:
    """
    Choose the number of buckets for texts of up to `max_length` tokens: two for each chunk, so that a bucket fills half
    of one; above 128, as a product of two numbers, for which fewer directions are drawn.

    It has to stay the same in training, evaluation and decoding, whatever a text's own length.

    Args:
        max_length (`int`): the most tokens of a text.
        chunk_length (`int`): tokens of a chunk.

    Returns:
        `list[int]`: one or two even factors. The product of two may be less than twice the number of chunks.

    Raises:
        ValueError: if a chunk would be longer than the longest text, or not even one token long.
    """
    if chunk_length < 1:
        raise ValueError(f"A chunk has at least one token; chunk_length is {chunk_length}.")
    if chunk_length > max_length:
        raise ValueError(
            f"Chunks of {chunk_length} tokens are longer than the longest text, of {max_length}: attention would be "
            "over all tokens. Lower chunk_length or take standard attention."
        )
    count = 2 * (max_length // chunk_length)
    if count <= LARGEST_FACTOR:
        return [count]
    first = 2
    while first * first < count:
        first *= 2
    return [first, 2 * (count // (2 * first))]


def _check_factors(factors: Sequence[int]) -> None:
    if not factors or any(factor < 2 or factor % 2 for factor in factors):
        raise ValueError(
            f"The factors of the number of buckets must be even and positive, since a direction and its opposite are "
            f"two buckets; got {list(factors)}."
        )


def draw_rotations(
    seed: int, head_size: int, rounds: int, factors: Sequence[int], heads: int | None = None, layer: int = 0
) -> Tensor:
    """
    Draw random directions that hash vectors, as a fixed function of a seed.

    They are the same on every device and in every release of torch, and round r is the same for every number of
    rounds, so that evaluation with more rounds than training keeps those of training.

    Args:
        seed (`int`): where the numbers come from; 64 bits of it count.
        head_size (`int`): width of the vectors.
        rounds (`int`): number of rounds.
        factors (`Sequence[int]`): factors of the number of buckets, see [`bucket_factors`].
        heads (`int`, *optional*): draw directions of its own for each head.
        layer (`int`, defaults to 0): layers draw directions of their own from one seed.

    Returns:
        `Tensor` of shape `(heads, head_size, rounds, sum(factors) / 2)`, or without `heads` `(head_size, rounds,
        sum(factors) / 2)`: float32 on the CPU, of normal distribution.

    Raises:
        ValueError: if a factor is odd or not positive, or a size is.
    """
    _check_factors(factors)
    for name, size in (("head_size", head_size), ("rounds", rounds), ("heads", 1 if heads is None else heads)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}.")
    shape = (1 if heads is None else heads, head_size, sum(factors) // 2)
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    seeds = torch.tensor([signed], device="cpu")
    uniforms = counter_based_uniforms(seeds, rounds, 2 * math.prod(shape), _STREAM + layer)[0].view(rounds, -1, 2)
    # Box and Muller's transform of two uniform numbers to a normal one.
    normal = (-2.0 * (1.0 - uniforms[..., 0]).log()).sqrt() * (2.0 * math.pi * uniforms[..., 1]).cos()
    rotations = normal.view(rounds, *shape).permute(1, 2, 0, 3).float().contiguous()
    return rotations[0] if heads is None else rotations


def hash_buckets(vectors: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """
    Hash vectors to buckets, so that vectors of similar direction often share one. Computed in float32 (float64 for
    float64 vectors), under autocast too; without a gradient.

    Args:
        vectors (`Tensor` of shape `(batch, heads, length, head_size)`): what to hash.
        rotations (`Tensor` of shape `(head_size, rounds, sum(factors) / 2)`, `(heads, ...)` or `(batch, heads, ...)`):
            random directions, see [`draw_rotations`].
        factors (`Sequence[int]`): factors of the number of buckets. Each has its own slice of the last dimension of
            `rotations`, in their order; the first one's digit counts least.

    Returns:
        `Tensor` of shape `(batch, heads, rounds, length)`: int32, in `[0, prod(factors))` for each round. Padding gets
        some bucket, whatever it holds.

    Raises:
        ValueError: if a factor is odd or not positive, or shapes do not fit together.
    """
    _check_factors(factors)
    if vectors.dim() != 4 or not vectors.is_floating_point():
        shape = tuple(vectors.shape)
        raise ValueError(f"vectors must be floating-point (batch, heads, length, head_size); got {shape}.")
    batch, heads, _, size = vectors.shape
    leading = {3: (), 4: (heads,), 5: (batch, heads)}.get(rotations.dim())
    if leading is None or (*rotations.shape[:-2], rotations.shape[-1]) != (*leading, size, sum(factors) // 2):
        raise ValueError(
            f"rotations must have shape ({size}, rounds, {sum(factors) // 2}), for vectors of shape "
            f"{tuple(vectors.shape)} and factors {list(factors)}, maybe with ({heads},) or ({batch}, {heads}) in "
            f"front; got {tuple(rotations.shape)}."
        )
    rounds = rotations.shape[-2]
    precision = torch.promote_types(vectors.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        rotated = vectors.to(precision) @ rotations.to(vectors.device, precision).flatten(-2)
        rotated = rotated.unflatten(-1, (rounds, -1))
        buckets, stride = torch.zeros(rotated.shape[:-1], dtype=torch.int64, device=vectors.device), 1
        for factor, part in zip(factors, rotated.split([factor // 2 for factor in factors], -1), strict=True):
            largest, smallest = part.max(-1), part.min(-1)
            # The place of the maximum of [part, -part], the first one among equals.
            digit = torch.where(largest.values >= -smallest.values, largest.indices, factor // 2 + smallest.indices)
            buckets, stride = buckets + stride * digit, stride * factor
    return buckets.int().transpose(2, 3).contiguous()
