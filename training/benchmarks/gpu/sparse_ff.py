"""Parts of the GPU agenda about the compiled sparse feed-forward: whether it is right, and how fast it is against the
dense layer."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.ops import sparse_ff_reference
from hf_efficient.ops.kernel_loader import load_kernel
from hf_efficient.ops.sparse_ff import KERNEL
from training.benchmarks.gpu.context import PartContext
from training.benchmarks.gpu.speed import Timer, medians


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = (torch.float32,) * 3
BFLOAT16 = (torch.bfloat16,) * 3
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
# The share of winners that rounding may decide otherwise than float64: of random logits few are so near to each other.
MOST_TIES = 1e-3
# (width, hidden, units of a block, rank) and tokens of the measurements; from width 2048 on gains are expected.
SIZES = [(1024, 4096, 64, 64), (2048, 8192, 128, 64), (4096, 16384, 64, 64), (9216, 36864, 256, 32)]
TOKENS = (1, 8, 64, 512)
# What layers in turn read together, more than caches hold, so that none of it is still there when its turn comes again.
COLD_BYTES = 1 << 27


@dataclass(frozen=True)
class Case:
    """One call: dtypes of input, controller and rows; sizes; options."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    width: int
    blocks: int
    units: int
    rank: int
    tokens: int
    activation: str = "relu"
    multiply: bool = False


def cases() -> Iterator[Case]:
    """Every kernel, by dtypes and by width of access, for one to many tokens; then options and sizes of models."""
    for dtypes, (width, rank), tokens in product(product(DTYPES, DTYPES, DTYPES), ((72, 16), (77, 7)), (1, 8, 9)):
        yield Case(dtypes, width, 3, 13, rank, tokens)
    for activation, multiply in product(("relu", "gelu", "gelu_new", "silu"), (False, True)):
        yield Case(FLOAT32, 500, 5, 40, 33, 17, activation, multiply)
    for tokens in (1, 2, 8, 63):
        yield Case(BFLOAT16, 1024, 64, 64, 64, tokens)


def random_weights(case: Case, device: torch.device) -> list[Tensor]:
    """The weights of a layer in the order of the op's arguments."""

    def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(dtype)

    _, controller, rows = case.dtypes
    width, blocks, units, scale = case.width, case.blocks, case.units, case.width**-0.5
    return [
        random(case.rank, width, dtype=controller, scale=scale),
        random(blocks, units, case.rank, dtype=controller),
        random(blocks, units, dtype=torch.float32),
        random(blocks, units, width, dtype=rows, scale=scale),
        random(blocks, units, width, dtype=rows),
        random(width, dtype=torch.float32),
        random(blocks, units, dtype=torch.float32),
    ]


def compare(kernel, case: Case, device: torch.device) -> None:
    """
    Compare one call with the torch form in float64.

    Raises:
        AssertionError: if results differ where the winners are the same, or too many winners differ.
    """
    torch.manual_seed(0)
    weights, x = random_weights(case, device), torch.randn(case.tokens, case.width, device=device).to(case.dtypes[0])
    arguments: list[Any] = [*weights, case.activation, case.multiply]
    y, winners = kernel.forward(x, *arguments)
    arguments[: len(weights)] = (weight.double() for weight in weights)
    expected, chosen = sparse_ff_reference.forward(x.double(), *arguments)
    same = winners == chosen
    assert (~same).float().mean().item() <= MOST_TIES, f"{(~same).sum().item()} winners differ"
    whole, limit = same.all(1), LIMITS[case.dtypes[0]]
    bound = limit * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(y.double()[whole], expected[whole], rtol=limit, atol=bound)


# Few, since a sanitizer makes each of them slow: rows multiplied by blocks and by warps, wide and single accesses.
SANITIZED = [
    Case(dtypes, width, 5, 13, rank, tokens)
    for dtypes, (width, rank), tokens in product((FLOAT32, BFLOAT16), ((72, 16), (77, 7)), (1, 5, 63))
]


def run_for_sanitizer(device: torch.device) -> None:
    """Run the cases of compute-sanitizer, without a look at what they give."""
    kernel = load_kernel(KERNEL, device.type)
    for case in SANITIZED:
        x = torch.randn(case.tokens, case.width, device=device).to(case.dtypes[0])
        kernel.forward(x, *random_weights(case, device), case.activation, case.multiply)


