"""The recurrence against a loop over its steps, and what torch's transforms make of the op."""

import itertools

import pytest
import torch
from torch import nn

from hf_efficient.ops import sru, sru_torch
from hf_efficient.ops.backend import BackendUnavailableError, last_backend, use_backend
from hf_efficient.ops.sru import sru_recurrence


pytestmark = pytest.mark.usefixtures("recurrence_backend")
TENSORS = ("x", "weight_c", "bias", "c0", "mask", "reset", "dropout_mask")


def make_inputs(*names, batch=3, length=7, width=5, parts=3, dtype=torch.float64, requires_grad=True):
    """`u` and those of the optional arguments that are named."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    makers = {
        "x": lambda: random(batch, length, width),
        "weight_c": lambda: random(2, width),
        "bias": lambda: random(2, width),
        "c0": lambda: random(batch, width),
        "mask": lambda: torch.rand(batch, length) < 0.7,
        "reset": lambda: torch.rand(batch, length) < 0.3,
        "dropout_mask": lambda: (torch.rand(batch, width) < 0.7).to(dtype) / 0.7,
    }
    return {"u": random(batch, length, parts, width), **{name: makers[name]() for name in names}}


def step_by_step(
    u, x=None, weight_c=None, bias=None, c0=None, mask=None, reset=None, dropout_mask=None, *, scale_x=1.0,
    activation="identity", reverse=False
):  # fmt: skip
    """h and c of every step, by the formulas at the head of `ops/sru.py`, with autograd's gradients."""
    state = torch.zeros_like(u[:, 0, 0]) if c0 is None else c0
    outputs, states = [None] * u.shape[1], [None] * u.shape[1]
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None], torch.zeros_like(state), state)
        forget, output = u[:, t, 1], u[:, t, 2]
        if weight_c is not None:
            forget, output = forget + weight_c[0] * state, output + weight_c[1] * state
        if bias is not None:
            forget, output = forget + bias[0], output + bias[1]
        c = u[:, t, 0] + (state - u[:, t, 0]) * forget.sigmoid()
        g = c.tanh() if activation == "tanh" else c
        gate = output.sigmoid() * (1.0 if dropout_mask is None else dropout_mask)
        highway = 0.0
        if u.shape[2] == 4:
            highway = u[:, t, 3]
        elif x is not None:
            highway = x[:, t] * scale_x
        h = highway + (g - highway) * gate
        if mask is not None:
            h, c = torch.where(mask[:, t, None], h, 0.0), torch.where(mask[:, t, None], c, state)
        outputs[t], states[t], state = h, c, c
    return torch.stack(outputs, 1), torch.stack(states, 1)


def leaves_of(inputs):
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def gradients(outputs, weights, leaves):
    return torch.autograd.grad(
        sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)), leaves, retain_graph=True
    )


FORMS = {"no-highway": (3, ()), "k3": (3, ("x",)), "k4": (4, ())}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("activation", sru.ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_combination_of_options(form, activation, reverse, monkeypatch):
    """Outputs, states and all gradients in float64, with a piece of two steps so that every path crosses pieces."""
    monkeypatch.setattr(sru_torch, "_PIECE", 2 * 3 * 5)
    parts, required = FORMS[form]
    options = {"scale_x": 1.7 if "x" in required else 1.0, "activation": activation, "reverse": reverse}
    for chosen in itertools.product((False, True), repeat=len(TENSORS) - 1):
        names = [*required, *itertools.compress(TENSORS[1:], chosen)]
        inputs = make_inputs(*names, parts=parts)
        ours = sru_recurrence(**inputs, **options, return_all_states=True)
        expected = step_by_step(**inputs, **options)
        weights = [torch.randn_like(tensor) for tensor in expected]
        leaves = leaves_of(inputs)
        for what, ours_of_it, expected_of_it in zip(
            ("h", "c", *(f"gradient {index}" for index in range(len(leaves)))),
            (*ours, *gradients(ours, weights, leaves)),
            (*expected, *gradients(expected, weights, leaves)),
            strict=True,
        ):
            torch.testing.assert_close(
                ours_of_it, expected_of_it, atol=1e-11, rtol=1e-9, msg=lambda m, w=what, n=names: f"{w} of {n}: {m}"
            )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("what", ["h", "last", "states"])
def test_gradients_of_one_output_alone(what, reverse):
    """The others' gradients are then not there at all, or zero outside of the last state."""
    inputs = make_inputs(*TENSORS)
    h, last = sru_recurrence(**inputs, reverse=reverse)
    _, states = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
    expected_h, expected_states = step_by_step(**inputs, reverse=reverse)
    expected_last = expected_states[:, 0 if reverse else -1]
    ours, expected = {
        "h": (h, expected_h),
        "last": (last, expected_last),
        "states": (states, expected_states),
    }[what]
    assert torch.equal(last, states[:, 0 if reverse else -1])
    weight = torch.randn_like(ours)
    leaves = leaves_of(inputs)
    ours_gradients = torch.autograd.grad((ours * weight).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for leaf, one, other in zip(leaves, ours_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(leaf) if other is None else other, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"reverse": True, "activation": "tanh", "scale_x": 0.8}])
