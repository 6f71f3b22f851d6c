"""The recurrence against a loop over its steps: results and gradients, of every option, size, dtype and layout."""

import itertools

import pytest
import torch
from torch import nn

from hf_efficient.ops import sru, sru_reference
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.sru import sru_recurrence
from hf_efficient.ops.sru_naive import sru_recurrence_naive
from tests.helpers.comparison import assert_close
from tests.ops.sru_inputs import TENSORS, gradients, leaves_of, make_inputs, sizes


pytestmark = pytest.mark.usefixtures("recurrence_backend")
FORMS = {"no-highway": (3, ()), "k3": (3, ("x",)), "k4": (4, ())}


def compare_with_naive(inputs, options, case="", tolerance=1e-12):
    """h, all states, the final state and every gradient by name, with random cotangents on h and on all states, and
    again on h and on the final state alone."""
    leaves = leaves_of(inputs)
    for all_states, state_name in ((True, "states"), (False, "final state")):
        ours = sru_recurrence(**inputs, **options, return_all_states=all_states)
        expected = sru_recurrence_naive(**inputs, **options, return_all_states=all_states)
        cotangents = [torch.randn_like(tensor) for tensor in expected]
        for name, one, other in zip(("h", state_name), ours, expected, strict=True):
            assert_close(f"{name}{case}", one, other, tolerance)
        expected_gradients = gradients(expected, cotangents, leaves)
        for name, gradient in gradients(ours, cotangents, leaves).items():
            what = f"gradient of {name}, from h and {state_name}{case}"
            assert_close(what, gradient, expected_gradients[name], tolerance)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("activation", sru.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_combination_of_options(form, activation, reverse, monkeypatch):
    """Outputs, states and all gradients in float64, with a piece of two steps so that every path crosses pieces."""
    monkeypatch.setattr(sru_reference, "_PIECE", 2 * 3 * 5)
    parts, required = FORMS[form]
    options = {"scale_x": 1.7 if "x" in required else 1.0, "activation": activation, "reverse": reverse}
    for chosen in itertools.product((False, True), repeat=len(TENSORS) - 1):
        names = [*required, *itertools.compress(TENSORS[1:], chosen)]
        inputs = make_inputs(*names, parts=parts)
        compare_with_naive(inputs, options, f" with {', '.join(names) or 'u alone'}")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("what", ["h", "last", "states"])
def test_gradients_of_one_output_alone(what, reverse):
    """The others' gradients are then not there at all, or zero outside of the last state."""
    inputs = make_inputs(*TENSORS)
    h, last = sru_recurrence(**inputs, reverse=reverse)
    _, states = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
    expected_h, expected_states = sru_recurrence_naive(**inputs, reverse=reverse, return_all_states=True)
    expected_last = expected_states[:, 0 if reverse else -1]
    ours, expected = {
        "h": (h, expected_h),
        "last": (last, expected_last),
        "states": (states, expected_states),
    }[what]
    assert torch.equal(last, states[:, 0 if reverse else -1])
    weight = torch.randn_like(ours)
    leaves = leaves_of(inputs)
    expected_gradients = gradients([expected], [weight], leaves)
    for name, gradient in gradients([ours], [weight], leaves).items():
        assert_close(f"gradient of {name}", gradient, expected_gradients[name], 1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"reverse": True, "activation": "tanh", "scale_x": 0.8}],
    ids=["identity-forward", "tanh-reverse-scaled"],
)
def test_gradcheck(options):
    inputs = make_inputs(*TENSORS, batch=2, length=4, width=3)

    def run(*tensors):
        return sru_recurrence(*tensors, **options, return_all_states=True)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("batch", "length", "width"), sizes((1, 1, 1), (1, 63, 5), (3, 1, 500), (2, 63, 7), (1, 2, 500))
)
def test_odd_sizes(batch, length, width, reverse):
    inputs = make_inputs(*TENSORS, batch=batch, length=length, width=width)
    compare_with_naive(inputs, {"reverse": reverse}, tolerance=1e-11)


