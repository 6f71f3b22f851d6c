"""The CUDA source of the sparse feed-forward without a GPU: threads run on the host, the compiler's report is read."""

import ctypes
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from kernel_testing.guarded_memory import GuardedTensor

from tests.ops.host_emulation import DTYPES, TensorView, compile_for_host
from tests.ops.test_sparse_ff_kernel import NAMES, in_float64, make_weights


KERNEL = Path(__file__).resolve().parents[2] / "kernels" / "sparse-ff"
SIZES = ("tokens", "width", "blocks", "units", "rank")
VIEWS = ("x", "controller_down", "controller_up", "controller_bias", "up", "down", "bias", "inner_bias", "y")
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
TYPES = {"float32": 4, "bfloat16": 8, "float16": 8}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# Two blocks of 256 threads then run on a multiprocessor at once, which the grid's barrier relies on.
MOST_REGISTERS = 128


class SparseFfParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, TensorView) for name in VIEWS),
        *((name, ctypes.c_void_p) for name in ("winners", "h", "hidden")),
        ("activation", ctypes.c_int32),
        ("multiply_by_controller", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    source = Path(__file__).with_name("sparse_ff_cuda_emulation.cpp")
    functions = compile_for_host(source, KERNEL, tmp_path_factory.mktemp("emulation"), "-O1")
    functions.last_kernels.restype = ctypes.c_char_p
    functions.size_of_params.restype = ctypes.c_int64
    assert functions.size_of_params() == ctypes.sizeof(SparseFfParams)
    return functions


def view_of(tensor):
    if tensor is None:
        return TensorView()
    strides = [*tensor.stride()[:-1], 0, 0][:2]
    return TensorView(tensor.data_ptr(), *strides, 0, DTYPES[tensor.dtype])


def emulate(functions, x, weights, activation="relu", multiply=False, misaligned=False):
    """A call as the binding makes it, every tensor in guarded memory: result, winners and the kernels that ran."""
    params, kept = SparseFfParams(), {}

    def place(name, shape, dtype, values=None):
        kept[name] = GuardedTensor(shape, dtype, misaligned, values)
        return kept[name].tensor

    blocks, units, rank = weights["controller_up"].shape
    tokens, width = x.shape
    params.tokens, params.width, params.blocks, params.units, params.rank = tokens, width, blocks, units, rank
    for name, values in {"x": x, **weights}.items():
        given = None if values is None else place(name, values.shape, values.dtype, values)
        setattr(params, name, view_of(given))
    y, h, hidden = place("y", x.shape, x.dtype), place("h", (tokens, rank), torch.float32), None
    hidden, winners = (
        place("hidden", (tokens, blocks), torch.float32),
        torch.full((tokens, blocks), -1, dtype=torch.int32),
    )
    params.y, params.winners, params.h, params.hidden = view_of(y), winners.data_ptr(), h.data_ptr(), hidden.data_ptr()
    params.activation, params.multiply_by_controller = ACTIVATIONS.index(activation), multiply
    functions.emulate(ctypes.byref(params))
    for name, guarded in kept.items():
        guarded.check(name)
    return y, winners, functions.last_kernels().decode().split("\n")[:-1]


def check(functions, x, weights, activation="relu", multiply=False, misaligned=False):
    y, winners, kernels = emulate(functions, x, weights, activation, multiply, misaligned)
    expected, margin = in_float64(x, weights, winners, activation, multiply)
    assert margin > -1e-4  # of logits of the size of 1: rounding alone decides between two
    limit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[x.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit * expected.abs().max().clamp(1.0).item())
    return kernels


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "single"])
@pytest.mark.parametrize("rows", TYPES)
@pytest.mark.parametrize("controller", TYPES)
def test_every_kernel_against_float64(emulation, controller, rows, wide):
    """In each dtype of the input; with accesses of 16 bytes where width, rank and addresses allow them."""
    V = {name: TYPES[name] if wide else 1 for name in TYPES}
    for x, tokens in itertools.product(TYPES, (1, 4, 9)):
        weights = make_weights(72 if wide else 77, 3, 13, 16 if wide else 7, x, controller, rows)
        found = check(emulation, torch.randn(tokens, weights["up"].shape[-1]).to(weights["bias"].dtype), weights)
        group = 1 if tokens == 1 else 4
        assert found == [f"controller {controller} V{V[controller]} G{group}", f"winners {rows} V{V[rows]}"]


