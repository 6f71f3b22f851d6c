"""The built kernel against plain products in float64, with nothing but torch.

    python kernels/build.py
    python -m pytest kernels/decode-layer/tests

This folder is run alone and has an `__init__.py`: without it pytest would name this module `kernels.<...>`, and its own
empty package of that name would stand where the `kernels` library should.
"""

import importlib
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the `kernels` library is imported

import torch
from kernel_testing.guarded_memory import GuardedTensor
from kernel_testing.loading import HAS_KERNELS, load_for_tests


KERNEL = Path(__file__).resolve().parents[1]
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
TOKENS = (1, 2, 8, 9, 33)

kernel = load_for_tests(KERNEL, "cpu")
plain = SimpleNamespace(**runpy.run_path(str(KERNEL / "example.py")))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def matrix(rows, width, kind):
    """A matrix of a format, and its scales."""
    weight = torch.randn(rows, width)
    if kind in ("int8", "int4"):
        return (plain.quantize_int8 if kind == "int8" else plain.quantize_int4)(weight)
    return weight.to(getattr(torch, kind)), None


@pytest.mark.kernels_ci
@pytest.mark.skipif(not HAS_KERNELS, reason="no `kernels` library")
def test_the_kernels_library_is_not_hidden():
    assert hasattr(importlib.import_module("kernels"), "get_local_kernel")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("width", [1, 5, 33, 500, 1030], ids=lambda width: f"d{width}")
def test_linear_equals_plain_products(width, kind):
    for rows in (1, 3, 7, 16):
        weight, scales = matrix(rows, width, kind)
        bias = torch.randn(rows)
        for tokens in TOKENS:
            x = torch.randn(tokens, width)
            plain.close(kernel.linear(x, weight, scales, bias), plain.plain_linear(x, weight, scales, bias), 3e-5)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", FORMATS)
