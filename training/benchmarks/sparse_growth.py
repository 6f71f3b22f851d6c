"""
Growth of the cost of a token with the width: blocks of the Scaling Transformer against dense ones of equal width.

    python -m training.benchmarks run sparse_growth run --dtype float32 --widths 1024 2304 4096
    python -m training.benchmarks run sparse_growth run --dtype float32 --widths 9216
    python -m training.benchmarks run sparse_growth report

A sparse block has modules, units of a block and rank of the controller (S, N, r of the paper) of sqrt(width), which
makes the weights that a token reads grow as width^1.5; a dense one reads 12 width^2. Both have 4 width hidden units.
Measured is one token at batch 1, without attention over a context: queries, keys and values, of the dense block the
output projection too, and the feed-forward layer. One thread, the blocks in turn in one process, medians of core time.
Each pass goes through several layers with an input of its own, so that the weights come from memory, not from a cache;
`run` says how many fit into 5 GB, of which at width 9216 in float32 one has 4.1. Dense and sparse feed-forward share
their memory.

`run` writes a file for each width, and `report` training/results/sparse_growth.json and its picture: the exponents of
time over width, of all widths that were measured.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_efficient.modules.sparse_blocks import ConvProjections
from hf_efficient.modules.sparse_layers import SparseFeedForward
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.utils.process import disable_malloc_trim

from .environment import RESULTS, describe, write_result, write_whole
from .timing import interleave, medians


CPU = torch.device("cpu")
RESULT = RESULTS / "sparse_growth.json"
WIDTHS = (1024, 2304, 4096, 9216)
DTYPES = ("float32", "bfloat16")
INPUTS = 311  # as many as no pass divides
WINDOW, KERNEL_WIDTH = 3, 3
# Of the whole block; the feed-forward layer alone; what makes queries, keys and values; its multiplicative layer alone.
PARTS = ("block", "feed-forward", "projections", "multiplicative layer")
# Goals of the exponents in float32.
GOALS = {("sparse", "block"): "at most 1.6", ("sparse", "feed-forward"): "about 1.5", ("dense", "block"): "about 2"}


def counts(width: int) -> dict[str, dict[str, dict[str, int]]]:
    """Count the weights that a token reads and the multiplications that it takes, of each part; biases are left out."""
    root = math.isqrt(width)
    hidden = 4 * width
    blocks = hidden // root
    feed_forward = root * (width + hidden) + 2 * blocks * width
    gated = {"weights": 2 * width * root, "products": width * width + root * width}
    # Queries and keys see so many tokens and modules, values so many tokens.
    taps = 2 * WINDOW * KERNEL_WIDTH + WINDOW
    convolved = {"weights": taps * root * root, "products": taps * root * root * root}
    projections = {name: gated[name] + convolved[name] for name in gated}
    sparse = {
        "feed-forward": {"weights": feed_forward, "products": feed_forward},
        "projections": projections,
        "multiplicative layer": gated,
        "block": {name: feed_forward + projections[name] for name in projections},
    }
    squares = {"feed-forward": 8, "projections": 4, "block": 12}
    dense = {part: dict.fromkeys(("weights", "products"), n * width * width) for part, n in squares.items()}
    return {"sparse": sparse, "dense": dense}


class Layer:
    """
    One sparse block and a dense one, whose feed-forward layers share their memory.

    Args:
        width (`int`): a square number.
        dtype (`torch.dtype`): of all weights.
    """

    def __init__(self, width: int, dtype: torch.dtype):
        root = math.isqrt(width)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            config = SimpleNamespace(
                hidden_size=width,
                attention_sparsity=root,
                attention_window=WINDOW,
                attention_kernel_width=KERNEL_WIDTH,
                attention_share_qk=False,
                attention_value_input="shared",
            )
            self.projections = ConvProjections(config).eval()
            self.feed_forward = SparseFeedForward(width, 4 * width, root, root).eval()
            self.dense_projections = torch.empty(4, width, width)
            self.dense_biases = torch.zeros(4, width)
            self.hidden_bias = torch.zeros(4 * width)
        finally:
            torch.set_default_dtype(before)
        bound = width**-0.5
        weights = (*self.projections.parameters(), *self.feed_forward.parameters(), self.dense_projections)
        with torch.no_grad():
            for weight in weights:
                weight.uniform_(-bound, bound)
        self.dense_up = self.feed_forward.up.detach().flatten(0, 1)
        self.dense_down = self.feed_forward.down.detach().view(width, 4 * width)
        self.state = torch.rand(1, self.projections.window.state_size, dtype=dtype)

    def sparse_projections(self, x: Tensor) -> object:
        return self.projections(x, self.state, None, False)

    def sparse_feed_forward(self, x: Tensor) -> object:
        return self.feed_forward(x)

    def multiplicative_layer(self, x: Tensor) -> object:
        return self.projections.shared(x)

    def project(self, x: Tensor) -> object:
        return [nn.functional.linear(x, *pair) for pair in zip(self.dense_projections, self.dense_biases, strict=True)]

    def feed(self, x: Tensor) -> object:
        hidden = nn.functional.linear(x, self.dense_up, self.hidden_bias).relu_()
        return nn.functional.linear(hidden, self.dense_down, self.feed_forward.bias.detach())

    def sparse_block(self, x: Tensor) -> object:
        return self.sparse_projections(x), self.sparse_feed_forward(x)

    def dense_block(self, x: Tensor) -> object:
        return self.project(x), self.feed(x)


# By kind and part.
CALLS: dict[tuple[str, str], Callable[[Layer, Tensor], object]] = {
    ("dense", "block"): Layer.dense_block,
    ("sparse", "block"): Layer.sparse_block,
    ("dense", "feed-forward"): Layer.feed,
    ("sparse", "feed-forward"): Layer.sparse_feed_forward,
    ("dense", "projections"): Layer.project,
    ("sparse", "projections"): Layer.sparse_projections,
    ("sparse", "multiplicative layer"): Layer.multiplicative_layer,
}


def read_bandwidth(repeats: int = 7) -> float:
    """Measure the bytes per second at which a product with a vector, or a sum, goes through 512 MB; the better one."""
    matrix, vector = torch.ones(1 << 14, 1 << 13), torch.ones(1 << 13)
    seconds = medians(interleave({"mv": lambda: matrix @ vector, "sum": matrix.sum}, repeats, CPU, "bandwidth"))
    return matrix.numel() * matrix.element_size() / min(seconds.values())


def measure(width: int, dtype: torch.dtype, layers: int, repeats: int) -> dict[str, Any]:
    """Measure a width; seconds are those of one token in one layer."""
    torch.manual_seed(0)
    stack = [Layer(width, dtype) for _ in range(layers)]
    inputs = itertools.cycle(torch.randn(INPUTS, 1, 1, width).to(dtype))

    def through(call: Callable[[Layer, Tensor], object]) -> Callable[[], object]:
        def run() -> None:
            x = next(inputs)
            for layer in stack:
                call(layer, x)

        return run

    runs = {" ".join(names): through(call) for names, call in CALLS.items()}
    with torch.no_grad():
        seconds = interleave(runs, repeats, CPU, f"{width} wide, {dtype}")
    return {name: [value / layers for value in values] for name, values in seconds.items()}


def fitting_layers(width: int, dtype: torch.dtype, gigabytes: float) -> int:
    """Count the layers whose weights fit, at least one; more than 48 would make no pass colder."""
    return max(1, min(48, int(gigabytes * 1e9 / (12 * width**2 * dtype.itemsize))))


def run(args: argparse.Namespace) -> None:
    """Measure widths one after the other, and write the file of each as soon as it has finished."""
    dtype = getattr(torch, args.dtype)
    bandwidth = read_bandwidth()
    for width in args.widths:
        layers = fitting_layers(width, dtype, args.gigabytes)
        with use_backend(args.backend):
            repetitions = measure(width, dtype, layers, args.repeats)
            backend = last_backend("sparse_ff")
        result = {
            "width": width,
            "dtype": args.dtype,
            "backend": backend,
            "layers": layers,
            "read_bandwidth": bandwidth,
            "seconds": medians(repetitions),
            "repetitions": repetitions,
        }
        write_result(args.output_dir / f"{backend}-{args.dtype}-{width}.json", {**result, **describe()})
        seconds = result["seconds"]
        print(f"{width} wide, {args.dtype}, {backend}, {layers} layers:")
        for kind, part in CALLS:
            print(f"  {kind} {part}: {1e3 * seconds[f'{kind} {part}']:.3f} ms")


def exponent(values: dict[int, float]) -> float:
    """Fit the power of the width that values grow with, by least squares of logarithms."""
    slope, _ = np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)
    return float(slope)


def points(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare sparse and dense parts of each width, with the ratio of their bytes."""
    rows = []
    for found in measured:
        width, seconds = found["width"], found["seconds"]
        counted, itemsize = counts(width), getattr(torch, found["dtype"]).itemsize
        for part in ("block", "feed-forward", "projections"):
            weights = {kind: counted[kind][part]["weights"] for kind in ("dense", "sparse")}
            times = {kind: seconds[f"{kind} {part}"] for kind in weights}
            rate = {kind: weights[kind] * itemsize / times[kind] / found["read_bandwidth"] for kind in weights}
            rows.append(
                {
                    "width": width,
                    "part": part,
                    "dense_ms": 1e3 * times["dense"],
                    "sparse_ms": 1e3 * times["sparse"],
                    "times_faster": times["dense"] / times["sparse"],
                    "times_fewer_bytes": weights["dense"] / weights["sparse"],
                    "dense_share_of_read_bandwidth": rate["dense"],
                    "sparse_share_of_read_bandwidth": rate["sparse"],
                }
            )
    return rows


