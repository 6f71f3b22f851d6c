"""Layers with weights of 8 and 4 bits: the compiled kernel against plain torch, with every instruction set, and which
of the two runs."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import decode_layer, quantized
from hf_efficient.ops.backend import BackendUnavailableError, last_backend, use_backend
from hf_efficient.ops.decode_layer import KERNEL, OP_NAME
from hf_efficient.ops.kernel_loader import find_variant, load_kernel
from hf_efficient.ops.quantized import pack_records, quantize_rows


ROOT = Path(__file__).resolve().parents[2]
needs_kernel = pytest.mark.skipif(
    find_variant(KERNEL, "cpu") is None, reason=f"{KERNEL} is not built: run `python kernels/build.py`"
)
kinds = pytest.mark.parametrize("kind", quantized.FORMATS)


def matrix(rows, width, kind="int8"):
    return quantize_rows(torch.randn(rows, width), kind)


def sparse_weights(width=63, blocks=3, units=5, rank=7, kind="int8"):
    controller = (*matrix(rank, width), *quantize_rows(torch.randn(blocks, units, rank), "int8"))
    records = pack_records(torch.randn(blocks, units, width), torch.randn(blocks, units, width), kind)
    return (*controller, torch.randn(blocks, units), records, torch.randn(width), torch.randn(blocks, units))


def calls(kind="int8"):
    """Of each op a name, and the call with an input."""
    linear, gating, projection = matrix(9, 60, kind), matrix(6, 60), matrix(10, 60)
    kernel, sparse = matrix(5, 3 * 3 * 10), sparse_weights(60, kind=kind)
    bias = torch.randn(60)
    return {
        "linear": lambda ops, x: ops.quantized_linear(x, *linear, bias[:9]),
        "multiplicative": lambda ops, x: ops.quantized_multiplicative(x, *gating, *projection, bias),
        "module_conv": lambda ops, x: ops.quantized_module_conv(x.reshape(1, -1, 6, 10), *kernel, bias[:5], 3, 3),
        "sparse": lambda ops, x: ops.quantized_sparse_feed_forward(x, *sparse, activation="gelu")[0],
    }


@kinds
@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "multiplicative", "module_conv", "sparse"])
def test_the_kernel_equals_plain_torch(name, dtype, kind):
    """In whatever shape the input comes: the same integers, and so nearly the same numbers."""
    call = calls(kind)[name]
    for shape in ((3, 60), (9, 60), (1, 4, 60), (2, 1, 9, 60)):
        x = torch.randn(shape).to(dtype)
        found, expected = call(decode_layer, x), call(quantized, x)
        assert last_backend(OP_NAME) == "cpu"
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        limit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit * expected.abs().max().item())


COMPARE = """
    torch.manual_seed(0)
    kernel = load_kernel("decode-layer", "cpu")
    def same(found, expected, kind):
        assert torch.equal(found, expected) if kind == "int8" else torch.allclose(found, expected, 1e-4, 1e-3)
    for width in (1, 5, 33, 500, 1024, 1100):
        for kind in FORMATS:
            x = torch.randn(9, width)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 21):
                codes, bias = quantize_rows(torch.randn(rows, width), kind), torch.randn(rows)
                for count in (1, 2, 3, 8, 9):
                    found = kernel.linear(x[:count], *codes, bias)
                    same(found, quantized_linear(x[:count], *codes, bias), kind)
        gating, projection = (quantize_rows(torch.randn(rows, width), "int8") for rows in (3, 7))
        same(kernel.multiplicative(x, *gating, *projection), quantized_multiplicative(x, *gating, *projection), "int8")
        for units, rank in ((1, 1), (5, 7), (40, 33)):
            controller = quantize_rows(torch.randn(rank, width), "int8")
            up = quantize_rows(torch.randn(2, units, rank), "int8")
            rows = torch.randn(2, 2, units, width)
            for kind in FORMATS:
                weights = (*controller, *up, torch.randn(2, units), pack_records(*rows, kind))
                for count in (1, 8, 9):
                    found, winners = kernel.sparse_feed_forward(x[:count], *weights)
                    expected, chosen = quantized_sparse_feed_forward(x[:count], *weights)
                    assert torch.equal(winners, chosen)
                    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(1e-30)
    print(kernel.ops.cpu_capability())
"""
LOAD = """
import torch
from hf_efficient.ops.kernel_loader import load_kernel
from hf_efficient.ops.quantized import *
"""


def in_a_fresh_process(code, capability=None):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"avx512_vnni": "avx512_vnni", "avx512": "avx512bw", "avx2": "avx2"}
    if needed.get(capability, "") not in flags:
        pytest.skip(f"this processor has no {capability}")
    wanted = {} if capability is None else {"DECODE_LAYER_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, "-c", LOAD + textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **wanted},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_kernel
@pytest.mark.parametrize("capability", ["avx512_vnni", "avx512", "avx2", "baseline"])
def test_every_instruction_set_finds_the_same_integers_and_attends(capability):
    """The latter by the kernel's own tests, of sizes that fill registers and that do not."""
    attend = f"""
        import pytest
        tests = "{ROOT / "kernels/decode-layer/tests/test_attention.py"}"
        print("tests:", int(pytest.main(["-q", "-x", tests, "-k", "33 or 125 or conv"])))
    """
    result = in_a_fresh_process(textwrap.dedent(COMPARE) + textwrap.dedent(attend), capability)
    said = result.stdout.splitlines()
    assert said[:1] == [capability], result.stderr
    assert said[-1:] == ["tests: 0"], result.stdout + result.stderr


