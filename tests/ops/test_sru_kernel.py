"""The compiled recurrence by itself: its ops, its instruction sets, and what it says of input that it cannot take."""

import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import sru_reference
from hf_efficient.ops.kernel_loader import find_variant, load_kernel
from hf_efficient.ops.sru import KERNEL
from tests.ops.sru_inputs import sizes


ROOT = Path(__file__).resolve().parents[2]
VARIANT = find_variant(KERNEL, "cpu")
pytestmark = pytest.mark.skipif(VARIANT is None, reason=f"{KERNEL} is not built: run `python kernels/build.py`")


@pytest.fixture(scope="module")
def kernel():
    return load_kernel(KERNEL, "cpu")


def arguments(batch=3, length=7, width=5, parts=3, dtype=torch.float32, requires_grad=False, **changes):
    """All arguments of the op, in their order; `name=value` replaces one."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    given = {
        "u": random(batch, length, parts, width),
        "x": random(batch, length, width) if parts == 3 else None,
        "weight_c": random(2, width),
        "bias": random(2, width),
        "c0": random(batch, width),
        "mask": torch.rand(batch, length) < 0.8,
        "document_start": torch.rand(batch, length) < 0.2,
        "dropout_mask": (torch.rand(batch, width) < 0.7).to(dtype) / 0.7,
        "scale_x": 1.3,
        "activation": "identity",
        "reverse": False,
    }
    unknown = set(changes) - set(given)
    assert not unknown, unknown
    return list({**given, **changes}.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "tanh", "reverse": True}, {"parts": 4, "mask": None, "document_start": None}],
    ids=["all", "tanh-reverse", "k4"],
)
def test_opcheck(kernel, options):
    given = arguments(dtype=torch.float64, requires_grad=True, **options)
    torch.library.opcheck(kernel.ops.forward.default, given)
    h, states = kernel.forward(*given)
    plain = [value.detach() if torch.is_tensor(value) else value for value in given]
    grads = (torch.randn_like(h), torch.randn_like(states), states.detach())
    torch.library.opcheck(kernel.ops.backward.default, (*grads, *plain))
    torch.library.opcheck(kernel.ops.forward_last.default, plain)
    torch.library.opcheck(kernel.ops.forward_out.default, (torch.empty_like(h), torch.empty_like(states), *plain))
    room = [None if tensor is None else torch.empty_like(tensor) for tensor in plain[:5]]
    torch.library.opcheck(kernel.ops.backward_out.default, (*room, *grads, *plain))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradcheck_of_its_own_gradient(kernel, reverse):
    given = arguments(batch=2, length=4, width=3, dtype=torch.float64, requires_grad=True, reverse=reverse)
    assert torch.autograd.gradcheck(kernel.sru_recurrence, given)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize(
    ("u_dtype", "x_dtype"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize(("batch", "length", "width"), sizes((1, 1, 1), (1, 63, 5), (3, 2, 500), (2, 5, 2500)))
def test_odd_sizes_and_mixed_dtypes(kernel, batch, length, width, u_dtype, x_dtype, activation):
    """Equal to the torch form: input in half the precision is exact in float32, and what comes out is rounded alike,
    but for the rare value next to a border."""
    given = arguments(batch, length, width, activation=activation)
    given[0], given[1] = given[0].to(getattr(torch, u_dtype)), given[1].to(getattr(torch, x_dtype))
    given[0][~given[5]] = float("nan")
    ours, expected = kernel.forward(*given), sru_reference.forward(*given)
    grads = (torch.randn(batch, length, width).to(given[1].dtype), torch.randn_like(expected[1]), expected[1])
    names = ("h", "states", "grad u", "grad x", "grad weight_c", "grad bias", "grad c0")
    pairs = zip(
        (*ours, *kernel.backward(*grads, *given)), (*expected, *sru_reference.backward(*grads, *given)), strict=True
    )
    for name, (one, other) in zip(names, pairs, strict=True):
        tolerance = {"atol": 2e-5, "rtol": 2e-5} if one.dtype == torch.float32 else {"atol": 1e-3, "rtol": 2**-7}
        torch.testing.assert_close(one, other, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_goes_in_and_comes_out(kernel, dtype):
    """A closed output gate hands the highway's input through; rounding is torch's, for subnormal numbers, ties and what
    becomes infinite too."""
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
    u = torch.full((1, 1, 3, 2**16), -200.0)  # the gate's sigmoid is 0: h = x
    u[:, :, 0] = 0.0
    h, _ = kernel.forward(u, everything, *[None] * 6, 1.0, "identity", False)
    finite = everything.isfinite()
    assert torch.equal(h[finite], everything[finite])
    assert not h[~finite].isfinite().any()
    middle = torch.linspace(-70000, 70000, 99_991).view(1, 1, -1) ** 3 / 70000**2
    u = torch.full((1, 1, 3, 99_991), -200.0)
    u[:, :, 0] = 0.0
    out = torch.empty(1, 1, 99_991, dtype=dtype)
    kernel.forward_out(out, torch.empty(1, 2, 99_991), u, middle, *[None] * 6, 1.0, "identity", False)
    assert torch.equal(out, middle.to(dtype))


def test_results_do_not_depend_on_threads(kernel):
    """Work is divided otherwise, and sums over the batch and over time keep their order."""
    given = arguments(batch=3, length=63, width=500)
    grads = (torch.randn(3, 63, 500), torch.randn(3, 64, 500))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            h, states = kernel.forward(*given)
            results.append((h, states, *kernel.backward(*grads, states, *given)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def in_a_fresh_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


COMPARE = """
    import torch
    from hf_efficient.ops import sru_reference
    from hf_efficient.ops.kernel_loader import load_kernel

    kernel = load_kernel("sru-recurrence", "cpu")
    for activation in ("identity", "tanh"):
        for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
            torch.manual_seed(0)
            u, x = torch.randn(2, 63, 3, 500, dtype=dtype), torch.randn(2, 63, 500, dtype=dtype)
            weight_c, bias = (0.3 * torch.randn(2, 500, dtype=dtype) for _ in range(2))
            given = (u, x, weight_c, bias, None, None, None, None, 1.0, activation, False)
            ours, expected = kernel.forward(*given), sru_reference.forward(*given)
            grads = (torch.randn_like(x), None, expected[1])
            pairs = zip((*ours, *kernel.backward(*grads, *given)),
                        (*expected, *sru_reference.backward(*grads, *given)), strict=True)
            for one, other in pairs:
                if other.numel():
                    error = (one - other).abs().max() / other.abs().max()
                    assert error < bound, (activation, dtype, error)
    print(kernel.ops.cpu_capability())