def test_a_token_does_not_depend_on_its_neighbours(kind):
    weight, scales = matrix(37, 1500, kind)
    x = torch.randn(33, 1500)
    together = kernel.linear(x, weight, scales)
    assert torch.equal(together, torch.cat([kernel.linear(row, weight, scales) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([kernel.linear(row, weight, scales) for row in x.split(7)]))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_at_any_address(kind, misaligned):
    """Amid NaN, or amid other codes."""
    weight, scales = matrix(6, 500, kind)
    x = torch.randn(9, 500)
    expected = kernel.linear(x, weight, scales)
    if weight.is_floating_point():
        guarded = GuardedTensor(weight.shape, weight.dtype, misaligned, weight).tensor
    else:
        around = torch.randint(0, 100, (weight.numel() + 128,)).to(weight.dtype)
        first = 64 + misaligned
        guarded = around[first : first + weight.numel()].view(weight.shape).copy_(weight)
    assert torch.equal(kernel.linear(x, guarded, scales), expected)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", FORMATS[:4])
def test_multiplicative_equals_plain_products(kind):
    for modules, size, width in ((3, 5, 15), (16, 33, 500)):
        gating, projection = torch.randn(modules, width), torch.randn(width, size)
        bias = torch.randn(modules * size)
        is_int8 = kind == "int8"
        if is_int8:
            weights = (*plain.quantize_int8(gating), *plain.quantize_int8(projection.mT.contiguous()))
            gates = (weights[0].float() * weights[1].unsqueeze(-1))[:, :width]
        else:
            gates, projected = (tensor.to(getattr(torch, kind)) for tensor in (gating, projection))
            weights = (gates, None, projected, None)
        for tokens in TOKENS:
            x = torch.randn(tokens, width)
            if is_int8:
                expected = plain.plain_linear(x.unsqueeze(1) * gates, *weights[2:]).flatten(1) + bias
            else:
                expected = ((x.double().unsqueeze(1) * gates.double()) @ projected.double()).flatten(1) + bias
            plain.close(kernel.multiplicative(x, *weights, bias), expected, 1e-5)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("in_pieces", [False, True], ids=["text", "windows"])
@pytest.mark.parametrize("kind", FORMATS[:4])
def test_module_conv_equals_a_convolution(kind, in_pieces):
    window, width, channels, size = 3, 3, 5, 7
    weight, bias = torch.randn(size, channels, window, width), torch.randn(size)
    text = torch.randn(2, 4 + window - 1, 6, channels)
    if kind == "int8":
        kernel_weight, scales = plain.quantize_int8(weight.permute(0, 2, 3, 1).flatten(1).contiguous())
        weight = plain.dequantize(kernel_weight, scales, channels * window * width)
        weight = weight.view(size, window, width, channels).permute(0, 3, 1, 2)
    else:
        kernel_weight, scales = weight.to(getattr(torch, kind)), None
        weight = kernel_weight.double()
    windows = text.unfold(1, window, 1).movedim(-1, 2).contiguous() if in_pieces else text
    found = kernel.module_conv(windows, kernel_weight, scales, bias, window, width)
    expected = torch.nn.functional.conv2d(text.double().permute(0, 3, 1, 2), weight, bias.double(), padding=(0, 1))
    # In int8 what a module sees is rounded.
    plain.close(found, expected.permute(0, 2, 3, 1).flatten(2), 0.02 if kind == "int8" else 1e-5)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"{tokens}-tokens")
@pytest.mark.parametrize("width", [1, 64, 1030], ids=lambda width: f"d{width}")
def test_sums_of_the_largest_codes(width, tokens):
    """Pairs of products of 8 bits nearly fill 16; integer sums are exact, whatever the signs."""
    codes = torch.tensor([-128, -127, 127, 0])[torch.randint(4, (7, width))]
    codes[:2] = torch.tensor([[-128], [127]])
    x = 127 * (torch.randint(2, (tokens, width)) * 2 - 1)
    x[0] = -127
    found = kernel.linear(x.float(), plain.filled(codes).to(torch.int8), torch.ones(7))
    assert torch.equal(found, (x @ codes.mT).float())


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", FORMATS)
def test_nan_in_an_input_makes_its_products_nan(kind):
    weight, scales = matrix(7, 500, kind)
    for tokens in TOKENS:
        x = torch.randn(tokens, 500)
        expected = kernel.linear(x, weight, scales)
        x[-1, 33] = float("nan")
        found = kernel.linear(x, weight, scales)
        assert found[-1].isnan().all()
        assert torch.equal(found[:-1], expected[:-1])


def nothing(rows, kind):
    """A matrix without columns, and its scales."""
    if kind == "int8":
        return torch.zeros(rows, 0, dtype=torch.int8), torch.ones(rows)
    if kind == "int4":
        return torch.zeros(rows, 0, 16, dtype=torch.uint8), torch.zeros(rows, 0, dtype=torch.float16)
    return torch.zeros(rows, 0, dtype=getattr(torch, kind)), None


@pytest.mark.kernels_ci
@pytest.mark.parametrize("tokens", TOKENS, ids=lambda tokens: f"{tokens}-tokens")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_over_nothing_is_the_bias(kind, tokens):
    x = torch.zeros(tokens, 0)
    for rows in (1, 3, 4, 7):
        bias = torch.randn(2 * rows)
        expected = bias.expand(tokens, -1)
        torch.full_like(expected, float("nan")).contiguous()  # what is not written may well be this
        assert torch.equal(kernel.linear(x, *nothing(2 * rows, kind), bias), expected)
        if kind != "int4":
            gating, projection = nothing(2, kind), nothing(rows, kind)
            projection = projection if kind == "int8" else (projection[0].mT.contiguous(), None)
            assert torch.equal(kernel.multiplicative(x, *gating, *projection, bias), expected)
    norm, hidden, bias = torch.randn(2, 33), torch.randn(tokens, 33), torch.randn(33)
    weights = [*norm, *matrix(0, 33, "float32"), *nothing(33, kind), bias]
    expected = hidden + bias
    kernel.feed_forward(hidden, [one for one in weights if one is not None], [1, 0, 0, 0, 1, 0], 1e-5)
    assert torch.equal(hidden, expected)


@pytest.mark.kernels_ci
def test_no_outputs_at_all():
    x, windows = torch.randn(3, 5), torch.randn(2, 4, 0, 5)
    assert kernel.linear(x, torch.zeros(0, 5)).shape == (3, 0)
    assert kernel.multiplicative(x, torch.zeros(0, 5), None, torch.zeros(5, 2)).shape == (3, 0)
    assert kernel.multiplicative(x, torch.zeros(2, 5), None, torch.zeros(5, 0)).shape == (3, 0)
    codes = torch.zeros(2, 32, dtype=torch.int8), torch.ones(2)
    none = torch.zeros(0, 32, dtype=torch.int8), torch.ones(0)
    assert kernel.multiplicative(x, *codes, *none).shape == (3, 0)
    assert kernel.multiplicative(x, *none, *codes).shape == (3, 0)
    assert kernel.module_conv(windows, torch.zeros(7, 5, 3, 3), None, None, 3, 3).shape == (2, 2, 0)
    assert kernel.module_conv(torch.randn(2, 4, 6, 5), torch.zeros(0, 5, 3, 3), None, None, 3, 3).shape == (2, 2, 0)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (33, 0, 5, 7), (33, 2, 0, 7), (33, 2, 5, 0)], ids=str)
