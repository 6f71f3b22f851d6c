"""Multiplicative layers and convolutions over modules against their sums written out, in float64."""

import pytest
import torch

from hf_efficient.ops.multiplicative import conv_over_modules, modular_dense, multiplicative_dense
from tests.helpers.comparison import assert_close


# Inputs, modules, size of a module; inputs need not divide by the modules.
SIZES = {"odd": (7, 3, 5), "one-module": (4, 1, 9), "size-1": (5, 6, 1), "even": (8, 4, 2)}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def written_out(x, gating, projection):
    """y[s, j] = sum over i of x[i] D[s, i] E[i, j]"""
    output = torch.zeros(*x.shape[:-1], len(gating), projection.shape[1], dtype=x.dtype)
    for module, gate in enumerate(gating):
        for unit in range(projection.shape[1]):
            for i in range(x.shape[-1]):
                output[..., module, unit] += x[..., i] * gate[i] * projection[i, unit]
    return output


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (2, 63)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_multiplicative_dense(size, shape, bias):
    """For few tokens and for many, which take different forms."""
    inputs, modules, unit = SIZES[size]
    x, gating, projection = normal(*shape, inputs), normal(modules, inputs), normal(inputs, unit)
    offset = normal(modules * unit) if bias else None
    expected = written_out(x, gating, projection).flatten(-2) + (offset if bias else 0.0)
    assert_close("output", multiplicative_dense(x, gating, projection, offset), expected, 1e-12)


@pytest.mark.parametrize("tokens", [1, 9])
def test_any_permutation_can_be_written(tokens):
    """As the paper says of the layer: D picks an input for each module, E a unit for each input."""
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    gating, projection = torch.zeros(2, 6), torch.zeros(6, 3)
    for source, target in enumerate(permutation.tolist()):
        gating[target // 3, source] = 1.0
        projection[source, target % 3] = 1.0
    x = torch.randn(tokens, 6)
    output = multiplicative_dense(x, gating, projection)
    assert torch.equal(output[:, permutation], x)


@pytest.mark.parametrize("shape", [(), (1,), (2, 63)], ids=str)
@pytest.mark.parametrize("modules", [1, 3, 6])
def test_modular_dense(modules, shape):
    x, size = normal(*shape, 6), 6 // modules
    gating, projection, bias = normal(modules, 6), normal(6, size), normal(6)
    kernel = normal(modules, size, size)
    first = written_out(x, gating, projection)
    expected = torch.stack([first[..., s, :] @ kernel[s] for s in range(modules)], -2).flatten(-2)
    assert_close("no bias", modular_dense(x, gating, projection, kernel), expected, 1e-12)
    assert_close("bias", modular_dense(x, gating, projection, kernel, bias), expected + bias, 1e-12)


def convolved(windows, kernel, bias):
    """y[t, s] = sum over a, b of u[t - a, s + b] W[a, b], window by window."""
    size, _, window, width = kernel.shape
    batch, length, _, modules, _ = windows.shape
    output = torch.zeros(batch, length, modules, size, dtype=windows.dtype)
    for module in range(modules):
        for a in range(window):
            for b in range(width):
                neighbour = module + b - width // 2
                if 0 <= neighbour < modules:
                    output[:, :, module] += windows[:, :, a, neighbour] @ kernel[:, :, a, b].T
    return (output if bias is None else output + bias).flatten(-2)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("modules", [1, 2, 5])
@pytest.mark.parametrize(("window", "width"), [(3, 3), (1, 1), (1, 3), (4, 5), (2, 1)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_conv_over_modules(length, window, width, modules, bias):
    text = normal(2, length + window - 1, modules, 3)
    kernel, offset = normal(4, 3, window, width), normal(4) if bias else None
    windows = text.unfold(1, window, 1).movedim(-1, 2)
    expected = convolved(windows, kernel, offset)
    assert_close("a text", conv_over_modules(text, kernel, offset), expected, 1e-12)
    assert_close("windows", conv_over_modules(windows, kernel, offset), expected, 1e-12)


def cases():
    """Name, function and arguments."""
    gating, projection = normal(3, 4), normal(4, 2)
    for tokens in (1, 5):
        yield f"dense-{tokens}", multiplicative_dense, (normal(tokens, 4), gating, projection, normal(6))
    square = normal(2, 4), normal(4, 2)
    yield "modular", modular_dense, (normal(3, 4), *square, normal(2, 2, 2), normal(4))
    for name, windows in (("conv", normal(2, 5, 2, 2)), ("conv-1", normal(2, 3, 2, 2)), ("own", normal(2, 2, 3, 2, 2))):
        yield name, conv_over_modules, (windows, normal(2, 2, 3, 3), normal(2))


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_gradients(case):
    _, function, tensors = case
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 33])
def test_dtypes(length, dtype):
    x, gating, projection = normal(2, length, 6), normal(3, 6), normal(6, 2)
    tensors = [tensor.to(dtype) for tensor in (x, gating, projection)]
    found = multiplicative_dense(*tensors)
    assert found.dtype == dtype
    assert_close("dense", found.double(), multiplicative_dense(*(tensor.double() for tensor in tensors)), 0.02)
    text, kernel = normal(2, length + 2, 3, 2).to(dtype), normal(2, 2, 3, 3).to(dtype)
    found = conv_over_modules(text, kernel)
    assert found.dtype == dtype
    assert_close("conv", found.double(), conv_over_modules(text.double(), kernel.double()), 0.02)


@torch.no_grad()
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("modular", [False, True], ids=["dense", "modular"])
def test_few_tokens_in_16_bits_are_rounded_as_many_are(how, modular):
    """Decoding and the whole text; in training the form for many tokens is the quick one."""
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    x, gating, projection = (tensor.to(dtype) for tensor in (normal(2, 60, 63), normal(9, 63), normal(63, 7)))
    arguments = (gating, projection, normal(9, 7, 7).to(dtype)) if modular else (gating, projection)
    function = modular_dense if modular else multiplicative_dense
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        whole = function(x, *arguments).double()
        steps = torch.stack([function(x[:, step], *arguments) for step in range(60)], dim=1).double()
        trained = function(x, *arguments, training=True).double()
    exact = function(x.double(), *(tensor.double() for tensor in arguments))
    assert_close("whole", whole, exact, 0.02)
    assert_close("trained", trained, exact, 0.02)
    equal = [(found == steps).double().mean().item() for found in (whole, trained)]
    assert equal[0] > 0.95  # sums of float32 may come in another order
    assert equal[1] < 0.9


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x is 5 wide, gating has shape \(2, 4\) and projection \(4, 3\)"):
        multiplicative_dense(torch.zeros(5), torch.zeros(2, 4), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="must agree"):
        multiplicative_dense(torch.zeros(4), torch.zeros(2, 4), torch.zeros(5, 3))
