"""The position bias against a matrix that is built entry by entry, and what torch's transforms make of the op."""

import math

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from hf_efficient.ops.backend import last_backend
from hf_efficient.ops.position_bias import relative_position_bucket, untied_position_bias


NAMES = ("query", "key", "relative", "first_column", "first_row")
# heads, length, head_dim, relative bias, untied [CLS]
SIZES = [
    pytest.param(3, 1, 5, True, True, id="H3-T1-D5-relative-untied"),
    pytest.param(3, 2, 5, True, True, id="H3-T2-D5-relative-untied"),
    pytest.param(3, 63, 15, True, True, id="H3-T63-D15-relative-untied"),
    pytest.param(1, 63, 5, False, True, id="H1-T63-D5-untied"),
    pytest.param(3, 7, 15, True, False, id="H3-T7-D15-relative"),
    pytest.param(3, 1, 1, False, False, id="H3-T1-D1-plain"),
]


def make_inputs(heads, length, head_dim, relative, untied, dtype=torch.float64, requires_grad=True):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    return (
        random(heads, length, head_dim),
        random(heads, length, head_dim),
        random(heads, 2 * length - 1) if relative else None,
        random(heads) if untied else None,
        random(heads) if untied else None,
    )


def by_definition(query, key, relative, first_column, first_row, scale):
    """bias[h, i, j], one entry at a time, as the formula at the head of `position_bias.py` says it."""
    heads, length, _ = query.shape
    entries = []
    for h in range(heads):
        for i in range(length):
            for j in range(length):
                if first_row is not None and i == 0:
                    entry = first_row[h]
                elif first_column is not None and j == 0:
                    entry = first_column[h]
                else:
                    entry = scale * torch.dot(query[h, i], key[h, j])
                    if relative is not None:
                        entry = entry + relative[h, j - i + length - 1]
                entries.append(entry)
    return torch.stack(entries).view(heads, length, length)


def relative_rms(ours: torch.Tensor, expected: torch.Tensor) -> float:
    error = (ours.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt().clamp(min=1e-30)).item() if error else 0.0


def assert_close(name: str, ours: torch.Tensor, expected: torch.Tensor, tolerance: float):
    assert ours.shape == expected.shape, f"{name}: {tuple(ours.shape)} against {tuple(expected.shape)}"
    error = relative_rms(ours, expected)
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e} > {tolerance:.0e}"


def gradients(function, inputs, cotangent):
    """The value, and the gradient of each input that is given, by name."""
    value = function(*inputs, scale=0.3)
    given = {name: tensor for name, tensor in zip(NAMES, inputs, strict=True) if tensor is not None}
    grads = torch.autograd.grad(value, list(given.values()), cotangent.to(value.dtype), allow_unused=True)
    return value, {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(given.items(), grads, strict=True)
    }


@pytest.mark.parametrize(("heads", "length", "head_dim", "relative", "untied"), SIZES)
def test_values_and_gradients_equal_the_definition(heads, length, head_dim, relative, untied):
    inputs = make_inputs(heads, length, head_dim, relative, untied)
    cotangent = torch.randn(heads, length, length, dtype=torch.float64)
    ours, our_grads = gradients(untied_position_bias, inputs, cotangent)
    expected, expected_grads = gradients(by_definition, inputs, cotangent)
    assert last_backend("untied_position_bias") == "reference"
    assert_close("bias", ours, expected, 1e-14)
    assert our_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert_close(f"gradient of {name}", our_grads[name], grad, 1e-13)


@pytest.mark.parametrize(
    "sizes", [(2, 1, 3, True, True), (1, 4, 3, True, True), (2, 3, 2, False, False)], ids=["T1", "T4", "T3-plain"]
)
def test_gradcheck(sizes):
    inputs = make_inputs(*sizes)

    def function(*tensors):
        return untied_position_bias(*tensors, scale=0.3)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("heads", "length", "head_dim", "relative", "untied"), [SIZES[0], SIZES[3], SIZES[4], SIZES[5]]
)
def test_opcheck(heads, length, head_dim, relative, untied):
    inputs = make_inputs(heads, length, head_dim, relative, untied, torch.float32)
    torch.library.opcheck(torch.ops.hf_efficient.untied_position_bias.default, (*inputs, 0.3))