"""

# Numbers that are not finite or close a gate: the torch form says where NaN comes out, and what saturates. An infinite
# candidate or highway input is left out, since both forms may make NaN of it.
NOT_FINITE = """
    import torch
    from hf_efficient.ops import sru_reference
    from hf_efficient.ops.kernel_loader import load_kernel

    kernel = load_kernel("sru-recurrence", "cpu")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u, x = torch.randn(1, 3, 3, 37).to(dtype), torch.randn(1, 3, 37).to(dtype)
        numbers = [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 60.0, -60.0, 43.5, -43.5]
        for unit, number in enumerate(numbers):
            u[0, 1, 1, unit] = u[0, 1, 2, unit + 9] = number
        x[0, 1, 18] = u[0, 1, 0, 19] = float("nan")
        for activation in ("identity", "tanh"):
            given = (u, x, torch.full((2, 37), 0.3), None, None, None, None, None, 1.0, activation, False)
            ours, expected = kernel.forward(*given), sru_reference.forward(*given)
            grads = (torch.ones_like(x), None, expected[1].nan_to_num(0.5, 1e4, -1e4))
            pairs = zip((*ours, *kernel.backward(*grads, *given)[:2]),
                        (*expected, *sru_reference.backward(*grads, *given)[:2]), strict=True)
            for one, other in pairs:
                close = {"atol": 1e-5, "rtol": 1e-5} if one.dtype == torch.float32 else {"atol": 1e-3, "rtol": 2**-7}
                torch.testing.assert_close(one, other, **close, equal_nan=True)
    print("not finite: equal")
