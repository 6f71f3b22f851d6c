"""
The compiled recurrence on a CPU, against the copy bandwidth of the same run and against its peers: a plain loop over
time in torch, our torch form, and the original's C++ forward and training path.

    python kernels/build.py
    python -m training.benchmarks run sru_recurrence_cpu
    python -m training.benchmarks run sru_recurrence_cpu --capabilities avx2 --parts bandwidth --repeats 30

Once for each instruction set of those that the processor has, in a process of its own and with a result of its own: a
processor with AVX-512 shows what the code for AVX2 alone does.

In each: one thread (but for the part `threads`), runs in turn, medians of core time. Bandwidth: every tensor of
`(batch, length, width)` has 64 MiB or more, results are allocated beforehand, and bytes are those that must be moved:
forward reads 3 parts of u and x and writes h and the states (6 units), backward reads these, the states and the
gradient and writes 4 gradients (10). The original (`pip install --no-deps sru==3.0.0.dev6 ninja`) compiles at the
first import; without it its rows say that they were not measured.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.ops import sru_reference
from hf_efficient.ops.sru import KERNEL
from training.benchmarks.capabilities import load_with, measure_each
from training.benchmarks.environment import describe, write_result
from training.benchmarks.lm_speed import original_recurrence
from training.benchmarks.timing import interleave, medians


CPU = torch.device("cpu")
UNITS = {"forward": 6, "backward": 10}
# By the beginning of a row's name.
GOALS = {
    "forward, share of copy bandwidth, float32": "at least 0.8",
    "forward + backward, share of copy bandwidth, float32": "at least 0.7",
    "forward, share of copy bandwidth, bfloat16": "at least 0.55",
    "forward + backward, share of copy bandwidth, bfloat16": "at least 0.45",
    "forward, fresh results": "at most 1.3",
    "backward, fresh results": "at most 1.3",
    "forward, faster than the plain loop": "at least 7",
    "forward, faster than the original's C++": "at least 5",
    "forward + backward, faster than the original's training path": "at least 30",
    "two threads": "at least 1.6",
}


class Call:
    """The ops on random input of one size, with room for all results."""

    def __init__(self, kernel, batch: int, length: int, width: int, dtype: torch.dtype = torch.float32):
        self.kernel = kernel
        u, x = torch.randn(batch, length, 3, width).to(dtype), torch.randn(batch, length, width).to(dtype)
        weight_c, bias = 0.3 * torch.randn(2, width), torch.randn(2, width)
        self.arguments = (u, x, weight_c, bias, None, None, None, None, 1.0, "identity", False)
        self.h, self.states = torch.empty_like(x), torch.empty(batch, length + 1, width)
        self.grads = tuple(torch.empty_like(tensor) for tensor in (u, x, weight_c, bias))
        self.grad_h = torch.randn(batch, length, width).to(dtype)
        self.unit = batch * length * width

    def forward(self) -> None:
        self.kernel.forward_out(self.h, self.states, *self.arguments)

    def backward(self) -> None:
        self.kernel.backward_out(*self.grads, None, self.grad_h, None, self.states, *self.arguments)


def moved_bytes(call: Call) -> dict[str, int]:
    """The bytes that each pass must read and write; the states are in float32, all else has the dtype of u."""
    size = call.h.element_size()
    return {name: call.unit * (4 + size * (units - 1)) for name, units in UNITS.items()}


def measure_bandwidth(kernel, repeats: int) -> dict[str, Any]:
    """(8, 512, 4096), 64 MiB a unit in float32; and the widths at which rows are cut into chunks otherwise."""
    source, found = torch.randn(1 << 25), {}
    target = torch.empty_like(source)
    for shape, dtype in (
        ((8, 512, 4096), torch.float32),
        ((16, 1024, 1100), torch.float32),
        ((2, 4096, 2048), torch.float32),
        ((16, 512, 4096), torch.bfloat16),
    ):
        call = Call(kernel, *shape, dtype)
        runs = {"copy": lambda: target.copy_(source), "forward": call.forward, "backward": call.backward}
        title = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
        seconds = interleave(runs, repeats, CPU, title)
        found[title] = {"seconds": seconds, "bytes": {**moved_bytes(call), "copy": 2 * source.nbytes}}
    return found


def plain_loop(u: Tensor, x: Tensor, weight_c: Tensor, bias: Tensor) -> Tensor:
    """The recurrence as its formulas stand, one step after the other."""
    state, outputs = torch.zeros_like(x[:, 0]), []
    for (candidate, forget, output), highway in zip((step.unbind(1) for step in u.unbind(1)), x.unbind(1), strict=True):
        forget = torch.sigmoid(forget + weight_c[0] * state + bias[0])
        output = torch.sigmoid(output + weight_c[1] * state + bias[1])
        state = candidate + (state - candidate) * forget
        outputs.append(highway + (state - highway) * output)
    return torch.stack(outputs, 1)


def measure_peers(kernel, repeats: int) -> dict[str, Any]:
    """(8, 512, 1024), as the original's figures were taken, and (1, 256, 4096), where the last cache holds all of it.
    `forward_given` and `backward_given` write to tensors that are there, all others allocate theirs; `forward_last`
    keeps no state but the last, as the original's C++ does."""
    found = {}
    for shape in ((8, 512, 1024), (1, 256, 4096)):
        call = Call(kernel, *shape)
        given = call.arguments[:4]
        leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in given)

        def train(run, leaves=leaves, cotangent=call.grad_h) -> None:
            torch.autograd.grad(run(*leaves), leaves, cotangent)

        runs: dict[str, Callable[[], object]] = {
            "forward": partial(kernel.forward, *call.arguments),
            "forward_given": call.forward,
            "backward": partial(kernel.backward, call.grad_h, None, call.states, *call.arguments),
            "backward_given": call.backward,
            "forward_last": partial(kernel.forward_last, *call.arguments),
            "train": partial(train, lambda *given: kernel.sru_recurrence(*given)[0]),
            "loop_forward": torch.no_grad()(partial(plain_loop, *given)),
            "loop_train": partial(train, plain_loop),
            "torch_forward": partial(sru_reference.forward, *call.arguments),
        }
        torch.testing.assert_close(kernel.forward(*call.arguments)[0], plain_loop(*given), atol=1e-4, rtol=1e-4)
        if shape[0] == 8:
            runs |= original_recurrence(*given, call.grad_h)
        found[str(shape)] = interleave(runs, repeats, CPU, str(shape))
    return found


