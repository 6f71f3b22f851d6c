"""The compiled sparse feed-forward by itself: against float64, and what it says of input that it cannot take."""

import itertools
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from kernel_testing.guarded_memory import GuardedTensor

from hf_efficient.ops import backend
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.kernel_loader import find_variant, load_kernel
from hf_efficient.ops.sparse_ff import KERNEL, OP_NAME, sparse_ff


ROOT = Path(__file__).resolve().parents[2]
VARIANT = find_variant(KERNEL, "cpu")
pytestmark = pytest.mark.skipif(VARIANT is None, reason=f"{KERNEL} is not built: run `python kernels/build.py`")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens of both forms of a call and of groups that are not full.
TOKENS = (1, 2, 8, 9, 63)
NAMES = ("controller_down", "controller_up", "controller_bias", "up", "down", "bias", "inner_bias")
plain_loop = runpy.run_path(str(ROOT / "kernels" / KERNEL / "example.py"))["plain_loop"]


@pytest.fixture(scope="module")
def kernel():
    return load_kernel(KERNEL, "cpu")


def make_weights(width=63, blocks=3, units=5, rank=7, x="float32", controller="float32", rows="float32"):
    """Weights by name, in the order of the op's arguments; about half of the winners die by ReLU."""
    types = {"controller_down": controller, "controller_up": controller, "up": rows, "down": rows, "bias": x}
    shapes = {
        "controller_down": (rank, width),
        "controller_up": (blocks, units, rank),
        "controller_bias": (blocks, units),
        "up": (blocks, units, width),
        "down": (blocks, units, width),
        "bias": (width,),
        "inner_bias": (blocks, units),
    }
    scales = {"controller_down": width**-0.5, "up": width**-0.5}
    return {
        name: (scales.get(name, 1.0) * torch.randn(shape)).to(DTYPES[types.get(name, controller)])
        for name, shape in shapes.items()
    }


def in_float64(x, weights, winners, activation="relu", multiply=False):
    """What given winners give, and by how much each of them beats the best other unit of its block."""
    w = {name: None if tensor is None else tensor.double() for name, tensor in weights.items()}
    logits = torch.einsum("kur,tr->tku", w["controller_up"], x.double() @ w["controller_down"].mT)
    logits = logits + w["controller_bias"]
    at = winners.long().unsqueeze(-1)
    chosen = logits.gather(-1, at)
    margin = chosen - logits.scatter(-1, at, -torch.inf).amax(-1, keepdim=True)
    block = torch.arange(winners.shape[1])
    value = torch.einsum("tkd,td->tk", w["up"][block, winners.long()], x.double())
    if w["inner_bias"] is not None:
        value = value + w["inner_bias"][block, winners.long()]
    value = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_new": lambda sums: torch.nn.functional.gelu(sums, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }[activation](value)
    if multiply:
        value = value * logits.softmax(-1).gather(-1, at).squeeze(-1)
    y = torch.einsum("tk,tkd->td", value, w["down"][block, winners.long()])
    return y if w["bias"] is None else y + w["bias"], margin.min().item()


def check(kernel, x, weights, activation="relu", multiply=False):
    y, winners = kernel.forward(x, *weights.values(), activation, multiply)
    assert (y.dtype, y.shape, winners.dtype) == (x.dtype, x.shape, torch.int32)
    expected, margin = in_float64(x, weights, winners, activation, multiply)
    assert margin > -1e-4  # of logits of the size of 1: rounding alone decides between two
    limit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[x.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit * expected.abs().max().clamp(1.0).item())
    return winners


@pytest.mark.parametrize("rank", [1, 7, 64], ids=lambda rank: f"r{rank}")
@pytest.mark.parametrize("units", [1, 2, 3, 16, 64], ids=lambda units: f"N{units}")
@pytest.mark.parametrize("width", [5, 8, 63, 500, 1024], ids=lambda width: f"d{width}")
def test_odd_sizes(kernel, width, units, rank):
    weights = make_weights(width, 3, units, rank)
    for tokens in TOKENS:
        check(kernel, torch.randn(tokens, width), weights)


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_every_combination_of_dtypes(kernel, x_dtype):
    """Controller, rows and input may differ, and so may every single weight."""
    for controller, rows, width in itertools.product(DTYPES, DTYPES, (37, 64)):
        weights = make_weights(width, 3, 6, 19, x_dtype, controller, rows)
        for tokens in TOKENS:
            check(kernel, torch.randn(tokens, width).to(DTYPES[x_dtype]), weights)
    mixed = {name: tensor.to(list(DTYPES.values())[i % 3]) for i, (name, tensor) in enumerate(make_weights().items())}
    check(kernel, torch.randn(3, 63), mixed)


