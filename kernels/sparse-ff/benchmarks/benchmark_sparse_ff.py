"""The sparse feed-forward's time for one token and for many: `kernels benchmark ./kernels/sparse-ff` runs it.

The library loads the kernel for the machine's device and compares `self.out` with what each `verify_` method returns.
"""

import torch
from kernels.benchmark import Benchmark
from torch import Tensor


def all_units(x: Tensor, controller_down: Tensor, controller_up: Tensor, controller_bias: Tensor, up, down) -> Tensor:
    """Every unit multiplied, and all but the winners left out."""
    logits = torch.einsum("kur,tr->tku", controller_up, x @ controller_down.mT) + controller_bias
    hidden = torch.relu(torch.einsum("kud,td->tku", up, x))
    chosen = torch.zeros_like(hidden).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.einsum("tku,kud->td", hidden * chosen, down)


class SparseFfBenchmark(Benchmark):
    """One token and 512; width 1024, 64 blocks of 64 units, rank 64. Weights are hot: one layer again and again."""

    seed = 0
    shape = (1024, 64, 64, 64)
    tokens = 512
    dtype = torch.float32

    def setup(self) -> None:
        width, blocks, units, rank = self.shape

        def random(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(*shape, device=self.device)).to(self.dtype)

        self.x = random(self.tokens, width, scale=1.0)
        self.weights = (
            random(rank, width, scale=width**-0.5),
            random(blocks, units, rank, scale=1.0),
            random(blocks, units, scale=0.1),
            random(blocks, units, width, scale=width**-0.5),
            random(blocks, units, width, scale=(blocks * units) ** -0.5),
        )

    def benchmark_one_token(self) -> None:
        self.out, _ = self.kernel.sparse_feed_forward(self.x[:1], *self.weights)

    def verify_one_token(self) -> Tensor:
        return all_units(self.x[:1], *self.weights)

    def benchmark_many_tokens(self) -> None:
        self.out, _ = self.kernel.sparse_feed_forward(self.x, *self.weights)

    def verify_many_tokens(self) -> Tensor:
        return all_units(self.x, *self.weights)


class SparseFfBfloat16Benchmark(SparseFfBenchmark):
    """The same with input and weights in bfloat16; computed in float32."""

    dtype = torch.bfloat16
    # The library's comparison is closer than two neighbouring numbers of bfloat16; the kernel's tests compare these.
    verify_one_token = verify_many_tokens = None
