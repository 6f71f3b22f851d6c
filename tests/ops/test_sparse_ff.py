"""The sparse feed-forward against loops over tokens and blocks, in float64; its gradients, ties and dtypes."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from hf_efficient.modules.sparse_layers import pack_units, unpack_units
from hf_efficient.ops import sparse_ff as op
from hf_efficient.ops import sparse_ff_reference
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.kernel_loader import find_variant
from hf_efficient.ops.sparse_ff import controller_logits, draw_winners, gated_units, sparse_ff
from hf_efficient.ops.sparse_ff_naive import controller_logits_naive, gated_units_naive, sparse_ff_naive
from tests.helpers.comparison import assert_close, assert_equal


ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
# Width, blocks, block size, rank: odd, of one block, of blocks of one unit, of more units in a block than tokens.
SIZES = {"odd": (7, 3, 5, 2), "one-block": (5, 1, 9, 3), "one-unit": (6, 4, 1, 1), "wide-blocks": (4, 2, 257, 3)}


@pytest.fixture(autouse=True)
def plain_torch():
    """The kernels have tests of their own."""
    with use_backend("reference"):
        yield


def make_weights(size="odd", dtype=torch.float64, inner_bias=False, spread=1.0):
    width, blocks, block, rank = SIZES[size]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    weights = {
        "controller_down": normal(rank, width),
        "controller_up": normal(blocks, block, rank),
        "controller_bias": normal(blocks, block),
        "up": normal(blocks, block, width),
        "down": normal(blocks, block, width),
        "bias": normal(width),
    }
    return {**weights, "inner_bias": normal(blocks, block)} if inner_bias else weights


def make_input(size="odd", *shape, dtype=torch.float64):
    return torch.randn(*(shape or (3, 4)), SIZES[size][0], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("options", [{}, {"multiply_by_controller": True}], ids=["", "multiplied"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inner_bias", [False, True], ids=["no-inner-bias", "inner-bias"])
@pytest.mark.parametrize("shape", [(), (1, 1), (3, 7)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_equals_the_loop(size, shape, inner_bias, activation, options):
    x, weights = make_input(size, *(shape or (1,))), make_weights(size, inner_bias=inner_bias)
    x = x[0] if not shape else x
    expected, chosen = sparse_ff_naive(x.view(-1, x.shape[-1]), **weights, activation=activation, **options)
    output, winners = sparse_ff(x, **weights, activation=activation, **options)
    assert winners.dtype == torch.int32
    assert output.shape == x.shape
    assert winners.shape == (*x.shape[:-1], SIZES[size][1])
    assert torch.equal(winners.view(-1, SIZES[size][1]), chosen)
    assert_close("output", output.view_as(expected), expected, 1e-12)
    again, _ = sparse_ff(x.requires_grad_(), **weights, activation=activation, **options)  # of plain operators
    assert_close("with a graph", again.detach(), output, 1e-12)


def test_no_tokens():
    output, winners = sparse_ff(torch.zeros(2, 0, 7, dtype=torch.float64), **make_weights())
    assert (output.shape, winners.shape) == ((2, 0, 7), (2, 0, 3))


def test_without_a_bias():
    x, weights = make_input(), make_weights()
    bias = weights.pop("bias")
    assert_close("output", sparse_ff(x, **weights)[0] + bias, sparse_ff(x, **weights, bias=bias)[0], 1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_the_first_of_equal_units_wins(tokens):
    """All equal, a tie of the largest behind a smaller one, and NaN, which counts as the largest."""
    weights = make_weights()
    weights["controller_up"] = torch.zeros_like(weights["controller_up"])
    nan = float("nan")
    weights["controller_bias"] = torch.tensor([[0.0] * 5, [1, 3, 2, 3, 3], [1, 2, nan, 5, nan]]).double()
    _, winners = sparse_ff(make_input("odd", tokens), **weights)
    assert winners.tolist() == [[0, 1, 2]] * tokens


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("backend", "tokens"), [("naive", 2), *itertools.product(["reference", "cpu"], [1, 2, 65])], ids=str
)
def test_rows_of_down_that_no_unit_uses_may_hold_anything(tokens, backend, dtype, activation):
    """Those of losers, and of winners that are 0 behind the activation, as all of the first block are; others show."""
    if backend == "cpu" and find_variant(op.KERNEL, "cpu") is None:
        pytest.skip("the kernel is not built")
    x, weights = make_input("wide-blocks", tokens, dtype=dtype), make_weights("wide-blocks", dtype, inner_bias=True)
    weights["inner_bias"][0], weights["inner_bias"][1] = (-1e4 if activation == "relu" else 0.0), 10.0
    weights["up"][0] = 0.0
    run = sparse_ff_naive if backend == "naive" else sparse_ff
    with use_backend("reference" if backend == "naive" else backend):
        expected, winners = run(x, **weights, activation=activation)
        unused = torch.ones(2, 257, dtype=torch.bool)
        unused[1, winners[:, 1].long()] = False
        for number in (float("inf"), float("nan")):
            weights["down"][unused] = number
            output, _ = run(x, **weights, activation=activation)
            assert_close("output", output, expected, 1e-6 if dtype == torch.float32 else 0.02)
        weights["down"][1, winners[0, 1].long(), 2] = float("inf")
        same = winners[:, 1] == winners[0, 1]
        spoiled, _ = run(x, **weights, activation=activation)
        assert torch.equal(spoiled[:, 2].isinf(), same)
        assert torch.equal(spoiled[~same], output[~same])


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_a_gradient_lets_rows_that_are_not_used_spoil_the_output(tokens):
    """As documented: all rows are multiplied there, those of dead winners by 0."""
    x, weights = make_input("odd", tokens), make_weights(inner_bias=True)
    weights["inner_bias"].fill_(-1e4)
    weights["down"].fill_(float("inf"))
    assert torch.equal(sparse_ff(x, **weights)[0], weights["bias"].expand_as(x))
    assert sparse_ff(x.requires_grad_(), **weights)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_float32(dtype):
    """Also under autocast, where a product of 16 bits would make many equal."""
    x, weights = make_input("wide-blocks", 9, dtype=dtype), make_weights("wide-blocks", dtype)
    controller = [weights[f"controller_{name}"] for name in ("down", "up", "bias")]
    expected = torch.stack([controller_logits_naive(one, *controller) for one in x])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = controller_logits(x, *controller)
        assert logits.dtype == torch.float32
        assert_close("logits", logits, expected, 1e-6)
    doubles = controller_logits(x.double(), *controller)
    assert doubles.dtype == torch.float64


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63])
def test_dtypes(dtype, tokens, grad):
    """The output has that of the input, whatever that of the weights; winners are those of float32 logits."""
    x, weights = make_input("wide-blocks", tokens, dtype=dtype), make_weights("wide-blocks", dtype, spread=0.3)
    expected, chosen = sparse_ff_naive(x.double(), **{name: value.double() for name, value in weights.items()})
    with torch.set_grad_enabled(grad):
        output, winners = sparse_ff(x.requires_grad_(grad), **weights)
    assert output.dtype == dtype
    assert (winners == chosen).float().mean() > 0.99
    same = (winners == chosen).all(-1)
    assert_close("output", output.detach()[same].double(), expected[same], 1e-6 if dtype == torch.float32 else 0.02)
    mixed, _ = sparse_ff(x.detach(), **{name: value.float() for name, value in weights.items()})
    assert mixed.dtype == dtype


def test_autocast_rounds_nothing_here():
    x, weights = make_input(dtype=torch.float32), make_weights(dtype=torch.float32)
    expected = sparse_ff(x, **weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse_ff(x, **weights)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_units_in_records(tokens):
    """Both rows of a unit side by side, as decoding reads them; and other layouts of input and weights."""
    x, weights = make_input("odd", tokens), make_weights(inner_bias=True)
    expected, winners = sparse_ff(x, **weights)
    records = pack_units(weights["up"], weights["down"])
    assert records.is_contiguous()
    up, down = unpack_units(records)
    assert up.stride(-1) == 1
    assert up.data_ptr() == records.data_ptr()
    for one, other in ((up, weights["up"]), (down, weights["down"])):
        assert torch.equal(one, other)
    with torch.no_grad():
        found = sparse_ff(x, **{**weights, "up": up, "down": down})
    assert_close("records", found[0], expected, 1e-12)
    assert torch.equal(found[1], winners)
    with torch.no_grad():
        strided = torch.stack([x, x], -1)[..., 0]
        assert_close("strided input", sparse_ff(strided, **weights)[0], expected, 1e-12)
        turned = x.t().contiguous().t()
        assert_close("transposed input", sparse_ff(turned, **weights)[0], expected, 1e-12)


@pytest.mark.parametrize("options", [{}, {"multiply_by_controller": True, "activation": "silu"}], ids=["relu", "silu"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_gradients_of_evaluation(tokens, options):
    """The winners are constants: no first derivative crosses a border of two of them at random weights."""
    weights = make_weights(inner_bias=True)
    names = list(weights)
    tensors = [make_input("odd", tokens), *weights.values()]
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def run(x, *values):
        return sparse_ff(x, **dict(zip(names, values, strict=True)), **options)[0]

    used = run(*tensors)
    gradients = torch.autograd.grad(used.sum(), tensors, allow_unused=True)
    reached = {name for name, gradient in zip(["x", *names], gradients, strict=True) if gradient is not None}
    controller = {"controller_down", "controller_up", "controller_bias"}
    assert reached == {"x", *names} - (set() if options else controller)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def make_units(tokens, blocks, block, rank):
    """Leaves of the training form, and its units with the mask written out."""
    shapes = ((tokens, blocks * block), (tokens, rank), (blocks, block, rank), (blocks, block))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def naive(pre_activations, code, up, bias, *options):
        logits = torch.einsum("tr,kbr->tkb", code, up) + bias
        return gated_units_naive(pre_activations, logits, *options)

    return leaves, naive


@pytest.fixture(params=[1 << 17, 1], ids=["at-once", "in-pieces"])
def pieces(request, monkeypatch):
    """Of at least 16 tokens."""
    monkeypatch.setattr(sparse_ff_reference, "_PIECE", request.param)


@pytest.mark.parametrize("multiply", [False, True], ids=["", "multiplied"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_units_of_training_equal_the_mask_written_out(size, activation, kind, multiply, pieces):
    _, blocks, block, rank = SIZES[size]
    tokens = 16 * torch.get_num_threads() + 5
    leaves, naive = make_units(tokens, blocks, block, rank)
    winners = torch.randint(block, (tokens, blocks)) if kind == "hard" else None
    results, cotangent = [], torch.randn_like(leaves[0])
    for units in (gated_units, naive):
        hidden = units(*leaves, winners, activation, multiply)
        gradients = torch.autograd.grad(hidden, leaves, cotangent)
        names = ("to units", "to code", "to up", "to bias")
        results.append({"hidden": hidden.detach(), **dict(zip(names, gradients, strict=True))})
    if kind == "hard":
        assert (results[0]["hidden"] != 0).sum() <= tokens * blocks
    assert_close("units", *results, 1e-11)


def test_units_of_training_under_autocast():
    """The controller stays in float32 in both passes, the backward pass under autocast too."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in make_units(9, 3, 5, 2)[0]]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            hidden = gated_units(*leaves, None)
            found.append([hidden.detach(), *torch.autograd.grad(hidden, leaves, torch.ones_like(hidden))])
    assert_equal("autocast", *found)


