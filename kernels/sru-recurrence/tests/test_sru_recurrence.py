"""The built kernel against a plain loop, with nothing but torch.

    python kernels/build.py
    python -m pytest kernels/sru-recurrence/tests

This folder is run alone and has an `__init__.py`: without it pytest would name this module `kernels.<...>`, and its own
empty package of that name would stand where the `kernels` library should.
"""

import importlib
import os
import runpy
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the `kernels` library is imported

import torch
from kernel_testing.guarded_memory import GuardedTensor
from kernel_testing.loading import HAS_KERNELS, load_for_tests
from torch import nn


KERNEL = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("u", "x", "weight_c", "bias", "c0")
ACTIVATIONS = {"identity": lambda state: state, "tanh": torch.tanh}

plain_loop = runpy.run_path(str(KERNEL / "example.py"))["plain_loop"]
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no `kernels` library")


kernel = load_for_tests(KERNEL, DEVICE.type)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_inputs(batch=3, length=7, width=5, dtype=torch.float64):
    """u, x, weight_c, bias, c0 with gradients, and a mask."""
    shapes = ((batch, length, 3, width), (batch, length, width), (2, width), (2, width), (batch, width))
    inputs = [torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes]
    return inputs, torch.rand(batch, length, device=DEVICE) < 0.8


def assert_same(ours, expected, names, **tolerance):
    for name, one, other in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def run_loop(inputs, mask, scale_x, activation):
    h, states = plain_loop(*inputs, mask, scale_x, ACTIVATIONS[activation])
    return h, states[:, 1:]


@pytest.mark.kernels_ci
@needs_kernels
def test_the_kernels_library_is_not_hidden():
    assert hasattr(importlib.import_module("kernels"), "get_local_kernel")


@pytest.mark.kernels_ci
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "width"),
    [
        pytest.param(batch, length, width, id=f"B{batch}-T{length}-D{width}")
        for batch, length, width in [(1, 1, 1), (1, 63, 5), (3, 7, 500)]
    ],
)
def test_equals_a_plain_loop(batch, length, width, dtype, activation):
    inputs, mask = make_inputs(batch, length, width, dtype)
    ours = kernel.sru_recurrence(*inputs, mask, scale_x=1.3, activation=activation)
    expected = run_loop(inputs, mask, 1.3, activation)
    cotangents = [torch.randn_like(tensor) for tensor in expected]
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-11, "rtol": 1e-9}
    assert_same(ours, expected, ("h", "states"), **close)
    gradients = (torch.autograd.grad(outputs, inputs, cotangents) for outputs in (ours, expected))
    assert_same(*gradients, [f"gradient of {name}" for name in NAMES], **close)


@pytest.mark.kernels_ci
def test_reverse_is_the_recurrence_of_a_text_read_backwards():
    inputs, mask = make_inputs(length=63)
    h, states = kernel.sru_recurrence(*inputs, mask, reverse=True)
    backwards = [tensor.flip(1) if name in ("u", "x") else tensor for name, tensor in zip(NAMES, inputs, strict=True)]
    expected = kernel.sru_recurrence(*backwards, mask.flip(1))
    assert_same((h, states), [tensor.flip(1) for tensor in expected], ("h", "states"))


@pytest.mark.kernels_ci
def test_a_fourth_part_is_the_highway():
    (u, x, *rest), mask = make_inputs()
    ours = kernel.sru_recurrence(torch.cat([u, x[:, :, None]], 2), None, *rest, mask)
    assert_same(ours, kernel.sru_recurrence(u, x, *rest, mask), ("h", "states"))


