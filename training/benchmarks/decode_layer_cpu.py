"""
The compiled layers of decoding on a CPU, for one token and in every format: feed-forward layers beside the dense one of
`F.linear`, multiplicative layers and convolutions, and matrices beside the read bandwidth.

    python kernels/build.py
    python -m training.benchmarks run decode_layer_cpu
    python -m training.benchmarks run decode_layer_cpu --capabilities avx2 --parts feed_forward

Once for each instruction set that the processor has, in a process of its own and with a result of its own; with AVX2
torch is held to it too. One thread, runs in turn, medians of core time. Weights are cold: several layers in turn, and
before each peer's turn 128 MiB of other memory are read, which is also what read bandwidth is measured by. "Hot" is one
layer again and again. Weights are random, so that ReLU kills about half of the winners.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.ops.decode_layer import KERNEL
from hf_efficient.ops.quantized import FORMATS, pack_records, quantize_rows
from training.benchmarks.capabilities import TORCH_LIMITS, load_with, measure_each
from training.benchmarks.environment import describe, write_result
from training.benchmarks.timing import interleave, medians


CPU = torch.device("cpu")
CAPABILITIES = ("avx512_vnni", "avx2")
READ_BYTES = 128 << 20
# Weights of all layers of a case have so many bytes at most, and there are no more layers than these.
MOST_BYTES, MOST_LAYERS = 2.5e9, 30


def in_format(weight: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Put a matrix into the form that the kernel takes: codes and scales, or numbers."""
    return quantize_rows(weight, kind) if kind in FORMATS else (weight.to(getattr(torch, kind)),)


