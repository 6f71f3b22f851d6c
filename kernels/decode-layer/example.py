"""A small example of the ops, against plain products; `kernels/build.py` runs it on what it has built."""

import torch


GROUP = 32


def run(kernel, device):
    """
    Multiply a few tokens and many, and let a sparse feed-forward choose its units.

    Args:
        kernel (`ModuleType`): the loaded package.
        device (`torch.device`): where; the CPU.

    Raises:
        AssertionError: if results are not those of plain products.
    """
    torch.manual_seed(0)
    for tokens in (1, 20):
        x, weight, bias = torch.randn(tokens, 37), torch.randn(5, 37), torch.randn(5)
        close(kernel.linear(x, weight, None, bias), plain_linear(x, weight, None, bias), 1e-5)
        for quantize in (quantize_int8, quantize_int4):
            codes = quantize(weight)
            close(kernel.linear(x, *codes, bias), plain_linear(x, *codes, bias), 1e-5)
        controller_down, controller_up = quantize_int8(torch.randn(7, 37)), quantize_int8(torch.randn(3, 5, 7))
        controller_bias, up, down = torch.randn(3, 5), torch.randn(3, 5, 37), torch.randn(3, 5, 37)
        weights = (*controller_down, *controller_up, controller_bias, pack_int8(up, down))
        y, winners = kernel.sparse_feed_forward(x, *weights)
        expected, chosen = plain_sparse_feed_forward(x, controller_down, controller_up, controller_bias, up, down)
        assert torch.equal(winners, chosen)
        close(y, expected, 1e-5)


def close(found, expected, limit):
    """Compare with float64, by the largest number, or 1."""
    size = expected.abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * size)


def filled(x):
    """Fill the last dimension up to whole groups with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP))


def quantize_int8(weight):
    """Codes and a scale for each row."""
    scales = weight.abs().amax(-1) / 127
    return filled((weight / scales.unsqueeze(-1)).round()).to(torch.int8), scales


def quantize_int4(weight):
    """Packed codes and a scale for each group."""
    groups = filled(weight).unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scales.float().unsqueeze(-1) + 8).round().clamp(0, 15).to(torch.uint8)
    return codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4, scales


def dequantize(codes, scales, width):
    """The matrix that codes stand for, in float64."""
    if codes.dtype == torch.int8:
        return (codes.double() * scales.double().unsqueeze(-1))[..., :width]
    numbers = torch.cat([codes & 15, codes >> 4], -1).double() - 8
    return (numbers * scales.double().unsqueeze(-1)).flatten(-2)[..., :width]


def rounded(x, grouped):
    """Inputs rounded to 8 bits, by groups for int4, in float64."""
    parts = filled(x).unflatten(-1, (-1, GROUP)) if grouped else filled(x).unsqueeze(-2)
    most = parts.abs().amax(-1, keepdim=True)
    codes = (parts * torch.where(most == 0, 0.0, most.reciprocal() * 127)).round().double()
    return (codes * (most / 127).double()).flatten(-2)[..., : x.shape[-1]]


def plain_linear(x, weight, scales=None, bias=None):
    """The product with a matrix of any format, in float64."""
    inputs, matrix = x.double(), weight
    if scales is not None:
        inputs, matrix = rounded(x, weight.dtype == torch.uint8), dequantize(weight, scales, x.shape[-1])
    return torch.nn.functional.linear(inputs, matrix.double(), None if bias is None else bias.double())


def pack_int8(up, down):
    """One record a unit: codes of both rows, then their scales."""
    rows = [quantize_int8(matrix) for matrix in (up, down)]
    parts = [codes.view(torch.uint8) for codes, _ in rows]
    record = torch.cat(parts + [scales.unsqueeze(-1).view(torch.uint8) for _, scales in rows], -1)
    return torch.nn.functional.pad(record, (0, -record.shape[-1] % 64)).contiguous()


def plain_sparse_feed_forward(x, controller_down, controller_up, controller_bias, up, down):
    """The units of each block that win, in int8 and with ReLU, token by token."""
    hidden = plain_linear(x, *controller_down).float()
    logits = plain_linear(hidden, controller_up[0].flatten(0, 1), controller_up[1].flatten())
    logits = logits.unflatten(-1, controller_bias.shape) + controller_bias
    winners = logits.argmax(-1)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, units in enumerate(winners.tolist()):
        for block, unit in enumerate(units):
            value = plain_linear(x[token : token + 1], *quantize_int8(up[block, unit : unit + 1])).item()
            y[token] += max(value, 0.0) * dequantize(*quantize_int8(down[block, unit]), x.shape[-1])
    return y, winners.int()
