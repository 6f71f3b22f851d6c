"""Parts of the GPU agenda that time the compiled recurrence: against the limits of the card, plain torch, a scan in
Triton, and cuDNN's LSTM.

Times are medians of CUDA events, peers in turn after a warm-up; what is short is replayed from CUDA graphs, since a
launch from Python costs as much as a small call.
"""

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.ops import sru_reference
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.kernel_loader import find_variant, load_kernel
from hf_efficient.ops.sru import KERNEL, sru_recurrence
from training.benchmarks.gpu.context import PartContext, find_tool, load_from_kernels


gpu_timing = load_from_kernels("kernel_testing/gpu_timing.py")
medians = gpu_timing.medians

LENGTH, WIDTH = 512, 3072
# (batch, dtype); the first two are those that other implementations are compared at.
SIZES = [
    (16, torch.float16),
    (16, torch.float32),
    *((batch, dtype) for batch in (8, 64) for dtype in (torch.bfloat16, torch.float32)),
]
COMPARED = 2
# One warp, and so many steps that starting it does not count.
CHAIN_LENGTH, CHAIN_WIDTH = 1 << 16, 32
# Numbers of (batch, length, width) that must be moved, those of the inputs' dtype and those of the state's: forward
# reads 3 parts of u and x and writes h and the states; backward reads these, h's gradient and the states and writes 4.
UNITS = {"forward": (5, 1), "backward": (9, 1)}


