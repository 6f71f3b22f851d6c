"""Random numbers of the objectives: uniform draws, fresh or as a fixed function of a row of data."""

from typing import NamedTuple

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64 bits of `value` as the int64 that torch takes."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


class MaskDraws(NamedTuple):
    """The uniform numbers in [0, 1) from which [`~hf_efficient.objectives.masking.mask_tokens`] makes its choices.

    `rounding` has shape `(batch,)`: a row of n candidates gets `floor(probability * n + rounding)` targets.
    The others have shape `(batch, length)`: the candidates with the smallest `order` become targets, `action`
    says what happens to a target, `replacement` which random id it gets.
    """

    rounding: Tensor
    order: Tensor
    action: Tensor
    replacement: Tensor


class SampleSource(NamedTuple):
    """Where an objective takes its samples from: ids, seeds of rows, or a generator, the first of these that is there;
    else torch's global generator."""

    sampled_ids: Tensor | None = None
    draw_seeds: Tensor | None = None
    generator: torch.Generator | None = None


def draw_mask(
    batch: int, length: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> MaskDraws:
    """Fresh draws for a batch of `(batch, length)` tokens from `generator` (torch's global one by
    default)."""
    rounding = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
    cells = torch.rand(3, batch, length, generator=generator, device=device, dtype=torch.float64)
    return MaskDraws(rounding, *cells.unbind(0))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shift of unsigned numbers; int64 would carry the sign along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014); int64 products wrap as unsigned ones do."""
    for shift, multiplier in _MULTIPLIERS:
        bits = (bits ^ _shift_right(bits, shift)) * multiplier
    return bits ^ _shift_right(bits, 31)


def row_uniforms(
    draw_seeds: Tensor, length: int, count: int, stream: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """
    Uniform numbers that are a fixed function of a row's seed, the position, the number of the draw and `stream`.

    So they do not depend on the batch that a row falls into, the number of processes, the device or the padding
    (a row of 5 tokens sees the same numbers at `length` 5 and 9), and draw k is the same whatever `count`.

    Args:
        draw_seeds (`torch.LongTensor` of shape `(batch,)`):
            One number per row, as [`~hf_efficient.objectives.masking.MaskingCollator`] makes them.
        length (`int`), count (`int`):
            Positions per row, and draws per position; below 2^31 each.
        stream (`int`):
            Which use the numbers are for: different streams are independent.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            `torch.float64` (multiples of 2^-53) or `torch.float32` (multiples of 2^-24).

    Returns:
        `torch.Tensor` of shape `(batch, length, count)`: numbers in [0, 1) on the device of `draw_seeds`.

    Raises:
        ValueError: if `draw_seeds` is not a vector of int64, or `dtype` is neither of the two.
    """
    if draw_seeds.dim() != 1 or draw_seeds.dtype != torch.int64:
        shape = tuple(draw_seeds.shape)
        raise ValueError(f"`draw_seeds` must be int64 of shape (batch,), not {draw_seeds.dtype} of shape {shape}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float64, not {dtype}.")
    device = draw_seeds.device
    cells = (torch.arange(length, device=device)[:, None] << 32) + torch.arange(count, device=device)
    start = _mix(_mix(draw_seeds + _GOLDEN) + _signed((stream + 1) * 0xD1342543DE82EF95 % (1 << 64)))
    bits = _mix(start[:, None, None] + (cells + 1) * _GOLDEN)
    kept = 53 if dtype == torch.float64 else 24
    return _shift_right(bits, 64 - kept).to(dtype) * 2.0**-kept