@pytest.mark.parametrize("multiply", [False, True], ids=["alone", "by-controller"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(emulation, activation, multiply):
    for absent in ((), ("bias",), ("bias", "inner_bias")):
        weights = {**make_weights(units=37), **dict.fromkeys(absent)}
        check(emulation, torch.randn(3, 63), weights, activation, multiply)


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_odd_sizes_and_addresses(emulation, misaligned):
    for width, units, rank, tokens in itertools.product((5, 8, 500), (1, 2, 16), (1, 64), (1, 2, 17)):
        kernels = check(
            emulation, torch.randn(tokens, width), make_weights(width, 3, units, rank), misaligned=misaligned
        )
        assert not misaligned or all(" V1" in kernel for kernel in kernels)


@pytest.mark.parametrize("units", [2, 7, 16, 40])
def test_of_equal_logits_the_first_wins(emulation, units):
    weights = make_weights(units=units)
    weights["controller_up"].zero_()
    x = torch.randn(9, 63)
    for bias in (0.0, -torch.inf, torch.inf):
        weights["controller_bias"].fill_(bias)
        assert (emulate(emulation, x, weights)[1] == 0).all()
    weights["controller_bias"].zero_()[:, units // 2 :] = 1.0
    assert (emulate(emulation, x, weights)[1] == units // 2).all()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_logits_that_are_not_finite(emulation, number):
    weights, x = make_weights(units=21), torch.randn(3, 63)
    weights["controller_bias"][0, 5] = weights["controller_bias"][0, 17] = weights["controller_bias"][1, 20] = number
    y, winners, _ = emulate(emulation, x, weights, multiply=True)
    expected, _ = in_float64(x, weights, winners, multiply=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    if number == -torch.inf:
        assert not (winners[:, 0] == 5).any()
    else:
        assert (winners[:, 0] == 5).all()
        assert (winners[:, 1] == 20).all()


def test_winners_that_relu_kills_are_not_read(emulation):
    weights = make_weights()
    weights["inner_bias"].fill_(-1e4)
    weights["down"].fill_(float("nan"))
    y, _, _ = emulate(emulation, torch.randn(9, 63), weights)
    assert torch.equal(y, weights["bias"].expand(9, 63))


def test_the_sources_share_their_threads_code():
    """What the emulation runs is what the kernels run; only how lanes and warps add up is written twice."""
    text = (KERNEL / "sparse_ff_cuda" / "kernels.cu").read_text()
    functions = (
        "lane_products<",
        "lanes_of<",
        "tokens_of<",
        "leader_of(",
        "merged(",
        "keep_winner(",
        "keep_hidden(",
        "column_sum<",
        "write_number(",
    )
    assert all(name in text for name in functions)
    assert "by_dtype(params.controller_up.dtype, wide_controller(params)" in text
    assert "by_dtype(params.up.dtype, wide_rows(params)" in text
    assert set(NAMES) <= set(VIEWS)


REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def test_what_the_compiler_said_of_the_built_kernel():
    """No registers in memory, and few enough for the blocks that must run at once."""
    variants = [path for path in (KERNEL / "build").glob("torch-stable-abi*-cu[0-9]*") if path.is_dir()]
    if not variants:
        pytest.skip("no CUDA variant is built; `python kernels/build.py --backend cuda` builds it")
    assert json.loads((variants[0] / "metadata.json").read_text())["name"] == "sparse-ff"
    report = (variants[0] / "compiler.log").read_text()
    assert "warning" not in report, "what the compiler warns of may be left out of the GPU's code"
    found = REPORT.findall(report)
    assert {architecture for _, architecture, *_ in found} == set(ARCHITECTURES)
    assert len(found) == report.count("Compiling entry function") == 3 * 2 * len(TYPES) * len(ARCHITECTURES)
    for name, architecture, *figures in found:
        stack, stores, loads, registers = map(int, figures)
        assert stack == stores == loads == 0, f"{name} for {architecture} keeps registers in memory"
        assert registers <= MOST_REGISTERS, f"{name} for {architecture}: {registers} registers"
