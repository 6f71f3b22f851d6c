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

from .backend import is_at_most
from .sparse_ff_reference import ACTIVATIONS, unit_indices


FORMATS = ("int8", "int4")
GROUP = 32
# A record of a unit begins at a multiple of this many bytes from the first one: a line of the processor's cache.
ALIGNMENT = 64
# Matrices are taken in pieces of so many numbers, so that a whole one never stands in memory as floats.
_PIECE = 1 << 22
# Codes that the number of largest magnitude in a group of int4 may get, about: the outer ones are cut off at 8.
_STEPS = (7.0, 7.5, 8.0, 8.5, 9.0)


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
        ValueError: for another format, or a weight that is not finite or, in `int4`, beyond what a scale can say.
    """
    _check_format(kind)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("A weight with inf or NaN cannot be quantised.")
    quantize = _int8_rows if kind == "int8" else _int4_rows
    pieces = weight.reshape(-1, weight.shape[-1]).split(max(1, _PIECE // max(1, weight.shape[-1])))
    codes, scales = (torch.cat(parts) for parts in zip(*(quantize(_padded(piece)) for piece in pieces), strict=True))
    shape = weight.shape[:-1]
    return codes.reshape((*shape, *codes.shape[1:])), scales.reshape((*shape, *scales.shape[1:]))


def _int8_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    scales = numbers.abs().amax(-1) / 127
    codes = (numbers / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def _int4_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Of a few scales for each group the one that is nearest in least squares, fitted to the codes that it gives."""
    groups = numbers.unflatten(-1, (-1, GROUP))
    # The number of largest magnitude becomes about -8, of which there is one more than of positive codes.
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for step in _STEPS:
        codes = _int4_codes(groups, extreme / -step)
        fitted = (groups * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)
        fitted = fitted.half().float()
        if bool(torch.isinf(fitted).any()):
            raise ValueError("A weight beyond 500,000 cannot be quantised to int4: its scale is a number in float16.")
        error = (groups - fitted * _int4_codes(groups, fitted)).square().sum(-1, keepdim=True)
        scales, least = torch.where(error < least, fitted, scales), torch.minimum(error, least)
    codes = (_int4_codes(groups, scales) + 8).to(torch.uint8)
    return codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4, scales.squeeze(-1).half()


def _int4_codes(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups * torch.where(scales == 0, 0.0, 1 / scales)).round().clamp(-8, 7)


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


# Of so many products of two codes a float32 holds any sum exactly.
_EXACT = 1024