def check_graph(kernel, context: PartContext) -> None:
    """
    Capture a call into a CUDA graph, and replay it on other values in the same tensors.

    Raises:
        AssertionError: if the graph gives other results than a plain call.
    """
    if context.rehearsal:
        context.needs_gpu("capture of cooperative launches into a CUDA graph")
        return
    case = Case(BFLOAT16, 1024, 64, 64, 64, 1)
    weights, x = random_weights(case, context.device), torch.randn(1, 1024, device=context.device).bfloat16()
    kernel.forward(x, *weights, "relu", False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.forward(x, *weights, "relu", False)
    x.mul_(-0.5)
    graph.replay()
    for one, other in zip(captured, kernel.forward(x, *weights, "relu", False), strict=True):
        assert torch.equal(one, other), "a replayed CUDA graph differs from a plain call"


def check_sparse_ff(context: PartContext) -> dict[str, Any]:
    """Parity of every kernel with the torch form in float64, and a CUDA graph."""
    kernel = load_kernel(KERNEL, context.device.type)
    compared, failures = 0, list[str]()
    for case in cases():
        compared += 1
        try:
            compare(kernel, case, context.device)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{case}: {error}")
    line = f"{compared} cases, {len(failures)} wrong"
    context.save({"line": line, "failures": failures[:50]})
    if failures:
        raise AssertionError("\n".join([line, *failures[:20]]))
    check_graph(kernel, context)
    return {"line": line, "compared": compared}


def dense(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense layer, with weights as `nn.Linear` stores them."""
    return nn.functional.linear(torch.relu(nn.functional.linear(x, up)), down)


def layers_in_turn(case: Case) -> int:
    """The number of layers that it takes for a sparse pass to read `COLD_BYTES` in bfloat16."""
    controller = case.rank * (case.width + case.blocks * case.units)
    rows = 2 * case.blocks * case.width * min(case.tokens, case.units)
    return -(-COLD_BYTES // (2 * (controller + rows)))


def peers(kernel, case: Case, layers: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The kernel, the torch form and the dense layer; each call is that of the next of so many layers."""
    calls: dict[str, list[Callable[[], object]]] = {"kernel": [], "torch": [], "dense": []}
    for _ in range(layers):
        *weights, bias, _ = random_weights(case, device)
        x = torch.randn(case.tokens, case.width, device=device).to(case.dtypes[0])
        arguments: tuple[Any, ...] = (x, *weights, bias, None, "relu", False)
        up, down = (rows.view(-1, case.width) for rows in weights[3:])
        calls["kernel"].append(partial(kernel.forward, *arguments))
        calls["torch"].append(partial(sparse_ff_reference.forward, *arguments))
        calls["dense"].append(partial(dense, x, up, down.mT.contiguous()))
    turns = {name: itertools.cycle(of_layers) for name, of_layers in calls.items()}
    return {name: partial(lambda turn: next(turn)(), turn) for name, turn in turns.items()}


@torch.inference_mode()
def measure_sparse_ff(context: PartContext) -> dict[str, Any]:
    """One layer after the other and a few tokens, in bfloat16, against `F.linear` twice and against the torch form, all
    replayed from CUDA graphs; and the dense layer's share of a copy's bandwidth."""
    kernel, timer = load_kernel(KERNEL, context.device.type), Timer(context)
    found: dict[str, Any] = {"copy_gigabytes_per_second": timer.copy_rate(context.device) / 1e3, "cases": []}
    for (width, hidden, units, rank), tokens in product(context.choose(SIZES, [(64, 256, 16, 8)]), TOKENS):
        case = Case(BFLOAT16, width, hidden // units, units, rank, tokens)
        layers = context.choose(layers_in_turn(case), 2)
        runs = peers(kernel, case, layers, context.device)
        times = timer.in_turn({name: timer.graph_of(run, layers) for name, run in runs.items()}, layers)
        medians_of = medians(times)
        ratio = {name: medians_of["dense"] / medians_of[name] for name in ("kernel", "torch")}
        size = {"width": width, "hidden": hidden, "units": units, "rank": rank, "tokens": tokens, "layers": layers}
        share = 2 * 2 * width * hidden / medians_of["dense"] / 1e3 / found["copy_gigabytes_per_second"]
        found["cases"].append(
            {**size, "microseconds": medians_of, "faster_than_dense": ratio, "dense_share_of_copy": share, "all": times}
        )
        found["line"] = "; ".join(
            f"d {c['width']} x {c['tokens']}: {c['faster_than_dense']['kernel']:.2g} x dense" for c in found["cases"]
        )
        context.save(found)
        context.say(found["line"].rpartition("; ")[2])
    return found