@needs_kernel
def test_an_instruction_set_that_is_not_there_is_refused():
    result = in_a_fresh_process('load_kernel("decode-layer", "cpu").ops.cpu_capability()', "mmx")
    assert "DECODE_LAYER_CPU_CAPABILITY is mmx, but here it is one of" in result.stderr


# Weights end where the next page must not be touched.
PAGE_END = """
    import ctypes, mmap
    libc = ctypes.CDLL(None)
    kernel = load_kernel("decode-layer", "cpu")
    pages = []
    def at_page_end(tensor):
        room = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        pages.append(memory)
        numbers = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - tensor.nbytes)
        numbers = numbers.view(tensor.shape).copy_(tensor)
        guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
        assert libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
        return numbers
    for width in (5, 33, 500):
        x = at_page_end(torch.randn(9, width))
        for kind in (*FORMATS, "float32", "bfloat16", "float16"):
            weight = torch.randn(6, width)
            given = quantize_rows(weight, kind) if kind in FORMATS else (weight.to(getattr(torch, kind)),)
            for count in (1, 9):
                kernel.linear(x[9 - count:], *map(at_page_end, given))
        for kind in FORMATS:
            rows = torch.randn(2, 2, 5, width)
            controller = (*quantize_rows(torch.randn(7, width), "int8"), *quantize_rows(torch.randn(2, 5, 7), "int8"))
            weights = (*controller, torch.randn(2, 5), pack_records(*rows, kind))
            kernel.sparse_feed_forward(x, *map(at_page_end, weights), activation="silu")
        for dtype in (torch.float32, torch.bfloat16):
            projection = at_page_end(torch.randn(width, 7).to(dtype))
            kernel.multiplicative(x, at_page_end(torch.randn(3, width).to(dtype)), None, projection)
    print("whole")
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by Linux's mprotect")
def test_nothing_is_read_behind_the_weights():
    result = in_a_fresh_process(PAGE_END)
    assert result.stdout.split() == ["whole"], result.stderr


@needs_kernel
@kinds
def test_threads_change_nothing(kind):
    x, linear = torch.randn(3, 4096), matrix(3000, 4096, kind)
    sparse = sparse_weights(4096, 64, 32, 16, kind)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            output, winners = decode_layer.quantized_sparse_feed_forward(x, *sparse)
            found.append((decode_layer.quantized_linear(x, *linear), output, winners))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_which_form_runs():
    call, x = calls()["linear"], torch.randn(3, 60)
    expected = call(quantized, x)
    with use_backend("reference"):
        assert torch.equal(call(decode_layer, x), expected)
        assert last_backend(OP_NAME) == "reference"
    call(decode_layer, x.double())
    assert last_backend(OP_NAME) == "reference"
    codes, bias = matrix(9, 60), torch.randn(9, dtype=torch.float64)
    found = decode_layer.quantized_linear(x, *codes, bias)
    assert torch.equal(found, quantized.quantized_linear(x, *codes, bias))
    with pytest.raises(BackendUnavailableError, match="has no 'cuda' kernel"), use_backend("cuda"):
        call(decode_layer, x)


@pytest.mark.parametrize("name", ["linear", "multiplicative", "module_conv", "sparse"])
def test_a_compiler_and_transforms_see_plain_torch(name):
    call, x = calls()[name], torch.randn(3, 60)
    expected = call(quantized, x)
    torch.testing.assert_close(torch.func.vmap(lambda one: call(decode_layer, one), in_dims=0)(x[None])[0], expected)
    assert last_backend(OP_NAME) == "reference"
    compiled = torch.compile(lambda x: call(decode_layer, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(call(decode_layer, x.requires_grad_()), expected)


@needs_kernel
def test_rows_may_lie_apart():
    """Rows of units in records; other layouts run in plain torch, unless the kernel is asked for by name."""
    x = torch.randn(3, 60)
    for kind in quantized.FORMATS:
        records = pack_records(torch.randn(1, 7, 60), torch.randn(1, 7, 60), kind).squeeze(0)
        for codes, scales in quantized.unpack_records(records, 60, kind):
            expected = quantized.quantized_linear(x, codes, scales)
            torch.testing.assert_close(load_kernel(KERNEL, "cpu").linear(x, codes, scales), expected)
    codes, scales = matrix(5, 60)
    turned = codes.t().contiguous().t()
    expected = quantized.quantized_linear(x, codes, scales)
    assert torch.equal(decode_layer.quantized_linear(x, turned, scales), expected)
    assert last_backend(OP_NAME) == "reference"
    with use_backend("cpu"), pytest.raises(ValueError, match="a weight is not contiguous"):
        decode_layer.quantized_linear(x, turned, scales)


def test_errors_name_what_does_not_fit():
    x, codes = torch.randn(3, 60), matrix(5, 90)
    with pytest.raises(ValueError, match=r"x of shape \(3, 60\) does not fit rows of codes with 96 numbers"):
        decode_layer.quantized_linear(x, *codes)
    with pytest.raises(ValueError, match="does not fit rows of projection with 96 numbers"):
        decode_layer.quantized_multiplicative(x, *matrix(5, 60), *codes)
    with pytest.raises(
        ValueError, match="Rows of kernel with 96 numbers do not fit 3 tokens, 3 modules and 5 channels"
    ):
        decode_layer.quantized_module_conv(torch.randn(1, 3, 4, 5), *codes, None, 3, 3)
    *controller, _, _, _ = sparse_weights(60)
    with pytest.raises(ValueError, match="units with 64 bytes a record are of no format of rows of 60 numbers"):
        decode_layer.quantized_sparse_feed_forward(x, *controller, torch.zeros(3, 5, 64, dtype=torch.uint8))