def exponents(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fit the exponents of time, of weights that are read and of products, by kind and part."""
    found: dict[str, dict[str, float]] = {}
    for kind, part in CALLS:
        name = f"{kind} {part}"
        found[name] = {"time": exponent({one["width"]: one["seconds"][name] for one in measured})}
        for what in ("weights", "products"):
            found[name][what] = exponent(
                {one["width"]: float(counts(one["width"])[kind][part][what]) for one in measured}
            )
    return found


def _summary(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    entries = []
    for (dtype, backend), measured in groups.items():
        fitted = exponents(measured)
        how = "plain torch" if backend == "reference" else "with the kernel"
        for kind, part in CALLS:
            entries.append(
                {
                    "name": f"exponent of time over width, {kind} {part}, {dtype}, {how}",
                    "value": fitted[f"{kind} {part}"]["time"],
                    "unit": f"weights read {fitted[f'{kind} {part}']['weights']:.2f}, "
                    f"multiplications {fitted[f'{kind} {part}']['products']:.2f}",
                    "goal": GOALS.get((kind, part)) if dtype == "float32" else None,
                }
            )
        for row in points(measured):
            if row["part"] == "block":
                entries.append(
                    {
                        "name": f"block of width {row['width']}, dense / sparse, {dtype}, {how}",
                        "value": row["times_faster"],
                        "unit": f"times; {row['times_fewer_bytes']:.3g} times fewer bytes",
                        "goal": None,
                    }
                )
    return entries


def _headline(measured: list[dict[str, Any]]) -> str:
    fitted, widths = exponents(measured), [one["width"] for one in measured]
    power = {name: f"width^{fitted[name]['time']:.2f}" for name in fitted}
    last = next(row for row in points(measured) if row["width"] == widths[-1] and row["part"] == "block")
    steepest = exponent({one["width"]: one["seconds"]["sparse block"] for one in measured[-2:]})
    how = "in plain torch" if measured[0]["backend"] == "reference" else "with the compiled kernel"
    return (
        f"From width {widths[0]:,} to {widths[-1]:,} the time of a token in one block (batch 1, "
        f"{measured[0]['dtype']}, one thread, weights from memory) grows with {power['sparse block']} where it is "
        f"sparse, {how}, and with {power['dense block']} where it is dense: {last['sparse_ms']:.2f} against "
        f"{last['dense_ms']:.1f} ms at {widths[-1]:,}. Modules, units of a block and rank are sqrt(width). "
        f"Calls of operators take a fixed time, which weighs at small widths: of the last two widths alone the sparse "
        f"exponent is {steepest:.2f}. The "
        f"feed-forward layer alone grows with {power['sparse feed-forward']}. The multiplicative layer reads few "
        f"weights, but multiplies width^2 numbers whatever the number of its modules: it grows with "
        f"{power['sparse multiplicative layer']}."
    )


def draw(groups: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Draw the time of a token in a block over the width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    colors = {"float32": "tab:blue", "bfloat16": "tab:orange"}
    for (dtype, backend), measured in groups.items():
        fitted, widths = exponents(measured), [one["width"] for one in measured]
        for kind, line in (("dense", "--"), ("sparse", "-")):
            label = f"{kind}, {dtype}: width^{fitted[f'{kind} block']['time']:.2f}"
            if kind == "sparse" and backend != "reference":
                label += " (kernel)"
            times = [1e3 * one["seconds"][f"{kind} block"] for one in measured]
            mark = "o" if backend == "reference" else "s"
            axes.loglog(widths, times, line, marker=mark, color=colors[dtype], label=label)
    axes.set_xticks(WIDTHS, [f"{width:,}" for width in WIDTHS])
    axes.minorticks_off()
    axes.set_xlabel("width d; S = N = r = sqrt(d)")
    axes.set_ylabel("ms per token and block, batch 1")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


def report(args: argparse.Namespace) -> None:
    """Merge all that was measured into one file and a picture, and print the headline."""
    found = [json.loads(path.read_text()) for path in args.output_dir.glob("*-*-*.json")]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in sorted(found, key=lambda one: (DTYPES.index(one["dtype"]), one["backend"] == "reference", one["width"])):
        groups.setdefault((one["dtype"], one["backend"]), []).append(one)
    groups = {names: measured for names, measured in groups.items() if len(measured) > 1}
    if not groups:
        raise SystemExit(f"{args.output_dir} holds fewer than two widths of a kind: use `run` first.")
    first = next(iter(groups.values()))
    machine = {name: first[0][name] for name in ("machine", "versions", "commit", "command")}
    result = {
        **machine,
        "headline": _headline(first),
        "summary": _summary(groups),
        "exponents": {" ".join(names): exponents(measured) for names, measured in groups.items()},
        "points": {" ".join(names): points(measured) for names, measured in groups.items()},
        "counts": {width: counts(width) for width in WIDTHS},
        "runs": found,
    }
    write_result(args.result, result)
    drawn = {names: measured for names, measured in groups.items() if names[1] == _best(groups, names[0])}
    draw(drawn, args.result.with_suffix(".png"))
    print(result["headline"])


def _best(groups: dict[tuple[str, str], list[dict[str, Any]]], dtype: str) -> str:
    """The backend to show: the compiled kernel where it was measured."""
    return next(backend for named, backend in groups if named == dtype)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks run sparse_growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure widths")
    reports = commands.add_parser("report", help="fit the exponents of all that was measured")
    runs.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="square numbers (%(default)s)")
    runs.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and inputs (%(default)s)")
    runs.add_argument("--backend", choices=("auto", "reference", "cpu"), default="auto", help="of the sparse ops")
    runs.add_argument("--repeats", type=int, default=15, help="timed passes of each part (%(default)s)")
    runs.add_argument(
        "--gigabytes", type=float, default=5.0, help="of weights at most, if one layer fits (%(default)s)"
    )
    for command in (runs, reports):
        command.add_argument("--output_dir", type=Path, default=Path("runs/sparse_growth"))
    reports.add_argument("--result", type=Path, default=RESULT, help="JSON to write (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_malloc_trim()
    {"run": run, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
