"""Parity of the compiled recurrence: outputs and all gradients against the torch form on the same device.

The cases reach every kernel that a public call can reach on a GPU: a kernel is made for the dtypes of u, h and the
state, for the number of units that a thread takes, for an activation, and with or without flags.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hf_efficient.ops import sru_reference
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.sru import ACTIVATIONS, BACKWARD_NAME, OP_NAME, sru_recurrence


# dtypes of u and of x; where x is given none, the forms without x and with four parts are compared as well. The last
# two are mixtures that no kernel is made for, which look up each element's dtype.
TYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "bfloat16-x_float32": (torch.bfloat16, torch.float32),
    "float16-x_float32": (torch.float16, torch.float32),
    "float32-x_bfloat16": (torch.float32, torch.bfloat16),
    "float64-x_float32": (torch.float64, torch.float32),
}
MIXED = ("float32-x_bfloat16", "float64-x_float32")
FLAGS = {"no-flags": (), "mask": ("mask",), "document_start": ("document_start",), "both": ("mask", "document_start")}
FORMS = ("k3", "no-highway", "k4")
# By units of a thread, a width that is divisible by no more than these.
WIDTHS = {8: 16, 4: 12, 2: 6, 1: 5}
NAMES = ("u", "x", "weight_c", "bias", "c0", "mask", "document_start", "dropout_mask")
ODD_SHAPES = [(1, 1, 1), (1, 63, 5), (3, 1, 500), (2, 17, 64), (0, 5, 7), (3, 5, 0)]
LARGE_SHAPES = [(8, 512, 3072), (64, 65, 3072)]
# Both forms compute in float32 or float64; results in 16 bits may be rounded to neighbouring numbers. Sums over time
# and batch are compared relative to their largest.
LIMITS = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Threads that keep a multiprocessor busy, as kernels/sru-recurrence/sru_cuda/launch.h says: with fewer of them a
# thread takes fewer units.
ENOUGH_THREADS = 128


class ParityError(Exception):
    """A result that is wrong, or that another form of the op gave."""


@dataclass(frozen=True)
class Case:
    """One call: the shape (batch, length, width), and all that decides which kernel runs and what it is given."""

    types: str
    shape: tuple[int, int, int]
    flags: str = "both"
    activation: str = "identity"
    reverse: bool = False
    peephole: bool = True
    form: str = "k3"

    def __str__(self) -> str:
        batch, length, width = self.shape
        direction = "reverse" if self.reverse else "forward"
        gates = "peephole" if self.peephole else "no-peephole"
        size = f"B{batch}-T{length}-D{width}"
        return "-".join([self.types, size, self.flags, self.activation, direction, gates, self.form])


def widest(types: str) -> int:
    """Units of a thread at most."""
    return 1 if types in MIXED else 16 // TYPES[types][0].itemsize


def shape_for(units: int, device: torch.device, batch: int = 2, length: int = 19) -> tuple[int, int, int]:
    """A shape for which a thread takes `units` units: on a GPU wide enough to keep it busy with so few threads."""
    width = WIDTHS[units]
    if device.type == "cuda":
        threads = ENOUGH_THREADS * torch.cuda.get_device_properties(device).multi_processor_count
        # An odd factor leaves the number of units that divide the width as it is.
        width *= -(-threads * units // (batch * width)) | 1
    return batch, length, width


def smoke_cases(device: torch.device) -> Iterator[Case]:
    """Without flags, as models train, in every width of access: the shortest run that says whether all is well."""
    for types in ("float32", "float16"):
        for units in WIDTHS:
            if units <= widest(types):
                yield Case(types, shape_for(units, device), "no-flags")


def kernel_cases(device: torch.device) -> Iterator[Case]:
    """Every kernel, in both directions, with each form of highway, with and without a peephole."""
    for types, units in product(TYPES, WIDTHS):
        if units > widest(types):
            continue
        forms = FORMS if TYPES[types][1] is None else ("k3",)
        rest = product(FLAGS, ACTIVATIONS, (False, True), (False, True), forms)
        for flags, activation, reverse, peephole, form in rest:
            yield Case(types, shape_for(units, device), flags, activation, reverse, peephole, form)


def shape_cases(shapes: Iterable[tuple[int, int, int]]) -> Iterator[Case]:
    """Odd and large shapes in all dtypes and both directions, with and without flags."""
    for types, shape, reverse, flags in product(TYPES, shapes, (False, True), ("no-flags", "both")):
        yield Case(types, shape, flags, "tanh" if reverse else "identity", reverse)


def sanitizer_cases(device: torch.device) -> Iterator[Case]:
    """Few cases, with wide accesses among them, since a sanitizer makes each of them slow."""
    chosen = [("float32", 4), ("float32", 2), ("float32", 1), ("float16", 8), ("float16", 4), ("float16", 2)]
    chosen += [("bfloat16-x_float32", 8), ("float32-x_bfloat16", 1), ("float64", 2)]
    for types, units in chosen:
        for flags, reverse in (("no-flags", False), ("both", True)):
            yield Case(types, shape_for(units, device), flags, reverse=reverse)


def random_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The arguments of a case: NaN at pads, some gates quite shut or open."""
    batch, length, width = case.shape
    dtype, x_type = TYPES[case.types]
    state = torch.promote_types(dtype, torch.float32)
    make: dict[str, Any] = {"dtype": state, "device": device}
    parts = 4 if case.form == "k4" else 3
    inputs = {
        "u": (2 * torch.randn(batch, length, parts, width, **make)).to(dtype),
        "bias": torch.randn(2, width, **make),
        "c0": torch.randn(batch, width, **make),
    }
    if case.peephole:
        # With larger weights some units are chaotic: of thousands, one multiplies each rounding at every step.
        inputs["weight_c"] = 0.3 * torch.randn(2, width, **make)
    if case.form == "k3":
        inputs["x"] = torch.randn(batch, length, width, **make).to(x_type or dtype)
    inputs["u"][:1, :1, 1:3, :1], inputs["u"][-1:, -1:, 1:3, -1:] = -200.0, 200.0
    rates = {"mask": 0.8, "document_start": 0.1}
    flags = {name: torch.rand(batch, length, device=device) < rates[name] for name in FLAGS[case.flags]}
    if "mask" in flags:
        inputs["u"].masked_fill_(~flags["mask"][:, :, None, None], float("nan"))
        if "x" in inputs:
            inputs["x"].masked_fill_(~flags["mask"][:, :, None], float("nan"))
    for values in inputs.values():
        values.requires_grad_()
    dropout_mask = (torch.rand(batch, width, device=device) < 0.7).to(state) / 0.7
    return {**inputs, **flags, "dropout_mask": dropout_mask}


