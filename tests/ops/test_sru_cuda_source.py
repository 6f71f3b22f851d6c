"""The recurrence's CUDA source where there is no GPU: its columns run on the host; the compiler's report is read."""

import hashlib
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import sru_reference
from tests.ops.host_emulation import SHARED
from tests.ops.sru_emulation import KERNEL, Emulated, compile_emulation
from tests.ops.sru_inputs import sizes


FOUND_NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SOURCES = [KERNEL / "sru_cuda" / name for name in ("forward.cu", "backward.cu")]
ARCHITECTURES = ("80", "90", "100", "120")
# Six blocks of 64 threads then fit on a multiprocessor; four where masks and document starts are read ahead as well.
MOST_REGISTERS = {"without flags": 168, "with flags": 255}
NAMES = ("u", "x", "weight_c", "bias", "c0", "mask", "document_start", "dropout_mask")


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    return compile_emulation(tmp_path_factory.mktemp("emulation"), "-O0")


def make_inputs(names, batch, length, width, parts=3, dtype=torch.float32, x_type=None):
    """`u` and those of the optional arguments that are named; NaN at pads, and values at which gates are shut."""
    state = torch.promote_types(dtype, torch.float32)
    makers = {
        "u": lambda: 2 * torch.randn(batch, length, parts, width),
        "x": lambda: torch.randn(batch, length, width),
        # With larger weights some of many units are chaotic: they multiply each rounding at every step.
        "weight_c": lambda: 0.3 * torch.randn(2, width),
        "bias": lambda: torch.randn(2, width),
        "c0": lambda: torch.randn(batch, width),
        "mask": lambda: torch.rand(batch, length) < 0.7,
        "document_start": lambda: torch.rand(batch, length) < 0.3,
        "dropout_mask": lambda: (torch.rand(batch, width) < 0.7) / 0.7,
    }
    types = {"u": dtype, "x": x_type or dtype, "mask": torch.bool, "document_start": torch.bool}
    inputs = {name: makers[name]().to(types.get(name, state)) for name in ("u", *names)}
    inputs["u"][:1, :1, 1, :1], inputs["u"][-1:, -1:, 1, -1:] = -200.0, 200.0
    if "mask" in inputs:
        for name in {"u", "x"} & inputs.keys():
            inputs[name][~inputs["mask"]] = float("nan")
    return inputs


def arguments_of(inputs, options):
    return *(inputs.get(name) for name in NAMES), options["scale_x"], options["activation"], options["reverse"]


def compare(ours, expected, what):
    # Both compute in float32 or float64; results in 16 bits may be rounded to neighbouring numbers.
    limits = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    limit = max(limits[ours.dtype], limits[expected.dtype])
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=limit, rtol=limit, msg=lambda m: f"{what}: {m}")


def check(functions, inputs, options, enough=1, misaligned=False, h_type=None, with_gradient_of=("h", "states")):
    """Both passes, and the forward pass with the last state alone, against the torch form; the kernels that ran."""
    arguments = arguments_of(inputs, options)
    h, states = sru_reference.forward(*arguments)
    emulated = Emulated(functions, inputs, options, enough, misaligned)
    our_h, our_states = emulated.forward(h_type or h.dtype)
    kernels = [emulated.kernel]
    compare(our_h, h, "h")
    compare(our_states, states, "states")
    last_h, last_state = emulated.forward_last(h_type or h.dtype)
    assert emulated.kernel == kernels[0]
    assert torch.equal(last_h, our_h), "h beside the last state alone"
    assert torch.equal(last_state, our_states[:, 0 if options["reverse"] else -1]), "the last state alone"
    grad_h = torch.randn_like(h, dtype=our_h.dtype) if "h" in with_gradient_of else None
    if grad_h is not None and "mask" in inputs:
        grad_h[~inputs["mask"]] = float("nan")
    grad_states = torch.randn_like(states) if "states" in with_gradient_of else None
    expected = sru_reference.backward(grad_h, grad_states, states, *arguments)
    ours = emulated.backward(states, grad_h, grad_states)
    for name, gradient in zip(NAMES, expected, strict=False):
        if name in ours:
            compare(ours[name], gradient, f"gradient of {name}")
    return [*kernels, emulated.kernel]


def units_of(kernels):
    """The number of units that a thread of each kernel takes."""
    return [int(re.search(r" V(\d+) ", kernel)[1]) for kernel in kernels]