@pytest.mark.parametrize("multiply", [False, True], ids=["alone", "by-controller"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu"])
def test_options(kernel, activation, multiply):
    for absent in ({}, {"bias": None}, {"inner_bias": None}, {"bias": None, "inner_bias": None}):
        weights = {**make_weights(units=37), **absent}
        for tokens in (1, 9):
            check(kernel, torch.randn(tokens, 63), weights, activation, multiply)


def test_the_plain_loop_of_the_example_says_the_same(kernel):
    """The loop that the build and the kernel's own suite compare with."""
    weights, x = make_weights(), torch.randn(9, 63)
    y, winners = kernel.forward(x, *weights.values(), "relu", True)
    expected, chosen = plain_loop(x, *weights.values(), multiply_by_controller=True)
    assert torch.equal(winners, chosen)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_packed_records_are_read_in_place(kernel, rows):
    """One record `[up row | down row | something else]` a unit, and every second token of a longer input."""
    weights = make_weights(rows=rows)
    record = torch.full((3, 5, 2 * 63 + 11), float("nan"), dtype=DTYPES[rows])
    record[..., :63], record[..., 63:126] = weights["up"], weights["down"]
    packed = {**weights, "up": record.narrow(-1, 0, 63), "down": record.narrow(-1, 63, 63)}
    wide = torch.full((7, 70), float("nan"))
    packed["controller_down"] = wide[:, 2:65].copy_(weights["controller_down"])
    packed["controller_up"] = torch.full((3, 9, 7), float("nan"))[:, ::2].copy_(weights["controller_up"])
    x = torch.randn(18, 63)
    for some in (x[:5:2], x[::2], x[::2].mT.contiguous().mT):
        ours = kernel.forward(some, *packed.values(), "relu", False)
        expected = kernel.forward(some.contiguous(), *weights.values(), "relu", False)
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_a_token_does_not_depend_on_those_beside_it(kernel):
    """To the bit, so that decoding takes the winners of the whole text, whatever it is cut into."""
    weights = make_weights(500, 3, 16, 40)
    x = torch.randn(63, 500)
    for multiply in (False, True):
        whole = kernel.forward(x, *weights.values(), "relu", multiply)
        for size in (1, 3, 8, 20):
            parts = [kernel.forward(part, *weights.values(), "relu", multiply) for part in x.split(size)]
            for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(one, torch.cat(pieces))


def test_results_do_not_depend_on_threads(kernel):
    """Large enough to be divided: blocks, then columns for few tokens, and tiles for many."""
    weights = make_weights(1024, 64, 64, 16, rows="bfloat16")
    results, threads = [], torch.get_num_threads()
    x = torch.randn(20, 1024)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([*kernel.forward(x[:3], *weights.values(), "relu", False)])
            results[-1] += kernel.forward(x, *weights.values(), "relu", False)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("units", [2, 7, 16, 40])
def test_of_equal_logits_the_first_wins(kernel, units, tokens):
    weights = make_weights(units=units)
    weights["controller_up"].zero_()
    x = torch.randn(tokens, 63)
    for bias, expected in ((0.0, 0), (-torch.inf, 0), (torch.inf, 0)):
        weights["controller_bias"].fill_(bias)
        assert (kernel.forward(x, *weights.values(), "relu", False)[1] == expected).all()
    weights["controller_bias"].zero_()[:, units // 2 :] = 1.0
    assert (check(kernel, x, weights) == units // 2).all()


@pytest.mark.parametrize("tokens", [2, 9])
def test_winners_that_relu_kills_are_not_read(kernel, tokens):
    """NaN in their rows of `down` would show."""
    weights = make_weights()
    weights["inner_bias"].fill_(-1e4)
    weights["down"].fill_(float("nan"))
    y, _ = kernel.forward(torch.randn(tokens, 63), *weights.values(), "relu", False)
    assert torch.equal(y, weights["bias"].expand(tokens, 63))


@pytest.mark.parametrize("tokens", [2, 9])
def test_rows_of_losers_are_not_read(kernel, tokens):
    weights, x = make_weights(), torch.randn(tokens, 63)
    expected, winners = kernel.forward(x, *weights.values(), "relu", False)
    lost = torch.ones(3, 5, dtype=torch.bool)
    lost[torch.arange(3).expand(tokens, 3), winners.long()] = False
    for name in ("up", "down"):
        weights[name][lost] = float("nan")
    assert torch.equal(kernel.forward(x, *weights.values(), "relu", False)[0], expected)


NOT_FINITE = """
    loop = runpy.run_path("kernels/sparse-ff/example.py")["plain_loop"]
    torch.manual_seed(0)
    shapes = [(7, 63), (3, 21, 7), (3, 21), (3, 21, 63), (3, 21, 63), (63,), (3, 21)]
    for tokens in (1, 8, 9):
        weights = [torch.randn(shape) for shape in shapes]
        x = torch.randn(tokens, 63)
        for number, multiply in ((float("nan"), False), (float("inf"), False), (-float("inf"), True)):
            weights[2][0, 5] = weights[2][0, 17] = weights[2][1, 20] = number
            weights[3][1, 20, 3] = number
            ours, expected = kernel.forward(x, *weights, "gelu", multiply), loop(x, *weights, "gelu", multiply)
            assert torch.equal(ours[1], expected[1]), (tokens, number)
            torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)
        x[0, 3] = float("nan")
        y, winners = kernel.forward(x, *weights, "relu", True)
        assert y[0].isnan().all() and (winners[0] == 0).all()
        assert y[1:].isfinite().all() or tokens > 1
    print("equal", kernel.ops.cpu_capability())
"""
EVERY_SIZE = """
    loop = runpy.run_path("kernels/sparse-ff/example.py")["plain_loop"]
    torch.manual_seed(0)
    for rank in (1, 3, 8, 31, 64):
        for width in (1, 7, 16, 77, 130):
            shapes = [(rank, width), (2, 9, rank), (2, 9), (2, 9, width), (2, 9, width), (width,), (2, 9)]
            weights = [torch.randn(shape) for shape in shapes]
            for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
                given = [tensor.to(dtype) for tensor in weights]
                for tokens in (1, 4, 7, 9):
                    x = torch.randn(tokens, width).to(dtype)
                    ours, expected = kernel.forward(x, *given, "relu", True), loop(x, *given, "relu", True)
                    assert torch.equal(ours[1], expected[1])
                    error = (ours[0].double() - expected[0]).abs().max() / expected[0].abs().max()
                    assert error < limit, (rank, width, dtype, tokens, error)
    print("equal", kernel.ops.cpu_capability())
"""


# Loaded as the build loads it: the package would take seconds to import.
LOAD = f"""
import runpy, sys, torch
from pathlib import Path
sys.path.append("kernels")
from kernel_testing.loading import load_variant
kernel = load_variant(Path({str(VARIANT)!r}))
"""


def in_a_fresh_process(code, capability):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if {"avx512": "avx512bw", "avx2": "avx2"}.get(capability, "") not in flags:
        pytest.skip(f"this processor has no {capability}")
    result = subprocess.run(
        [sys.executable, "-c", LOAD + code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SPARSE_FF_CPU_CAPABILITY": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("capability", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(kernel, capability):
    code = textwrap.dedent(EVERY_SIZE) + textwrap.dedent(NOT_FINITE)
    assert in_a_fresh_process(code, capability) == ["equal", capability] * 2


def test_an_instruction_set_that_is_not_there_is_refused(kernel):
    code = """
        one = torch.ones(1, 1, 1)
        try:
            kernel.forward(one[0], one[0], one, one[0], one, one, None, None, "relu", False)
        except RuntimeError as error:
            print(error)
    """
    assert "SPARSE_FF_CPU_CAPABILITY is mmx, but here it is one of" in " ".join(
        in_a_fresh_process(textwrap.dedent(code), "mmx")
    )


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_input_has_an_effect(kernel, dtype, misaligned):
    """Every tensor stands in memory full of NaN."""
    weights = make_weights(37, 3, 6, 19, dtype, dtype, dtype)
    for tokens in (3, 9):
        x = torch.randn(tokens, 37).to(DTYPES[dtype])
        given = {name: GuardedTensor(t.shape, t.dtype, misaligned, t) for name, t in {"x": x, **weights}.items()}
        check(kernel, given["x"].tensor, {name: given[name].tensor for name in NAMES}, multiply=True)
        for name, guarded in given.items():
            guarded.check(name)


def test_no_tokens(kernel):
    y, winners = kernel.forward(torch.empty(0, 63), *make_weights().values(), "relu", False)
    assert (y.shape, winners.shape) == ((0, 63), (0, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(63)}, r"x must have shape \(tokens, width\), not \(63\)"),
        ({"x": torch.zeros(2, 62)}, r"controller_down must have shape \(7, 62\), not \(7, 63\)"),
        ({"x": torch.zeros(2, 63, dtype=torch.double)}, "x must be float32, bfloat16 or float16, not Double"),
        ({"x": torch.zeros(2, 63, dtype=torch.int)}, "x must be float32"),
        ({"controller_up": torch.zeros(15, 7)}, r"controller_up must have shape \(blocks, block_size, rank\)"),
        ({"controller_up": torch.zeros(3, 0, 7)}, r"No dimension but that of tokens may be 0"),
        ({"controller_bias": torch.zeros(15)}, r"controller_bias must have shape \(3, 5\), not \(15\)"),
        ({"up": torch.zeros(3, 63, 5).mT}, "up must be contiguous in its last dimension"),
        ({"down": torch.zeros(3, 5, 64)}, r"down must have shape \(3, 5, 63\)"),
        ({"down": torch.zeros(3, 5, 63, dtype=torch.double)}, "down must be float32, bfloat16 or float16, not Double"),
        ({"bias": torch.zeros(1, 63)}, r"bias must have shape \(63\), not \(1, 63\)"),
        ({"inner_bias": torch.zeros(3, 6)}, r"inner_bias must have shape \(3, 5\), not \(3, 6\)"),
        ({"activation": "tanh"}, "activation must be relu, gelu, gelu_new or silu, not tanh"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_what_is_wrong(kernel, changes, message):
    given = {"x": torch.zeros(2, 63), **make_weights(), "activation": "relu", **changes}
    with pytest.raises(RuntimeError, match=message):
        kernel.forward(*given.values(), False)


def test_opcheck(kernel):
    for tokens in (1, 9):
        given = (torch.randn(tokens, 63), *make_weights().values(), "gelu", True)
        torch.library.opcheck(kernel.ops.forward.default, given)


def test_forward_mode_is_refused(kernel):
    weights, x = make_weights(), torch.randn(2, 63)
    for function in (kernel.sparse_feed_forward, lambda x, *rest: kernel.forward(x, *rest, "relu", False)):
        with pytest.raises(RuntimeError, match="no forward-mode derivative: call `sparse_ff` of `hf_efficient"):
            torch.func.jvp(lambda x, run=function: run(x, *weights.values())[0], (x,), (x,))


def test_a_gradient_is_refused(kernel):
    weights = make_weights()
    weights["up"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        kernel.sparse_feed_forward(torch.randn(2, 63), *weights.values())
    with torch.no_grad():
        kernel.sparse_feed_forward(torch.randn(2, 63), *weights.values())


def test_it_compiles_as_one_node(kernel):
    weights, x = make_weights(), torch.randn(3, 63)
    compiled = torch.compile(kernel.sparse_feed_forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for one, other in zip(
            compiled(x, *weights.values()), kernel.sparse_feed_forward(x, *weights.values()), strict=True
        ):
            assert torch.equal(one, other)


def strided(tensor):
    """The same values with something between the numbers of a row."""
    return torch.stack([tensor, torch.full_like(tensor, 99.0)], dim=-1)[..., 0]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_a_strided_last_dimension(monkeypatch, caplog, name, tokens):
    """Vectors are copied; of a matrix the op says once that it runs in plain torch, or refuses it by its name."""
    monkeypatch.setattr(backend, "_said", set())
    weights, x = make_weights(), torch.randn(tokens, 63)
    with use_backend("cpu"):
        expected, winners = sparse_ff(x, **weights)
    weights[name] = strided(weights[name])
    is_vector = name.endswith("bias")
    for _ in range(2):
        found, found_winners = sparse_ff(x, **weights)
        assert last_backend(OP_NAME) == ("cpu" if is_vector else "reference")
        torch.testing.assert_close(found, expected)
        assert torch.equal(found_winners, winners)
    said = [record for record in caplog.records if f"since {name} is not contiguous" in record.getMessage()]
    assert len(said) == (0 if is_vector else 1)
    with use_backend("cpu"):
        if is_vector:
            assert torch.equal(sparse_ff(x, **weights)[0], expected)
        else:
            with pytest.raises(ValueError, match=rf"{name} is not contiguous.*Give {name}.contiguous\(\)"):
                sparse_ff(x, **weights)
    with use_backend("reference"):
        torch.testing.assert_close(sparse_ff(x, **weights)[0], expected)


@torch.no_grad()
def test_a_last_dimension_of_one_number_has_no_stride():
    weights = make_weights(rank=1)
    x = torch.randn(3, 63)
    expected = sparse_ff(x, **weights)[0]
    weights["controller_up"] = strided(weights["controller_up"])
    with use_backend("cpu"):
        torch.testing.assert_close(sparse_ff(x, **weights)[0], expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 3), (0,), (2, 0)], ids=str)
def test_the_public_call_gives_what_the_kernel_gives(kernel, shape, mode):
    """Whatever the shape and the mode, of which some skip torch's dispatcher; input that is not contiguous too."""
    weights, x = make_weights(), torch.randn(*shape, 63)
    expected = kernel.forward(x.reshape(-1, 63), *weights.values(), "relu", False)
    with mode(), use_backend("cpu"):
        for given in (x, strided(x), x.mT.contiguous().mT if x.dim() > 1 else x):
            output, winners = sparse_ff(given, **weights)
            assert last_backend(OP_NAME) == "cpu"
            assert (output.shape, winners.shape) == (x.shape, (*shape, 3))
            assert torch.equal(output.reshape(-1, 63), expected[0])
            assert torch.equal(winners.reshape(-1, 3), expected[1])
