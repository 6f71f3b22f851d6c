"""Weights of 8 and 4 bits: what the formats hold, and products with them, against loops and float layers."""

import pytest
import torch

from hf_efficient.ops.multiplicative import conv_over_modules, multiplicative_dense
from hf_efficient.ops.quantized import (
    dequantize_rows,
    pack_records,
    padded_width,
    quantize_inputs,
    quantize_rows,
    quantized_linear,
    quantized_module_conv,
    quantized_multiplicative,
    quantized_sparse_feed_forward,
    record_bytes,
    records_format,
    unpack_records,
)
from hf_efficient.ops.sparse_ff import sparse_ff
from tests.helpers.comparison import assert_close, assert_equal, relative_error


KINDS = ("int8", "int4")
WIDTHS = (1, 5, 33, 500)
# Largest relative error of what is restored from codes of normal numbers.
ERROR = {"int8": 0.012, "int4": 0.12}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_come_back(kind, width):
    weight = torch.randn(3, 7, width)
    codes, scales = quantize_rows(weight, kind)
    restored = dequantize_rows(codes, scales, width)
    assert restored.shape == weight.shape
    assert restored.dtype == torch.float32
    assert relative_error(restored, weight) < ERROR[kind]
    for row in range(7):  # each by itself
        assert_equal("row", quantize_rows(weight[1, row], kind), (codes[1, row], scales[1, row]))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_huge_and_tiny_numbers(kind):
    weight = torch.tensor([[0.0] * 5, [1e4, -2e4, 0.0, 5e3, 1e4], [1e-4, -2e-4, 0.0, 5e-5, 1e-4]])
    restored = dequantize_rows(*quantize_rows(weight, kind), 5)
    assert_equal("zeros", restored[0], weight[0])
    for row in (1, 2):
        assert relative_error(restored[row] / weight[row].abs().amax(), weight[row] / weight[row].abs().amax()) < 0.12


