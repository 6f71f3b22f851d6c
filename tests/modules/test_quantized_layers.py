"""Layers with weights of 8 and 4 bits: made from float ones and back, their names, their dtypes, and no training."""

import copy

import pytest
import torch
from torch import nn

from hf_efficient.modules.quantized_layers import (
    QUANTIZED,
    QuantizedLinear,
    QuantizedModularDense,
    QuantizedModuleConv,
    QuantizedMultiplicativeDense,
    QuantizedSparseFeedForward,
)
from hf_efficient.modules.sparse_layers import ModularDense, ModuleConv, MultiplicativeDense, SparseFeedForward
from hf_efficient.modules.unit_usage import observed_units
from hf_efficient.ops.backend import last_backend
from hf_efficient.ops.decode_layer import KERNEL, OP_NAME
from hf_efficient.ops.kernel_loader import find_variant
from tests.helpers.comparison import assert_close, assert_equal, relative_error


def filled(layer):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


# A float layer, its input without the batch, and the tensors of the quantised one.
LAYERS = {
    "linear": (lambda: nn.Linear(33, 7), (33,), {"weight", "weight_scales", "bias"}),
    "linear-no-bias": (lambda: nn.Linear(5, 500, bias=False), (5,), {"weight", "weight_scales"}),
    "multiplicative": (
        lambda: MultiplicativeDense(33, 12, 4),
        (33,),
        {"gating", "gating_scales", "projection", "projection_scales", "bias"},
    ),
    "modular": (
        lambda: ModularDense(33, 3),
        (33,),
        {"gating", "gating_scales", "projection", "projection_scales", "bias", "kernel"},
    ),
    "conv": (lambda: ModuleConv(5, 3, 3, 3), (20,), {"kernel", "kernel_scales", "bias"}),
    "sparse": (
        lambda: SparseFeedForward(33, 20, 5, 4, inner_bias=True, multiply_by_controller=True, activation="gelu"),
        (33,),
        {
            "controller_down",
            "controller_down_scales",
            "controller_up",
            "controller_up_scales",
            "controller_bias",
            "units",
            "bias",
            "inner_bias",
        },
    ),
    "sparse-relu": (
        lambda: SparseFeedForward(500, 12, 4, 33),
        (500,),
        {
            "controller_down",
            "controller_down_scales",
            "controller_up",
            "controller_up_scales",
            "controller_bias",
            "units",
            "bias",
        },
    ),
}
QUANTISED = [pytest.param(name, kind, id=f"{name}-{kind}") for name in LAYERS for kind in ("int8", "int4")]


def made(name, kind):
    """A float layer, the layer that is made from it, and input."""
    build, shape, _ = LAYERS[name]
    layer = filled(build())
    quantized = QUANTIZED[type(layer)].from_float(layer, kind)
    return layer, quantized, torch.randn(2, 63, *shape)


@pytest.mark.parametrize(("name", "kind"), QUANTISED)
def test_a_layer_computes_nearly_what_the_float_one_does(name, kind):
    layer, quantized, x = made(name, kind)
    assert set(quantized.state_dict()) == LAYERS[name][2]
    if name.startswith("sparse"):  # by the same choice: a changed winner is another unit
        layer.controller_up.data.zero_(), quantized.controller_up.zero_()
    with torch.no_grad():
        assert relative_error(quantized(x), layer(x)) < (0.05 if kind == "int8" else 0.25)
        assert quantized(x.bfloat16()).dtype == torch.bfloat16
    one = quantized(x[:, -3:] if name == "conv" else x[:, -1:])
    assert_close("one token", one, quantized(x)[:, -1:], 1e-5)