@pytest.mark.parametrize("recurrence_backend", ["reference"], indirect=True)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_size_of_pieces_changes_nothing(reverse, monkeypatch):
    inputs = make_inputs(*TENSORS, length=63)
    weight, results = torch.randn(3, 63, 5, dtype=torch.float64), []
    for steps in (1, 2, 10, 62, 63, 1000):
        monkeypatch.setattr(sru_reference, "_PIECE", steps * 3 * 5)
        h, states = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
        results.append({"h": h, "states": states, **gradients([h], [weight], leaves_of(inputs))})
    for result in results[:-1]:
        for name, expected in results[-1].items():
            assert_close(name, result[name], expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_keeps_a_float32_state(dtype):
    """All the arithmetic is that of float32; only what goes in and comes out is rounded."""
    inputs = make_inputs("x", "mask", "document_start", dtype=dtype)
    inputs |= {
        name: value for name, value in make_inputs("weight_c", "bias", "c0", dtype=torch.float32).items() if name != "u"
    }
    widened = {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    widened = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in widened.items()}
    h, c = sru_recurrence(**inputs)
    h_wide, c_wide = sru_recurrence(**widened)
    assert (h.dtype, c.dtype) == (dtype, torch.float32)
    assert_close("c", c, c_wide, 1e-6)
    torch.testing.assert_close(h, h_wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    grad_h = torch.randn_like(h)
    expected = gradients([h_wide, c_wide], [grad_h.float(), c.detach()], leaves_of(widened))
    for name, gradient in gradients([h, c], [grad_h, c.detach()], leaves_of(inputs)).items():
        torch.testing.assert_close(gradient, expected[name].to(inputs[name].dtype), msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_over_2048_steps():
    """Relative RMS error against float64 on the same input: 2^-9 is what rounding the output to 8 bits costs, and the
    state, which is not rounded, must not drift. Biases of the forget gate up to 5 make it reach back hundreds of steps.
    """
    inputs = make_inputs("x", batch=2, length=2048, width=15, dtype=torch.bfloat16, requires_grad=False)
    parameters = {"weight_c": torch.rand(2, 15) * 2 - 1, "bias": torch.rand(2, 15) * 5}
    h, c = sru_recurrence(**inputs, **parameters, return_all_states=True)
    exact = {name: tensor.double() for name, tensor in (inputs | parameters).items()}
    h_exact, c_exact = sru_recurrence(**exact, return_all_states=True)

    def error(ours, expected):
        return ((ours.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()

    assert error(h, h_exact) < 2**-9
    for span in (slice(0, 100), slice(1948, 2048)):
        assert error(c[:, span], c_exact[:, span]) < 1e-6


@pytest.mark.parametrize("layout", ["interleaved", "time-major", "sliced", "expanded"])
def test_strided_input(layout):
    inputs = make_inputs("x", "weight_c", "bias", "c0")
    expected = sru_recurrence(**inputs)
    reshape = {
        "interleaved": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        "time-major": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 1],
        "expanded": lambda t: t,
    }[layout]
    strided = {name: reshape(tensor) for name, tensor in inputs.items()}
    if layout == "expanded":
        strided["bias"] = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True).expand(2, 5)
        expected = sru_recurrence(**{**inputs, "bias": strided["bias"].contiguous()})
    else:
        assert not strided["u"].is_contiguous()
    ours = sru_recurrence(**strided)
    leaves = {name: tensor for name, tensor in inputs.items() if layout != "expanded" or name != "bias"}
    cotangents = [torch.randn_like(tensor) for tensor in expected]
    for name, one, other in zip(("h", "final state"), ours, expected, strict=True):
        assert_close(name, one, other, 1e-13)
    expected_gradients = gradients(expected, cotangents, leaves)
    for name, gradient in gradients(ours, cotangents, leaves).items():
        assert_close(f"gradient of {name}", gradient, expected_gradients[name], 1e-13)


def test_the_sru_of_the_scaling_transformer():
    """One matrix with gates in the order r, f, y; gates that do not see the state; a highway times sqrt 3 (Jaszczur et
    al. 2021, arXiv 2111.12763, and its code in Trax)."""
    width, x = 5, torch.randn(2, 9, 5, dtype=torch.float64)
    linear = nn.Linear(width, 3 * width, dtype=torch.float64)
    r, f, y = linear(x).chunk(3, -1)
    state, expected = torch.zeros(2, width, dtype=torch.float64), []
    for t in range(9):
        state = f[:, t].sigmoid() * state + (1 - f[:, t].sigmoid()) * y[:, t]
        gate = r[:, t].sigmoid()
        expected.append(gate * state + (1 - gate) * x[:, t] * 3**0.5)
    u = linear(x).unflatten(-1, (3, width)).flip(2)  # y, f, r
    h, c = sru_recurrence(u, x, scale_x=3**0.5)
    torch.testing.assert_close(h, torch.stack(expected, 1))
    torch.testing.assert_close(c, state)


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_on_a_gpu(reverse):
    inputs = make_inputs(*TENSORS, length=63, width=500)
    there = {name: tensor.detach().cuda().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    expected = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
    weights = [torch.randn_like(tensor) for tensor in expected]
    with use_backend("reference"):
        ours = sru_recurrence(**there, reverse=reverse, return_all_states=True)
        ours_gradients = gradients(ours, [weight.cuda() for weight in weights], leaves_of(there))
    assert last_backend(sru.OP_NAME) == last_backend(sru.BACKWARD_NAME) == "reference"
    expected_gradients = gradients(expected, weights, leaves_of(inputs))
    for name, one, other in zip(("h", "states"), ours, expected, strict=True):
        assert_close(name, one.cpu(), other, 1e-12)
    for name, gradient in ours_gradients.items():
        assert_close(f"gradient of {name}", gradient.cpu(), expected_gradients[name], 1e-12)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("activation", sru.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_option_of_a_single_step(form, activation, reverse):
    """Without padding and documents a step has a path of its own, as decoding takes it."""
    parts, required = FORMS[form]
    options = {"scale_x": 1.7 if required else 1.0, "activation": activation, "reverse": reverse}
    optional = ("weight_c", "bias", "c0", "dropout_mask")
    for chosen in itertools.product((False, True), repeat=len(optional)):
        names = [*required, *itertools.compress(optional, chosen)]
        compare_with_naive(make_inputs(*names, parts=parts, length=1), options, f" with {', '.join(names) or 'u'}")


@pytest.mark.parametrize("length", [1, 7])
def test_the_fourth_part_of_u_is_not_scaled(length):
    """`scale_x` is a factor of the layer's input; the original leaves a highway that has a matrix of its own alone."""
    inputs = make_inputs("weight_c", "bias", parts=4, length=length)
    compare_with_naive(inputs, {"scale_x": 1.7})