def test_a_sparse_layer_without_units_is_refused(sizes):
    width, blocks, units, rank = sizes
    controller = torch.zeros(rank, width), torch.zeros(blocks, units, rank), torch.zeros(blocks, units)
    rows = torch.zeros(2, blocks, units, width)
    records = torch.zeros(blocks, units, 128, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"No dimension but that of tokens may be 0|at least one number a row"):
        kernel.feed_forward(torch.zeros(1, width), [torch.ones(width), *controller, *rows], [0, 1, 0, 0, 0, 0], 1e-5)
    down, up, bias = controller
    with pytest.raises(RuntimeError, match="No dimension but that of tokens may be 0"):
        kernel.sparse_feed_forward(torch.zeros(1, width), down, None, up, None, bias, records)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("units", [1, 5])
def test_rows_of_units_may_lie_apart(units):
    """Rows lie apart in records, which hold both of a unit."""
    records, hidden = torch.randn(3, units, 2, 33), torch.randn(2, 33)
    weights = [torch.ones(33), torch.randn(7, 33), torch.randn(3, units, 7), torch.randn(3, units)]
    rows, expected = records.unbind(2), hidden.clone()
    kernel.feed_forward(expected, [*weights, *(one.contiguous() for one in rows)], [0, 1, 1, 0, 0, 0], 1e-5)
    kernel.feed_forward(hidden, [*weights, *rows], [0, 1, 1, 0, 0, 0], 1e-5)
    assert torch.equal(hidden, expected)


@pytest.mark.kernels_ci
def test_of_equal_logits_the_first_wins_and_nan_before_all():
    controller = (*plain.quantize_int8(torch.ones(7, 63)), *plain.quantize_int8(torch.ones(3, 40, 7)))
    bias, records = torch.zeros(3, 40), plain.pack_int8(torch.randn(3, 40, 63), torch.randn(3, 40, 63))
    bias[:, 20:] = 1.0
    x = torch.randn(9, 63)
    assert (kernel.sparse_feed_forward(x, *controller, bias, records)[1] == 20).all()
    bias[:, 30] = float("nan")
    assert (kernel.sparse_feed_forward(x, *controller, bias, records)[1] == 30).all()


@pytest.mark.kernels_ci
def test_winners_that_relu_kills_are_not_read():
    controller = (*plain.quantize_int8(torch.randn(7, 63)), *plain.quantize_int8(torch.randn(3, 5, 7)))
    records = plain.pack_int8(torch.randn(3, 5, 63), torch.randn(3, 5, 63))
    records[..., 2 * 64 + 4 : 2 * 64 + 8] = torch.tensor([float("nan")]).view(torch.uint8)  # scales of the second rows
    bias, inner_bias = torch.randn(63), torch.full((3, 5), -1e4)
    y, _ = kernel.sparse_feed_forward(torch.randn(9, 63), *controller, torch.zeros(3, 5), records, bias, inner_bias)
    assert torch.equal(y, bias.expand(9, 63))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("kind", FORMATS)
