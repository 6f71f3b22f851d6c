"""The recurrence's time against a plain loop in torch: `kernels benchmark ./kernels/sru-recurrence` runs it.

The library loads the kernel for the machine's device and compares `self.out` with what each `verify_` method returns.
"""

import torch
from kernels.benchmark import Benchmark
from torch import Tensor


def plain_loop(u: Tensor, x: Tensor, weight_c: Tensor, bias: Tensor) -> Tensor:
    """h of each step, one step after the other."""
    state, outputs = torch.zeros_like(x[:, 0]), []
    # `unbind`, since the gradient of each slice would be a tensor of u's size.
    for (candidate, forget_gate, output_gate), highway in zip(
        (step.unbind(1) for step in u.unbind(1)), x.unbind(1), strict=True
    ):
        forget_gate = torch.sigmoid(forget_gate + weight_c[0] * state + bias[0])
        output_gate = torch.sigmoid(output_gate + weight_c[1] * state + bias[1])
        state = torch.lerp(candidate, state, forget_gate)
        outputs.append(torch.lerp(highway, state, output_gate))
    return torch.stack(outputs, 1)


class SruRecurrenceBenchmark(Benchmark):
    """Forward, forward with the last state alone, and both passes; (batch, length, width) = (8, 512, 1024)."""

    seed = 0
    shape = (8, 512, 1024)
    dtype = torch.float32

    def setup(self) -> None:
        batch, length, width = self.shape
        self.u = torch.randn(batch, length, 3, width, device=self.device, dtype=self.dtype)
        self.x = torch.randn(batch, length, width, device=self.device, dtype=self.dtype)
        self.weight_c, self.bias = (0.3 * torch.randn(2, width, device=self.device) for _ in range(2))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.u, self.x, self.weight_c, self.bias

    @torch.no_grad()
    def benchmark_forward(self) -> None:
        self.out, _ = self.kernel.sru_recurrence(*self.inputs)

    @torch.no_grad()
    def verify_forward(self) -> Tensor:
        return plain_loop(*self.inputs)

    def benchmark_forward_last(self) -> None:
        self.out, _ = self.kernel.forward_last(*self.inputs, None, None, None, None, 1.0, "identity", False)

    def verify_forward_last(self) -> Tensor:
        return self.verify_forward()

    def setup_forward_backward(self) -> None:
        self.setup()
        self.grad_h = torch.randn_like(self.x)
        for tensor in self.inputs:
            tensor.requires_grad_()

    def benchmark_forward_backward(self) -> None:
        h, _ = self.kernel.sru_recurrence(*self.inputs)
        (self.out,) = torch.autograd.grad(h, self.u, self.grad_h)

    def verify_forward_backward(self) -> Tensor:
        (gradient,) = torch.autograd.grad(plain_loop(*self.inputs), self.u, self.grad_h)
        return gradient


class SruRecurrenceBfloat16Benchmark(SruRecurrenceBenchmark):
    """The same in bfloat16; the state stays in float32."""

    dtype = torch.bfloat16
    # The library's comparison is closer than two neighbouring numbers of bfloat16; the kernel's tests compare these.
    verify_forward = verify_forward_last = verify_forward_backward = None
