"""
All that only a GPU can show of the compiled recurrence: whether it is right, how fast it is, and whether it stays
within its memory.

    python -m training.benchmarks.sru_recurrence_gpu
    python -m training.benchmarks.sru_recurrence_gpu --parts build smoke recurrence
    python -m training.benchmarks.sru_recurrence_gpu --parts recurrence --repeats 50 --result gpu.json

    build       compile with `kernels/build.py --backend cuda`, if sources have changed
    smoke       outputs and all gradients against the torch form on the same GPU: no flags, every width of access
    recurrence  length 512 and width 3,072, in several batches and dtypes: against its floor, the longer of the time to
                copy as many bytes and of that which the dependence of a step on the one before it takes
                (`latency_floor.cu`, measured in the same run, where there is nvcc), against plain torch, and against a
                scan in Triton (where it is installed)
    parity      as smoke, for every kernel that a call can reach, odd and large shapes; float32 also against float64
    repeated    gradients of one call, several times: they are the same to the bit
    lstm        a layer, matrix product included, against cuDNN's LSTM: length 512, batch 32, width 1,024
    lm          a training step of the 42 M SRU++ in bfloat16 autocast, against a GPT-2 of equal size with flash
                attention: tokens a second
    sanitizer   few cases of parity again under NVIDIA's compute-sanitizer (memcheck and initcheck), where it is
                installed

Times are medians of CUDA events, peers in turn after a warm-up; the recurrence and the Triton scan are replayed from
CUDA graphs, since a launch from Python costs as much as a small call. The result goes to training/results, with the
card's name, after each part; without a GPU nothing is written. A part that fails is recorded and does not stop those
after it; the exit code is then 1.
"""

import argparse
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_efficient.ops import sru_reference
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.kernel_loader import load_kernel
from hf_efficient.ops.sru import BACKWARD_NAME, OP_NAME, sru_recurrence
from training.benchmarks import sru_recurrence_parity as parity
from training.benchmarks.environment import RESULTS, ROOT, describe, write_result
from training.benchmarks.lm_speed import build_models


def load_from_kernels(path: str) -> ModuleType:
    """A module of the folder kernels/, which is no package: `import kernels` gives the library of that name."""
    file = ROOT / "kernels" / path
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


gpu_timing = load_from_kernels("kernel_testing/gpu_timing.py")
sanitizer = load_from_kernels("kernel_testing/sanitizer.py")
toolchain = load_from_kernels("_build/toolchain.py")

GPU = torch.device("cuda")
LENGTH, WIDTH = 512, 3072
# (batch, dtype); the first two are those that other implementations are compared at.
SIZES = [
    (16, torch.float16),
    (16, torch.float32),
    *((batch, dtype) for batch in (8, 64) for dtype in (torch.bfloat16, torch.float32)),
]
# One warp, and so many steps that starting it does not count.
CHAIN_LENGTH, CHAIN_WIDTH = 1 << 16, 32
# Numbers of (batch, length, width) that must be moved, those of the inputs' dtype and those of the state's: forward
# reads 3 parts of u and x and writes h and the states; backward reads these, h's gradient and the states and writes 4.
UNITS = {"forward": (5, 1), "backward": (9, 1)}
GOALS = {
    "forward": "at most 2 times the floor",
    "backward": None,
    "triton": "at least 1.3 times as fast",
    "torch": None,
    "lstm": "at least 5 times as fast",
    "lm": None,
}


def build() -> dict[str, Any]:
    """
    Compile the kernel for the GPU, if its sources have changed.

    Raises:
        RuntimeError: if that fails; what it lacks stands above.
    """
    command = [sys.executable, str(ROOT / "kernels" / "build.py"), "sru-recurrence", "--backend", "cuda"]
    done = subprocess.run(command)
    if done.returncode != 0:
        raise RuntimeError(f"kernels/build.py ended with exit code {done.returncode}")
    return {"built": True}


def check_cases(scope: str, device: torch.device = GPU) -> dict[str, Any]:
    """
    Parity of the cases "smoke", "full" or "sanitizer".

    Raises:
        parity.ParityError: if some differ; names the first few and says how many.
    """
    chosen = {
        "smoke": lambda: parity.smoke_cases(device),
        "full": lambda: chain(
            parity.kernel_cases(device), parity.shape_cases([*parity.ODD_SHAPES, *parity.LARGE_SHAPES])
        ),
        "sanitizer": lambda: parity.sanitizer_cases(device),
    }
    found = parity.check_parity(chosen[scope](), device)
    if failures := found["failures"]:
        shown = "\n".join(failures[:20])
        raise parity.ParityError(f"{len(failures)} of {found['compared']} cases failed:\n{shown}")
    return found


