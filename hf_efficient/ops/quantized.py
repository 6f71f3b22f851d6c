"""Weights in integers of 8 and 4 bits: their layout in memory, and what is computed with them, in plain torch.

Rows are quantised along the input, each by itself, so that a row of a matrix or a unit of a sparse feed-forward layer
can be read alone. `int8` has one scale a row; `int4` has one in float16 for each group of 32 numbers. Inputs are
rounded to 8 bits too, one scale for a vector (`int8`) or for each group of it (`int4`), and products are summed as
integers, so that every implementation finds the same sums, whatever instructions it has.

    int8    w[o, i] = codes[o, i] scales[o]                             codes from -127 to 127
    int4    w[o, i] = (codes[o, i] - 8) scales[o, i // 32]              codes from 0 to 15

A group of 32 numbers of `int4` lies in 16 bytes: byte b holds number b in its low four bits and number b + 16 in its
high ones. Rows are filled up to a multiple of 32 with numbers that are 0.
"""

import torch
from torch import Tensor, nn


FORMATS = ("int8", "int4")
GROUP = 32
# A record of a unit begins at a multiple of this many bytes from the first one: a line of the processor's cache.
ALIGNMENT = 64


def padded_width(width: int) -> int:
    """Fill a width up to whole groups."""
    return width + -width % GROUP


def _check_format(kind: str) -> None:
    if kind not in FORMATS:
        raise ValueError(f"A format of quantised weights is one of {', '.join(FORMATS)}, not {kind!r}.")


def _padded(weight: Tensor) -> Tensor:
    # A matrix that lies transposed in memory is not left so: kernels read rows.
    return nn.functional.pad(weight.detach().float(), (0, -weight.shape[-1] % GROUP)).contiguous()