def test_places_of_int4_codes():
    """Byte b of a group holds number b in its low four bits and number b + 16 in its high ones."""
    weight = torch.arange(-8, 8).float().repeat_interleave(2).view(1, 32)
    codes, scales = quantize_rows(weight, "int4")
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[[place // 2 | (place // 2 + 8) << 4 for place in range(16)]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="inf or NaN"):
        quantize_rows(torch.tensor([[1.0, bad]]), "int8")


def test_weights_beyond_a_scale_in_float16_are_refused():
    assert quantize_rows(torch.full((1, 5), 4e5), "int4")[1].isfinite().all()
    with pytest.raises(ValueError, match="beyond 500,000"):
        quantize_rows(torch.tensor([[1.0, 1e6]]), "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_denormal_rows_are_zeros_or_nearly_what_they_were(kind):
    weight = torch.tensor([[1e-40, -3e-41, 0.0], [1.0, 0.5, -1.0]])
    restored = dequantize_rows(*quantize_rows(weight, kind), 3)
    assert (restored[0] - weight[0]).abs().max() < 1e-38
    assert (restored[1] - weight[1]).abs().max() < 0.1


def test_scales_of_int4_are_least_squares():
    """No scale near the one that was found, in steps of a per cent, is better by more than its grid explains."""
    weight = torch.randn(200, 32)
    codes, scales = quantize_rows(weight, "int4")
    error = (dequantize_rows(codes, scales, 32) - weight).square().sum(-1)
    plain = weight.gather(-1, weight.abs().argmax(-1, keepdim=True)) / -8
    best = torch.full_like(error, torch.inf)
    for factor in torch.arange(0.8, 1.4, 0.01):
        nearest = (weight / (plain * factor)).round().clamp(-8, 7) * plain * factor
        best = torch.minimum(best, (nearest - weight).square().sum(-1))
    assert error.sum() < 1.05 * best.sum()
    rounded = (weight / plain).round().clamp(-8, 7) * plain
    assert error.sum() < 0.92 * (rounded - weight).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_quantised_in_pieces(kind, monkeypatch):
    weight = torch.randn(3, 5, 33)
    whole = quantize_rows(weight, kind)
    monkeypatch.setattr("hf_efficient.ops.quantized._PIECE", 100)
    assert_equal("pieces", quantize_rows(weight, kind), whole)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="int8, int4, not 'int3'"):
        quantize_rows(torch.ones(1, 1), "int3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_records_hold_both_rows_and_are_told_apart(kind, width):
    up, down = torch.randn(2, 2, 3, width)
    records = pack_records(up, down, kind)
    assert records.shape == (2, 3, record_bytes(width, kind))
    assert records.shape[-1] % 64 == 0
    assert records.is_contiguous()
    assert records_format(records, width) == kind
    for matrix, found in zip((up, down), unpack_records(records, width, kind), strict=True):
        assert_equal("rows", found[1].flatten(), quantize_rows(matrix, kind)[1].flatten())
        assert_equal("codes", dequantize_rows(*found, width), dequantize_rows(*quantize_rows(matrix, kind), width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_inputs_are_rounded_half_to_even(width, dtype):
    x = torch.randn(2, 63, width, dtype=dtype)
    x[0, 0] = 0.0
    for kind in KINDS:
        codes, scales = quantize_inputs(x, kind)
        assert codes.shape == (2, 63, padded_width(width))
        assert codes.dtype == torch.int8
        parts = codes.unflatten(-1, (scales.shape[-1] if kind == "int4" else 1, -1)).float()
        restored = (parts * scales.reshape(2, 63, -1, 1)).flatten(-2)[..., :width]
        assert_close("inputs", restored, x.float(), 0.02 if dtype == torch.float32 else 0.03)
    assert quantize_inputs(torch.tensor([127.0, 0.5, 1.5, -2.5]), "int8")[0][:4].tolist() == [127, 0, 2, -2]


def linear_by_hand(x, codes, scales, width):
    """Sums of integers in int64, row by row."""
    kind = "int8" if codes.dtype == torch.int8 else "int4"
    inputs, input_scales = quantize_inputs(x, kind)
    if kind == "int8":
        sums = torch.einsum("ti,oi->to", inputs.long(), codes.long()).float()
        return sums * scales * input_scales.unsqueeze(-1)
    numbers = torch.cat([codes & 15, codes >> 4], dim=-1).long() - 8
    sums = torch.einsum("tgi,ogi->tog", inputs.unflatten(-1, (-1, 32)).long(), numbers).double()
    return (sums * scales.double() * input_scales.double().unsqueeze(1)).sum(-1).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "tokens"), [(5, 1), (33, 63), (500, 2), (2500, 3)])
def test_linear_sums_integers(kind, width, tokens):
    x, weight, bias = torch.randn(tokens, width), torch.randn(9, width), torch.randn(9)
    codes, scales = quantize_rows(weight, kind)
    output = quantized_linear(x, codes, scales, bias)
    assert_close("by hand", output, linear_by_hand(x, codes, scales, width) + bias, 1e-6)
    if kind == "int8":  # nothing is summed but integers
        assert_equal("integers", quantized_linear(x, codes, scales), linear_by_hand(x, codes, scales, width))
    assert relative_error(output, x @ weight.T + bias) < 1.5 * ERROR[kind]


def test_sums_beyond_what_a_float_holds_are_those_of_integers():
    """All codes 127 over a width of 20,000: sums beyond 2^24, which float32 does not hold one by one."""
    codes = torch.full((2, 20000), 127, dtype=torch.int8)
    codes[1, ::3] = 126
    x = torch.ones(1, 20000)
    assert_equal("sums", quantized_linear(x, codes, torch.ones(2)), linear_by_hand(x, codes, torch.ones(2), 20000))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_rounds_to_16_bits_once(kind):
    x, bias = torch.randn(4, 33, dtype=torch.bfloat16), torch.randn(6, dtype=torch.bfloat16)
    codes, scales = quantize_rows(torch.randn(6, 33), kind)
    output = quantized_linear(x, codes, scales, bias)
    assert_equal("bf16", output, quantized_linear(x.float(), codes, scales, bias.float()).bfloat16())


def test_matrices_are_multiplied_in_pieces(monkeypatch):
    x, weight = torch.randn(3, 33), torch.randn(50, 33)
    for kind in KINDS:
        whole = quantized_linear(x, *quantize_rows(weight, kind))
        with monkeypatch.context() as patched:
            patched.setattr("hf_efficient.ops.quantized._PIECE", 7 * 64)
            assert_close(kind, quantized_linear(x, *quantize_rows(weight, kind)), whole, 1e-6)


@pytest.mark.parametrize(("width", "modules", "size"), [(5, 1, 5), (33, 3, 11), (500, 4, 7)])
@pytest.mark.parametrize("length", [1, 63])
def test_multiplicative(width, modules, size, length, monkeypatch):
    x = torch.randn(2, length, width)
    gating, projection, bias = torch.randn(modules, width), torch.randn(width, size), torch.randn(modules * size)
    gating_rows, rows = quantize_rows(gating, "int8"), quantize_rows(projection.t(), "int8")
    output = quantized_multiplicative(x, *gating_rows, *rows, bias)
    # Module by module: a rounded input of each, and rows of integers.
    gates = dequantize_rows(*gating_rows, width)
    by_hand = [linear_by_hand((x * gate).flatten(0, 1), *rows, width) for gate in gates]
    assert_close("by hand", output, torch.cat(by_hand, -1).view(2, length, -1) + bias, 1e-6)
    assert relative_error(output, multiplicative_dense(x, gating, projection, bias)) < 0.03
    monkeypatch.setattr("hf_efficient.ops.quantized._PIECE", 64)
    assert_close("pieces", quantized_multiplicative(x, *gating_rows, *rows, bias), output, 1e-6)


@pytest.mark.parametrize(("channels", "size", "modules"), [(5, 5, 3), (11, 3, 1), (1, 1, 4)])
@pytest.mark.parametrize(("window", "width"), [(3, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("length", [1, 63])
def test_module_conv(channels, size, modules, window, width, length):
    kernel, bias = torch.randn(size, channels, window, width), torch.randn(size)
    rows = quantize_rows(kernel.permute(0, 2, 3, 1).flatten(1), "int8")
    windows = torch.randn(2, length + window - 1, modules, channels)
    output = quantized_module_conv(windows, *rows, bias, window, width)
    expected = conv_over_modules(windows, kernel, bias)
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 0.04
    # A window of its own for each token, the form of texts with padding.
    own = windows.unfold(1, window, 1).movedim(-1, 2)
    assert_equal("own windows", quantized_module_conv(own, *rows, bias, window, width), output)
    # Of rounded images, by the float layer: one image a module is one row of the window.
    token, module = length // 2, modules // 2
    image = torch.nn.functional.pad(windows, (0, 0, width // 2, width // 2))
    image = image[:, token : token + window, module : module + width].flatten(1)
    expected = linear_by_hand(image, *rows, window * width * channels) + bias
    assert_close("one module", output[:, token].view(2, modules, size)[:, module], expected, 1e-6)


def sparse_weights(width, blocks, size, rank):
    down, up = torch.randn(rank, width), torch.randn(blocks, size, rank)
    return down, up, torch.randn(blocks, size), torch.randn(blocks, size, width), torch.randn(blocks, size, width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "multiply", "inner"), [("relu", False, False), ("gelu", True, True)], ids=["relu", "gelu"]
)
@pytest.mark.parametrize(("width", "blocks", "size", "rank"), [(5, 2, 3, 1), (33, 3, 20, 5), (500, 1, 64, 33)])
@pytest.mark.parametrize("length", [1, 63])
def test_sparse_feed_forward(kind, activation, multiply, inner, width, blocks, size, rank, length):
    controller_down, controller_up, controller_bias, up, down = sparse_weights(width, blocks, size, rank)
    x, bias = torch.randn(2, length, width), torch.randn(width)
    inner_bias = torch.randn(blocks, size) if inner else None
    down_rows, up_rows = quantize_rows(controller_down, "int8"), quantize_rows(controller_up, "int8")
    records = pack_records(up, down, kind)
    options = {"activation": activation, "multiply_by_controller": multiply}
    output, winners = quantized_sparse_feed_forward(
        x, *down_rows, *up_rows, controller_bias, records, bias, inner_bias, **options
    )
    assert output.shape == x.shape
    assert winners.shape == (2, length, blocks)
    assert winners.dtype == torch.int32
    # The controller: two linear maps of rounded inputs.
    inner_layer = quantized_linear(x, *down_rows)
    logits = quantized_linear(inner_layer, up_rows[0].flatten(0, 1), up_rows[1].flatten())
    logits = logits.unflatten(-1, (blocks, size)) + controller_bias
    assert_equal("winners", winners, logits.argmax(-1).int())
    # The units: all of them by linear maps, and a mask.
    (up_codes, up_scales), down_pair = unpack_records(records.flatten(0, 1), width, kind)
    hidden = quantized_linear(x, up_codes, up_scales, None if inner_bias is None else inner_bias.flatten())
    hidden = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation](hidden)
    mask = torch.nn.functional.one_hot(winners.long(), size).float()
    mask = (mask * logits.softmax(-1) if multiply else mask).flatten(-2)
    assert_close("output", output, (hidden * mask) @ dequantize_rows(*down_pair, width) + bias, 1e-5)
    # One token alone takes another path.
    alone, chosen = quantized_sparse_feed_forward(
        x[1, -1], *down_rows, *up_rows, controller_bias, records, bias, inner_bias, **options
    )
    assert_equal("winners alone", chosen, winners[1, -1])
    assert_close("alone", alone, output[1, -1], 1e-5)


def test_quantised_winners_are_nearly_those_of_floats():
    weights = sparse_weights(64, 8, 16, 16)
    x = torch.randn(500, 64)
    _, expected = sparse_ff(x, *weights)
    _, winners = quantized_sparse_feed_forward(
        x,
        *quantize_rows(weights[0], "int8"),
        *quantize_rows(weights[1], "int8"),
        weights[2],
        pack_records(*weights[3:], "int8"),
    )
    assert 0.95 < (winners == expected).float().mean() < 1.0


def test_first_of_equal_logits_wins():
    rows = quantize_rows(torch.ones(1, 5), "int8")
    up = quantize_rows(torch.ones(2, 4, 1), "int8")
    records = pack_records(torch.ones(2, 4, 5), torch.ones(2, 4, 5), "int4")
    _, winners = quantized_sparse_feed_forward(torch.ones(3, 5), *rows, *up, torch.zeros(2, 4), records)
    assert winners.tolist() == [[0, 0]] * 3
