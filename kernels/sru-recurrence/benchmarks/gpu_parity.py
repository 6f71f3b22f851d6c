"""Whether the compiled recurrence is right: outputs and all gradients against the torch form on the same device."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from hf_efficient.ops import sru_reference
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.sru import BACKWARD_NAME, OP_NAME, sru_recurrence


GPU = torch.device("cuda")
# dtypes of u and of x.
TYPES = [
    *((dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
NAMES = ("u", "x", "weight_c", "bias", "c0", "mask", "reset", "dropout_mask")
SMALL_SHAPES = [(1, 1, 1), (1, 63, 5), (3, 1, 500), (2, 17, 64), (0, 5, 7), (3, 5, 0)]
SHAPES = [*SMALL_SHAPES, (8, 512, 3072), (64, 65, 3072)]
# Both forms compute in float32 or float64; results in 16 bits may be rounded to neighbouring numbers. Sums over time
# and batch are compared relative to their largest.
LIMITS = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random_inputs(
    shape: tuple[int, int, int], parts: int, dtype: torch.dtype, x_type: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """All arguments that there are, NaN at pads, some gates quite shut or open; with three parts a highway input, if
    `x_type` is a dtype."""
    batch, length, width = shape
    state = torch.promote_types(dtype, torch.float32)
    make: dict[str, Any] = {"dtype": state, "device": device}
    inputs = {
        "u": (2 * torch.randn(batch, length, parts, width, **make)).to(dtype),
        # With larger weights some units are chaotic: of thousands, one multiplies each rounding at every step.
        "weight_c": 0.3 * torch.randn(2, width, **make),
        "bias": torch.randn(2, width, **make),
        "c0": torch.randn(batch, width, **make),
    }
    if x_type is not None:
        inputs["x"] = torch.randn(batch, length, width, **make).to(x_type)
    inputs["u"][:1, :1, 1:3, :1], inputs["u"][-1:, -1:, 1:3, -1:] = -200.0, 200.0
    mask = torch.rand(batch, length, device=device) < 0.8
    inputs["u"].masked_fill_(~mask[:, :, None, None], float("nan"))
    if "x" in inputs:
        inputs["x"].masked_fill_(~mask[:, :, None], float("nan"))
    for values in inputs.values():
        values.requires_grad_()
    inputs["mask"], inputs["reset"] = mask, torch.rand(batch, length, device=device) < 0.1
    inputs["dropout_mask"] = (torch.rand(batch, width, device=device) < 0.7).to(state) / 0.7
    return inputs


def our_results(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """
    Outputs and gradients of the compiled op by name, and the gradients of the outputs that were given to it.

    Raises:
        SystemExit: if another form of the op ran, in either pass.
    """
    leaves = {name: values for name, values in inputs.items() if values.requires_grad}
    backend = inputs["u"].device.type
    arguments: dict[str, Any] = {**inputs, **options}
    with use_backend(backend):
        h, states = sru_recurrence(**arguments, return_all_states=True)
        given = [torch.randn_like(tensor) for tensor in (h, states)]
        gradients = torch.autograd.grad((h, states), list(leaves.values()), given)
    ran = {name: last_backend(name) for name in (OP_NAME, BACKWARD_NAME)}
    if set(ran.values()) != {backend}:
        raise SystemExit(f"NOT COMPARED: the {backend} form of both passes was asked for, and this ran: {ran}.")
    return {"h": h, "states": states, **dict(zip(leaves, gradients, strict=True))}, given


def torch_results(
    inputs: dict[str, Tensor], options: dict[str, Any], given: list[Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The same from the torch form's two functions, called without the op, so that nothing chooses another one; all in
    `dtype`, if it is given."""

    def converted(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    there = {name: converted(tensor) for name, tensor in inputs.items()}
    arguments = [*map(there.get, NAMES), *(options[name] for name in ("scale_x", "activation", "reverse"))]
    h, states = sru_reference.forward(*arguments)
    after = slice(None, -1) if options["reverse"] else slice(1, None)
    grad_states = torch.zeros_like(states)
    grad_states[:, after] = converted(given[1])
    gradients = sru_reference.backward(converted(given[0]), grad_states, states, *arguments)
    return {"h": h, "states": states[:, after], **dict(zip(NAMES, gradients, strict=False))}


def error_of(ours: Tensor, expected: Tensor) -> float:
    """The largest error as a share of what is allowed; NaN if there is one."""
    if ours.shape != expected.shape:
        return float("inf")
    if ours.numel() == 0:
        return 0.0
    other = expected.double()
    return (ours.double() - other).abs().max().item() / max(1.0, other.abs().max().item()) / LIMITS[ours.dtype]


def check_parity(shapes: list[tuple[int, int, int]], device: torch.device = GPU) -> dict[str, float]:
    """
    The largest error of each dtype as a share of what is allowed: against the torch form in the same dtypes, and for
    float32 in float64, too.

    Raises:
        SystemExit: if one is larger, or a number that should be finite is not; names the case.
    """
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    kinds = [(*types, 3) for types in TYPES] + [(dtype, None, parts) for dtype in LIMITS for parts in (3, 4)]
    for (dtype, x_type, parts), shape, reverse in product(kinds, shapes, (False, True)):
        scale_x = 1.0 if x_type is None else 0.8
        options = {"reverse": reverse, "activation": "tanh" if reverse else "identity", "scale_x": scale_x}
        inputs = random_inputs(shape, parts, dtype, x_type, device)
        results, given = our_results(inputs, options)
        for exact in (None, torch.float64) if dtype == torch.float32 else (None,):
            expected = torch_results(inputs, options, given, exact)
            key = str(dtype).removeprefix("torch.") + (" against float64" if exact else "")
            for name, ours in results.items():
                error = error_of(ours, expected[name])
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= 1.0:
                    what = name if name in ("h", "states") else f"the gradient of {name}"
                    case = f"{key}, x {x_type}, {parts} parts, shape {shape}, {options}"
                    raise SystemExit(f"WRONG: {what} is {error:.3g} times the allowed error away ({case}).")
    return worst