def quantize_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """
    Quantise a matrix row by row.

    Args:
        weight (`Tensor` of shape `(..., width)`): in any floating-point dtype.
        kind (`str`): `"int8"` or `"int4"`.

    Returns:
        `tuple(Tensor, Tensor)`: for `int8` codes `(..., padded width)` in int8 and scales `(...)` in float32; for
        `int4` codes `(..., groups, 16)` in uint8 and scales `(..., groups)` in float16.

    Raises:
        ValueError: for another format, or a weight that is not finite.
    """
    _check_format(kind)
    numbers = _padded(weight)
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError("A weight with inf or NaN cannot be quantised.")
    if kind == "int8":
        scales = numbers.abs().amax(-1) / 127
        codes = (numbers / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().clamp(-127, 127)
        return codes.to(torch.int8), scales
    groups = numbers.unflatten(-1, (-1, GROUP))
    # The number of largest magnitude becomes -8, of which there is one more than of positive codes.
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (extreme / -8).half()
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    codes = (groups * inverse + 8).round().clamp(0, 15).to(torch.uint8)
    return codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4, scales.squeeze(-1)


def dequantize_rows(codes: Tensor, scales: Tensor, width: int) -> Tensor:
    """
    Restore the matrix that codes and scales of [`quantize_rows`] stand for.

    Args:
        codes, scales (`Tensor`): see [`quantize_rows`]; `uint8` codes are `int4`.
        width (`int`): of a row, without what it was filled up with.

    Returns:
        `Tensor` of shape `(..., width)`: in float32.
    """
    if codes.dtype == torch.int8:
        return (codes.float() * scales.float().unsqueeze(-1))[..., :width]
    numbers = torch.cat([codes & 15, codes >> 4], dim=-1).float() - 8
    return (numbers * scales.float().unsqueeze(-1)).flatten(-2)[..., :width]


def record_bytes(width: int, kind: str) -> int:
    """Count the bytes of a unit's record in [`pack_records`]."""
    _check_format(kind)
    padded = padded_width(width)
    size = 2 * (padded + 4) if kind == "int8" else 2 * (padded // 2 + padded // GROUP * 2)
    return size + -size % ALIGNMENT


def pack_records(up: Tensor, down: Tensor, kind: str) -> Tensor:
    """
    Quantise the units of a sparse feed-forward layer, each into one record that is read as one stream.

    A record is `[codes of the up row | codes of the down row | scales of the up row | scales of the down row]`, filled
    up with zeros to a multiple of 64 bytes.

    Args:
        up, down (`Tensor` of shape `(blocks, block size, width)`): both matrices, one row a unit.
        kind (`str`): `"int8"` or `"int4"`.

    Returns:
        `Tensor` of shape `(blocks, block size, record_bytes(width, kind))`: in uint8.
    """
    rows = [quantize_rows(matrix, kind) for matrix in (up, down)]
    codes = [each.flatten(2).view(torch.uint8) for each, _ in rows]
    scales = [each.reshape(*up.shape[:2], -1).view(torch.uint8) for _, each in rows]
    record = torch.cat(codes + scales, dim=-1)
    return nn.functional.pad(record, (0, record_bytes(up.shape[-1], kind) - record.shape[-1])).contiguous()


def unpack_records(records: Tensor, width: int, kind: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """
    Take records of [`pack_records`] apart.

    Args:
        records (`Tensor` of shape `(..., bytes)`): in uint8; records of some units, or of all.
        width (`int`): of a row.
        kind (`str`): `"int8"` or `"int4"`.

    Returns:
        `tuple`: of both rows the codes and scales, as [`dequantize_rows`] takes them.
    """
    _check_format(kind)
    padded = padded_width(width)
    code_bytes, scale_bytes = (padded, 4) if kind == "int8" else (padded // 2, padded // GROUP * 2)
    up, down, up_scales, down_scales, _ = records.split(
        [code_bytes] * 2 + [scale_bytes] * 2 + [records.shape[-1] - 2 * (code_bytes + scale_bytes)], dim=-1
    )
    if kind == "int8":
        scales = [each.contiguous().view(torch.float32).squeeze(-1) for each in (up_scales, down_scales)]
        return (up.view(torch.int8), scales[0]), (down.view(torch.int8), scales[1])
    scales = [each.contiguous().view(torch.float16) for each in (up_scales, down_scales)]
    return (up.unflatten(-1, (-1, GROUP // 2)), scales[0]), (down.unflatten(-1, (-1, GROUP // 2)), scales[1])


def quantize_inputs(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """
    Round inputs to 8 bits, as products with quantised rows take them.

    Args:
        x (`Tensor` of shape `(..., width)`): in any floating-point dtype.
        kind (`str`): the format of the rows: `"int8"` has one scale for a vector, `"int4"` one for each group of 32.

    Returns:
        `tuple(Tensor, Tensor)`: codes `(..., padded width)` in int8, from -127 to 127, rounded half to even, and scales
        in float32, `(...)` or `(..., groups)`: a scale is the largest magnitude / 127.
    """
    _check_format(kind)
    numbers = _padded(x)
    parts = numbers if kind == "int8" else numbers.unflatten(-1, (-1, GROUP))
    most = parts.abs().amax(-1)
    # Multiplied by the inverse, as kernels do it: dividing would round some numbers otherwise.
    inverse = torch.where(most == 0, 0.0, 127 / most)
    codes = (parts * inverse.unsqueeze(-1)).round().to(torch.int8)
    return codes.reshape(numbers.shape), most / 127


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Multiply rounded inputs by quantised rows.

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        codes, scales (`Tensor`): of a matrix `(outputs, width)`, see [`quantize_rows`].
        bias (`Tensor` of shape `(outputs,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(..., outputs)`: in the dtype of `x`.
    """
    if codes.dtype == torch.int8:
        inputs, input_scales = quantize_inputs(x, "int8")
        output = nn.functional.linear(inputs.float(), codes.float()) * input_scales.unsqueeze(-1) * scales
    else:
        inputs, input_scales = quantize_inputs(x, "int4")
        rounded = (inputs.unflatten(-1, (-1, GROUP)).float() * input_scales.unsqueeze(-1)).flatten(-2)
        output = nn.functional.linear(rounded, dequantize_rows(codes, scales, rounded.shape[-1]))
    output = output.to(x.dtype)
    return output if bias is None else output + bias.to(x.dtype)
