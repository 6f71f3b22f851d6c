"""The recurrence's forward pass as one writes it in Triton: a program for each block of columns, one step after the
other. A peer to measure against, not a product."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def scan_kernel(u, x, weight_c, bias, h, states, length, width, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    units = block * BLOCK + tl.arange(0, BLOCK)
    inside = units < width
    forget_gate_weight = tl.load(weight_c + units, mask=inside, other=0.0)
    output_gate_weight = tl.load(weight_c + width + units, mask=inside, other=0.0)
    forget_gate_bias = tl.load(bias + units, mask=inside, other=0.0)
    output_gate_bias = tl.load(bias + width + units, mask=inside, other=0.0)
    u += row * length * 3 * width + units
    x += row * length * width + units
    h += row * length * width + units
    states += row * (length + 1) * width + units
    c = tl.zeros((BLOCK,), tl.float32)
    tl.store(states, c, mask=inside)
    for step in tl.range(0, length, num_stages=STAGES):
        at = step * width
        u0 = tl.load(u + 3 * at, mask=inside, other=0.0).to(tl.float32)
        u1 = tl.load(u + 3 * at + width, mask=inside, other=0.0).to(tl.float32)
        u2 = tl.load(u + 3 * at + 2 * width, mask=inside, other=0.0).to(tl.float32)
        highway = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        forget = tl.sigmoid(u1 + forget_gate_weight * c + forget_gate_bias)
        output = tl.sigmoid(u2 + output_gate_weight * c + output_gate_bias)
        c = u0 + (c - u0) * forget
        tl.store(h + at, (highway + (c - highway) * output).to(h.dtype.element_ty), mask=inside)
        tl.store(states + at + width, c, mask=inside)


# Columns of a program, its warps, and stages of the loop's pipeline: the fastest of them is the peer.
CONFIGURATIONS = tuple(
    (block, warps, stages) for block, warps in ((32, 1), (64, 1), (128, 2), (128, 4), (256, 4)) for stages in (1, 4)
)


def triton_forward(
    h: Tensor, states: Tensor, u: Tensor, x: Tensor, weight_c: Tensor, bias: Tensor, configuration: tuple[int, int, int]
) -> None:
    """Write h, (batch, length, width), and the states of `(batch, length + 1, width)`, for contiguous tensors."""
    batch, length, _, width = u.shape
    block, warps, stages = configuration
    grid = (batch, triton.cdiv(width, block))
    scan_kernel[grid](u, x, weight_c, bias, h, states, length, width, BLOCK=block, STAGES=stages, num_warps=warps)


def compile_for(capability: int, configuration: tuple[int, int, int]) -> None:
    """Compile for tensors in float16 and GPUs of such a compute capability as 90, which needs no GPU."""
    block, warps, stages = configuration
    types = {**dict.fromkeys(("u", "x", "h"), "*fp16"), **dict.fromkeys(("weight_c", "bias", "states"), "*fp32")}
    constants = {"BLOCK": block, "STAGES": stages}
    signature = {**types, "length": "i32", "width": "i32", **dict.fromkeys(constants, "constexpr")}
    target = GPUTarget("cuda", capability, 32)
    triton.compile(ASTSource(scan_kernel, signature, constants), target=target, options={"num_warps": warps})


def check_triton(device: torch.device) -> None:
    """Compare with plain torch on a small example; raises `AssertionError`."""
    torch.manual_seed(0)
    u, x = torch.randn(2, 5, 3, 37, device=device), torch.randn(2, 5, 37, device=device)
    weight_c, bias = torch.randn(2, 2, 37, device=device)
    h, states = torch.empty_like(x), torch.empty(2, 6, 37, device=device)
    triton_forward(h, states, u, x, weight_c, bias, CONFIGURATIONS[0])
    c = torch.zeros(2, 37, device=device)
    for step in range(5):
        gates = torch.sigmoid(u[:, step, 1:] + weight_c * c[:, None] + bias)
        c = torch.lerp(u[:, step, 0], c, gates[:, 0])
        torch.testing.assert_close(states[:, step + 1], c, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h[:, step], torch.lerp(x[:, step], c, gates[:, 1]), atol=1e-5, rtol=1e-5)
