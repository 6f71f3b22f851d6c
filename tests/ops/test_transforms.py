"""The ops under the transforms of `torch.func`, in forward mode, and differentiated twice."""

import logging
from contextlib import contextmanager

import pytest
import torch
from packaging.version import Version
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from hf_efficient.ops import backend, kernel_loader, sru, sru_plain
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.candidate_scores import candidate_scores
from hf_efficient.ops.categorical import sample_categorical
from hf_efficient.ops.counter_rng import counter_based_uniforms
from hf_efficient.ops.multiplicative import conv_over_modules, multiplicative_dense
from hf_efficient.ops.position_bias import untied_position_bias
from hf_efficient.ops.sparse_ff import gated_units, sparse_ff
from hf_efficient.ops.sru import sru_recurrence
from hf_efficient.ops.sru_naive import sru_recurrence_naive
from tests.helpers.comparison import assert_close
from tests.helpers.derivatives import check_first_derivatives, check_second_derivatives
from tests.ops.sru_inputs import TENSORS, leaves_of, make_inputs


RECURRENCES = {
    "bare": ((), {}),
    "peephole": (("x", "weight_c", "bias"), {}),
    "no-peephole": (("x", "bias", "c0"), {"activation": "tanh"}),
    "four-parts-reverse": (("weight_c", "mask"), {"parts": 4, "reverse": True}),
    "all": (TENSORS, {"scale_x": 1.3, "activation": "tanh"}),
    "all-reverse": (TENSORS, {"scale_x": 0.7, "reverse": True}),
    "one-step": (("x", "weight_c", "bias", "c0"), {"length": 1, "batch": 1}),
    "documents": (("x", "weight_c", "document_start"), {"length": 9}),
}


def recurrence_case(names, options):
    sizes = {name: options[name] for name in ("parts", "length", "batch") if name in options}
    inputs = make_inputs(*names, **{"batch": 2, "length": 5, "width": 3, **sizes})
    options = {name: value for name, value in options.items() if name not in sizes}
    leaves = leaves_of(inputs)
    rest = {name: value for name, value in inputs.items() if name not in leaves}

    def results(point):
        h, states = sru_recurrence(**point, **rest, **options, return_all_states=True)
        return torch.cat([h, states], -1)

    return results, leaves


def bias_case(relative, cls):
    heads, length, width = 2, 5, 3
    point = {name: torch.randn(heads, length, width, dtype=torch.float64) for name in ("query", "key")}
    if relative:
        point["relative"] = torch.randn(heads, 2 * length - 1, dtype=torch.float64)
    if cls:
        point.update({name: torch.randn(heads, dtype=torch.float64) for name in ("first_column", "first_row")})
    return lambda point: untied_position_bias(**point, scale=0.4), point


def scores_case(padding_idx):
    candidates = torch.randint(11, (7, 5))
    point = {name: torch.randn(rows, 3, dtype=torch.float64) for name, rows in (("states", 7), ("table", 11))}
    point["bias"] = torch.randn(11, dtype=torch.float64)
    if padding_idx is None:
        return lambda point: candidate_scores(**point, candidates=candidates), point

    def scores(point):
        # Differences know no stopped gradient; so the padding row stands still in them, too.
        keep = torch.arange(11) != padding_idx
        table = torch.where(keep[:, None], point["table"], point["table"].detach() if padding_idx else 0.0)
        return candidate_scores(point["states"], table, point["bias"], candidates, padding_idx)

    return scores, point


def sparse_ff_case():
    shapes = {
        "x": (2, 3),
        "controller_down": (2, 3),
        "controller_up": (2, 4, 2),
        "controller_bias": (2, 4),
        "up": (2, 4, 3),
        "down": (2, 4, 3),
        "bias": (3,),
        "inner_bias": (2, 4),
    }
    point = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    # Far apart, so that no difference that derivatives are held against chooses another unit.
    point["controller_bias"] = 9.0 * torch.stack([torch.randperm(4), torch.randperm(4)]).double()
    return lambda point: sparse_ff(**point, multiply_by_controller=True, activation="silu")[0], point


def units_case():
    shapes = {"pre_activations": (3, 8), "code": (3, 2), "up": (2, 4, 2), "bias": (2, 4)}
    point = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    return lambda point: gated_units(**point, winners=None), point


def multiplicative_case():
    shapes = {"x": (2, 4, 4), "gating": (2, 4), "projection": (4, 2), "kernel": (3, 2, 2, 3), "bias": (3,)}
    point = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}

    def results(point):
        modules = multiplicative_dense(point["x"], point["gating"], point["projection"]).unflatten(-1, (2, 2))
        return conv_over_modules(modules, point["kernel"], point["bias"])

    return results, point