def random_matrix(*shape: int) -> Tensor:
    """Normal numbers; of a large matrix pieces that repeat, since making each anew takes minutes."""
    numbers = torch.randn(min(torch.Size(shape).numel(), (1 << 20) + 7))
    return numbers.repeat(-(-torch.Size(shape).numel() // len(numbers)))[: torch.Size(shape).numel()].view(shape)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Case:
    """A kind of layer, its sizes by name, and its format."""

    layer: str
    sizes: tuple[tuple[str, int], ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}, " + ", ".join(f"{name} {size}" for name, size in self.sizes) + f", {self.kind}"

    def size(self, name: str) -> int:
        return dict(self.sizes)[name]


def _cases(layer: str, kinds: tuple[str, ...], **sizes: int) -> list[Case]:
    return [Case(layer, tuple(sizes.items()), kind) for kind in kinds]


ALL = ("float32", "bfloat16", "int8", "int4")
PARTS = {
    "feed_forward": [
        *_cases("sparse feed-forward", ALL, d=1024, F=4096, N=64, r=64),
        *_cases("sparse feed-forward", ALL[1:], d=9216, F=36864, N=256, r=32),
        *_cases("dense feed-forward", ALL, d=1024, F=4096),
        *_cases("F.linear", ALL[:2], d=1024, F=4096),
    ],
    "projections": [
        *_cases("multiplicative and convolutions", ALL[:3], d=1024, S=16),
        *_cases("multiplicative and convolutions", ALL[:3], d=9216, S=64),
    ],
    "matrices": _cases("matrix", ALL, rows=32000, d=1024),
}
Call = Callable[[Tensor], object]


def sparse_layer(kernel: Any, case: Case) -> tuple[list[Tensor], Call]:
    width, units, rank = case.size("d"), case.size("N"), case.size("r")
    blocks = case.size("F") // units
    controller = "int8" if case.kind in FORMATS else case.kind
    up, down = (random_matrix(blocks, units, width) for _ in range(2))
    rows = [pack_records(up, down, case.kind)] if case.kind in FORMATS else []
    if not rows:
        records = torch.cat([up, down], dim=-1).to(getattr(torch, case.kind))
        rows = [records[..., :width], records[..., width:]]
    weights = [
        torch.ones(width),
        torch.zeros(width),
        *in_format(random_matrix(rank, width), controller),
        *in_format(random_matrix(blocks, units, rank), controller),
        torch.zeros(blocks, units),
        *rows,
        torch.zeros(width),
    ]
    return weights, lambda x: kernel.feed_forward(x, weights, [1, 1, 0, 0, 1, 0], 1e-5)


def dense_layer(kernel: Any, case: Case) -> tuple[list[Tensor], Call]:
    width, units = case.size("d"), case.size("F")
    matrices = (in_format(random_matrix(*shape), case.kind) for shape in ((units, width), (width, units)))
    weights = [torch.ones(width), torch.zeros(width), *next(matrices), *next(matrices)]
    return weights, lambda x: kernel.feed_forward(x, weights, [1, 0, 0, 0, 0, 0], 1e-5)


def torch_layer(_: Any, case: Case) -> tuple[list[Tensor], Call]:
    dtype = getattr(torch, case.kind)
    up, down = (
        random_matrix(*shape).to(dtype)
        for shape in (((case.size("F"), case.size("d"))), (case.size("d"), case.size("F")))
    )
    return [up, down], lambda x: nn.functional.linear(torch.relu(nn.functional.linear(x.to(dtype), up)), down)


def projection_layer(kernel: Any, case: Case) -> tuple[list[Tensor], Call]:
    """Build what attention needs of a token: a multiplicative layer, and convolutions of 3 x 3, 3 x 3 and 3 x 1."""
    width, modules = case.size("d"), case.size("S")
    size = width // modules
    gating, projection = random_matrix(modules, width), random_matrix(width, size)
    kernels = [random_matrix(size, size, 3, seen) for seen in (3, 3, 1)]
    if case.kind in FORMATS:
        layer: list[Any] = [*quantize_rows(gating, "int8"), *quantize_rows(projection.mT, "int8")]
        convolutions: list[Any] = [quantize_rows(one.permute(0, 2, 3, 1).flatten(1), "int8") for one in kernels]
    else:
        dtype = getattr(torch, case.kind)
        layer = [gating.to(dtype), None, projection.to(dtype), None]
        convolutions = [(one.to(dtype), None) for one in kernels]

    def run(x: Tensor) -> None:
        kernel.multiplicative(x, *layer)
        windows = x.expand(3, -1).reshape(1, 3, modules, size)
        for convolution, seen in zip(convolutions, (3, 3, 1), strict=True):
            kernel.module_conv(windows, *convolution, None, 3, seen)

    weights = [one for one in (*layer, *(tensor for pair in convolutions for tensor in pair)) if one is not None]
    return weights, run


def matrix_layer(kernel: Any, case: Case) -> tuple[list[Tensor], Call]:
    weights = in_format(random_matrix(case.size("rows"), case.size("d")), case.kind)
    return list(weights), lambda x: kernel.linear(x, *weights)


LAYERS = {
    "sparse feed-forward": sparse_layer,
    "dense feed-forward": dense_layer,
    "F.linear": torch_layer,
    "multiplicative and convolutions": projection_layer,
    "matrix": matrix_layer,
}


def read_bytes_of(case: Case, weights: list[Tensor]) -> float:
    """Bytes of weights that one token needs: of a sparse layer one unit of each block, half of them killed by ReLU."""
    if case.layer != "sparse feed-forward":
        return bytes_of(weights)
    units = weights[-2:-1] if case.kind in FORMATS else weights[-3:-1]
    return bytes_of(weights) - bytes_of(units) * (1 - 0.75 / case.size("N"))


@torch.inference_mode()
def measure_case(kernel: Any, case: Case, repeats: int) -> dict[str, Any]:
    """Core seconds of a call, cold and hot."""
    build = partial(LAYERS[case.layer], kernel, case)
    first = build()
    count = max(1, min(MOST_LAYERS, int(MOST_BYTES / bytes_of(first[0]))))
    layers = [first, *(build() for _ in range(count - 1))]
    inputs = [torch.randn(1, case.size("d")) for _ in range(13)]
    other, turn = torch.randn(READ_BYTES // 4), iter(range(1 << 30))

    def cold() -> None:
        x = inputs[next(turn) % len(inputs)].clone()
        for _, run in layers:
            run(x)

    def hot() -> None:
        x = inputs[0].clone()
        for _ in range(20):
            first[1](x)

    seconds = interleave({"read": other.sum, "cold": cold, "hot": hot}, repeats, CPU, str(case))
    counts = {"cold": count, "hot": 20}
    return {
        "layers": count,
        "bytes": read_bytes_of(case, first[0]),
        "read_bytes": other.nbytes,
        "seconds": {name: [value / counts.get(name, 1) for value in values] for name, values in seconds.items()},
    }


def rows_of_case(case: Case, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case."""
    times = medians(found["seconds"])
    bandwidth = found["read_bytes"] / statistics.median(found["seconds"]["read"])
    share = found["bytes"] / times["cold"] / bandwidth
    for name, value, unit in (
        ("cold", 1e6 * times["cold"], "us"),
        ("hot", 1e6 * times["hot"], "us"),
        ("weights read", found["bytes"] / 1e6, "MB"),
        ("share of read bandwidth", share, "times"),
    ):
        yield {"name": f"{case}: {name}", "value": value, "unit": unit, "goal": None}


def measure(capability: str, names: list[str], repeats: int, path: Path) -> None:
    """Measure the parts with one instruction set, and write the result."""
    kernel = load_with(KERNEL, capability)
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        for case in PARTS[name]:
            parts.setdefault(name, {})[str(case)] = measure_case(kernel, case, repeats)
            # After every case, so that an interrupted run leaves what it has.
            rows = [
                row
                for part, cases in parts.items()
                for one in PARTS[part]
                if str(one) in cases
                for row in rows_of_case(one, cases[str(one)])
            ]
            environment = describe()
            write_result(path, {"summary": rows, **environment, "capability": capability, "parts": parts})
            for row in rows[-4:]:
                print(f"{row['name']}: {row['value']:.4g} {row['unit']}", flush=True)


def main(argv: list[str] | None = None) -> None:
    measure_each("decode_layer_cpu", __doc__, KERNEL, list(PARTS), measure, argv, TORCH_LIMITS, CAPABILITIES)


if __name__ == "__main__":
    main()