"""


def skip_without(capability: str) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if capability != "baseline" and {"avx512": "avx512bw", "avx2": "avx2"}[capability] not in flags:
        pytest.skip(f"this processor has no {capability}")


@pytest.mark.parametrize("capability", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(kernel, capability):
    """On random numbers, and on some that are not finite."""
    skip_without(capability)
    code = textwrap.dedent(COMPARE) + textwrap.dedent(NOT_FINITE)
    said = in_a_fresh_process(code, SRU_RECURRENCE_CPU_CAPABILITY=capability)
    assert said.splitlines() == [capability, "not finite: equal"]


def test_an_instruction_set_that_is_not_there_is_refused(kernel):
    code = """
        import torch
        from hf_efficient.ops.kernel_loader import load_kernel
        try:
            load_kernel("sru-recurrence", "cpu").forward(torch.ones(1, 1, 3, 5), *[None] * 7, 1.0, "identity", False)
        except RuntimeError as error:
            print(error)
    """
    assert "is mmx, but here it is one of" in in_a_fresh_process(code, SRU_RECURRENCE_CPU_CAPABILITY="mmx")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (binutils)")
def test_loops_became_vector_code(kernel):
    """Registers of 256 and 512 bits do arithmetic; without that a step takes six times as long."""
    if "x86_64" not in VARIANT.name:
        pytest.skip("not an x86-64 library")
    (library,) = VARIANT.glob("*.so")
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    for register in ("ymm", "zmm"):
        assert len(re.findall(rf"v(?:fn?m(?:add|sub)|div|mul|add)\w*ps .*%{register}", code)) > 100, register
        # The clamp is a minimum and a maximum: compares and blends would be a sixth of all instructions.
        assert all(re.search(rf"v{name}ps .*%{register}", code) for name in ("min", "max")), register


def test_memory_of_large_results_is_used_again(kernel):
    """Else the system fills it with zeros for each call. What is still in use is left alone."""
    given = arguments(batch=2, length=512, width=2048)
    kept = kernel.forward(*given)
    copies = [tensor.clone() for tensor in kept]
    freed = {tensor.data_ptr() for tensor in kernel.forward(*given)}
    again = kernel.forward(*given)
    assert {tensor.data_ptr() for tensor in again} == freed
    assert not freed & {tensor.data_ptr() for tensor in kept}
    for one, two, copy in zip(kept, again, copies, strict=True):
        assert torch.equal(one, copy)
        assert torch.equal(two, copy)


def test_little_memory_is_kept(kernel):
    """At most 128 MiB, so that a large call does not leave the process as large as it was."""
    code = """
        import torch
        from hf_efficient.ops.kernel_loader import load_kernel

        def resident():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024

        kernel = load_kernel("sru-recurrence", "cpu")
        given = (torch.ones(8, 512, 3, 2048), *[None] * 7, 1.0, "identity", False)
        kernel.forward(*given)
        before = resident()
        results = [kernel.forward(*given) for _ in range(8)]
        print(resident() - before)
        results.clear()
        print(resident() - before)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    held, kept = map(int, in_a_fresh_process(code).split())
    assert held > 300
    assert kept < 140


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's malloc")
def test_memory_of_other_tensors_stays_with_the_process(kernel):
    """glibc learns from large blocks that are freed to hold on to memory; results that are kept must not hide that."""
    code = """
        import resource
        import torch
        from hf_efficient.ops.kernel_loader import load_kernel

        def faults():
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(2**22) for _ in range(3)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

        torch.set_num_threads(1)
        load_kernel("sru-recurrence", "cpu").forward(torch.ones(1, 512, 3, 2048), *[None] * 7, 1.0, "identity", False)
        counts = [faults() for _ in range(7)]
        print(sum(counts[-2:]))
    """
    assert int(in_a_fresh_process(code)) < 1000  # of 4 KiB; twice three tensors of 16 MiB are some 24,600


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system gives no huge pages on demand"
)
def test_large_fresh_results_ask_for_huge_pages(kernel):
    """Else first touches of memory take as long as the pass itself."""
    given = arguments(batch=2, length=512, width=2048)
    h, states = kernel.forward(*given)
    results = {"h": h, "states": states, "grad u": kernel.backward(h, None, states, *given)[0]}
    results["h of forward_last"] = kernel.forward_last(*given)[0]
    regions = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: ([\w ]*)$",
        Path("/proc/self/smaps").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    for name, tensor in results.items():
        middle = tensor.data_ptr() + tensor.nbytes // 2
        (flags,) = [flags for begin, end, flags in regions if int(begin, 16) <= middle < int(end, 16)]
        assert "hg" in flags.split(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(2, 7, 5)}, r"u must have shape \(batch, length, 3 or 4, width\)"),
        ({"u": torch.zeros(3, 7, 2, 5)}, r"u must have shape .* not \(3, 7, 2, 5\)"),
        ({"u": torch.zeros(3, 0, 3, 5)}, "u has length 0"),
        ({"u": torch.zeros(3, 7, 3, 5, dtype=torch.long)}, "u must be float32, float64, bfloat16 or float16, not Long"),
        ({"x": torch.zeros(3, 6, 5)}, r"x must have shape \(3, 7, 5\), not \(3, 6, 5\)"),
        ({"x": torch.zeros(3, 7, 5, dtype=torch.int)}, "x must be float32"),
        ({"weight_c": torch.zeros(10)}, r"weight_c must have shape \(2, 5\), not \(10\)"),
        ({"bias": torch.zeros(2, 5, dtype=torch.bool)}, "bias must be float32"),
        ({"c0": torch.zeros(1, 5)}, r"c0 must have shape \(3, 5\)"),
        ({"mask": torch.ones(3, 7)}, "mask must be boolean"),
        ({"document_start": torch.ones(3, 8, dtype=torch.bool)}, "document_start must have shape"),
        ({"dropout_mask": torch.ones(3, 7, 5)}, "dropout_mask must have shape"),
        ({"activation": "relu"}, "activation must be identity or tanh, not relu"),
        ({"u": torch.zeros(3, 7, 4, 5)}, "give no x"),
    ],
    ids=[
        "three-dimensions",
        "two-parts",
        "no-steps",
        "integers",
        "x-length",
        "x-integers",
        "weight_c-shape",
        "bias-booleans",
        "c0-shape",
        "mask-floats",
        "document_start-shape",
        "dropout_mask-shape",
        "activation",
        "x-beside-four-parts",
    ],
)
def test_errors_name_what_is_wrong(kernel, changes, message):
    with pytest.raises(RuntimeError, match=message):
        kernel.forward(*arguments(**changes))


