"""Reversible blocks among what else works on graphs: wrappers, compilers, transforms, hooks; and their errors."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hf_efficient.ops.rerun import Remembered
from hf_efficient.ops.reversible import HalfResidual, ReversibleChain, reversible_blocks
from tests.helpers.comparison import assert_close, assert_equal, assert_gradients_close, named_gradients
from tests.helpers.processes import run_distributed
from tests.ops import reversible_worker
from tests.ops.reversible_stacks import CALM, WIDTH, loss_of, make_input, make_stack, run_halves, train_step


class Scaled(nn.Module):
    """A half residual of one weight, by a function of it and the stream."""

    def __init__(self, function=lambda weight, x: (x * weight).tanh()):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
        self.function = function

    def forward(self, x, memory, **arguments):
        return self.function(self.weight, x, **arguments)


def expected_step(**options):
    return train_step(make_stack(dropout=0.2), make_input(), reversible=False, **options)


def test_two_processes_equal_one(tmp_path):
    """DistributedDataParallel, FSDP of both versions, with blocks sharded or the whole, and gradients accumulated."""
    run_distributed(reversible_worker, tmp_path)


def test_a_retained_graph_runs_backward_again():
    stack, x = make_stack(dropout=0.2), make_input().requires_grad_()
    torch.manual_seed(1)
    output = stack(x)
    loss_of(output).backward(retain_graph=True)
    once = {"input": x.grad.clone(), **named_gradients(stack)}
    loss_of(output).backward()
    assert_gradients_close({"input": x.grad, **named_gradients(stack)}, {k: 2 * v for k, v in once.items()}, 1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss_of(output).backward()


def test_gradients_of_a_few_tensors_alone():
    """Blocks in front of them do not run again."""
    _, expected, _ = expected_step()
    stack = make_stack(dropout=0.2)
    torch.manual_seed(1)
    output = stack(make_input())
    name = "blocks.2.attention.key.weight"
    (found,) = torch.autograd.grad(loss_of(output), [stack.get_parameter(name)], retain_graph=True)
    assert_close("gradient", found, expected[name], 1e-9)
    assert len(stack.blocks[0].buckets.seen) == 1
    loss_of(output).backward()
    assert_gradients_close(stack, {key: value for key, value in expected.items() if key != "input"}, 1e-9)


def test_a_failed_backward_pass_leaves_nothing_behind():
    stack = make_stack(dropout=0.2)
    torch.manual_seed(1)
    output = stack(make_input())
    handle = stack.blocks[1].attention.query.register_forward_hook(lambda *_: 1 / 0)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        loss_of(output).backward(retain_graph=True)
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    stack.zero_grad()
    loss_of(output).backward()
    _, expected, _ = expected_step()
    assert_gradients_close(stack, {key: value for key, value in expected.items() if key != "input"}, 1e-9)


@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "ordinary"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "by-hooks"])
def test_inside_of_gradient_checkpointing(reversible, reentrant):
    """Memory that is handed over survives from run to run of the whole stack."""
    _, expected, _ = expected_step()
    stack, x = make_stack(dropout=0.2), make_input().requires_grad_()
    memories = [[Remembered() for _ in range(3)] for _ in stack.blocks]

    def run(x):
        start = stack.embed(x)
        blocks = [
            [HalfResidual(half.module, half.arguments, half.swap, memory) for half, memory in zip(*pair, strict=True)]
            for pair in zip([block.halves() for block in stack.blocks], memories, strict=True)
        ]
        return stack.norm(torch.cat(reversible_blocks(blocks, start, start, reversible=reversible), dim=-1))

    torch.manual_seed(1)
    loss_of(checkpoint(run, x, use_reentrant=reentrant)).backward()
    assert all(one is seen[0] for block in stack.blocks for seen in [block.buckets.seen] for one in seen)
    assert_gradients_close({"input": x.grad, **named_gradients(stack)}, expected, 1e-9)


def test_saved_tensors_may_be_packed():
    _, expected, _ = expected_step()
    stack, x, packed = make_stack(dropout=0.2), make_input().requires_grad_(), []
    torch.manual_seed(1)

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        output = stack(x)
    assert packed
    loss_of(output).backward()
    assert_gradients_close({"input": x.grad, **named_gradients(stack)}, expected, 1e-9)


def test_nothing_is_kept_when_a_graph_is_dropped():
    stack = make_stack(dropout=0.2)
    memories = []
    for block in stack.blocks:
        block.attention.register_forward_pre_hook(lambda module, given: memories.append(weakref.ref(given[1])))
    gc.disable()  # by counting references alone
    try:
        output = stack(make_input())
        assert all(memory() is not None for memory in memories)
        del output
        assert len(memories) == 3
        assert all(memory() is None for memory in memories)
    finally:
        gc.enable()


def test_evaluation_reads_no_generator(monkeypatch):
    stack, x = make_stack().eval(), make_input()
    monkeypatch.setattr(torch, "get_rng_state", None)
    with torch.no_grad():
        torch.manual_seed(3)
        ours = stack(x)
        torch.manual_seed(3)
        assert_equal("evaluation", ours, stack(x, reversible=False))


def test_gradients_in_evaluation():
    stack, found = make_stack(dropout=0.2).eval(), []
    for reversible in (False, True):
        found.append(train_step(stack, make_input(), reversible=reversible)[1])
    assert_gradients_close(found[1], found[0], 1e-9)


def test_lora():
    peft = pytest.importorskip("peft")
    stack = make_stack(dropout=0.2)
    config = peft.LoraConfig(target_modules=["query", "value", "down_proj"], lora_dropout=0.1, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, stack).double()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    found = [train_step(model, make_input(), reversible=reversible)[1] for reversible in (False, True)]
    assert len(found[0]) == 1 + 3 * 2 * 2
    assert_gradients_close(found[1], found[0], 1e-9)


def test_compiled_evaluation_is_whole():
    stack, x = make_stack(1, **CALM).eval(), make_input()
    stack.blocks[0].buckets.forward = lambda x, memory: memory.remember("choice", lambda: x.argmax(-1, True)) * x
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close("output", compiled(x), stack(x), 1e-12)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    loss_of(compiled(leaf)).backward()
    loss_of(stack(other)).backward()
    assert_close("gradient", leaf.grad, other.grad, 1e-9)


def test_compiled_training_breaks_where_it_says():
    stack, x = make_stack(dropout=0.2), make_input()
    _, expected, _ = expected_step()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, found, _ = train_step(torch.compile(stack, backend="aot_eager"), x)
    assert_gradients_close({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, expected, 1e-9)
    breaks = torch._dynamo.utils.counters["graph_break"]
    # At each block, by its frame or by that of the loop around it, and at the end of the chain; nowhere else
    assert all("reversible blocks rebuild their inputs" in reason for reason in breaks)
    names = ("_rebuilding_block", "_rebuilding_close")
    counts = [sum(count for reason, count in breaks.items() if name in reason) for name in names]
    assert len(stack.blocks) <= counts[0] <= 2 * len(stack.blocks)
    assert counts[1] == 1
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reversible blocks rebuild their inputs"):
        torch.compile(stack, backend="aot_eager", fullgraph=True)(x)


def test_export():
    stack, x = make_stack(1, **CALM).eval(), make_input()
    stack.blocks[0].buckets.forward = lambda x, memory: memory.remember("choice", lambda: x.argmax(-1, True)) * x
    program = torch.export.export(stack, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=512)},))
    for length in (2, 31):
        x = make_input(2, length)
        assert_close(f"length {length}", program.module()(x), stack(x), 1e-12)


def test_transforms_see_ordinary_operators():
    halves, x = [Scaled(), Scaled()], make_input(1, 3)

    def loss(weights, x):
        first, second = x, x
        replaced = [lambda x, memory, w=w, half=half: functional_call(half, {"weight": w}, (x, memory)) for w, half in
                    zip(weights, halves, strict=True)]  # fmt: skip
        modules = [nn.Identity() for _ in replaced]
        for module, call in zip(modules, replaced, strict=True):
            module.forward = call
        return loss_of(sum(run_halves(modules, first, second)))

    weights = [half.weight.detach() for half in halves]
    gradients = torch.func.grad(loss)(weights, x)
    rows = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(
        weights, x.expand(3, -1, -1).unsqueeze(1)
    )
    _, tangent = torch.func.jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    loss_of(sum(run_halves(halves, leaf, leaf))).backward()
    assert_close("weights", gradients, [half.weight.grad for half in halves], 1e-9)
    assert_close("rows", rows[2, 0], leaf.grad[0], 1e-9)
    assert_close("tangent", tangent, leaf.grad.sum(), 1e-9)


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    half, x = Scaled(), make_input()
    loss = sum(run_halves([half, half], x, x)).sum()
    with torch.no_grad():
        half.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("what", ["mask", "output"])
def test_a_tensor_changed_before_the_backward_pass_is_noticed(what):
    half, x = Scaled(lambda weight, x, mask: x * weight * mask), make_input()
    mask = torch.ones(2, 7, 1, dtype=torch.float64)
    first, second = reversible_blocks([[HalfResidual(half, {"mask": mask})]], x, x)
    loss = (first + second).sum()
    with torch.no_grad():
        {"mask": mask, "output": second}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_of_a_gradient_is_refused():
    half, x = Scaled(), make_input()
    loss = loss_of(sum(run_halves([half], x, x)))
    with pytest.raises(RuntimeError, match=r"create_graph=True.*Use reversible=False"):
        torch.autograd.grad(loss, [half.weight], create_graph=True)
    loss = loss_of(sum(run_halves([half], x, x, reversible=False)))
    (grad,) = torch.autograd.grad(loss, [half.weight], create_graph=True)
    assert grad.requires_grad


def test_a_captured_tensor_is_refused():
    weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
    half = Scaled(lambda own, x: x * own * weight.exp())
    loss = sum(run_halves([half], make_input(), make_input())).sum()
    with pytest.raises(RuntimeError, match=r"Half residual 0 of block 0 \(Scaled\) uses a tensor .*of shape \(5,\)"):
        loss.backward()


def test_another_mode_in_the_backward_pass_is_refused():
    half = Scaled()
    loss = sum(run_halves([half], make_input(), make_input())).sum()
    half.eval()
    with pytest.raises(RuntimeError, match="ran forward with training=True and would run again with training=False"):
        loss.backward()


@pytest.mark.parametrize("change", ["in-place", "new"])
def test_streams_may_not_change_between_blocks(change):
    chain, half, x = ReversibleChain(), Scaled(), make_input()
    first, second = chain.block([HalfResidual(half)] * 2, *chain.open(x, x))
    first = first.add_(1.0) if change == "in-place" else first * 2
    with pytest.raises(ValueError, match=r"not those that the block before returned.*cast_forward_inputs=False"):
        chain.block([HalfResidual(half)], first, second)
    with pytest.raises(ValueError, match="not those that the block before returned"):
        chain.close(first, second)


def test_a_loss_of_streams_between_blocks_is_refused():
    chain, half, x = ReversibleChain(), Scaled(), make_input()
    streams = chain.block([HalfResidual(half)], *chain.open(x, x))
    chain.close(*streams)
    with pytest.raises(RuntimeError, match=r"must depend on what ReversibleChain\.close returned"):
        sum(streams).sum().backward()


@pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "ordinary"])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda weight, x: (x * weight)[:, 1:], r"block 1 \(Scaled\) .* shape \(2, 7, 5\); got \(2, 6, 5\)"),
        (lambda weight, x: (x * weight, None), "got a tuple"),
    ],
    ids=["shape", "tuple"],
)
def test_errors_of_halves(result, message, reversible):
    with pytest.raises(ValueError, match=message):
        run_halves([Scaled(), Scaled(result)], make_input(), make_input(), reversible=reversible)


def test_a_gradient_inside_of_a_container_is_refused():
    states = {"states": [make_input(), make_input().requires_grad_()]}
    half = HalfResidual(Scaled(lambda weight, x, states: x), {"states": states})
    with pytest.raises(ValueError, match=r"takes 'states'\['states'\]\[1\], which needs a gradient"):
        reversible_blocks([[half]], make_input(), make_input())


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 4), {}, r"same shape; got \(2, 5\) and \(2, 4\)"),
        (torch.zeros(2, 5), torch.zeros(2, 5).double(), {}, "same dtype; got torch.float32 and torch.float64"),
        (torch.zeros(2, 5), torch.zeros(2, 5, device="meta"), {}, "same device; got cpu and meta"),
        (torch.zeros(2, 5).long(), torch.zeros(2, 5).long(), {}, "floating-point dtype, not torch.int64"),
        (
            torch.zeros(2, 5),
            torch.zeros(2, 5),
            {"stream_dtype": torch.bfloat16},
            "cannot hold streams of torch.float32",
        ),
        (torch.zeros(2, 5), torch.zeros(2, 5), {"real": torch.ones(5).bool()}, r"boolean of shape \(2,\)"),
        (torch.zeros(2, 5), torch.zeros(2, 5), {"real": torch.ones(2)}, "got torch.float32 of shape"),
    ],
    ids=["shape", "dtype", "device", "integers", "narrow", "real-shape", "real-dtype"],
)
def test_errors_of_streams(first, second, options, message):
    with pytest.raises(ValueError, match=message):
        reversible_blocks([], first, second, **options)


def test_names_asked_for_twice_are_two_decisions():
    memory, drawn = Remembered(), []

    def run():
        memory.begin(torch.device("cpu"))
        return [memory.remember(name, lambda: torch.rand(3)) for name in ("a", "b", "a")] + [torch.rand(3)]

    torch.manual_seed(0)
    drawn.append(run())
    torch.manual_seed(0)
    drawn.append(run())
    assert all(one is other for one, other in zip(*(each[:3] for each in drawn), strict=True))
    assert torch.equal(drawn[0][3], drawn[1][3])
    assert len({tuple(tensor.tolist()) for tensor in drawn[0]}) == 4