def test_gradcheck(options):
    inputs = make_inputs(*TENSORS, batch=2, length=4, width=3)

    def run(*tensors):
        return sru_recurrence(*tensors, **options, return_all_states=True)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def op_arguments(inputs, scale_x=1.0, activation="identity", reverse=False):
    return (inputs["u"], *(inputs.get(name) for name in TENSORS), scale_x, activation, reverse)


@pytest.mark.parametrize(
    ("names", "parts", "options"),
    [
        pytest.param(TENSORS, 3, {"scale_x": 1.3}, id="all"),
        pytest.param((), 4, {"activation": "tanh", "reverse": True}, id="bare-k4"),
    ],
)
def test_opcheck(names, parts, options):
    inputs = make_inputs(*names, parts=parts)
    # Strides that a careless fake would copy
    inputs["u"] = inputs["u"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    arguments = op_arguments(inputs, **options)
    torch.library.opcheck(torch.ops.hf_efficient.sru_recurrence.default, arguments)
    h, states = sru._op(*arguments)
    plain = [value.detach() if torch.is_tensor(value) else value for value in arguments]
    for grad_h, grad_states in ((torch.randn_like(h), torch.randn_like(states)), (torch.randn_like(h), None)):
        torch.library.opcheck(
            torch.ops.hf_efficient.sru_recurrence_backward.default, (grad_h, grad_states, states.detach(), *plain)
        )


class Cell(nn.Module):
    """A linear map and the recurrence."""

    def __init__(self, width=5):
        super().__init__()
        self.linear = nn.Linear(width, 3 * width, bias=False)
        self.weight_c = nn.Parameter(torch.rand(2, width))
        self.bias = nn.Parameter(torch.rand(2, width))

    def forward(self, x, mask):
        u = self.linear(x).unflatten(-1, (3, -1))
        return sru_recurrence(u, x, self.weight_c, self.bias, mask=mask)


def inputs_of_cell(length, batch=2):
    return torch.randn(batch, length, 5), torch.rand(batch, length) < 0.8


def test_compiles_whole_with_dynamic_length():
    cell = Cell()
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 11, 63):
            x, mask = inputs_of_cell(length)
            results = []
            for module in (cell, compiled):
                cell.zero_grad()
                leaf = x.clone().requires_grad_()
                h, c = module(leaf, mask)
                (h.square().sum() + c.sum()).backward()
                results.append([h, c, leaf.grad, *(parameter.grad.clone() for parameter in cell.parameters())])
            for ours, expected in zip(*results, strict=True):
                torch.testing.assert_close(ours, expected)


def test_exports_with_dynamic_length_and_reloads(tmp_path):
    cell = Cell().eval()
    shape = {1: torch.export.Dim("length", min=2, max=512)}
    program = torch.export.export(cell, inputs_of_cell(7), dynamic_shapes=(shape, shape))
    assert "hf_efficient.sru_recurrence" in str(program.graph)
    torch.export.save(program, tmp_path / "cell.pt2")
    reloaded = torch.export.load(tmp_path / "cell.pt2").module()
    for length in (2, 31):
        inputs = inputs_of_cell(length)
        for ours, expected in zip(reloaded(*inputs), cell(*inputs), strict=True):
            assert torch.equal(ours, expected)


PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
    "inside": [[1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 0, 1]],
    "all": [[0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]],
}