CASES = {
    **{f"sru-{name}": lambda case=case: recurrence_case(*case) for name, case in RECURRENCES.items()},
    "bias-plain": lambda: bias_case(False, False),
    "bias-relative-cls": lambda: bias_case(True, True),
    "scores": lambda: scores_case(None),
    "scores-padding": lambda: scores_case(0),
    "sparse-ff": sparse_ff_case,
    "sparse-ff-units": units_case,
    "multiplicative-conv": multiplicative_case,
}


@contextmanager
def asked_for(name):
    if name == "cpu" and kernel_loader.find_variant(sru.KERNEL, "cpu") is None:
        pytest.skip(f"{sru.KERNEL} is not built for the CPU: run `python kernels/build.py`")
    with use_backend(name):
        yield name


BACKENDS = ("auto", "reference", "cpu")


@pytest.fixture(
    params=[("auto", name) for name in CASES] + [(backend, "sru-all") for backend in BACKENDS[1:]], ids="-".join
)
def case(request):
    """A function of a dict of tensors that runs an op, and where to differentiate it. Whatever backend is asked for, a
    transform sees plain operators."""
    with asked_for(request.param[0]):
        yield CASES[request.param[1]]()


def number_of(results):
    """A number that is not linear in the results, so that it has second derivatives through linear ops, too."""
    return lambda point: (results(point).sin() * results(point)).sum()


def test_first_derivatives(case):
    check_first_derivatives(*case)


def test_second_derivatives(case):
    results, point = case
    check_second_derivatives(number_of(results), point, whole=point)


def test_batched_gradients_and_vmap_equal_a_loop(case):
    results, point = case
    point = {name: value.detach() for name, value in point.items()}
    stacked = {name: torch.stack([value, value.flip(0)]) for name, value in point.items()}
    loop = [{name: value[index] for name, value in stacked.items()} for index in range(2)]
    with torch.no_grad():
        expected = torch.stack([results(one) for one in loop])
        assert_close("vmap without grad", vmap(results)(stacked), expected, 1e-12)
    assert_close("vmap", vmap(results)(stacked), expected, 1e-12)
    number = number_of(results)
    expected = [grad(number)(one) for one in loop]
    found = vmap(grad(number))(stacked)
    for name in point:
        assert_close(f"gradient of {name}", found[name], torch.stack([one[name] for one in expected]), 1e-12)
    leaves = {name: value.clone().requires_grad_() for name, value in point.items()}
    output = results(leaves)
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype)

    def pull(cotangent, batched=False):
        return torch.autograd.grad(output, list(leaves.values()), cotangent, True, is_grads_batched=batched)

    expected = [torch.stack(rows) for rows in zip(*map(pull, cotangents), strict=True)]
    assert_close("batched cotangents", list(pull(cotangents, batched=True)), expected, 1e-12)


def test_one_argument_of_many_under_vmap():
    """What is written in place, or made anew inside, must not depend on which argument there is more than one of."""
    for results, point in (make() for make in CASES.values()):
        point = {name: value.detach() for name, value in point.items()}
        for name, value in point.items():
            several = torch.stack([value, 2 * value, -value])
            found = vmap(lambda one, name=name, results=results, point=point: results({**point, name: one}))(several)
            expected = torch.stack([results({**point, name: one}) for one in several])
            assert_close(name, found, expected, 1e-12)


@pytest.mark.parametrize("name", RECURRENCES)
def test_values_of_the_plain_form(name):
    """In float32, with NaN and infinity under the mask, and with a graph beside."""
    names, options = RECURRENCES[name]
    sizes = {key: options[key] for key in ("parts",) if key in options}
    inputs = make_inputs(*names, length=63, dtype=torch.float32, **sizes)
    options = {key: value for key, value in options.items() if key not in ("parts", "length", "batch")}
    if "mask" in inputs:
        with torch.no_grad():
            inputs["u"][~inputs["mask"]] = torch.tensor([float("nan"), float("inf")])[torch.arange(5) % 2]
    expected = sru_recurrence_naive(**inputs, **options)
    ours, _ = vmap(lambda u: sru_recurrence(**{**inputs, "u": u}, **options))(inputs["u"].unsqueeze(0))
    assert_close("h", ours[0], expected[0], 1e-6)
    leaves = leaves_of(inputs)
    got = torch.autograd.grad(ours.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in got)


@pytest.mark.parametrize("name", ["all", "all-reverse", "no-peephole"])
def test_the_loop_as_one_operator_gives_the_same(name):
    """As it is exported to ONNX."""
    names, options = RECURRENCES[name]
    inputs = make_inputs(*names, requires_grad=False)
    tensors = (inputs["u"], *(inputs.get(name) for name in TENSORS))
    arguments = (
        *tensors,
        options.get("scale_x", 1.0),
        options.get("activation", "identity"),
        options.get("reverse", False),
    )
    assert_close("scan", sru_plain.forward(*arguments, scan=True), sru_plain.forward(*arguments), 1e-12)