def test_the_result_is_contiguous_whatever_the_layout_of_the_table():
    """The fused attention kernel is handed a copy of anything else, in every layer."""
    query = torch.randn(7, 3, 5).transpose(0, 1)
    relative = torch.randn(13, 3).t()  # an embedding of buckets: heads innermost
    result = untied_position_bias(query, query, relative, relative[:, 0], relative[:, 1], scale=0.3)
    assert result.is_contiguous()


def test_compiles_as_one_graph_for_every_length():
    torch._dynamo.reset()
    graphs = []

    def remember(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(untied_position_bias, fullgraph=True, dynamic=True, backend=remember)
    for length in (6, 9, 12):  # not the width or the number of heads, which may then share a symbol
        inputs = make_inputs(3, length, 5, True, True, torch.float32)
        cotangent = torch.randn(3, length, length)
        ours, our_grads = gradients(compiled, inputs, cotangent)
        expected, expected_grads = gradients(untied_position_bias, inputs, cotangent)
        assert_close("bias", ours, expected, 1e-6)
        for name, grad in expected_grads.items():
            assert_close(f"gradient of {name}", our_grads[name], grad, 1e-6)
    assert len(graphs) == 1
    assert any(node.target is torch.ops.hf_efficient.untied_position_bias.default for node in graphs[0].graph.nodes)


def test_gradients_through_aot_autograd():
    torch._dynamo.reset()
    inputs = make_inputs(3, 9, 5, True, True, torch.float32)
    cotangent = torch.randn(3, 9, 9)
    compiled = torch.compile(untied_position_bias, fullgraph=True, backend="aot_eager")
    _, our_grads = gradients(compiled, inputs, cotangent)
    _, expected_grads = gradients(untied_position_bias, inputs, cotangent)
    for name, grad in expected_grads.items():
        assert_close(f"gradient of {name}", our_grads[name], grad, 1e-6)


class Bias(torch.nn.Module):
    def forward(self, query, key, relative, first_column, first_row):
        return untied_position_bias(query, key, relative, first_column, first_row, scale=0.3)


def test_exported_program_needs_no_op_of_ours():
    inputs = make_inputs(3, 9, 5, True, True, torch.float32, requires_grad=False)
    program = torch.export.export(Bias(), inputs)
    namespaces = {
        node.target.namespace
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    assert namespaces == {"aten"}
    assert_close("bias", program.module()(*inputs), untied_position_bias(*inputs, scale=0.3), 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_rounded_once(dtype):
    inputs = [tensor.detach().requires_grad_() for tensor in make_inputs(3, 63, 15, True, True, dtype)]
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    cotangent = torch.randn(3, 63, 63).to(dtype)
    ours, our_grads = gradients(untied_position_bias, inputs, cotangent)
    exact, exact_grads = gradients(untied_position_bias, exact_inputs, cotangent)
    assert ours.dtype == dtype
    assert torch.equal(ours, exact.to(dtype))
    for name, grad in exact_grads.items():
        assert our_grads[name].dtype == dtype
        assert torch.equal(our_grads[name], grad.to(dtype)), f"gradient of {name} is rounded more than once"


def test_autocast_does_not_lower_the_sums():
    inputs = make_inputs(3, 63, 15, True, True, torch.float32)
    cotangent = torch.randn(3, 63, 63)
    expected, expected_grads = gradients(untied_position_bias, inputs, cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        ours, our_grads = gradients(untied_position_bias, inputs, cotangent)
    assert torch.equal(ours, expected)
    for name, grad in expected_grads.items():
        assert torch.equal(our_grads[name], grad), f"gradient of {name}"


def test_strided_inputs_equal_contiguous_ones():
    inputs = make_inputs(3, 7, 5, True, True, requires_grad=False)
    query, key, relative, first_column, first_row = inputs
    strided = (
        query.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.cat([key, key], dim=-1)[..., ::2].copy_(key),
        relative.flip(1).contiguous().flip(1).t().contiguous().t(),
        first_column.repeat_interleave(2)[::2],
        first_row[:1].expand(3),
    )
    inputs = (query, key, relative, first_column, first_row[:1].repeat(3))
    assert not any(tensor.is_contiguous() for tensor in strided)
    strided = tuple(tensor.requires_grad_() for tensor in strided)
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    cotangent = torch.randn(7, 7, 3, dtype=torch.float64).permute(2, 0, 1)
    ours, our_grads = gradients(untied_position_bias, strided, cotangent)
    expected, expected_grads = gradients(untied_position_bias, inputs, cotangent.contiguous())
    assert_close("bias", ours, expected, 1e-14)
    for name, grad in expected_grads.items():
        assert_close(f"gradient of {name}", our_grads[name], grad, 1e-14)


def replaced(name, tensor):
    inputs = dict(zip(NAMES, make_inputs(3, 7, 5, True, True, torch.float32), strict=True))
    return {**inputs, name: tensor}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param(replaced("query", torch.zeros(3, 7)), "query and key must both be", id="query-2d"),
        pytest.param(replaced("key", torch.zeros(3, 8, 5)), r"query and key .*\(3, 8, 5\)", id="key-longer"),
        pytest.param(
            replaced("relative", torch.zeros(3, 12)), r"relative must have shape \(3, 13\).*\(3, 12\)", id="r-short"
        ),
        pytest.param(
            replaced("first_column", torch.zeros(2)), r"first_column must have shape \(3,\)", id="column-heads"
        ),
        pytest.param(replaced("first_row", torch.zeros(3, 1)), r"first_row must have shape \(3,\)", id="row-2d"),
        pytest.param(replaced("key", torch.zeros(3, 7, 5).double()), "key is torch.float64", id="key-dtype"),
        pytest.param(replaced("relative", torch.zeros(3, 13).half()), "relative is torch.float16", id="relative-dtype"),
        pytest.param(replaced("first_row", None), "both or neither", id="row-alone-missing"),
    ],
)
def test_errors_name_the_argument(inputs, message):
    with pytest.raises(ValueError, match=message):
        untied_position_bias(**inputs, scale=0.3)


def test_length_zero_is_refused():
    with pytest.raises(ValueError, match="length 0"):
        untied_position_bias(torch.zeros(3, 0, 5), torch.zeros(3, 0, 5), scale=0.3)


def test_bucket_edges_of_the_paper():
    offsets = torch.arange(-400, 401)
    buckets = relative_position_bucket(offsets, 32, 128)
    left = buckets[:401].flip(0)
    edges = [distance for distance in range(1, 401) if left[distance] != left[distance - 1]]
    assert edges == [*range(1, 9), 12, 16, 23, 32, 46, 64, 91]
    assert left.max() == 15
    assert torch.equal(buckets[401:], left[1:] + 16)
    assert 16 not in buckets


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 50), (64, 1000)], ids=lambda value: str(value)
)
def test_buckets_equal_those_of_t5(num_buckets, max_distance):
    """T5 takes a logarithm in float32, which falls on either side where the exact quotient is whole; ours is exact."""
    exact = num_buckets // 4
    offsets = [
        offset
        for offset in range(-3 * max_distance, 3 * max_distance + 1)
        if abs(offset) < exact
        or abs(step := exact * math.log(abs(offset) / exact) / math.log(max_distance / exact) - 0.5) < 0
        or abs((step % 1) - 0.5) > 1e-4
    ]
    assert len(offsets) > 5.5 * max_distance
    offsets = torch.tensor(offsets)
    theirs = T5Attention._relative_position_bucket(offsets, True, num_buckets, max_distance)
    ours = relative_position_bucket(offsets, num_buckets, max_distance)
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.int64