def options_of(case: Case) -> dict[str, Any]:
    scale_x = 0.8 if case.form == "k3" else 1.0
    return {"scale_x": scale_x, "activation": case.activation, "reverse": case.reverse}


def our_results(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """
    Outputs and gradients of the compiled op by name, and the gradients of the outputs that were given to it.

    Raises:
        ParityError: if another form of the op ran, in either pass, or a call for the last state alone differs.
    """
    leaves = {name: values for name, values in inputs.items() if values.requires_grad}
    backend = inputs["u"].device.type
    arguments: dict[str, Any] = {**inputs, **options}
    with use_backend(backend):
        h, states = sru_recurrence(**arguments, return_all_states=True)
        given = [torch.randn_like(tensor) for tensor in (h, states)]
        gradients = torch.autograd.grad((h, states), list(leaves.values()), given)
        ran = {name: last_backend(name) for name in (OP_NAME, BACKWARD_NAME)}
        with torch.no_grad():
            last_h, last_state = sru_recurrence(**arguments)
    if set(ran.values()) != {backend}:
        raise ParityError(f"NOT COMPARED: the {backend} form of both passes was asked for, and this ran: {ran}.")
    if not (torch.equal(last_h, h) and torch.equal(last_state, states[:, 0 if options["reverse"] else -1])):
        raise ParityError("WRONG: h and the last state differ where no other state is kept.")
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


def compare(case: Case, device: torch.device) -> dict[str, float]:
    """
    The largest error of a case as a share of what is allowed: against the torch form in the same dtypes, and for
    float32 in float64, too. Over long sequences some units multiply every rounding: where the torch form in float32 is
    itself far from float64, three times its distance is allowed.

    Raises:
        ParityError: if one is larger, or a number that should be finite is not; names the case.
    """
    torch.manual_seed(0)
    dtype = TYPES[case.types][0]
    inputs, options = random_inputs(case, device), options_of(case)
    results, given = our_results(inputs, options)
    worst: dict[str, float] = {}
    alike = torch_results(inputs, options, given, None)
    for exact in (None, torch.float64) if dtype == torch.float32 else (None,):
        expected = torch_results(inputs, options, given, exact) if exact else alike
        key = str(dtype).removeprefix("torch.") + (" against float64" if exact else "")
        for name, ours in results.items():
            error = error_of(ours, expected[name])
            if exact:
                error /= max(1.0, 3 * error_of(alike[name], expected[name]))
            worst[key] = max(worst.get(key, 0.0), error)
            if not error <= 1.0:
                what = name if name in ("h", "states") else f"the gradient of {name}"
                raise ParityError(f"WRONG: {what} is {error:.3g} times the allowed error away ({key}, {case}).")
    return worst


def check_parity(cases: Iterable[Case], device: torch.device) -> dict[str, Any]:
    """Compare all cases, whatever is found in each: how many there were, the largest error of each dtype as a share of
    what is allowed, and what failed."""
    compared, worst, failures = 0, dict[str, float](), []
    for case in cases:
        compared += 1
        try:
            for key, error in compare(case, device).items():
                worst[key] = max(worst.get(key, 0.0), error)
        except (ParityError, RuntimeError) as error:
            failures.append(f"{case}: {error}")
    return {"compared": compared, "largest_error_of_the_allowed": worst, "failures": failures}