@pytest.mark.kernels_ci
def test_a_document_start_begins_a_new_document():
    (u, x, weight_c, bias, c0), _ = make_inputs()
    document_start = torch.zeros(3, 7, dtype=torch.bool, device=DEVICE)
    document_start[:, 4] = True
    ours = kernel.sru_recurrence(u, x, weight_c, bias, c0, document_start=document_start)
    first = kernel.sru_recurrence(u[:, :4], x[:, :4], weight_c, bias, c0)
    second = kernel.sru_recurrence(u[:, 4:], x[:, 4:], weight_c, bias)
    assert_same(ours, [torch.cat(parts, 1) for parts in zip(first, second, strict=True)], ("h", "states"))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_in_and_out_and_the_state_is_float32(dtype):
    inputs, mask = make_inputs(length=63, dtype=dtype)
    with torch.no_grad():
        inputs[0][~mask] = float("nan")  # padding leaves no trace
        ours = kernel.sru_recurrence(*inputs, mask)
        expected = kernel.sru_recurrence(*(tensor.float() for tensor in inputs), mask)
    assert [tensor.dtype for tensor in ours] == [dtype, torch.float32]
    assert_same(ours, (expected[0].to(dtype), expected[1]), ("h", "states"))
    assert ours[0].isfinite().all()