def check_repeated(repeats: int = 3) -> dict[str, Any]:
    """
    Gradients of one call, several times.

    Raises:
        parity.ParityError: if they are not the same to the bit.
    """
    inputs: dict[str, Any] = parity.random_inputs(parity.Case("float32", (64, 40, 512)), GPU)
    leaves = [values for values in inputs.values() if values.requires_grad]
    with use_backend("cuda"):
        runs = [torch.autograd.grad(sru_recurrence(**inputs)[0].sum(), leaves) for _ in range(repeats)]
    for again in runs[1:]:
        if not all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True)):
            raise parity.ParityError("gradients differ from run to run")
    return {"runs": repeats}


def sanitize(timeout: float = 120.0) -> dict[str, Any]:
    """
    Few cases under each of compute-sanitizer's programs that look at global memory.

    Raises:
        RuntimeError: if one finds an error; with what it says of it.
    """
    command = [sys.executable, "-m", "training.benchmarks.sru_recurrence_gpu", "--parts", "sanitizer-cases"]
    results = {name: sanitizer.run_sanitizer(name, command, timeout) for name in sanitizer.PROGRAMS}
    wrong = {name: result for name, result in results.items() if result.status in ("errors", "failed")}
    if wrong:
        raise RuntimeError("\n".join(f"{name}: {result.status}: {result.said}" for name, result in wrong.items()))
    return {name: {"status": result.status, "said": result.said} for name, result in results.items()}


class Call:
    """The ops on random input of one size, with room for all results."""

    def __init__(self, batch: int, dtype: torch.dtype, length: int = LENGTH, width: int = WIDTH):
        self.kernel = load_kernel("sru-recurrence", "cuda")
        shape = (batch, length, width)
        self.u = torch.randn(batch, length, 3, width, device=GPU).to(dtype)
        self.x, self.grad_h = (torch.randn(shape, device=GPU).to(dtype) for _ in range(2))
        self.weight_c, self.bias = (torch.randn(2, width, device=GPU) for _ in range(2))
        self.h, self.states = torch.empty_like(self.x), torch.empty(batch, length + 1, width, device=GPU)
        self.grads = [torch.empty_like(tensor) for tensor in (self.u, self.x, self.weight_c, self.bias)]

    @property
    def arguments(self) -> tuple:
        return self.u, self.x, self.weight_c, self.bias, None, None, None, None, 1.0, "identity", False

    def forward(self) -> None:
        self.kernel.forward_out(self.h, self.states, *self.arguments)

    def backward(self) -> None:
        self.kernel.backward_out(*self.grads, None, self.grad_h, None, self.states, *self.arguments)