@pytest.mark.parametrize("multiply", [False, True], ids=["", "multiplied"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_second_derivatives_of_training(kind, multiply):
    """The straight-through estimator is no derivative, so hard masks are held against autograd of the mask itself."""
    leaves, naive = make_units(3, 2, 5, 2)
    winners = torch.randint(5, (3, 2)) if kind == "hard" else None
    if kind == "soft":
        run = lambda *tensors: gated_units(*tensors, None, "relu", multiply)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)
        return
    found = []
    for units in (gated_units, naive):
        hidden = units(*leaves, winners, "relu", multiply)
        first = torch.autograd.grad(hidden.square().sum(), leaves, create_graph=True)
        number = sum(gradient.square().sum() for gradient in first)
        found.append(list(torch.autograd.grad(number, leaves)))
    assert_close("second derivatives", *found, 1e-12)


def test_batched_cotangents():
    leaves, _ = make_units(3, 2, 5, 2)
    for winners in (None, torch.randint(5, (3, 2))):
        hidden = gated_units(*leaves, winners)
        cotangents = torch.randn(4, *hidden.shape, dtype=torch.float64)
        batched = torch.autograd.grad(hidden, leaves, cotangents, True, is_grads_batched=True)
        single = zip(*(torch.autograd.grad(hidden, leaves, one, True) for one in cotangents), strict=True)
        assert_close("batched", list(batched), [torch.stack(rows) for rows in single], 1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5])