# On a GPU the number of units that divide the width decides how many a thread takes, if there are enough of them.
MANY = 8191 if DEVICE.type == "cuda" else 1
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("masked", [False, True], ids=["no-flags", "mask"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("units", [8, 4, 2, 1], ids=lambda units: f"{units}-units")
def test_every_width_of_access(units, dtype, masked):
    """Neighbouring units that are loaded together; without flags other code runs."""
    inputs, mask = make_inputs(2, 19, units * (3 if units < 8 else 2) * MANY, torch.float32)
    inputs[2].data *= 0.3  # with larger weights some of many units are chaotic: they multiply each rounding
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    ours = kernel.sru_recurrence(*given, mask if masked else None)
    expected = run_loop(exact, mask if masked else torch.ones_like(mask), 1.0, "identity")
    cotangents = [torch.randn_like(tensor).to(dtype).float() for tensor in expected]
    gradients = torch.autograd.grad(ours, given, [c.to(o.dtype) for c, o in zip(cotangents, ours, strict=True)])
    expected = (*expected, *torch.autograd.grad(expected, exact, cotangents))
    close = {"atol": LIMITS[dtype], "rtol": LIMITS[dtype]}
    assert_same([t.float() for t in (*ours, *gradients)], expected, ("h", "states", *NAMES), **close)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_written_beside_the_results(dtype, misaligned):
    inputs, mask = make_inputs(width=16, dtype=dtype)
    with torch.no_grad():
        u, x, weight_c, bias, c0 = (
            GuardedTensor(tensor.shape, dtype, misaligned, tensor, DEVICE).tensor for tensor in inputs
        )
        given = (u, x, weight_c, bias, c0, mask, None, None, 1.0, "tanh", False)
        h, states = kernel.forward(*given)
        results = {
            "h": GuardedTensor(h.shape, dtype, misaligned, device=DEVICE),
            "states": GuardedTensor(states.shape, torch.float32, misaligned, device=DEVICE),
        }
        kernel.forward_out(*(result.tensor for result in results.values()), *given)
        grads = torch.randn_like(h), torch.randn_like(states), states
        expected = h, states, *kernel.backward(*grads, *given)
        types = (dtype, dtype, *[torch.float32] * 3)
        for name, tensor, result_type in zip(NAMES, (u, x, weight_c, bias, c0), types, strict=True):
            results[f"gradient of {name}"] = GuardedTensor(tensor.shape, result_type, misaligned, device=DEVICE)
        kernel.backward_out(*(result.tensor for result in [*results.values()][2:]), *grads, *given)
    for (name, result), wanted in zip(results.items(), expected, strict=True):
        result.check(name)
        assert torch.equal(result.tensor.to(wanted.dtype), wanted), name


@pytest.mark.kernels_ci
def test_only_the_last_state():
    inputs, mask = make_inputs()
    with torch.no_grad():
        given = (*inputs, mask, None, None, 1.0, "identity", False)
        h, states = kernel.sru_recurrence(*given)
        assert_same(kernel.forward_last(*given), (h, states[:, -1]), ("h", "last state"))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_opcheck(reverse):
    inputs, mask = make_inputs()
    given = (*inputs, mask, None, None, 1.3, "tanh", reverse)
    torch.library.opcheck(kernel.ops.forward.default, given)
    h, states = (tensor.detach() for tensor in kernel.forward(*given))
    plain = [value.detach() if torch.is_tensor(value) else value for value in given]
    torch.library.opcheck(kernel.ops.backward.default, (torch.randn_like(h), torch.randn_like(states), states, *plain))


@pytest.mark.parametrize(
    "name", ["sru_recurrence", "forward", "forward_last", "forward_out", "backward", "backward_out"]
)
def test_forward_mode_is_refused(name):
    """The ops would go on without the tangents: a derivative of zero."""
    inputs, _ = make_inputs()
    u, *rest = (value.detach() for value in inputs)
    h, states = kernel.forward(u, *rest, None, None, None, 1.0, "identity", False)
    options = (None, None, None, 1.0, "identity", False)
    before = {
        "forward_out": (h, states),
        "backward": (h, None, states),
        "backward_out": (*map(torch.empty_like, (u, *rest)), h, None, states),
    }

    def run(u):
        return getattr(kernel, name)(*before.get(name, ()), u, *rest, *options)

    run(u)
    with pytest.raises(RuntimeError, match="no forward-mode derivative: call `sru_recurrence` of `hf_efficient"):
        torch.func.jvp(run, (u,), (u,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        run(torch.autograd.forward_ad.make_dual(u, u))


def test_a_backward_pass_in_forward_mode_is_refused():
    """Forward over reverse, where the forward pass ran before: its gradient's derivative would be zero, too."""
    (u, *rest), mask = make_inputs()
    h, _ = kernel.sru_recurrence(u, *rest, mask)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.autograd.grad(h, u, torch.autograd.forward_ad.make_dual(torch.ones_like(h), torch.ones_like(h)))


@pytest.mark.kernels_ci
def test_errors_name_what_is_wrong():
    (u, x, *_), _ = make_inputs()
    with pytest.raises(RuntimeError, match=r"x must have shape \(3, 7, 5\), not \(3, 6, 5\)"):
        kernel.sru_recurrence(u, x[:, 1:])
    with pytest.raises(RuntimeError, match="activation must be identity or tanh, not relu"):
        kernel.sru_recurrence(u, x, activation="relu")


class Loop(nn.Module):
    """A model's own layer, as a library of models has it."""

    def forward(
        self, u, x=None, weight_c=None, bias=None, c0=None, mask=None, document_start=None, dropout_mask=None,
        scale_x=1.0, activation="identity", reverse=False, all_states=True
    ):  # fmt: skip
        return run_loop((u, x, weight_c, bias, c0), mask, scale_x, activation)


@pytest.mark.kernels_ci
@needs_kernels
@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_kernelize_puts_the_layer_in_place(mode, monkeypatch):
    """The library compares the layers' signatures first; it may not fall back."""
    library = importlib.import_module("kernels")
    inputs, mask = make_inputs()
    expected = Loop()(*inputs, mask, scale_x=1.3, activation="tanh")
    layer = library.use_kernel_forward_from_hub("SruRecurrence")(type("Marked", (Loop,), {}))()
    mode = library.Mode[mode]
    repository = library.LocalLayerRepository(Path(kernel.__file__).parent, layer_name="SruRecurrence")
    with library.use_kernel_mapping({"SruRecurrence": {DEVICE.type: {mode: repository}}}, inherit_mapping=False):
        layer = library.kernelize(layer, mode=mode, device=DEVICE.type, use_fallback=False)
    monkeypatch.setitem(globals(), "run_loop", None)  # the loop cannot run any more
    ours = layer(*inputs, mask, scale_x=1.3, activation="tanh")
    assert_same(ours, expected, ("h", "states"))
    _, last = layer(*inputs, mask, scale_x=1.3, activation="tanh", all_states=False)
    assert torch.equal(last, ours[1][:, -1:])
    gradients = (torch.autograd.grad([h.sum(), c.sum()], inputs) for h, c in (ours, expected))
    assert_same(*gradients, [f"gradient of {name}" for name in NAMES])
