"""Reversible blocks against ordinary autograd over the same modules."""

import copy

import pytest
import torch
from torch import nn

from hf_efficient.ops.reversible import HalfResidual, ReversibleChain
from tests.helpers.comparison import (
    assert_close,
    assert_equal,
    assert_gradients_close,
    named_gradients,
    relative_error,
)
from tests.ops.reversible_stacks import (
    CALM,
    SPARSE,
    WIDTH,
    FeedForwardHalf,
    loss_of,
    make_input,
    make_stack,
    run_halves,
    train_step,
)


DRAWS = {
    "dropout": {"dropout": 0.3, "activation_dropout": 0.3, "ff_hard_probability": 0.0},
    "hard": {"dropout": 0.2, "ff_hard_probability": 1.0, "ff_temperature": 0.5},
    "select": {"dropout": 0.2, "ff_hard_probability": 0.5},
    "pieces": {"dropout": 0.2, "ff_hard_probability": 0.5, "ff_chunk_size": 4},
    "dense": {"ff_sparsity": None, "ff_rank": None, "dropout": 0.1, "activation_dropout": 0.3},
}


class Half(nn.Module):
    """A half residual out of a function of the stream."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x, memory, **arguments):
        return self.function(self, x, **arguments)


def linear_half(width=WIDTH, linear=None):
    return Half(lambda self, x: self.linear(x).tanh(), linear=linear or nn.Linear(width, width).double())


def pair(stack, x, **options):
    """A step by ordinary autograd, and one that rebuilds, from the same seed."""
    return [train_step(stack, x, reversible=reversible, **options) for reversible in (False, True)]


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
def test_gradients_are_those_of_ordinary_autograd(draws, dtype, tolerance):
    stack = make_stack(dtype=dtype, **DRAWS[draws])
    for seed in range(3):
        (output, expected, states), (ours, found, states_behind) = pair(stack, make_input(dtype=dtype), seed=seed)
        assert_equal("output", ours, output)
        assert_gradients_close(found, expected, tolerance)
        # Behind the forward pass, and behind the backward pass
        assert_equal("generator", states_behind, states)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 63), (3, 2)], ids=str)
def test_sizes(batch, length):
    (_, expected, _), (_, found, _) = pair(make_stack(dropout=0.2), make_input(batch, length))
    assert_gradients_close(found, expected, 1e-9)


def test_what_was_drawn_differs_between_halves_and_calls():
    x, seen = torch.ones(1, 3, WIDTH, dtype=torch.float64), []
    half = Half(lambda self, x: seen.append(nn.functional.dropout(torch.ones_like(x))) or x * seen[-1])
    first, second = run_halves([half, half], x, x.clone().requires_grad_())
    (first + second).sum().backward()
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[3])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_decisions_are_remembered():
    stack = make_stack(dropout=0.2)
    train_step(stack, make_input(), reversible=True)
    for block in stack.blocks:
        first, second = block.buckets.seen
        assert first is second
        assert first.dtype == torch.uint8


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=["bf16", "autocast", "bf16-autocast", "fp16"],
)
def test_sixteen_bits_over_24_blocks(dtype, autocast):
    """Both against float64: rebuilding may at most double the error."""
    fields = {"width": 31, "intermediate_size": 60, **CALM}
    x = make_input(2, 33, 31).bfloat16()
    exact = make_stack(24, torch.bfloat16, **fields)
    for block in exact.blocks:  # without a choice, which sixteen bits may make otherwise
        block.buckets.buckets_of = lambda x: torch.zeros(x.shape[:-1], dtype=torch.uint8)
    rounded = copy.deepcopy(exact).to(dtype)
    _, expected, _ = train_step(exact.double(), x.double(), reversible=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        steps = pair(rounded, x.to(dtype))
    whole, ordinary, ours = (
        torch.cat([gradient.double().flatten() for gradient in gradients.values()])
        for gradients in (expected, steps[0][1], steps[1][1])
    )
    limit = relative_error(ordinary, whole)
    assert 1e-4 < limit < 0.2
    assert relative_error(ours, whole) <= 2 * limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_the_same_in_the_second_run_and_streams_stay_wide(dtype):
    seen = []

    def watch(self, x):
        product = self.linear(x)
        seen.append((x.dtype, product.dtype))
        return product

    half = Half(watch, linear=nn.Linear(WIDTH, WIDTH).to(dtype))
    x = make_input(dtype=dtype).requires_grad_()
    chain = ReversibleChain()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = chain.block([HalfResidual(half)], *chain.open(x, x))
        assert (first.dtype, second.dtype) == (torch.float32, torch.float32)
        first, second = chain.close(first, second)
    assert (first.dtype, second.dtype) == (dtype, dtype)
    (first + second).sum().backward()  # outside of autocast
    assert seen == [(dtype, torch.bfloat16)] * 2


def test_a_backward_pass_inside_of_autocast_runs_again_without_it():
    half, x = linear_half(linear=nn.Linear(WIDTH, WIDTH)), make_input(dtype=torch.float32)
    found = []
    for inside in (False, True):
        half.zero_grad()
        loss = loss_of(sum(run_halves([half, half, half], x, x)))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            # Of the gradients' own products, which autocast rounds, only those of the last half
            loss.backward()
        found.append(named_gradients(half))
    assert_gradients_close(found[1], found[0], 1e-2)


def test_a_weight_used_outside_as_well_keeps_both_gradients_under_autocast():
    """What autocast keeps of weights it cast without a graph must not serve the use that needs one."""
    linear = nn.Linear(WIDTH, WIDTH)
    found = []
    for reversible in (False, True):
        linear.zero_grad()
        x = make_input(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            first, second = run_halves([linear_half(linear=linear)], x, x, reversible=reversible)
            loss = loss_of(linear(first + second))
        loss.backward()
        found.append(named_gradients(linear))
    assert_gradients_close(found[1], found[0], 1e-2)


def test_accumulated_gradients_equal_one_batch():
    stack, x = make_stack(**CALM), make_input(4)
    # Each row by buckets of its own tokens: the rotation is the same for all
    for block in stack.blocks:
        block.buckets.buckets_of = lambda x: x.argmax(-1).to(torch.uint8) % 4
    stack(x).sum(-1).square().mean().backward()
    whole = named_gradients(stack)
    stack.zero_grad()
    for rows in x.split(2):
        (stack(rows).sum(-1).square().mean() / 2).backward()
    assert_gradients_close(stack, whole, 1e-9)


def test_hooks_of_parameters_fire_once_with_the_whole_gradient():
    stack, counts, grads = make_stack(dropout=0.2), {}, {}

    def count(name, kind):
        counts[name, kind] = counts.get((name, kind), 0) + 1

    def see(name, grad):
        count(name, "gradient")
        grads[name] = grad

    for name, parameter in stack.named_parameters():
        parameter.register_hook(lambda grad, name=name: see(name, grad))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: count(name, "accumulated"))
    train_step(stack, make_input())
    expected = named_gradients(stack)
    assert counts == dict.fromkeys([(name, kind) for name in expected for kind in ("gradient", "accumulated")], 1)
    assert_equal("seen by hooks", grads, expected)


def test_a_hook_that_changes_a_gradient_counts_once():
    half, x = linear_half(), make_input()
    half.linear.weight.register_hook(lambda grad: 2 * grad)
    found = []
    for reversible in (False, True):
        half.zero_grad()
        first, second = run_halves([half, half], x, x, reversible=reversible)
        loss_of(first + second).backward()
        found.append(named_gradients(half))
    assert_gradients_close(found[1], found[0], 1e-9)


def test_an_optimizer_may_step_inside_the_backward_pass():
    """Weights of later blocks are new before earlier blocks run again."""
    stack, other = make_stack(dropout=0.2), make_stack(dropout=0.2)

    def step(parameter):
        parameter.data.sub_(parameter.grad, alpha=0.1)
        with torch.no_grad():
            parameter.add_(0.0)  # counted as a change

    for parameter in other.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    _, gradients, _ = train_step(stack, make_input(), reversible=False)
    train_step(other, make_input())
    expected = {name: p - 0.1 * gradients[name] for name, p in stack.named_parameters()}
    assert_close("weights", dict(other.named_parameters()), expected, 1e-9)


def test_shared_frozen_and_unused_parameters():
    stack = make_stack(4, dropout=0.2)
    stack.blocks[3].attention = stack.blocks[0].attention
    stack.blocks[2].feed_forward = stack.blocks[1].feed_forward
    stack.blocks[1].buckets.requires_grad_(False)
    stack.blocks[2].attention.query.weight.requires_grad_(False)
    stack.blocks[0].attention.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    (_, expected, _), (_, found, _) = pair(stack, make_input())
    assert "blocks.1.buckets.scales" not in found
    assert stack.blocks[0].attention.unused.grad is None
    assert_gradients_close(found, expected, 1e-9)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_one_block_is_trained(trained):
    """Blocks before it save nothing, and those behind it hand gradients through."""
    stack = make_stack(3, dropout=0.2).requires_grad_(False)
    stack.blocks[trained].requires_grad_(True)
    found = []
    for reversible in (False, True):
        stack.zero_grad()
        torch.manual_seed(3)
        loss_of(stack(make_input(), reversible=reversible)).backward()
        found.append(named_gradients(stack))
    assert_gradients_close(found[1], found[0], 1e-9)


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no-swap"])
def test_a_block_of_one_half_returns_an_input(swap):
    half, (first, second) = linear_half(), (make_input(2, 3), make_input(2, 3) + 1)
    chain = ReversibleChain()
    streams = chain.block([HalfResidual(half, swap=swap)], *chain.open(first, second.requires_grad_()))
    a, b = chain.close(*streams)
    changed, kept = (b, a) if swap else (a, b)
    assert_equal("kept", kept, second)
    assert_equal("changed", changed, first + half.linear(second).tanh())
    loss_of(kept + changed).backward()
    leaf = second.detach().requires_grad_()
    loss_of(leaf + first + half.linear(leaf).tanh()).backward()
    assert_close("gradient", second.grad, leaf.grad, 1e-9)


def test_cross_attention_gives_gradients_to_another_sequence():
    stack, x = make_stack(dropout=0.1), make_input()
    found = []
    for reversible in (False, True):
        stack.zero_grad()
        torch.manual_seed(3)
        source = make_input(2, 4).requires_grad_()
        # No leaf: one more step of the graph stands behind it
        loss_of(stack(x, reversible=reversible, states=source.exp())).backward()
        found.append({"source": source.grad, **named_gradients(stack)})
    assert_gradients_close(found[1], found[0], 1e-9)


def test_nothing_spreads_from_padding():
    """With `real`, whatever stands at padding. The halves see zeros there, and are masked as ever."""
    stack = make_stack(dropout=0.1)
    real = torch.arange(7) >= torch.tensor([[0], [3]])
    mask, results = real.clone(), []
    for value in (0.0, 1e30, float("nan"), float("inf")):
        first = make_input().masked_fill(~real[..., None], value).requires_grad_()
        torch.manual_seed(3)
        chain = ReversibleChain(real=real)
        streams = chain.open(first, first)
        for block in stack.blocks:
            streams = block(*streams, chain=chain, mask=mask)
        streams = chain.close(*streams)
        assert all((stream[~real] == 0).all() for stream in streams)
        stack.zero_grad()
        loss_of(sum(streams)[real]).backward()
        results.append([*(s.detach() for s in streams), first.grad, *named_gradients(stack).values()])
        assert (first.grad[~real] == 0).all()
        assert_equal(f"{value} at padding", results[-1], results[0])
    _, *ordinary = results[0]
    assert all(tensor.isfinite().all() for tensor in ordinary)


def test_padding_stays_apart_from_other_tokens_without_a_mask():
    """Positions are rebuilt one by one: a NaN stays where it stands, unless a half carries it on."""
    halves = [linear_half(), linear_half()]
    x = make_input()
    x[0, 2] = float("nan")
    x[1, 4] = 1e30
    clean = torch.ones(2, 7, dtype=torch.bool)
    clean[0, 2] = clean[1, 4] = False
    grads = []
    for reversible in (False, True):
        leaf = x.clone().requires_grad_()
        loss_of(sum(run_halves(halves, leaf, leaf, reversible=reversible))[clean]).backward()
        grads.append(leaf.grad[clean])
    assert_close("gradient", grads[1], grads[0], 1e-9)


def saved_bytes(modules, x, reversible):
    """Bytes that stay allocated behind a forward pass, by what the allocator reports."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = sum(run_halves(modules, x, x, reversible=reversible))
    output.sum().backward()
    return sum(event.self_cpu_memory_usage for event in profile.events())


def test_memory_does_not_grow_with_depth():
    """Winners, where they are remembered, are counted."""
    fields = {"intermediate_size": 120, "ff_sparsity": 30, "dropout": 0.1, "ff_hard_probability": 1.0}
    halves = [FeedForwardHalf(60, **{**SPARSE, **fields}) for _ in range(24)]
    x = make_input(1, 1001, 60, torch.float32).requires_grad_()
    saved_bytes(halves[:4], x, True)  # with what a first call leaves behind
    ours, ordinary = ([saved_bytes(halves[:count], x, way) for count in (4, 24)] for way in (True, False))
    assert ordinary[1] > 4 * ordinary[0]
    assert ours[1] <= 1.3 * ours[0], (ours, ordinary)