def test_results_given_by_the_caller_are_checked(kernel):
    given = arguments()
    h, states = kernel.forward(*given)
    with pytest.raises(RuntimeError, match="states must have the state's dtype"):
        kernel.forward_out(h, states.double(), *given)
    with pytest.raises(RuntimeError, match=r"h must have shape \(3, 7, 5\), not \(3, 7, 4\)"):
        kernel.forward_out(h[..., :4], states, *given)
    with pytest.raises(RuntimeError, match="h must be contiguous in its last dimension"):
        kernel.forward_out(h.mT.contiguous().mT, states, *given)
    with pytest.raises(RuntimeError, match="states must have shape"):
        kernel.backward(h, None, states[:, 1:], *given)
    with pytest.raises(RuntimeError, match="grad_weight_c must be contiguous and have the state's dtype"):
        kernel.backward_out(
            given[0].clone(), given[1].clone(), torch.empty(2, 5).double(), None, None, h, None, states, *given
        )


def test_results_go_where_the_caller_says(kernel):
    """Slices of larger tensors, with strides; what lies beside them stays."""
    given = arguments(width=500)
    h, states = kernel.forward(*given)
    room = torch.full((3, 9, 600), 7.0)
    states_room = torch.empty(8, 3, 500).transpose(0, 1)
    kernel.forward_out(room[:, 1:8, 50:550], states_room, *given)
    assert torch.equal(room[:, 1:8, 50:550], h)
    assert torch.equal(states_room, states)
    room[:, 1:8, 50:550] = 7.0
    assert (room == 7.0).all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_last_state_alone(kernel, dtype, reverse):
    """Without room for the states between, and to the bit the same, pads and document starts included."""
    for batch, length, width in ((3, 63, 500), (1, 1, 5), (2, 7, 4500)):
        given = arguments(batch, length, width, dtype=dtype, reverse=reverse)
        h, states = kernel.forward(*given)
        h_alone, last = kernel.forward_last(*given)
        assert torch.equal(h_alone, h)
        assert torch.equal(last, states[:, 0 if reverse else -1])
        assert last.untyped_storage().nbytes() == batch * width * last.element_size()


def test_a_second_derivative_is_refused(kernel):
    u = torch.randn(1, 2, 3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernel.sru_recurrence(u)[0].sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(("batch", "width"), [(0, 5), (2, 0)], ids=["no-rows", "no-units"])
def test_nothing_to_do(kernel, batch, width):
    """The gradient of a sum is expanded, with strides of 0."""
    u = torch.randn(batch, 7, 3, width, requires_grad=True)
    weight_c = torch.randn(2, width, requires_grad=True)
    h, states = kernel.sru_recurrence(u, weight_c=weight_c)
    assert (h.shape, states.shape) == ((batch, 7, width), (batch, 7, width))
    h.sum().backward()
    assert u.grad.shape == u.shape
    assert (weight_c.grad == 0).all()


def test_rooms_that_would_be_overwritten_are_refused(kernel):
    given = arguments()
    h, states = kernel.forward(*given)
    with pytest.raises(RuntimeError, match="h must have room for each row of the batch"):
        kernel.forward_out(h[:1].expand(3, 7, 5), states, *given)
    with pytest.raises(RuntimeError, match="states must be what the forward pass gave: those of all steps"):
        kernel.backward(h, None, states[:, :1].expand(3, 8, 5), *given)