def measure_threads(kernel, repeats: int) -> dict[str, Any]:
    """Wall seconds with one thread and with two, in turn, on tensors of 4 MiB and of 64; and of a copy, which says what
    the machine allows."""
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    found = {}
    for shape in ((8, 512, 256), (8, 512, 4096)):
        call = Call(kernel, *shape)
        runs = {"forward": call.forward, "backward": call.backward, "copy": lambda: target.copy_(source)}
        seconds: dict[str, list[float]] = {f"{name}, {count}": [] for name in runs for count in (1, 2)}
        for index in range(repeats + 2):
            for count in (1, 2):
                torch.set_num_threads(count)
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if index > 1:
                        seconds[f"{name}, {count}"].append(time.perf_counter() - start)
        found[str(shape)] = seconds
    torch.set_num_threads(1)
    return found


def shares(part: dict[str, Any]) -> dict[str, float]:
    """Bytes a second of each pass, and of both, over those of the copy."""
    times, moved = medians(part["seconds"]), part["bytes"]
    bandwidth = moved["copy"] / times["copy"]
    both = (moved["forward"] + moved["backward"]) / (times["forward"] + times["backward"])
    return {**{name: moved[name] / times[name] / bandwidth for name in UNITS}, "both": both / bandwidth}


def ratios(parts: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the ratios that goals are set for. A call in inference keeps the last state alone, as the original's C++
    does, and like all peers allocates its results."""
    for dtype in ("float32", "bfloat16"):
        shared = [shares(part) for title, part in parts.get("bandwidth", {}).items() if title.endswith(dtype)]
        for name, key in (("forward", "forward"), ("forward + backward", "both")) if shared else ():
            yield f"{name}, share of copy bandwidth, {dtype}", statistics.median(share[key] for share in shared)
    for title, part in parts.get("peers", {}).items():
        times = medians(part)
        for name in UNITS:
            yield f"{name}, fresh results over given ones, {title}", times[name] / times[f"{name}_given"]
        yield f"forward, faster than the plain loop, {title}", times["loop_forward"] / times["forward_last"]
        if "original_forward" in times:
            yield f"forward, faster than the original's C++, {title}", times["original_forward"] / times["forward_last"]
            training = times["original_train"] / times["train"]
            yield f"forward + backward, faster than the original's training path, {title}", training
    for title, part in parts.get("threads", {}).items():
        times = medians(part)
        for name in UNITS:
            yield f"two threads, {name}, faster than one, {title}", times[f"{name}, 1"] / times[f"{name}, 2"]


def rows_of(parts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, value in ratios(parts):
        goal = next(goal for start, goal in GOALS.items() if name.startswith(start))
        rows.append({"name": f"SRU kernel: {name}", "value": value, "unit": "times", "goal": goal})
    return rows + details_of(parts)


def details_of(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rates and times behind the ratios."""
    rows = []
    for title, part in parts.get("bandwidth", {}).items():
        copy = part["bytes"]["copy"] / medians(part["seconds"])["copy"] / 1e9
        rows.append({"name": f"copy beside {title}", "value": copy, "unit": "GB/s", "goal": None})
        for name, share in shares(part).items():
            rows.append({"name": f"{name}, {title}", "value": share, "unit": "of copy bandwidth", "goal": None})
    for title, part in parts.get("peers", {}).items():
        for name, seconds in medians(part).items():
            rows.append({"name": f"{name}, {title}", "value": 1e3 * seconds, "unit": "ms", "goal": None})
    for title, part in parts.get("threads", {}).items():
        times = medians(part)
        ratio = times["copy, 1"] / times["copy, 2"]
        rows.append({"name": f"two threads, copy beside {title}", "value": ratio, "unit": "times", "goal": None})
    return rows


def headline_of(environment: dict[str, Any], capability: str, parts: dict[str, Any]) -> str:
    machine, versions = environment["machine"], environment["versions"]
    found = "; ".join(f"{name}: {value:.2f}" for name, value in ratios(parts))
    return (
        f"The compiled recurrence on a CPU, with {capability}: {found}. Medians of core time (of wall time where "
        "threads are compared) of runs in turn in one process; sizes are (batch, length, width), float32 if no dtype "
        f"is named, and shares of bandwidth medians over sizes. Machine: {machine['processor']} "
        f"({', '.join(machine['instructions'])}); torch {versions['torch']}."
    )


PARTS = {"bandwidth": measure_bandwidth, "peers": measure_peers, "threads": measure_threads}


def measure(capability: str, names: list[str], repeats: int, path: Path) -> None:
    """Measure the parts with one instruction set, and write the result."""
    kernel = load_with(KERNEL, capability)
    parts: dict[str, Any] = {}
    for name in names:
        parts[name] = PARTS[name](kernel, repeats)
        # After every part, so that an interrupted run leaves what it has.
        environment = describe()
        shown = {"headline": headline_of(environment, capability, parts), "summary": rows_of(parts)}
        write_result(path, {**shown, **environment, "capability": capability, "parts": parts})
    for row in rows_of(parts):
        print(f"{row['name']}: {row['value']} {row['unit']}" + (f", {row['goal']}" if row["goal"] else ""))


def main(argv: list[str] | None = None) -> None:
    measure_each("sru_recurrence_cpu", __doc__, KERNEL, list(PARTS), measure, argv)


if __name__ == "__main__":
    main()
