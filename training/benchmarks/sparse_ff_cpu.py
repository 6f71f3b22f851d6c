"""
The compiled sparse feed-forward on a CPU, for one token and for many, against the dense one of the same size
(`F.linear`, ReLU, `F.linear`) and against our torch form.

    python kernels/build.py
    python -m training.benchmarks run sparse_ff_cpu
    python -m training.benchmarks run sparse_ff_cpu --capabilities avx2 --parts decode

Once for each instruction set that the processor has, in a process of its own and with a result of its own; with AVX2
the dense side is held to it too. One thread, runs in turn, medians of core time. Weights are cold: several layers in
turn, and before each sparse peer's turn 128 MiB of other memory are read, which is also what read bandwidth is measured
by. "Hot" is one layer again and again. Weights are random, so that ReLU kills about half of the winners: of these only
the row of the first matrix counts among the bytes. In bfloat16 are rows, controller and input.

The dense layer's matrices lie as `nn.Linear` stores them, which is also the form that it is fastest in: by a transposed
view of the other layout it takes twice the time in bfloat16, and ten times without AVX-512.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.ops import sparse_ff_reference
from hf_efficient.ops.sparse_ff import KERNEL
from training.benchmarks.capabilities import TORCH_LIMITS, load_with, measure_each
from training.benchmarks.environment import describe, write_result
from training.benchmarks.timing import interleave, medians


CPU = torch.device("cpu")
# Weights of all layers of a case have so many bytes at most, and there are no more layers than these.
MOST_BYTES, MOST_LAYERS = 4.3e9, 30
READ_BYTES = 128 << 20


@dataclass(frozen=True)
class Case:
    """Sizes of a layer, tokens of a call, and what is asked of kernel and torch form: how many times as fast as the
    dense layer they are at least."""

    width: int
    hidden: int
    units: int
    rank: int
    dtype: torch.dtype
    tokens: int = 1
    kernel_goal: float | None = None
    torch_goal: float | None = None

    def __str__(self) -> str:
        tokens = f", {self.tokens} tokens" if self.tokens > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"d {self.width}, F {self.hidden}, N {self.units}, r {self.rank}, {dtype}{tokens}"

    @property
    def blocks(self) -> int:
        return self.hidden // self.units

    @property
    def dense_bytes(self) -> int:
        return 2 * self.width * self.hidden * self.dtype.itemsize

    def sparse_bytes(self, killed: float) -> float:
        """Bytes of weights that one token needs, where ReLU kills such a share of winners."""
        controller = self.rank * (self.width + self.hidden)
        return (controller + self.blocks * self.width * (2 - killed)) * self.dtype.itemsize

    @property
    def layers(self) -> int:
        most = MOST_LAYERS if self.tokens <= 16 else 4
        return max(1, min(most, int(MOST_BYTES / (1.5 * self.dense_bytes))))

    @property
    def hot_calls(self) -> int:
        return 20 if self.tokens <= 16 else 1


DECODE = [
    Case(1024, 4096, 64, 64, torch.float32, 1, 14, 6),
    Case(2048, 8192, 128, 64, torch.float32, 1, 25, 10),
    Case(1024, 4096, 64, 64, torch.bfloat16, 1, 14, 3.5),
    Case(9216, 36864, 256, 32, torch.bfloat16, 1, 110),
]
BATCHES = [Case(1024, 4096, 64, 64, torch.float32, tokens) for tokens in (2, 4, 8, 16)]
PREFILL = [Case(1024, 4096, 64, 64, torch.float32, 512, 3), Case(1024, 4096, 64, 64, torch.bfloat16, 512, 3)]
# Of the ratio of bytes, in float32 and for one token.
BYTES_GOAL = 0.7


class Layers:
    """So many layers of random weights, both forms of which share them."""

    def __init__(self, case: Case, count: int):
        self.case = case
        # Random numbers for all weights: making each anew takes minutes.
        self.numbers = torch.randn((1 << 20) + 7)
        width, blocks, units, rank = case.width, case.blocks, case.units, case.rank
        self.all = [
            (
                self.random(rank, width, scale=width**-0.5),
                self.random(blocks, units, rank, scale=1.0),
                torch.zeros(blocks, units),
                self.random(blocks, units, width, scale=width**-0.5),
                self.random(blocks, units, width, scale=case.hidden**-0.5),
                torch.zeros(width),
            )
            for _ in range(count)
        ]

    def random(self, *shape: int, scale: float) -> Tensor:
        weights = torch.empty(torch.Size(shape).numel(), dtype=self.case.dtype)
        for part in weights.split(self.numbers.numel()):
            part.copy_(self.numbers.roll(int(torch.randint(1 << 20, ())))[: len(part)] * scale)
        return weights.view(shape)

    def killed(self, kernel, inputs: list[Tensor]) -> float:
        """The share of winners that ReLU kills."""
        shares = []
        for x in inputs[:3]:
            for weights in self.all[:3]:
                winners = kernel.forward(x, *weights, None, "relu", False)[1].long()
                rows = weights[3][torch.arange(winners.shape[1]), winners[:1]]
                shares.append(((rows.float() * x[:1, None].float()).sum(-1) <= 0).float().mean().item())
        return statistics.mean(shares)


def dense(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense layer, with weights as `nn.Linear` stores them."""
    return nn.functional.linear(torch.relu(nn.functional.linear(x, up)), down)