@pytest.mark.parametrize("parts", [3, 4], ids=["k3", "k4"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", PADS)
def test_pads_leave_no_trace(where, rubbish, reverse, parts):
    """The state passes a pad to the bit, and rows equal the rows without their pads."""
    mask = torch.tensor(PADS[where], dtype=torch.bool)
    names = [name for name in TENSORS if name not in ("mask", "reset", *(("x",) if parts == 4 else ()))]
    inputs = make_inputs(*names, batch=2, length=8, parts=parts, dtype=torch.float32)
    spoilt = dict(inputs)
    for name in {"u", "x"} & set(inputs):
        pads = ~mask.view(2, 8, *[1] * (inputs[name].dim() - 2))
        spoilt[name] = inputs[name].detach().masked_fill(pads, rubbish).requires_grad_()
    h, states = sru_recurrence(**spoilt, mask=mask, reverse=reverse, return_all_states=True)
    assert h.isfinite().all()
    assert (h[~mask] == 0).all()
    previous = torch.cat(
        [states[:, 1:], inputs["c0"][:, None]] if reverse else [inputs["c0"][:, None], states[:, :-1]], 1
    )
    assert torch.equal(states[~mask], previous[~mask])

    # A loss that also looks at the pads, where the gradient of the output is rubbish too
    grad_h = torch.randn_like(h).masked_fill(~mask[..., None], rubbish)
    ours = torch.autograd.grad([h, states[:, 0 if reverse else -1]], leaves_of(spoilt), [grad_h, torch.ones(2, 5)])
    for name, gradient in zip([n for n, t in spoilt.items() if t.requires_grad], ours, strict=True):
        assert gradient.isfinite().all(), name
        if name in ("u", "x"):
            assert (gradient[~mask] == 0).all(), name
    for row in range(2):
        kept = {name: tensor[row : row + 1] for name, tensor in inputs.items() if name not in ("weight_c", "bias")}
        kept |= {name: tensor[:, mask[row]] for name, tensor in kept.items() if name in ("u", "x")}
        last = states[row, 0 if reverse else -1]
        if not mask[row].any():
            assert torch.equal(last, inputs["c0"][row])
            continue
        alone, last_alone = sru_recurrence(**kept, weight_c=inputs["weight_c"], bias=inputs["bias"], reverse=reverse)
        torch.testing.assert_close(h[row][mask[row]], alone[0])
        torch.testing.assert_close(last, last_alone[0])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_reset_begins_a_new_sequence(reverse):
    inputs = make_inputs("x", "weight_c", "bias", "c0", batch=1, length=11)
    starts = (0, 3, 4, 9, 11)
    reset = torch.zeros(1, 11, dtype=torch.bool)
    begins = [stop - 1 for stop in starts[1:]] if reverse else list(starts[:-1])
    reset[0, begins] = True
    h, states = sru_recurrence(**inputs, reset=reset, reverse=reverse, return_all_states=True)
    for start, stop in itertools.pairwise(starts):
        alone = {"u": inputs["u"][:, start:stop], "x": inputs["x"][:, start:stop]}
        alone |= {"weight_c": inputs["weight_c"], "bias": inputs["bias"]}
        h_alone, states_alone = sru_recurrence(**alone, reverse=reverse, return_all_states=True)
        torch.testing.assert_close(h[:, start:stop], h_alone)
        torch.testing.assert_close(states[:, start:stop], states_alone)
    (gradient,) = torch.autograd.grad(h.sum() + states.sum(), inputs["c0"])
    assert (gradient == 0).all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (1, 63, 5), (3, 1, 500), (2, 63, 7), (1, 2, 500)])