FORMS = {"no-highway": (3, ()), "k3": (3, ("x",)), "k4": (4, ())}
OPTIONAL = ("weight_c", "bias", "c0", "mask", "document_start", "dropout_mask")
TYPES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "x_type"), TYPES, ids=str)
def test_columns_against_the_torch_form(emulation, dtype, x_type, form, reverse):
    """All dtypes, activations and widths of access, and lengths around the ring's depth."""
    parts, names = FORMS[form]
    for activation in ("identity", "tanh"):
        options = {"scale_x": 1.7 if names else 1.0, "activation": activation, "reverse": reverse}
        for length in (1, 2, 16, 17, 63):
            inputs = make_inputs((*names, *OPTIONAL), 2, length, 16, parts, dtype, x_type if names else None)
            widest = 16 // dtype.itemsize, 16 // max(dtype.itemsize, 4)
            for fewest, expected in ((8, widest), (2, (2, 2)), (1, (1, 1))):
                assert units_of(check(emulation, inputs, options, enough=2 * 16 // fewest)) == [*expected]


# dtypes of u and of x, by what the kernels' names say of u, h and the state.
KERNEL_TYPES = {
    "float32 float32 float32": (torch.float32, None),
    "float64 float64 float64": (torch.float64, None),
    "bfloat16 bfloat16 float32": (torch.bfloat16, None),
    "float16 float16 float32": (torch.float16, None),
    "bfloat16 float32 float32": (torch.bfloat16, torch.float32),
    "float16 float32 float32": (torch.float16, torch.float32),
    "any any float32": (torch.float32, torch.bfloat16),
    "any any float64": (torch.float64, torch.float32),
}
FLAGS = {
    "no-flags": (),
    "mask": ("mask",),
    "document_start": ("document_start",),
    "both-flags": ("mask", "document_start"),
}
# A width that is divisible by no more units than these.
WIDTHS = {8: 16, 4: 12, 2: 6, 1: 5}


def kernel_cases():
    """Types and units of a thread in both passes, of every kernel that a call can reach."""
    for types, (dtype, _) in KERNEL_TYPES.items():
        forward = 1 if types.startswith("any") else 16 // dtype.itemsize
        backward = min(forward, 16 // max(dtype.itemsize, 4))
        for units in WIDTHS:
            if units <= forward:
                yield pytest.param(types, units, min(units, backward), id=f"{types.replace(' ', '-')}-V{units}")


def kernel_names(types, units, activation, flagged):
    flags = "flags" if flagged else "no-flags"
    return [f"{name} {types} V{V} {activation} {flags}" for name, V in zip(("forward", "backward"), units, strict=True)]


def test_the_cases_reach_every_kernel_that_there_is(emulation):
    """A kernel that the dispatcher holds and no case reaches fails here."""
    expected = set()
    for case in kernel_cases():
        types, *units = case.values
        for activation, flagged in itertools.product(("identity", "tanh"), (False, True)):
            expected.update(kernel_names(types, units, activation, flagged))
    assert expected == set(emulation.all_kernels().decode().splitlines())


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("types", "forward_units", "backward_units"), [*kernel_cases()])
def test_every_kernel_against_the_torch_form(emulation, types, forward_units, backward_units, flags):
    """In both directions, with each form of highway, with and without a view of the gates on the state."""
    dtype, x_type = KERNEL_TYPES[types]
    for activation, reverse, peephole, form in itertools.product(
        ("identity", "tanh"), (False, True), (False, True), FORMS if x_type is None else ("k3",)
    ):
        parts, names = FORMS[form]
        options = {"scale_x": 1.7 if names else 1.0, "activation": activation, "reverse": reverse}
        optional = ("weight_c", "bias", "c0", "dropout_mask") if peephole else ("bias",)
        inputs = make_inputs(
            (*names, *optional, *FLAGS[flags]), 2, 19, WIDTHS[forward_units], parts, dtype, x_type if names else None
        )
        expected = kernel_names(types, (forward_units, backward_units), activation, flags != "no-flags")
        assert check(emulation, inputs, options) == expected


def test_half_precision_takes_four_units_where_eight_do_not_fit(emulation):
    inputs = make_inputs(("x",), 2, 3, 1100, dtype=torch.bfloat16)
    kernels = check(emulation, inputs, {"scale_x": 1.0, "activation": "identity", "reverse": False})
    assert units_of(kernels) == [4, 4]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("batch", "length", "width"), sizes((1, 1, 1), (1, 63, 5), (3, 1, 500), (2, 63, 7), (1, 33, 500))
)
def test_odd_sizes_and_addresses(emulation, batch, length, width, reverse):
    options = {"scale_x": 1.0, "activation": "identity", "reverse": reverse}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(("x", *OPTIONAL), batch, length, width, dtype=dtype)
        check(emulation, inputs, options)
        assert units_of(check(emulation, inputs, options, misaligned=True)) == [1, 1]


@pytest.mark.parametrize(("batch", "width"), [(0, 7), (3, 0), (0, 0)], ids=["no-rows", "no-units", "neither"])
def test_without_elements_sums_are_zero_and_nothing_else_is_written(emulation, batch, width):
    """A batch without rows still has parameters; the emulation starts as many columns as a GPU would: none."""
    inputs = make_inputs(("x", *OPTIONAL), batch, 5, width)
    emulated = Emulated(emulation, inputs, {"scale_x": 1.0, "activation": "identity", "reverse": False}, 1, False)
    h, states = emulated.forward(torch.float32)
    gradients = emulated.backward(states, torch.randn_like(h), torch.randn_like(states))
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert torch.equal(gradient, torch.zeros_like(inputs[name])), name


def test_a_gpu_starts_nothing_for_no_columns():
    """What the emulation cannot show: a grid of no blocks is an error in CUDA."""
    launch = (SHARED / "cuda_launch.h").read_text()
    assert launch.index("if (count == 0) return;") < launch.index("<<<")
    for source in SOURCES:
        assert "<<<" not in source.read_text()


@pytest.mark.slow
def test_every_access_is_aligned(tmp_path, capfd):
    """By the compiler's own checks, which tell on stderr; a GPU refuses an access that is not."""
    functions = compile_emulation(tmp_path, "-O1", "-fsanitize=alignment,bounds")
    options = {"scale_x": 1.0, "activation": "identity", "reverse": True}
    for dtype, x_type in TYPES:
        for width in (1, 2, 4, 6, 7, 8, 16, 500):
            inputs = make_inputs(("x", *OPTIONAL), 2, 17, width, dtype=dtype, x_type=x_type)
            for misaligned in (False, True):
                check(functions, inputs, options, misaligned=misaligned)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("absent", OPTIONAL)
def test_each_argument_may_be_absent(emulation, absent):
    inputs = make_inputs([name for name in ("x", *OPTIONAL) if name != absent], 2, 9, 8)
    for gradient in ("h", "states"):
        check(emulation, inputs, {"scale_x": 1.0, "activation": "tanh", "reverse": False}, with_gradient_of=(gradient,))


@pytest.mark.parametrize(
    ("dtype", "x_type", "h_type", "parts"),
    [
        (torch.float32, torch.bfloat16, None, 3),
        (torch.float64, torch.float32, None, 3),
        (torch.float16, torch.bfloat16, None, 3),
        (torch.bfloat16, None, torch.float32, 4),
        (torch.float32, torch.float32, torch.float16, 3),
    ],
    ids=str,
)
def test_any_mixture_of_dtypes(emulation, dtype, x_type, h_type, parts):
    names = ("x", *OPTIONAL) if x_type else OPTIONAL
    inputs = make_inputs(names, 2, 9, 8, parts, dtype, x_type)
    options = {"scale_x": 0.8 if x_type else 1.0, "activation": "identity", "reverse": True}
    kernels = check(emulation, inputs, options, h_type=h_type)
    assert units_of(kernels) == [1, 1]
    assert all(" any any " in kernel for kernel in kernels)


def test_the_sources_share_the_mathematics_with_the_cpu():
    for source in SOURCES:
        assert '#include "../include/sru_cell.h"' in source.read_text()
    steps = (KERNEL / "sru_cuda" / "column.h").read_text()
    assert "forward_step<Tanh>(" in steps
    assert "backward_step<Tanh>(" in steps


REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def check_report(report):
    """Every kernel, for both architectures: nothing of its registers in memory, and no more of them than are stated."""
    kernels = REPORT.findall(report)
    assert {architecture for _, architecture, *_ in kernels} == {f"sm_{number}" for number in ARCHITECTURES}
    assert len(kernels) == report.count("Compiling entry function")
    for name, architecture, *figures in kernels:
        stack, stores, loads, registers = map(int, figures)
        assert stack == stores == loads == 0, f"{name} for {architecture} keeps registers in memory"
        # The last template argument, mangled.
        most = MOST_REGISTERS["with flags" if "ELb1EEEv" in name else "without flags"]
        assert registers <= most, f"{name} for {architecture}: {registers} registers"


def test_what_the_compiler_said_of_the_built_kernel(emulation):
    """No spills; and the library holds as many kernels of each pass as the emulation compares."""
    variants = [path for path in (KERNEL / "build").glob("torch-stable-abi*-cu[0-9]*") if path.is_dir()]
    if not variants:
        pytest.skip("no CUDA variant is built; `python kernels/build.py --backend cuda` builds it")
    recorded = json.loads((variants[0] / "build_record.json").read_text())["library"]["files"]
    for path in [*(KERNEL / "sru_cuda").iterdir(), *(KERNEL / "include").iterdir()]:
        digest = hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
        if recorded.get(path.relative_to(KERNEL).as_posix()) != digest:
            pytest.skip(f"the CUDA variant is older than {path.name}; `python kernels/build.py` builds it anew")
    report = (variants[0] / "compiler.log").read_text()
    check_report(report)
    emulated = Counter(kernel.split()[0] for kernel in emulation.all_kernels().decode().splitlines())
    for number in ARCHITECTURES:
        entries = re.findall(rf"Compiling entry function '\w*?(forward|backward)_kernel\w*' for 'sm_{number}'", report)
        assert Counter(entries) == emulated


WIDE_KERNELS = """
#include "sru_cuda/column.h"

using Widest = sru::Types<float, {element}, {element}>;

__global__ void forward(const __grid_constant__ sru::SruParams params) {{
  sru::forward_column<Widest, {forward}, false, false>(params, threadIdx.x);
}}

__global__ void backward(const __grid_constant__ sru::SruBackwardParams params) {{
  sru::backward_column<Widest, {backward}, false, false>(params, threadIdx.x);
}}
"""


def accesses(text):
    """How often each kind of access to global memory stands in PTX, such as `ld.v4` and `st.f32`."""
    found = re.findall(r"\b(ld|st)\.(?!param)([a-z0-9.]+)", text)
    assert all(kind.startswith("global.") for _, kind in found), "an access whose address space is looked up, or local"
    return Counter(f"{what}.{kind.split('.')[1]}" for what, kind in found)


@pytest.mark.skipif(FOUND_NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("element", "forward", "backward"), [("float", 4, 4), ("hfe::BFloat16", 8, 4)], ids=["float32", "bfloat16"]
)
def test_wide_accesses_are_one_instruction(element, forward, backward, tmp_path):
    """128 bits at a time in global memory (64 for four gradients of 16 bits), except for what each thread reads once
    before the first step and writes once after the last."""
    source, ptx = tmp_path / "wide.cu", tmp_path / "wide.ptx"
    source.write_text(WIDE_KERNELS.format(element=element, forward=forward, backward=backward))
    flags = ["-O3", "-std=c++17", "-arch=sm_90", "-ptx", f"-I{KERNEL}", f"-I{SHARED}"]
    subprocess.run([FOUND_NVCC, *flags, str(source), "-o", str(ptx)], check=True)
    entries = re.split(r"\.entry \w*(forward|backward)", ptx.read_text())
    found = {name: accesses(text) for name, text in zip(entries[1::2], entries[2::2], strict=True)}
    single = {"ld.f32", "ld.u32"}  # weights, biases, dropout mask and initial state
    assert set(found["forward"]) == {"ld.v4", "st.v4", *single}
    assert found["forward"]["ld.f32"] + found["forward"]["ld.u32"] == 6 * forward
    halves = set() if element == "float" else {"ld.v2", "st.v2"}
    assert set(found["backward"]) - single == {"ld.v4", "st.f32", *(halves or {"st.v4"})}
    assert found["backward"]["ld.f32"] == found["backward"]["st.f32"] == 5 * backward  # four sums, initial state


@pytest.mark.slow
@pytest.mark.skipif(FOUND_NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_compiler_needs_no_local_memory(source, tmp_path):
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    include = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-std=c++17", "-ftz=true", "-Xptxas", "-v", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command = [
        FOUND_NVCC,
        "-c",
        *codes,
        *flags,
        f"-I{include}",
        f"-I{SHARED}",
        str(source),
        "-o",
        str(tmp_path / "object.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    check_report(done.stderr)