def test_low_precision_keeps_its_state_in_float32():
    inputs = make_inputs("x", "weight_c", dtype=torch.bfloat16, requires_grad=False, length=63)
    tangents = (torch.zeros_like(inputs["u"]),)
    (h, state), _ = jvp(lambda u: sru_recurrence(**{**inputs, "u": u}), (inputs["u"],), tangents)
    expected, expected_state = sru_recurrence(**inputs)
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close("state", state, expected_state, 1e-5)
    assert_close("h", h, expected, 1e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_ran_is_told_and_said_once(name, monkeypatch, caplog):
    with asked_for(name):
        check_what_is_told(name, monkeypatch, caplog)


def check_what_is_told(asked_backend, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_said", set())
    inputs = make_inputs("x", requires_grad=False)
    expected = sru_recurrence(**inputs)[0]
    normal = last_backend(sru.OP_NAME)
    with caplog.at_level(logging.WARNING, logger=backend.logger.name):
        for _ in range(2):
            h = vmap(lambda u: sru_recurrence(u, inputs["x"])[0])(inputs["u"].unsqueeze(0))
    assert last_backend(sru.OP_NAME) == "reference"
    said = [record for record in caplog.records if "plain torch operators" in record.getMessage()]
    assert len(said) == (asked_backend != "reference")
    assert_close("h", h[0], expected, 1e-12)
    sru_recurrence(**inputs)
    assert last_backend(sru.OP_NAME) == normal


def test_no_transform_is_left_behind(case):
    """After an error inside a transform, too, the kernels run again."""
    assert not backend.is_transformed()
    results, point = case
    with pytest.raises(ZeroDivisionError):
        vmap(lambda point: results(point) / (1 // 0))({name: value[None] for name, value in point.items()})
    with forward_ad.dual_level():
        assert backend.is_transformed()
    assert not backend.is_transformed()


def test_an_op_called_by_its_registered_name_refuses_forward_mode():
    """It would go on without the tangents: a derivative of zero."""
    inputs = make_inputs("x", requires_grad=False)

    def run(u):
        return torch.ops.hf_efficient.sru_recurrence(u, inputs["x"], *[None] * 6, 1.0, "identity", False)[0]

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(run, (inputs["u"],), (inputs["u"],))
    query = torch.randn(2, 5, 3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(lambda q: torch.ops.hf_efficient.untied_position_bias(q, q, None, None, None, 0.5), (query,), (query,))


def test_compiled_transforms(case):
    """torch.compile takes the plain form where it compiles a transform, and the op itself elsewhere."""
    results, point = case
    point = {name: value.detach() for name, value in point.items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda point: jvp(results, (point,), (point,))[1], backend="eager", fullgraph=True)
    assert_close("jvp", compiled(point), jvp(results, (point,), (point,))[1], 1e-12)
    compiled = torch.compile(results, backend="eager", fullgraph=True)
    expected = jvp(results, (point,), (point,))[1]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, value) for name, value in point.items()}
        if Version(torch.__version__).release >= (2, 14):  # which refuses such inputs of any function
            with pytest.raises(torch._dynamo.exc.Unsupported, match="dual tensor input"):
                compiled(duals)
            return
        assert_close("a compiled op", forward_ad.unpack_dual(compiled(duals)).tangent, expected, 1e-12)


@pytest.mark.parametrize("replacement", [True, False], ids=["replaced", "distinct"])
@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, None), (None, None, None, 0)], ids=str)
def test_samples_under_vmap(replacement, axes):
    models = [
        (torch.randn(9, 5), torch.randn(37, 5), torch.randn(37), torch.rand(9, 4, dtype=torch.float64))
        for _ in range(2)
    ]
    arguments = [
        torch.stack(values) if axis == 0 else values[0]
        for values, axis in zip(zip(*models, strict=True), axes, strict=True)
    ]

    def draw(*tensors):
        return sample_categorical(*tensors, temperature=0.7, replacement=replacement)

    found = vmap(draw, in_dims=axes)(*arguments)
    for index in range(2):
        own = [value[index] if axis == 0 else value for value, axis in zip(arguments, axes, strict=True)]
        assert torch.equal(found[index], draw(*own))


def test_samples_have_no_derivative():
    states, weight, uniforms = torch.randn(9, 5), torch.randn(37, 5), torch.rand(9, 4)
    expected = sample_categorical(states, weight, None, uniforms)
    drawn, tangent = jvp(lambda states: sample_categorical(states, weight, None, uniforms), (states,), (states,))
    assert torch.equal(drawn, expected)
    assert not tangent.any()
    assert not hessian(lambda states: sample_categorical(states, weight, None, uniforms).double().sum())(states).any()


def test_counter_based_numbers_under_vmap():
    seeds = torch.tensor([[3, 4, 5], [2**62, -7, 0]])
    found = vmap(lambda row: counter_based_uniforms(row, 5, 2, stream=1))(seeds)
    assert torch.equal(found, torch.stack([counter_based_uniforms(row, 5, 2, stream=1) for row in seeds]))