@torch.inference_mode()
def measure_case(kernel, case: Case, repeats: int) -> dict[str, Any]:
    """Core seconds of a call by peer, cold and hot, and what is needed to judge them."""
    layers = Layers(case, case.layers)
    inputs = [torch.randn(case.tokens, case.width).to(case.dtype) for _ in range(13)]
    following = {name: cycle(inputs) for name in ("kernel", "torch", "dense")}
    other = torch.randn(READ_BYTES // 4)
    pairs = [
        (up.view(-1, case.width), down.view(-1, case.width).mT.contiguous()) for _, _, _, up, down, _ in layers.all
    ]

    def sparse(name: str, function: Callable) -> None:
        x = next(following[name])
        for weights in layers.all:
            function(x, *weights, None, "relu", False)

    def all_dense() -> None:
        x = next(following["dense"])
        for pair in pairs:
            dense(x, *pair)

    def hot() -> None:
        for _ in range(case.hot_calls):
            kernel.forward(inputs[0], *layers.all[0], None, "relu", False)

    runs: dict[str, Callable[[], object]] = {
        "dense": all_dense,
        "read before the kernel": other.sum,
        "kernel": partial(sparse, "kernel", kernel.forward),
        "read before torch": other.sum,
        "torch": partial(sparse, "torch", sparse_ff_reference.forward),
        "hot": hot,
    }
    seconds = interleave(runs, repeats, CPU, str(case))
    counts = {"dense": case.layers, "kernel": case.layers, "torch": case.layers, "hot": case.hot_calls}
    killed = layers.killed(kernel, inputs)
    return {
        "layers": case.layers,
        "killed": killed,
        "dense_bytes": case.dense_bytes,
        "sparse_bytes": case.sparse_bytes(killed),
        "read_bytes": other.nbytes,
        "seconds": {name: [value / counts.get(name, 1) for value in values] for name, values in seconds.items()},
    }


PARTS = {"decode": DECODE, "batches": BATCHES, "prefill": PREFILL}


def rows_of_case(case: Case, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case: ratios with their goals, then what stands behind them."""
    times = medians(found["seconds"])
    reads = [*found["seconds"]["read before the kernel"], *found["seconds"]["read before torch"]]
    bandwidth = found["read_bytes"] / statistics.median(reads)

    def row(name: str, value: float, unit: str, goal: float | None = None) -> dict[str, Any]:
        return {"name": f"{case}: {name}", "value": value, "unit": unit, "goal": goal and f"at least {goal:g}"}

    ratio, by_bytes = times["dense"] / times["kernel"], found["dense_bytes"] / found["sparse_bytes"]
    yield row("kernel, faster than dense", ratio, "times", case.kernel_goal)
    yield row("torch form, faster than dense", times["dense"] / times["torch"], "times", case.torch_goal)
    if case.tokens == 1:
        goal = BYTES_GOAL if case.dtype == torch.float32 else None
        yield row("ratio of bytes", by_bytes, "times")
        yield row("kernel, share of the ratio of bytes", ratio / by_bytes, "times", goal)
        share = found["sparse_bytes"] / times["kernel"] / bandwidth
        yield row("kernel, share of read bandwidth", share, "times")
        share = found["dense_bytes"] / times["dense"] / bandwidth
        yield row("dense, share of read bandwidth", share, "times")
    yield row("kernel, faster than the torch form", times["torch"] / times["kernel"], "times")
    for name, title in {"kernel": "kernel", "torch": "torch form", "dense": "dense", "hot": "kernel, hot"}.items():
        yield row(title, 1e6 * times[name], "us")
    yield row("read bandwidth", bandwidth / 1e9, "GB/s")
    yield row("winners that ReLU kills", found["killed"], "of all")
    yield row("layers in turn", found["layers"], "layers")


def rows_of(parts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        row
        for name, cases in parts.items()
        for case in PARTS[name]
        if str(case) in cases
        for row in rows_of_case(case, cases[str(case)])
    ]
    return [row for row in rows if row["goal"]] + [row for row in rows if not row["goal"]]


# What pages show besides the rows that have a goal; the rest is in `parts`.
SHOWN = (
    ": ratio of bytes",
    ": kernel, share of read bandwidth",
    ": dense, share of read bandwidth",
    ": kernel",
    ", hot",
)


def summary_of(parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in rows_of(parts) if row["goal"] or row["name"].endswith(SHOWN)]


def headline_of(environment: dict[str, Any], capability: str, parts: dict[str, Any]) -> str:
    machine, versions = environment["machine"], environment["versions"]
    shown = [row for row in rows_of(parts) if row["goal"] or row["name"].endswith(": ratio of bytes")]
    found = "; ".join(f"{row['name']}: {row['value']:.3g}" for row in shown)
    return (
        f"The sparse feed-forward on a CPU, with {capability}: {found}. Medians of core time of runs in turn in one "
        f"process, one thread, weights cold. Machine: {machine['processor']} ({', '.join(machine['instructions'])}); "
        f"torch {versions['torch']}."
    )


def measure(capability: str, names: list[str], repeats: int, path: Path) -> None:
    """Measure the parts with one instruction set, and write the result."""
    kernel = load_with(KERNEL, capability)
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        for case in PARTS[name]:
            parts.setdefault(name, {})[str(case)] = measure_case(kernel, case, repeats)
            # After every case, so that an interrupted run leaves what it has.
            environment = describe()
            shown = {"headline": headline_of(environment, capability, parts), "summary": summary_of(parts)}
            write_result(path, {**shown, **environment, "capability": capability, "parts": parts})
            for row in rows_of_case(case, parts[name][str(case)]):
                print(f"{row['name']}: {row['value']:.4g} {row['unit']}" + (f", {row['goal']}" if row["goal"] else ""))


def main(argv: list[str] | None = None) -> None:
    measure_each("sparse_ff_cpu", __doc__, KERNEL, list(PARTS), measure, argv, TORCH_LIMITS)


if __name__ == "__main__":
    main()