def test_winners_are_drawn_by_a_softmax(temperature):
    """At 0.1 nearly the maximum: log p + t g has its maximum where softmax(logits / t) says."""
    logits = torch.randn(2, 5, dtype=torch.float64) * min(1.0, temperature)
    count = 20_000
    for uniforms in (None, torch.rand(count, 2, 5, dtype=torch.float64)):
        winners = draw_winners(logits.expand(count, -1, -1), temperature, uniforms)
        for block in range(2):
            expected = count * (logits[block] / temperature).softmax(-1)
            assert chisquare(torch.bincount(winners[:, block], minlength=5), expected).pvalue > 1e-3


def test_winners_have_no_gradient_and_are_first_among_equals():
    logits = torch.zeros(3, 2, 4, requires_grad=True)
    winners = draw_winners(logits, 0.1, torch.full((3, 2, 4), 0.5))
    assert not winners.any()
    assert not winners.requires_grad


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(tokens, dtype):
    x, weights = make_input("odd", tokens, dtype=dtype), make_weights(dtype=dtype, inner_bias=True)
    for extra in ((None, None), (weights["bias"], weights["inner_bias"])):
        required = [weights[name] for name in ("controller_down", "controller_up", "controller_bias", "up", "down")]
        torch.library.opcheck(op._op, (x, *required, *extra, "relu", True))