def test_a_dense_feed_forward_in_place(kind):
    (up, up_scales), (down, down_scales) = matrix(40, 33, kind), matrix(33, 40, kind)
    norm, biases = torch.randn(2, 33), (torch.randn(40), torch.randn(33))
    for rows in (1, 3, 9):
        hidden = torch.randn(rows, 33)
        normalized = torch.nn.functional.layer_norm(hidden, (33,), *norm, 1e-5)
        inner = torch.relu(plain.plain_linear(normalized, up, up_scales, biases[0])).float()
        expected = hidden + plain.plain_linear(inner, down, down_scales, biases[1])
        weights = [*norm, up, up_scales, biases[0], down, down_scales, biases[1]]
        kernel.feed_forward(hidden, [one for one in weights if one is not None], [1, 0, 0, 0, 1, 1], 1e-5)
        plain.close(hidden, expected, 0.01 if kind == "int4" else 1e-3 if kind == "int8" else 1e-5)


def test_opcheck():
    x = torch.randn(3, 63)
    torch.library.opcheck(kernel.ops.linear.default, (x, torch.randn(5, 63), None, torch.randn(5)))
    weights = (torch.randn(3, 63), None, torch.randn(63, 5), None, None)
    torch.library.opcheck(kernel.ops.multiplicative.default, (x, *weights))
    windows = torch.randn(2, 5, 6, 5)
    torch.library.opcheck(kernel.ops.module_conv.default, (windows, torch.randn(7, 5, 3, 3), None, None, 3, 3))
    controller = (*plain.quantize_int8(torch.randn(7, 63)), *plain.quantize_int8(torch.randn(3, 5, 7)))
    records = plain.pack_int8(torch.randn(3, 5, 63), torch.randn(3, 5, 63))
    arguments = (x, *controller, torch.randn(3, 5), records, None, None, "gelu", True)
    torch.library.opcheck(kernel.ops.sparse_feed_forward.default, arguments)


@pytest.mark.kernels_ci
def test_errors_name_what_is_wrong():
    x, (codes, scales) = torch.randn(3, 63), matrix(5, 63, "int8")
    with pytest.raises(RuntimeError, match=r"weight must have shape \(5, 60\), not \(5, 63\)"):
        kernel.linear(x[:, 3:], torch.randn(5, 63))
    with pytest.raises(RuntimeError, match="weight holds codes and needs their scales"):
        kernel.linear(x, codes)
    with pytest.raises(RuntimeError, match=r"The scales of weight must have shape \(5\), not \(4\)"):
        kernel.linear(x, codes, scales[1:])
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16, float16, int8"):
        kernel.linear(x, torch.randn(5, 63).double())
    with pytest.raises(RuntimeError, match="gating and projection must both be int8, or neither"):
        kernel.multiplicative(x, codes, scales, torch.randn(63, 5))
    with pytest.raises(RuntimeError, match="settings must hold 6 or 7 numbers, not 2"):
        kernel.feed_forward(x, [], [0, 0], 1e-5)
    with pytest.raises(RuntimeError, match="The list of weights ends before up"):
        kernel.feed_forward(x, [torch.ones(63)], [0, 0, 0, 0, 0, 0], 1e-5)
    with pytest.raises(RuntimeError, match="hidden must have at least one number a row"):
        kernel.feed_forward(torch.zeros(1, 0), [torch.ones(0)], [0, 0, 0, 0, 0, 0], 1e-5)
    with pytest.raises(RuntimeError, match="A module must have at least one channel"):
        kernel.module_conv(torch.zeros(1, 3, 4, 0), torch.zeros(5, 0, 3, 3), None, None, 3, 3)
    controller = (*plain.quantize_int8(torch.randn(7, 63)), *plain.quantize_int8(torch.randn(3, 5, 7)))
    with pytest.raises(RuntimeError, match="units have 100 bytes a record, which is no format of rows of 63 numbers"):
        kernel.sparse_feed_forward(x, *controller, torch.zeros(3, 5), torch.zeros(3, 5, 100, dtype=torch.uint8))
