"""What torch's transforms make of the recurrence, which backend runs it, and its errors."""

import threading

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from hf_efficient.ops import sru
from hf_efficient.ops.backend import ENVIRONMENT_VARIABLE, BackendUnavailableError, last_backend, use_backend
from hf_efficient.ops.sru import sru_recurrence
from tests.helpers.comparison import assert_close
from tests.ops.sru_inputs import TENSORS, leaves_of, make_inputs


pytestmark = pytest.mark.usefixtures("recurrence_backend")


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
        assert_close(f"length {length}", reloaded(*inputs), cell(*inputs), 1e-6)


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
    assert_close("h", h, expected, 1e-6)
    assert_close("c", c, c_expected, 1e-6)
    assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())


def test_inference_mode_gives_the_same():
    inputs = make_inputs(*TENSORS)
    expected = sru_recurrence(**inputs)
    with torch.inference_mode():
        ours = sru_recurrence(**inputs)
    assert_close("h and c", ours, expected, 1e-6)


def test_inputs_are_left_alone():
    inputs = make_inputs(*TENSORS)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    h, c = sru_recurrence(**inputs)
    grad_h = torch.ones_like(h)
    torch.autograd.grad([h, c], [*leaves_of(inputs).values()], [grad_h, torch.ones_like(c)])
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())
    assert (grad_h == 1).all()


def test_a_second_derivative_is_refused():
    inputs = make_inputs("x")
    h, _ = sru_recurrence(**inputs)
    (gradient,) = torch.autograd.grad(h.sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


def test_which_backend_ran(recurrence_backend):
    inputs = make_inputs("x")
    h, _ = sru_recurrence(**inputs)
    h.sum().backward()
    assert last_backend("sru_recurrence") == last_backend("sru_recurrence_backward") == recurrence_backend


@pytest.mark.parametrize("all_states", [False, True], ids=["last-state", "all-states"])
def test_which_backend_ran_without_a_gradient(recurrence_backend, all_states):
    with torch.no_grad():
        sru_recurrence(**make_inputs("x"), return_all_states=all_states)
    assert last_backend("sru_recurrence") == recurrence_backend


def test_a_backward_pass_follows_its_forward_pass_into_other_threads(recurrence_backend, monkeypatch):
    """As autograd runs it on an accelerator: what `use_backend` chose is not to be seen there."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with use_backend(recurrence_backend):
        h, _ = sru_recurrence(**make_inputs("x"))
    with use_backend("auto"):
        thread = threading.Thread(target=h.sum().backward)
        thread.start()
        thread.join()
    assert last_backend("sru_recurrence_backward") == recurrence_backend


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_transforms_see_one_op(recurrence_backend, grad):
    """Nothing slips past vmap, functionalize or a trace because no gradient is asked for."""
    inputs = make_inputs("x", dtype=torch.float32, requires_grad=False)
    expected = sru_recurrence(**inputs)[0]
    u, x = inputs.values()

    def run(u, x):
        return sru_recurrence(u, x)[0]

    with torch.set_grad_enabled(grad):
        batched = torch.func.vmap(run)(torch.stack([u, 2 * u]), torch.stack([x, x]))
        torch.testing.assert_close(batched[0], expected)
        torch.testing.assert_close(torch.func.functionalize(run)(u, x), expected)
        graph = make_fx(run)(u, x)
    assert [node.target for node in graph.graph.nodes if "sru" in str(node.target)] == [
        torch.ops.hf_efficient.sru_recurrence.default
    ]


@pytest.mark.parametrize(("batch", "width"), [(0, 5), (2, 0)], ids=["no-rows", "no-units"])
def test_nothing_to_do(batch, width):
    inputs = make_inputs(*TENSORS, batch=batch, width=width)
    h, c = sru_recurrence(**inputs)
    (h.sum() + c.sum()).backward()
    assert (h.shape, c.shape) == ((batch, 7, width), (batch, width))
    for tensor in leaves_of(inputs).values():
        assert tensor.grad.shape == tensor.shape
    assert (inputs["bias"].grad == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_of_another_device_is_refused():
    """Whether its kernel is built, and could be loaded, or not."""
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match=r"kernels/build\.py|tensors are on cpu"):
        sru_recurrence(**make_inputs("x"))


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
        ({"document_start": torch.ones(2, 7, dtype=torch.long)}, "document_start must be boolean, not torch.int64"),
        ({"dropout_mask": torch.ones(2, 7, 5)}, "dropout_mask must have shape"),
    ],
    ids=[
        "three-dimensions",
        "two-parts",
        "integers",
        "no-steps",
        "activation",
        "x-beside-four-parts",
        "x-length",
        "x-integers",
        "weight_c-shape",
        "bias-shape",
        "c0-shape",
        "mask-shape",
        "mask-floats",
        "document_start-integers",
        "dropout_mask-shape",
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        sru_recurrence(**{"u": torch.zeros(2, 7, 3, 5), **change})