@pytest.mark.parametrize(("name", "kind"), QUANTISED)
def test_a_layer_comes_back_as_floats(name, kind):
    layer, quantized, x = made(name, kind)
    restored = quantized.to_float()
    assert type(restored) is type(layer)
    assert str(restored) == str(layer)
    assert not restored.training
    for (key, parameter), expected in zip(restored.named_parameters(), layer.parameters(), strict=True):
        assert parameter.requires_grad
        assert parameter.shape == expected.shape
        assert parameter.is_contiguous()
        assert relative_error(parameter, expected) < (0.02 if kind == "int8" else 0.15), key
    again = QUANTIZED[type(layer)].from_float(restored, kind)
    with torch.no_grad():
        assert_close("again", again(x), quantized(x), 2e-2 if kind == "int4" else 1e-5)
    if isinstance(layer, SparseFeedForward):
        options = ("temperature", "hard_probability", "scaled_init", "activation", "multiply_by_controller")
        assert all(getattr(restored, option) == getattr(layer, option) for option in options)


@pytest.mark.parametrize(("name", "kind"), QUANTISED)
def test_an_empty_layer_takes_the_tensors(name, kind):
    layer, quantized, x = made(name, kind)
    empty = type(quantized).like(layer, kind).eval()
    assert str(empty) == str(quantized)
    empty.load_state_dict(quantized.state_dict())
    assert_equal("output", empty(x), quantized(x))


@pytest.mark.parametrize(("name", "kind"), QUANTISED)
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casts_leave_codes_and_scales_alone(name, kind, cast):
    _, quantized, x = made(name, kind)
    before = copy.deepcopy(dict(quantized.named_buffers()))
    cast(quantized)
    assert_equal("buffers", dict(quantized.named_buffers()), before)
    assert all(parameter.dtype != torch.float32 for parameter in quantized.parameters())
    assert quantized(x.bfloat16()).isfinite().all()


def test_a_layer_moves_to_another_device():
    quantized = QuantizedLinear(5, 3, kind="int4").to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in quantized.buffers()} == {"meta"}
    assert quantized.weight_scales.dtype == torch.float16
    assert quantized.bias.dtype == torch.bfloat16
    assert quantized.to_empty(device="cpu").weight.device.type == "cpu"


@pytest.mark.parametrize(("name", "kind"), QUANTISED)
def test_training_is_refused(name, kind):
    _, quantized, x = made(name, kind)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    quantized.source = "my/float-model"
    for mode, given in ((True, x), (False, x.requires_grad_())):
        with pytest.raises(ValueError, match=r"cannot be trained.*'my/float-model'.*quantise what comes out"):
            quantized.train(mode)(given)
        with torch.no_grad():
            assert quantized.train(mode)(given).shape[:1] == x.shape[:1]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_observer_counts_units(kind):
    layer = filled(SparseFeedForward(33, 20, 5, 4))
    x, real = torch.randn(4, 7, 33), torch.ones(4, 7, dtype=torch.bool)
    real[0, 3:] = False
    counted = []
    for each in (layer, QuantizedSparseFeedForward.from_float(layer, kind)):
        with observed_units(nn.ModuleDict({"ff": each})) as usage, torch.no_grad():
            each(x, real=real)
        counted.append(usage["ff"])
        assert each.observer is None
        assert usage["ff"].tokens == real.sum()
    has_kernel = find_variant(KERNEL, "cpu") is not None
    assert last_backend(OP_NAME) == ("cpu" if has_kernel else "reference"), "units lie within records"
    difference = (counted[0].counts - counted[1].counts).abs().sum()
    assert difference <= 0.1 * counted[0].counts.sum()
    assert abs(counted[0].killed - counted[1].killed) <= 10


def test_layers_say_what_they_are():
    assert str(QuantizedLinear(5, 3, kind="int4")) == "QuantizedLinear(5, 3, bias=True, int4)"
    assert str(QuantizedModuleConv(5, 3, 3, 1)) == "QuantizedModuleConv(5, 3, window=3, width=1, int8)"
    modules = "12, 12, 3 modules, bias=True, int8"
    assert str(QuantizedMultiplicativeDense(12, 12, 3)) == f"QuantizedMultiplicativeDense({modules})"
    assert str(QuantizedModularDense(12, 3)) == f"QuantizedModularDense({modules})"
    sparse = QuantizedSparseFeedForward(5, 12, 4, 2)
    assert str(sparse) == "QuantizedSparseFeedForward(5, 3 blocks of 4 units, rank 2, relu, int8)"
