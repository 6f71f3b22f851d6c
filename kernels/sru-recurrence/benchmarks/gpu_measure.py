"""What `gpu_check.py` measures: the recurrence against its floor and a Triton scan, a layer against cuDNN's LSTM, and
training steps of language models."""

import ctypes
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_peers import build_models
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from _build.toolchain import Lack, find_nvcc  # noqa: E402

from hf_efficient.ops.backend import last_backend, use_backend  # noqa: E402
from hf_efficient.ops.kernel_loader import load_kernel  # noqa: E402
from hf_efficient.ops.sru import OP_NAME, sru_recurrence  # noqa: E402


GPU = torch.device("cuda")
LENGTH, WIDTH = 512, 3072
# One warp, and so many steps that starting it does not count.
CHAIN_LENGTH, CHAIN_WIDTH = 1 << 16, 32
# Numbers of (batch, length, width) that must be moved, those of the inputs' dtype and those of the state's: forward
# reads 3 parts of u and x and writes h and the states; backward reads these, h's gradient and the states and writes 4.
UNITS = {"forward": (5, 1), "backward": (9, 1)}


def time_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, list[float]]:
    """Microseconds of one of the `calls` that each run makes, for each repetition after three of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 3):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if index >= 3:
                times[name].append(1e3 * start.elapsed_time(end) / calls)
    return times


def graph_of(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """A CUDA graph of `calls` calls, after some on a stream of their own, as capturing wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bytes_per_microsecond(repeats: int) -> float:
    """Bytes read and written by a copy of 1 GiB."""
    source = torch.randn(1 << 28, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians(time_in_turn({"copy": lambda: target.copy_(source)}, repeats))["copy"]


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


def compile_bare_chain(architecture: str, folder: Path) -> Callable[..., int]:
    """
    `start_chain` of `bare_chain.cu`, compiled into `folder` for such as "sm_90".

    Raises:
        SystemExit: if there is no nvcc, or it fails.
    """
    library = folder / "bare_chain.so"
    try:
        flags = ["-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
        command = [find_nvcc().path, *flags, str(HERE / "bare_chain.cu"), "-o", str(library)]
        subprocess.run(command, check=True)
    except (Lack, subprocess.CalledProcessError) as error:
        raise SystemExit(f"bare_chain.cu, by which the floor is measured, could not be compiled: {error}") from error
    start = ctypes.CDLL(str(library)).start_chain
    start.argtypes = [ctypes.c_void_p, *3 * [ctypes.c_float], ctypes.c_int, ctypes.c_void_p]
    return start


def measure_step(repeats: int) -> dict[str, float]:
    """Nanoseconds of one step where nothing but the step before it is waited for: `bare`, of what leads from a state
    to the next alone; `as_run`, of our forward pass with all that it loads and writes."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        start = compile_bare_chain(f"sm_{major}{minor}", Path(folder))
    state = torch.zeros(CHAIN_WIDTH, device=GPU)

    def bare() -> None:
        code = start(state.data_ptr(), 1.0, -0.5, 0.5, CHAIN_LENGTH, torch.cuda.current_stream().cuda_stream)
        if code != 0:
            raise RuntimeError(f"bare_chain.cu could not be started: CUDA's error {code}")

    call = Call(1, torch.float32, CHAIN_LENGTH, CHAIN_WIDTH)
    found = medians(time_in_turn({"bare": bare, "as_run": call.forward}, repeats))
    return {name: 1e3 * value / CHAIN_LENGTH for name, value in found.items()}


def triton_runs(call: Call) -> dict[str, Callable[[], object]]:
    """The Triton scan in each of its configurations, after a check of it; nothing where there is no Triton."""
    try:
        from triton_scan import CONFIGURATIONS, check_triton, triton_forward
    except ImportError:
        return {}
    check_triton(GPU)
    tensors = (call.h, call.states, call.u, call.x, call.weight_c, call.bias)
    return {f"triton {which}": partial(triton_forward, *tensors, which) for which in CONFIGURATIONS}


def measure_case(batch: int, dtype: torch.dtype, bandwidth: float, step: float, repeats: int) -> dict[str, Any]:
    """One size: microseconds of both passes and of the fastest Triton scan, beside the floors. A step of the backward
    pass waits for two products alone, since the gates follow from the states: bytes are its floor."""
    call, calls = Call(batch, dtype), 4
    runs = {"forward": call.forward, "backward": call.backward, **triton_runs(call)}
    call.forward()
    times = time_in_turn({name: graph_of(run, calls) for name, run in runs.items()}, repeats, calls)
    found = medians(times)
    of_triton = {name: value for name, value in found.items() if name.startswith("triton")}
    shown = {name: found[name] for name in ("forward", "backward")}
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
    """Both batches in both dtypes; the floor is the larger of bytes over copy bandwidth and of `LENGTH` bare steps."""
    bandwidth, step = copy_bytes_per_microsecond(repeats), measure_step(repeats)
    sizes = [(batch, dtype) for batch in (8, 64) for dtype in (torch.bfloat16, torch.float32)]
    cases = [measure_case(*size, bandwidth, step["bare"], repeats) for size in sizes]
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
                raw[name] = time_in_turn(runs, repeats)
            found[name] = medians(raw[name])
    return {"microseconds": found, "all": raw}


def measure_lm(repeats: int, batch: int = 24) -> dict[str, Any]:
    """A step of AdamW on `batch` segments of 512 tokens, as the race of the 42 M models takes it."""
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
        times = time_in_turn({name: partial(step, name) for name in models}, repeats)
    tokens = {name: 1e6 * ids.numel() / value for name, value in medians(times).items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    ran = last_backend(OP_NAME)
    return {"tokens_per_second": tokens, "recurrence": ran, "parameters": parameters, "microseconds": times}