class Timer:
    """Times of runs in turn: by CUDA events, or by the clock of a CPU, where a rehearsal walks the same path."""

    def __init__(self, context: PartContext):
        self.on_gpu, self.repeats = context.device.type == "cuda", context.choose(context.repeats, 1)

    def in_turn(self, runs: Mapping[str, Callable[[], object]], calls: int = 1) -> dict[str, list[float]]:
        """Microseconds of one of the `calls` that each run makes, for each repetition."""
        if self.on_gpu:
            return gpu_timing.time_in_turn(runs, self.repeats, calls)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(1e6 * (time.perf_counter() - start) / calls)
        return times

    def graph_of(self, run: Callable[[], object], calls: int) -> Callable[[], object]:
        """A function that makes `calls` calls: a CUDA graph, or a loop."""
        if self.on_gpu:
            return gpu_timing.graph_of(run, calls)
        return lambda: [run() for _ in range(calls)]

    def copy_rate(self, device: torch.device) -> float:
        """Bytes a microsecond, read and written by a copy of 1 GiB."""
        source = torch.randn(1 << (28 if self.on_gpu else 16), device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / medians(self.in_turn({"copy": lambda: target.copy_(source)}))["copy"]

    def matmul_rate(self, device: torch.device) -> float:
        """FLOP a microsecond of a large matrix product in bfloat16."""
        size = 8192 if self.on_gpu else 128
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * size**3 / statistics.median(self.in_turn({"product": lambda: left @ right})["product"])


def compiled_backend(device: torch.device) -> str:
    """The form of the recurrence to measure: the compiled one; in a rehearsal plain torch where it is not built."""
    return device.type if device.type == "cuda" or find_variant(KERNEL, device.type) else "reference"


class Call:
    """The ops on random input of one size, with room for all results."""

    def __init__(self, batch: int, dtype: torch.dtype, length: int, width: int, device: torch.device):
        self.kernel = load_kernel(KERNEL, device.type)
        self.unit = batch * length * width
        shape = (batch, length, width)
        self.u = torch.randn(batch, length, 3, width, device=device).to(dtype)
        self.x, self.grad_h = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        self.weight_c, self.bias = (torch.randn(2, width, device=device) for _ in range(2))
        self.h, self.states = torch.empty_like(self.x), torch.empty(batch, length + 1, width, device=device)
        self.grads = [torch.empty_like(tensor) for tensor in (self.u, self.x, self.weight_c, self.bias)]

    @property
    def arguments(self) -> tuple:
        return self.u, self.x, self.weight_c, self.bias, None, None, None, None, 1.0, "identity", False

    def forward(self) -> None:
        self.kernel.forward_out(self.h, self.states, *self.arguments)

    def backward(self) -> None:
        self.kernel.backward_out(*self.grads, None, self.grad_h, None, self.states, *self.arguments)

    def bytes(self) -> dict[str, int]:
        """The bytes that each pass must move."""
        return {name: (ours * self.u.itemsize + states * 4) * self.unit for name, (ours, states) in UNITS.items()}


def make_call(context: PartContext, batch: int, dtype: torch.dtype) -> Call:
    """A call of a batch of 512 steps of 3,072 units, or a tiny one."""
    length, width = context.choose((LENGTH, WIDTH), (7, 48))
    return Call(context.choose(batch, 2), dtype, length, width, context.device)


def compile_latency_floor(architecture: str, folder: Path) -> Callable[..., int]:
    """
    `start_chain` of `latency_floor.cu`, compiled into `folder` for such as "sm_90".

    Raises:
        RuntimeError: if there is no nvcc, or it fails.
    """
    source, library = Path(__file__).with_name("latency_floor.cu"), folder / "latency_floor.so"
    flags = ["-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
    try:
        subprocess.run([find_tool("nvcc") or "nvcc", *flags, str(source), "-o", str(library)], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{source.name} could not be compiled: {error}") from error
    start = ctypes.CDLL(str(library)).start_chain
    start.argtypes = [ctypes.c_void_p, *3 * [ctypes.c_float], ctypes.c_int, ctypes.c_void_p]
    return start


def measure_step(context: PartContext) -> dict[str, Any]:
    """Nanoseconds of one step where nothing but the step before it is waited for: `bare`, of what leads from a state to
    the next alone; `as_run`, of our forward pass with all that it loads and writes. Or why that was not measured."""
    if context.rehearsal:
        context.needs_gpu("the bare chain of steps")
        return {"not_measured": "no GPU"}
    major, minor = torch.cuda.get_device_capability()
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = compile_latency_floor(f"sm_{major}{minor}", Path(folder))
    except RuntimeError as error:
        return {"not_measured": str(error)}
    state = torch.zeros(CHAIN_WIDTH, device=context.device)

    def bare() -> None:
        code = start(state.data_ptr(), 1.0, -0.5, 0.5, CHAIN_LENGTH, torch.cuda.current_stream().cuda_stream)
        if code != 0:
            raise RuntimeError(f"latency_floor.cu could not be started: CUDA's error {code}")

    call = Call(1, torch.float32, CHAIN_LENGTH, CHAIN_WIDTH, context.device)
    found = medians(Timer(context).in_turn({"bare": bare, "as_run": call.forward}))
    return {name: 1e3 * value / CHAIN_LENGTH for name, value in found.items()}


def measure_case(context: PartContext, batch: int, dtype: torch.dtype, copy_rate: float) -> dict[str, Any]:
    """One size: microseconds of both passes and of plain torch, launch by launch, and the share of the copy's rate."""
    call, timer, calls = make_call(context, batch, dtype), Timer(context), 4
    runs = {"forward": call.forward, "backward": call.backward}
    call.forward()  # backward reads the states
    times = timer.in_turn({name: timer.graph_of(run, calls) for name, run in runs.items()}, calls)
    timer.repeats = min(timer.repeats, 5)
    times |= timer.in_turn(
        {
            "torch forward": lambda: sru_reference.forward(*call.arguments),
            "torch backward": lambda: sru_reference.backward(call.grad_h, None, call.states, *call.arguments),
        }
    )
    found, moved = medians(times), call.bytes()
    return {
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "microseconds": found,
        "megabytes": {name: size / 1e6 for name, size in moved.items()},
        "copy_bandwidth_fraction": {name: moved[name] / found[name] / copy_rate for name in UNITS},
        "faster_than_torch": {name: found[f"torch {name}"] / found[name] for name in UNITS},
        "all": times,
    }


def measure_recurrence(context: PartContext) -> dict[str, Any]:
    """
    Measure every size, beside the two things that bound it: the bandwidth of a copy, and for forward the time that the
    dependence of a step on the one before it takes. (A step of the backward pass waits for two products alone, since
    the gates follow from the states.)
    """
    copy_rate = Timer(context).copy_rate(context.device)
    found: dict[str, Any] = {"copy_gigabytes_per_second": copy_rate / 1e3, "cases": []}
    for batch, dtype in context.choose(SIZES, SIZES[:COMPARED]):
        case = measure_case(context, batch, dtype, copy_rate)
        found["cases"].append(case)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in case["copy_bandwidth_fraction"].items())
        context.say(f"batch {batch}, {case['dtype']}: {shares} of copy bandwidth")
        found["line"] = "; ".join(_line_of(case) for case in found["cases"][:COMPARED])
        context.save(found)
    return {**found, "step_nanoseconds": measure_step(context)}


def _line_of(case: dict[str, Any]) -> str:
    passes = (
        f"{name} {case['copy_bandwidth_fraction'][name]:.0%} of copy, {case['faster_than_torch'][name]:.1f} x torch"
        for name in UNITS
    )
    return f"{case['dtype']}: {', '.join(passes)}"


def measure_triton(context: PartContext) -> dict[str, Any]:
    """Our forward pass against the fastest configuration of a scan in Triton, which is checked before."""
    from training.benchmarks.gpu.triton_scan import CONFIGURATIONS, check_triton, compile_for, triton_forward

    if context.rehearsal:
        context.needs_gpu("runs of what was compiled")
        make_call(context, 16, torch.float16).forward()
        for configuration in CONFIGURATIONS[::9]:
            compile_for(90, configuration)
        return {"line": f"two of {len(CONFIGURATIONS)} configurations compile for compute capability 9.0"}
    check_triton(context.device)
    found: dict[str, Any] = {"cases": []}
    for batch, dtype in SIZES[:COMPARED]:
        call, timer, calls = make_call(context, batch, dtype), Timer(context), 4
        tensors = (call.h, call.states, call.u, call.x, call.weight_c, call.bias)
        runs: dict[str, Callable[[], object]] = {"ours": call.forward}
        runs |= {f"triton {which}": partial(triton_forward, *tensors, which) for which in CONFIGURATIONS}
        graphs = {name: timer.graph_of(run, calls) for name, run in runs.items()}
        times = timer.in_turn(graphs, calls)
        medians_of = medians(times)
        best = min((name for name in medians_of if name != "ours"), key=medians_of.__getitem__)
        ratio = medians_of[best] / medians_of["ours"]
        case = {"batch": batch, "dtype": str(dtype).removeprefix("torch."), "microseconds": medians_of}
        found["cases"].append({**case, "best": best, "faster_than_triton": ratio, "all": times})
        found["line"] = "; ".join(f"{c['dtype']}: {c['faster_than_triton']:.2f} x Triton" for c in found["cases"])
        context.save(found)
        context.say(found["line"])
    return found


class SruLayer(nn.Module):
    """SRU as a layer: one matrix product for all steps, then the recurrence with the input as highway."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 3 * width, bias=False)
        self.weight_c, self.bias = (nn.Parameter(0.1 * torch.randn(2, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        u = self.linear(x).unflatten(-1, (3, x.shape[-1]))
        return sru_recurrence(u, x, self.weight_c, self.bias)[0]


def _output_of(lstm: nn.LSTM, x: Tensor) -> Tensor:
    return lstm(x)[0]


def _infer(layer: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _train(layer: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> None:
    layer(x).backward(cotangent)


def measure_lstm(context: PartContext) -> dict[str, Any]:
    """A layer, matrix product included, against cuDNN's LSTM: forward alone, and both passes, in two dtypes."""
    batch, length, width = context.choose((32, LENGTH, 1024), (2, 7, 16))
    found: dict[str, Any] = {"microseconds": {}, "faster_than_lstm": {}, "all": {}}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(batch, length, width, device=context.device, dtype=dtype, requires_grad=True)
        lstm = nn.LSTM(width, width, batch_first=True, device=context.device, dtype=dtype)
        sru: Callable[[Tensor], Tensor] = SruLayer(width).to(context.device, dtype)
        layers: dict[str, Callable[[Tensor], Tensor]] = {"sru": sru, "lstm": partial(_output_of, lstm)}
        for what, run in (("forward", _infer), ("forward and backward", _train)):
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            with use_backend(compiled_backend(context.device)):
                runs = {peer: partial(run, layer, x, torch.randn_like(x)) for peer, layer in layers.items()}
                times = Timer(context).in_turn(runs)
            found["all"][name], found["microseconds"][name] = times, medians(times)
            found["faster_than_lstm"][name] = medians(times)["lstm"] / medians(times)["sru"]
            found["line"] = "; ".join(f"{key}: {ratio:.1f} x" for key, ratio in found["faster_than_lstm"].items())
            context.save(found)
    return found