def compile_latency_floor(architecture: str, folder: Path) -> Callable[..., int]:
    """
    `start_chain` of `latency_floor.cu`, compiled into `folder` for such as "sm_90".

    Raises:
        RuntimeError: if there is no nvcc, or it fails.
    """
    source, library = Path(__file__).with_name("latency_floor.cu"), folder / "latency_floor.so"
    try:
        flags = ["-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
        subprocess.run([toolchain.find_nvcc().path, *flags, str(source), "-o", str(library)], check=True)
    except (toolchain.MissingDependencyError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{source.name} could not be compiled: {error}") from error
    start = ctypes.CDLL(str(library)).start_chain
    start.argtypes = [ctypes.c_void_p, *3 * [ctypes.c_float], ctypes.c_int, ctypes.c_void_p]
    return start


def measure_step(repeats: int) -> dict[str, float]:
    """
    Nanoseconds of one step where nothing but the step before it is waited for: `bare`, of what leads from a state to
    the next alone; `as_run`, of our forward pass with all that it loads and writes.

    Raises:
        RuntimeError: if the bare chain of steps cannot be compiled or started.
    """
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        start = compile_latency_floor(f"sm_{major}{minor}", Path(folder))
    state = torch.zeros(CHAIN_WIDTH, device=GPU)

    def bare() -> None:
        code = start(state.data_ptr(), 1.0, -0.5, 0.5, CHAIN_LENGTH, torch.cuda.current_stream().cuda_stream)
        if code != 0:
            raise RuntimeError(f"latency_floor.cu could not be started: CUDA's error {code}")

    call = Call(1, torch.float32, CHAIN_LENGTH, CHAIN_WIDTH)
    found = gpu_timing.medians(gpu_timing.time_in_turn({"bare": bare, "as_run": call.forward}, repeats))
    return {name: 1e3 * value / CHAIN_LENGTH for name, value in found.items()}


def triton_runs(call: Call) -> dict[str, Callable[[], object]]:
    """The Triton scan in each of its configurations, after a check of it; nothing where there is no Triton."""
    try:
        from training.benchmarks.triton_scan import CONFIGURATIONS, check_triton, triton_forward
    except ImportError:
        return {}
    check_triton(GPU)
    tensors = (call.h, call.states, call.u, call.x, call.weight_c, call.bias)
    return {f"triton {which}": partial(triton_forward, *tensors, which) for which in CONFIGURATIONS}


def torch_times(call: Call, repeats: int) -> dict[str, float]:
    """Both passes in plain torch, launch by launch."""
    runs = {
        "torch forward": lambda: sru_reference.forward(*call.arguments),
        "torch backward": lambda: sru_reference.backward(call.grad_h, None, call.states, *call.arguments),
    }
    return gpu_timing.medians(gpu_timing.time_in_turn(runs, min(repeats, 5)))


def measure_case(batch: int, dtype: torch.dtype, bandwidth: float, step: float, repeats: int) -> dict[str, Any]:
    """One size: microseconds of both passes, of plain torch and of the fastest Triton scan, beside the floors. A step
    of the backward pass waits for two products alone, since the gates follow from the states: bytes are its floor."""
    call, calls = Call(batch, dtype), 4
    runs = {"forward": call.forward, "backward": call.backward, **triton_runs(call)}
    call.forward()
    graphs = {name: gpu_timing.graph_of(run, calls) for name, run in runs.items()}
    times = gpu_timing.time_in_turn(graphs, repeats, calls)
    found = gpu_timing.medians(times)
    of_triton = {name: value for name, value in found.items() if name.startswith("triton")}
    shown = {**{name: found[name] for name in ("forward", "backward")}, **torch_times(call, repeats)}
    if of_triton:
        shown["triton"] = min(of_triton.values())
    unit = batch * LENGTH * WIDTH
    of_bytes = {name: (a * call.u.itemsize + b * 4) * unit / bandwidth for name, (a, b) in UNITS.items()}
    floor = {**of_bytes, "forward": max(of_bytes["forward"], LENGTH * step / 1e3)}
    return {
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "microseconds": shown,
        "floor_microseconds": floor,
        "bytes_microseconds": of_bytes,
        "all": times,
    }


def measure_recurrence(repeats: int) -> dict[str, Any]:
    """All sizes; the floor is the larger of bytes over copy bandwidth and of `LENGTH` bare steps, where these can be
    measured."""
    bandwidth = gpu_timing.copy_bytes_per_microsecond(repeats)
    try:
        step: dict[str, Any] = measure_step(repeats)
    except RuntimeError as error:
        step = {"bare": 0.0, "not_measured": str(error)}
    cases = [measure_case(*size, bandwidth, step["bare"], repeats) for size in SIZES]
    return {"copy_gigabytes_per_second": bandwidth / 1e3, "step_nanoseconds": step, "cases": cases}


class SruLayer(nn.Module):
    """SRU as a layer: one matrix product for all steps, then the recurrence with the input as highway."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 3 * width, bias=False)
        self.weight_c, self.bias = (nn.Parameter(0.1 * torch.randn(2, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        u = self.linear(x).unflatten(-1, (3, x.shape[-1]))
        return sru_recurrence(u, x, self.weight_c, self.bias)[0]


def measure_lstm(repeats: int) -> dict[str, Any]:
    """Length 512, batch 32, width 1,024: forward alone, and forward with backward, in both dtypes."""
    found, raw = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(32, LENGTH, 1024, device=GPU, dtype=dtype, requires_grad=True)
        lstm = nn.LSTM(1024, 1024, batch_first=True, device=GPU, dtype=dtype)
        layers = {"sru": SruLayer(1024).to(GPU, dtype), "lstm": lambda x, lstm=lstm: lstm(x)[0]}
        cotangent = torch.randn_like(x)

        def forward(layer, x=x):
            with torch.no_grad():
                layer(x)

        def train(layer, x=x, cotangent=cotangent):
            layer(x).backward(cotangent)

        for what, run in (("forward", forward), ("forward and backward", train)):
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            with use_backend("cuda"):
                runs = {peer: partial(run, layer) for peer, layer in layers.items()}
                raw[name] = gpu_timing.time_in_turn(runs, repeats)
            found[name] = gpu_timing.medians(raw[name])
    return {"microseconds": found, "all": raw}


def measure_lm(repeats: int, batch: int = 24) -> dict[str, Any]:
    """
    A step of AdamW on `batch` segments of 512 tokens, as the comparison of the 42 M models takes it.

    Raises:
        RuntimeError: if the recurrence did not run by the compiled kernel, in either pass.
    """
    ids = torch.randint(0, 205, (batch, LENGTH), device=GPU)
    models = {name: model.to(GPU).train() for name, model in build_models().items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}

    def step(name: str) -> None:
        flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if name == "gpt2" else nullcontext()
        with flash, torch.autocast("cuda", torch.bfloat16):
            loss = models[name](input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    with use_backend("cuda"):
        times = gpu_timing.time_in_turn({name: partial(step, name) for name in models}, repeats)
    tokens = {name: 1e6 * ids.numel() / value for name, value in gpu_timing.medians(times).items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    ran = {name: last_backend(name) for name in (OP_NAME, BACKWARD_NAME)}
    if set(ran.values()) != {"cuda"}:
        raise RuntimeError(f"the compiled recurrence was asked for, and this ran: {ran}")
    return {"tokens_per_second": tokens, "recurrence": ran, "parameters": parameters, "microseconds": times}


def summarise(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each measured ratio, with its goal."""
    rows: list[dict[str, Any]] = []
    for case in parts.get("recurrence", {}).get("cases", []):
        where = f"batch {case['batch']}, {case['dtype']}"
        for name in ("forward", "backward"):
            value = case["microseconds"][name] / case["floor_microseconds"][name]
            rows.append({"name": f"{name} over its floor, {where}", "value": value, "goal": GOALS[name]})
        for name in ("forward", "backward"):
            value = case["microseconds"][f"torch {name}"] / case["microseconds"][name]
            rows.append({"name": f"{name} against plain torch, {where}", "value": value, "goal": GOALS["torch"]})
        if "triton" in case["microseconds"]:
            value = case["microseconds"]["triton"] / case["microseconds"]["forward"]
            rows.append({"name": f"forward against the Triton scan, {where}", "value": value, "goal": GOALS["triton"]})
    for name, times in parts.get("lstm", {}).get("microseconds", {}).items():
        row = {"name": f"layer against cuDNN's LSTM, {name}", "value": times["lstm"] / times["sru"]}
        rows.append({**row, "goal": GOALS["lstm"]})
    tokens = parts.get("lm", {}).get("tokens_per_second", {})
    for name in sorted(set(tokens) - {"gpt2"}):
        row = {"name": f"training tokens a second, {name} / gpt2", "value": tokens[name] / tokens["gpt2"]}
        rows.append({**row, "goal": GOALS["lm"]})
    return rows


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "build": lambda repeats: build(),
    "smoke": lambda repeats: check_cases("smoke"),
    "recurrence": measure_recurrence,
    "parity": lambda repeats: check_cases("full"),
    "repeated": lambda repeats: check_repeated(),
    "lstm": measure_lstm,
    "lm": measure_lm,
    "sanitizer": lambda repeats: sanitize(),
}


def run_part(name: str, repeats: int) -> dict[str, Any]:
    """What a part found, or how it failed."""
    try:
        return PARTS[name](repeats)
    except Exception as error:  # whatever it is, the parts after it can still be run
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, "sanitizer-cases"], metavar="PART")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each peer (%(default)s)")
    parser.add_argument("--result", type=Path, default=RESULTS / "sru_recurrence_gpu.json", help="(%(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use here: nothing was run and nothing written.")
    if args.parts == ["sanitizer-cases"]:
        print(check_cases("sanitizer"))
        return
    parts: dict[str, Any] = {}
    for name in args.parts:
        print(f"{name} ...", flush=True)
        parts[name] = run_part(name, args.repeats)
        print(f"{name}: {parts[name]}", flush=True)
        result = {"card": torch.cuda.get_device_name(), "summary": summarise(parts), **describe(), "parts": parts}
        write_result(args.result, result)
    for row in summarise(parts):
        print(f"{row['name']}: {row['value']:.2f}" + (f" (goal: {row['goal']})" if row["goal"] else ""))
    if any("failed" in part for part in parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