def _pieces(tensor: Tensor, numbers: int) -> tuple[Tensor, ...]:
    """Split along the first dimension, each entry of which stands for so many numbers; a compiler gets one piece."""
    return (tensor,) if torch.compiler.is_compiling() else tensor.split(max(1, _PIECE // numbers))


def _rounded(x: Tensor, kind: str) -> Tensor:
    """Rounded inputs: of `int8` the codes, whose scale is put to the sums, of `int4` the numbers they stand for."""
    codes, scales = quantize_inputs(x, kind)
    if kind == "int8":
        return codes.float()
    return (codes.unflatten(-1, (-1, GROUP)).float() * scales.unsqueeze(-1)).flatten(-2)


def _row_products(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Products of what [`_rounded`] gives, `(..., padded width)`, with rows, `(..., rows)` in float32."""
    width = inputs.shape[-1]
    outputs = []
    for piece, piece_scales in zip(_pieces(codes, width), _pieces(scales, width), strict=True):
        if codes.dtype != torch.int8:
            outputs.append(nn.functional.linear(inputs, dequantize_rows(piece, piece_scales, width)))
            continue
        parts = zip(inputs.split(_EXACT, -1), piece.split(_EXACT, -1), strict=True)
        sums = [nn.functional.linear(part, part_codes.float()) for part, part_codes in parts]
        # Each is an integer, and in float64 so is their sum: it is rounded once, as the int32 of a kernel is.
        total = sums[0] if len(sums) == 1 else torch.stack(sums).double().sum(0).float()
        outputs.append(total * piece_scales)
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


def _linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """[`quantized_linear`] in float32, without a bias."""
    kind = "int8" if codes.dtype == torch.int8 else "int4"
    if kind == "int4":
        return _row_products(_rounded(x, kind), codes, scales)
    inputs, input_scales = quantize_inputs(x, kind)
    return _row_products(inputs.float(), codes, scales) * input_scales.unsqueeze(-1)


def _finished(output: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (output if bias is None else output + bias.float()).to(dtype)


def quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Multiply rounded inputs by quantised rows.

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        codes, scales (`Tensor`): of a matrix `(outputs, width)`, see [`quantize_rows`].
        bias (`Tensor` of shape `(outputs,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(..., outputs)`: in the dtype of `x`, rounded to it once.
    """
    return _finished(_linear(x, codes, scales), bias, x.dtype)


def quantized_multiplicative(
    x: Tensor,
    gating: Tensor,
    gating_scales: Tensor,
    projection: Tensor,
    projection_scales: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """
    Apply [`~hf_efficient.ops.multiplicative.multiplicative_dense`] with a quantised gating and projection.

    The input times the gating of a module is rounded to 8 bits for each module.

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        gating, gating_scales (`Tensor` of shape `(modules, padded width)`, `(modules,)`): D in `int8`.
        projection, projection_scales (`Tensor` of shape `(size, padded width)`, `(size,)`): E in `int8`, transposed: a
            row for each output of a module.
        bias (`Tensor` of shape `(modules * size,)`, *optional*): added to the output.

    Returns:
        `Tensor` of shape `(..., modules * size)`: in the dtype of `x`.
    """
    gates = dequantize_rows(gating, gating_scales, x.shape[-1])
    tokens = x.reshape(-1, x.shape[-1]).float()
    pieces = _pieces(tokens, gating.numel())
    outputs = [_linear(piece.unsqueeze(1) * gates, projection, projection_scales).flatten(1) for piece in pieces]
    return _finished(torch.cat(outputs), bias, x.dtype).reshape(*x.shape[:-1], -1)


def quantized_module_conv(
    windows: Tensor, kernel: Tensor, kernel_scales: Tensor, bias: Tensor | None, window: int, width: int
) -> Tensor:
    """
    Apply [`~hf_efficient.ops.multiplicative.conv_over_modules`] with a quantised kernel.

    What a module's outputs see, its image, is rounded to 8 bits for each module.

    Args:
        windows (`Tensor` of shape `(batch, length + window - 1, modules, channels)` or `(batch, length, window,
            modules, channels)`): see there.
        kernel, kernel_scales (`Tensor` of shape `(size, padded window * width * channels)`, `(size,)`): W in `int8`,
            the numbers of a row in the order `(window, width, channels)`, the channels next to each other.
        bias (`Tensor` of shape `(size,)`, *optional*): added to each module.
        window, width (`int`): tokens and modules that an output sees.

    Returns:
        `Tensor` of shape `(batch, length, modules * size)`: in the dtype of `windows`.
    """
    if windows.dim() == 4:
        windows = windows.unfold(1, window, 1).movedim(-1, 2)
    batch, length = windows.shape[:2]
    padded = nn.functional.pad(windows.flatten(0, 1), (0, 0, width // 2, width // 2))
    images = padded.unfold(2, width, 1).permute(0, 2, 1, 4, 3)  # (tokens, modules, window, width, channels)
    pieces = _pieces(images, images.shape[1] * kernel.shape[-1])
    outputs = [_linear(piece.flatten(2), kernel, kernel_scales) for piece in pieces]
    return _finished(torch.cat(outputs), bias, windows.dtype).reshape(batch, length, -1)


def records_format(records: Tensor, width: int) -> str:
    """Tell in which format [`pack_records`] wrote records of units of some width."""
    return next(kind for kind in FORMATS if records.shape[-1] == record_bytes(width, kind))


def quantized_sparse_feed_forward(
    x: Tensor,
    controller_down: Tensor,
    controller_down_scales: Tensor,
    controller_up: Tensor,
    controller_up_scales: Tensor,
    controller_bias: Tensor,
    units: Tensor,
    bias: Tensor | None = None,
    inner_bias: Tensor | None = None,
    *,
    activation: str = "relu",
    multiply_by_controller: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Apply [`~hf_efficient.ops.sparse_ff.sparse_ff`] with quantised units and a quantised controller.

    Input and inner layer of the controller are rounded to 8 bits; a hidden unit is a float, and multiplied as such by
    the codes of its row down.

    Args:
        x (`Tensor` of shape `(..., width)`): input.
        controller_down, controller_down_scales (`Tensor` of shape `(rank, padded width)`, `(rank,)`): in `int8`.
        controller_up, controller_up_scales (`Tensor` of shape `(blocks, block size, padded rank)`, `(blocks, block
            size)`): in `int8`.
        controller_bias (`Tensor` of shape `(blocks, block size)`): in float32.
        units (`Tensor` of shape `(blocks, block size, bytes)`): records of [`pack_records`], of either format.
        bias (`Tensor` of shape `(width,)`, *optional*): added to the output.
        inner_bias (`Tensor` of shape `(blocks, block size)`, *optional*): added to a unit's product with the input.
        activation (`str`, defaults to `"relu"`): one of `relu`, `gelu`, `gelu_new` and `silu`.
        multiply_by_controller (`bool`, defaults to `False`): scale a winner by its probability in its block.

    Returns:
        `tuple(Tensor, Tensor)`: the output, of the shape and dtype of `x`, and the winners, `(..., blocks)`, int32.
    """
    width, (blocks, size) = x.shape[-1], units.shape[:2]
    kind = records_format(units, width)
    tokens = x.reshape(-1, width)
    inner = _linear(tokens, controller_down, controller_down_scales)
    logits = _linear(inner, controller_up.flatten(0, 1), controller_up_scales.flatten())
    logits = logits.unflatten(-1, (blocks, size)) + controller_bias.float()
    winners = logits.argmax(-1)
    chosen = unit_indices(winners, size)
    records = units.flatten(0, 1)
    # As in the float layer: few tokens read their own units alone.
    gathers = is_at_most(4 * len(tokens), size)
    up, down = unpack_records(records[chosen] if gathers else records, width, kind)
    if gathers:
        inputs, input_scales = quantize_inputs(tokens, "int8")
        inputs = inputs.float() if kind == "int8" else _rounded(tokens, kind)
        rows = up[0].double() if kind == "int8" else dequantize_rows(*up, inputs.shape[-1])
        value = torch.bmm(rows, inputs.to(rows.dtype).unsqueeze(-1)).squeeze(-1).float()
        value = value * up[1] * input_scales.unsqueeze(-1) if kind == "int8" else value
    else:
        value = _linear(tokens, *up).gather(1, chosen)
    if inner_bias is not None:
        value = value + inner_bias.float().flatten()[chosen]
    value = ACTIVATIONS[activation](value)
    if multiply_by_controller:
        value = value * logits.softmax(-1).gather(-1, winners.unsqueeze(-1)).squeeze(-1)
    if gathers:
        output = torch.bmm(value.unsqueeze(1), dequantize_rows(*down, width)).squeeze(1)
    else:
        hidden = value.new_zeros(len(tokens), blocks * size).scatter(1, chosen, value)
        output = value.new_zeros(len(tokens), width)
        parts = (_pieces(each, width) for each in (hidden.t(), *down))
        for part, codes, scales in zip(*parts, strict=True):
            output = output + part.t() @ dequantize_rows(codes, scales, width)
    shape = (*x.shape[:-1], blocks)
    return _finished(output, bias, x.dtype).reshape(x.shape), winners.int().reshape(shape)
