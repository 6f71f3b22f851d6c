"""Counter-based random numbers: each is a fixed function of a seed and of where it is used."""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64 bits of `value` as the int64 that torch takes."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift of unsigned numbers; int64 would carry the sign along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014); int64 products wrap as unsigned ones do."""
    for shift, multiplier in _MULTIPLIERS:
        bits = (bits ^ _shift_right(bits, shift)) * multiplier
    return bits ^ _shift_right(bits, 31)


def counter_based_uniforms(
    sample_seeds: Tensor, length: int, count: int, stream: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """
    Uniform random numbers as a fixed function of a row's seed, the position, the index of the draw and `stream`.

    They do not depend on the batch that a row falls into, on the number of processes, on the device or on padding: a
    row of 5 tokens gets the same numbers at `length` 5 and 9, and draw k is the same for every `count`.

    Args:
        sample_seeds (`torch.LongTensor` of shape `(batch,)`):
            One seed per row.
        length (`int`), count (`int`):
            Positions per row and draws per position, each below 2^31.
        stream (`int`):
            Purpose of the numbers; different streams are independent.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            `torch.float64` (multiples of 2^-53) or `torch.float32` (multiples of 2^-24).

    Returns:
        `torch.Tensor` of shape `(batch, length, count)`: numbers in [0, 1) on the device of `sample_seeds`.

    Raises:
        ValueError: if `sample_seeds` is not a vector of int64, or `dtype` is neither of the two.
    """
    if sample_seeds.dim() != 1 or sample_seeds.dtype != torch.int64:
        shape = tuple(sample_seeds.shape)
        raise ValueError(f"`sample_seeds` must be int64 of shape (batch,), not {sample_seeds.dtype} of shape {shape}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float64, not {dtype}.")
    device = sample_seeds.device
    cells = (torch.arange(length, device=device)[:, None] << 32) + torch.arange(count, device=device)
    start = _mix(_mix(sample_seeds + _GOLDEN) + _signed((stream + 1) * 0xD1342543DE82EF95 % (1 << 64)))
    bits = _mix(start[:, None, None] + (cells + 1) * _GOLDEN)
    kept = 53 if dtype == torch.float64 else 24
    return _shift_right(bits, 64 - kept).to(dtype) * 2.0**-kept