@torch.no_grad()
def test_compiles_as_one_operator():
    weights, graphs = make_weights(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sparse_ff(x, **weights), fullgraph=True, dynamic=True, backend=backend)
    for length in (3, 9):
        x = make_input("odd", 2, length)
        assert_close("output", list(compiled(x)), list(sparse_ff(x, **weights)), 1e-12)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert any("hf_efficient.sparse_ff" in target for target in targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 6)}, r"x must have shape \(\.\.\., 7\), as wide as the rows of up; got \(3, 6\)"),
        ({"up": torch.zeros(15, 7)}, r"up must have shape \(blocks, block size, width\); got \(15, 7\)"),
        ({"down": torch.zeros(5, 3, 7)}, r"down must have shape \(3, 5, 7\); got \(5, 3, 7\)"),
        ({"controller_up": torch.zeros(3, 5, 3)}, r"controller_up must have shape \(3, 5, 2\)"),
        ({"controller_bias": torch.zeros(15)}, r"controller_bias must have shape \(3, 5\); got \(15,\)"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(7,\)"),
        ({"inner_bias": torch.zeros(15)}, r"inner_bias must have shape \(3, 5\)"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, gelu_new, silu, not 'tanh'"),
        ({"x": torch.zeros(3, 7).long()}, "x must be of a floating-point dtype, not torch.int64"),
        ({"bias": torch.zeros(7).int()}, "bias must be of a floating-point dtype, not torch.int32"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        sparse_ff(**{"x": make_input(), **make_weights(), **changes})