def test_odd_sizes(batch, length, width, reverse):
    inputs = make_inputs(*TENSORS, batch=batch, length=length, width=width)
    ours = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
    expected = step_by_step(**inputs, reverse=reverse)
    weights = [torch.randn_like(tensor) for tensor in expected]
    for one, other in zip(
        (*ours, *gradients(ours, weights, leaves_of(inputs))),
        (*expected, *gradients(expected, weights, leaves_of(inputs))),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("recurrence_backend", ["reference"], indirect=True)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_size_of_pieces_changes_nothing(reverse, monkeypatch):
    inputs = make_inputs(*TENSORS, length=63)
    weight, results = torch.randn(3, 63, 5, dtype=torch.float64), []
    for steps in (1, 2, 10, 62, 63, 1000):
        monkeypatch.setattr(sru_torch, "_PIECE", steps * 3 * 5)
        h, states = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
        results.append((h, states, *gradients([h], [weight], leaves_of(inputs))))
    for result in results[:-1]:
        for ours, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_a_float32_state(dtype):
    """All the arithmetic is that of float32; only what goes in and comes out is rounded."""
    inputs = make_inputs("x", "mask", "reset", dtype=dtype)
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
    assert torch.equal(c, c_wide)
    assert torch.equal(h, h_wide.to(dtype))
    grad_h = torch.randn_like(h)
    ours = torch.autograd.grad([h, c], leaves_of(inputs), [grad_h, c.detach()])
    expected = torch.autograd.grad([h_wide, c_wide], leaves_of(widened), [grad_h.float(), c.detach()])
    for leaf, one, other in zip(leaves_of(inputs), ours, expected, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one, other.to(leaf.dtype))


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
    leaves = [tensor for name, tensor in inputs.items() if layout != "expanded" or name != "bias"]
    weights = [torch.randn_like(tensor) for tensor in expected]
    for one, other in zip(
        (*ours, *gradients(ours, weights, leaves)), (*expected, *gradients(expected, weights, leaves)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_autocast_leaves_the_recurrence_in_float32():
    """u comes out of a matrix product, so it is in bfloat16; x is not, and decides the output's dtype."""
    cell = Cell()
    x, mask = inputs_of_cell(63)
    with torch.autocast("cpu", torch.bfloat16):
        u = cell.linear(x).unflatten(-1, (3, -1))
        h, c = cell(x, mask)
        # Python constants and their products inside the op are no invitation to compute in bfloat16
        h.sum().backward()
    assert (u.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    expected, c_expected = sru_recurrence(u.float(), x, cell.weight_c, cell.bias, mask=mask)
    assert torch.equal(h, expected)
    assert torch.equal(c, c_expected)
    assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 7, 5)}, r"u must have shape \(batch, length, 3 or 4, width\); got \(2, 7, 5\)"),
        ({"u": torch.zeros(2, 7, 2, 5)}, "3 or 4"),
        ({"u": torch.zeros(2, 7, 3, 5, dtype=torch.long)}, "u must be of a floating-point dtype, not torch.int64"),
        ({"u": torch.zeros(2, 0, 3, 5)}, "at least one step"),
        ({"activation": "relu"}, "one of identity, tanh, not 'relu'"),
        ({"u": torch.zeros(2, 7, 4, 5), "x": torch.zeros(2, 7, 5)}, "give no x"),
        ({"x": torch.zeros(2, 6, 5)}, r"x must have shape \(2, 7, 5\); got \(2, 6, 5\)"),
        ({"x": torch.zeros(2, 7, 5, dtype=torch.int)}, "x must be of a floating-point dtype"),
        ({"weight_c": torch.zeros(10)}, r"weight_c must have shape \(2, 5\); got \(10,\)"),
        ({"bias": torch.zeros(5, 2)}, "bias must have shape"),
        ({"c0": torch.zeros(1, 5)}, r"c0 must have shape \(2, 5\)"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "mask must have shape"),
        ({"mask": torch.ones(2, 7)}, "mask must be boolean, not torch.float32"),
        ({"reset": torch.ones(2, 7, dtype=torch.long)}, "reset must be boolean, not torch.int64"),
        ({"dropout_mask": torch.ones(2, 7, 5)}, "dropout_mask must have shape"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        sru_recurrence(**{"u": torch.zeros(2, 7, 3, 5), **change})


def test_inference_mode_gives_the_same():
    inputs = make_inputs(*TENSORS)
    expected = sru_recurrence(**inputs)
    with torch.inference_mode():
        ours = sru_recurrence(**inputs)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_inputs_are_left_alone():
    inputs = make_inputs(*TENSORS)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    h, c = sru_recurrence(**inputs)
    grad_h = torch.ones_like(h)
    torch.autograd.grad([h, c], leaves_of(inputs), [grad_h, torch.ones_like(c)])
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())
    assert (grad_h == 1).all()


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


def test_which_backend_ran(recurrence_backend):
    inputs = make_inputs("x")
    h, _ = sru_recurrence(**inputs)
    h.sum().backward()
    assert last_backend("sru_recurrence") == last_backend("sru_recurrence_backward") == recurrence_backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_of_another_device_is_refused():
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match=r"kernels/build\.py"):
        sru_recurrence(**make_inputs("x"))


def test_a_second_derivative_is_refused():
    inputs = make_inputs("x")
    h, _ = sru_recurrence(**inputs)
    (gradient,) = torch.autograd.grad(h.sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_on_a_gpu(reverse):
    inputs = make_inputs(*TENSORS, length=63, width=500)
    there = {name: tensor.detach().cuda().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
    expected = sru_recurrence(**inputs, reverse=reverse, return_all_states=True)
    weights = [torch.randn_like(tensor) for tensor in expected]
    with use_backend("reference"):
        ours = sru_recurrence(**there, reverse=reverse, return_all_states=True)
        ours += gradients(ours, [weight.cuda() for weight in weights], leaves_of(there))
    expected += gradients(expected, weights, leaves_of(inputs))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-10, rtol=1e-9)
