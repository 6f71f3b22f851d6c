"""Attention and feed-forward of the Scaling Transformer by themselves: their formulas, steps and pieces."""

import pytest
import torch
from torch import nn

from hf_efficient.modules.causal_window import TokenOrder
from hf_efficient.modules.sparse_blocks import (
    ConvProjections,
    FeedForwardBlock,
    SparseAttention,
    SruBranch,
    build_norm,
    shared_dropout,
)
from hf_efficient.modules.sparse_layers import ModularDense, MultiplicativeDense, UnitDraws
from tests.helpers.comparison import assert_close, assert_gradients_close, named_gradients
from tests.helpers.families import SCALING_TRANSFORMER


WIDTH = 15
SIZES = {"hidden_size": WIDTH, "intermediate_size": 21, "num_attention_heads": 3}
FF = {"ff_sparsity": 3, "ff_rank": 2}
SRU = {"ff_sru_layers": 2, "ff_sru_units": 4}
CONV = {"attention_type": "multiplicative_conv", "attention_sparsity": 5}
CONVS = {
    "shared": CONV,
    "by-module": {**CONV, "attention_value_input": "by_module", "attention_output": "conv"},
    "concatenated": {
        **CONV,
        "attention_value_input": "concatenated",
        "attention_share_qk": True,
        "attention_output": "multiplicative_conv",
        "attention_window": 4,
        "attention_kernel_width": 5,
    },
    "window-1": {**CONV, "attention_window": 1, "attention_output": "multiplicative"},
}
PADS = {"left": [0, 0, 1, 1, 1, 1, 1], "right": [1, 1, 1, 1, 0, 0, 0], "inside": [1, 0, 1, 1, 0, 0, 1]}
LENGTHS = [(1, 1), (1, 63), (3, 7)]  # batch and length


def make(cls, *args, attention="sdpa", **fields):
    """A module in evaluation mode and float64, whose weights are large enough to be seen."""
    config = SCALING_TRANSFORMER.make_config(**SIZES, **fields)
    config._attn_implementation = attention
    torch.manual_seed(0)
    module = cls(config, *args).double().eval()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.35)
    return module


def make_input(batch, length):
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("center", [True, False], ids=["layer-norm", "rms-norm"])
def test_norms(center):
    norm = make(build_norm, layer_norm_center=center, layer_norm_eps=0.3)
    x = make_input(2, 5)
    centered = x - x.mean(-1, keepdim=True) if center else x
    expected = centered / (centered.square().mean(-1, keepdim=True) + 0.3).sqrt() * norm.weight
    assert_close("norm", norm(x).detach(), (expected + norm.bias if center else expected).detach(), 1e-12)


@pytest.mark.parametrize("shape", [(1, 1, WIDTH), (3, 1, WIDTH), (3, 7, 1)])
def test_one_mask_is_shared_over_what_its_shape_leaves_out(shape):
    x = torch.ones(3, 7, WIDTH)
    assert shared_dropout(x, 0.5, False, shape) is x
    assert shared_dropout(x, 0.0, True, shape) is x
    dropped = shared_dropout(x, 0.5, True, shape)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    mask = dropped[tuple(slice(0, size) for size in shape)]
    assert torch.equal(dropped, mask.expand_as(x))


KINDS = {
    "dense": {},
    "multiplicative": {"attention_type": "multiplicative", "attention_sparsity": 5},
    "modular": {"attention_type": "multiplicative_modular", "attention_sparsity": 5},
    **CONVS,
}
PROJECTIONS = {"dense": nn.Linear, "multiplicative": MultiplicativeDense, "modular": ModularDense}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("batch", "length"), LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_by_its_formula(kind, batch, length, attention):
    """Of the queries, keys and values that its projections give; causal, over heads of width 5."""
    layer, x = make(SparseAttention, 0, attention=attention, **KINDS[kind]), make_input(batch, length)
    causal = torch.ones(length, length).tril().bool()
    hidden = torch.full((length, length), float("-inf"), dtype=x.dtype).masked_fill(causal, 0.0)
    output, weights, _ = layer(x, hidden.expand(batch, 1, -1, -1))
    if layer.projections is None:
        assert {type(getattr(layer, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")} == {PROJECTIONS[kind]}
        query, key, value = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    else:
        query, key, value, _ = layer.projections(x, None, None, False)
    expected = torch.zeros_like(x)
    for head in (slice(0, 5), slice(5, 10), slice(10, 15)):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / 5**0.5
        expected[..., head] = (scores + hidden).softmax(-1) @ value[..., head]
    expected = expected if layer.o_proj is None else layer.o_proj(expected)
    if layer.output_conv is not None:
        expected = layer.output_conv(layer.output_window(expected, None, None, False)[0])
    assert_close("output", output, expected, 1e-12)
    assert (weights is not None) == (attention == "eager")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("dense", (0, 0)), ("shared", (2 * 15, 0)), ("by-module", (2 * 30, 2 * 15)), ("concatenated", (3 * 30, 3 * 15))],
)
def test_what_the_windows_keep_of_a_row(kind, sizes):
    """The tokens before the current one; of the values' input its own as well, where the values see it."""
    assert make(SparseAttention, 0, **KINDS[kind]).state_sizes == sizes


@torch.no_grad()
@pytest.mark.parametrize("kind", CONVS)
def test_queries_keys_and_values_by_a_loop_over_tokens(kind):
    """Each from the tokens that its window holds, zeros before the first: a call with that token as its last one."""
    layer, x = make(ConvProjections, **CONVS[kind]), make_input(2, 7)
    window = CONVS[kind].get("attention_window", 3)
    whole = layer(x, None, None, False)[:3]
    for place in range(7):
        seen = x[:, max(0, place - window + 1) : place + 1]
        for name, found, expected in zip("qkv", whole, layer(seen, None, None, False)[:3], strict=True):
            assert_close(f"{name} at {place}", found[:, place], expected[:, -1], 1e-12)
    assert (whole[0] is whole[1]) == CONVS[kind].get("attention_share_qk", False)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("split", [1, 3, 6])
def test_projections_go_on_from_a_state(kind, split):
    """That of the last token of the first part, or the one that was kept after that token of the whole."""
    layer, x = make(ConvProjections, **CONVS[kind]), make_input(2, 7)
    *whole, every = layer(x, None, None, True)
    *first, last = layer(x[:, :split], None, None, False)
    if layer.window.state_size == 0:
        assert last is None
        assert every is None
    else:
        assert_close("state", every[:, split - 1 : split], last, 1e-12)
    *second, _ = layer(x[:, split:], None if last is None else last[:, 0], None, False)
    for index, name in enumerate("qkv"):
        assert_close(name, torch.cat([first[index], second[index]], 1), whole[index], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("where", PADS)
def test_projections_of_a_padded_row_are_those_of_its_tokens(kind, where):
    layer, x, real = make(ConvProjections, **CONVS[kind]), make_input(1, 7), torch.tensor([PADS[where]]).bool()
    order = TokenOrder.of(real, None, layer.window.window, (1, 7), x.device)
    padded, alone = layer(x, None, order, False), layer(x[:, real[0]], None, None, False)
    for name, found, expected in zip("qkv", padded, alone, strict=False):
        assert_close(name, found[:, real[0]], expected, 1e-12)
    if alone[3] is not None:
        assert_close("state", padded[3], alone[3], 1e-12)


def recur(branch, x, real, starts, state):
    """The branch by its formula, a token at a time; its last states."""
    hidden = branch.in_proj(branch.norm(x))
    states = list(state)
    for index, layer in enumerate(branch.layers):
        outputs, cell = [], states[index]
        for place in range(x.shape[1]):
            candidate, forget, read = layer(hidden[:, place]).chunk(3, -1)
            before = cell.masked_fill(starts[:, place, None], 0.0)
            forget, read = forget.sigmoid(), read.sigmoid()
            after = forget * before + (1 - forget) * candidate
            outputs.append(read * after + (1 - read) * hidden[:, place] * 3**0.5)
            cell = torch.where(real[:, place, None], after, cell)
        hidden, states[index] = torch.stack(outputs, 1), cell
    return branch.out_proj(hidden), states


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), LENGTHS)
@pytest.mark.parametrize("with_state", [False, True], ids=["from-zero", "from-a-state"])
@pytest.mark.parametrize("told", ["plain", "padding", "documents"])
def test_the_branch_of_recurrences_by_its_formula(batch, length, with_state, told):
    branch, x = make(SruBranch, **SRU), make_input(batch, length)
    real, starts = torch.ones(batch, length).bool(), torch.zeros(batch, length).bool()
    if told == "padding" and length > 1:
        real = torch.rand(batch, length) < 0.6
    if told == "documents":
        starts = torch.rand(batch, length) < 0.3
    state = torch.randn(batch, 8, dtype=torch.float64) if with_state else torch.zeros(batch, 8, dtype=torch.float64)
    given = (real if told == "padding" else None, starts if told == "documents" else None)
    output, states = branch(x, state if with_state else None, *given, False)
    expected, last = recur(branch, x, real, starts, state.split(4, -1))
    assert_close("output", output[real], expected[real], 1e-12)
    assert_close("states", [one[:, 0] for one in states], last, 1e-12)
    _, every = branch(x, state if with_state else None, *given, True)
    assert [tuple(one.shape) for one in every] == [(batch, length, 4)] * 2
    assert_close("last of all states", [one[:, -1] for one in every], last, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), LENGTHS)
def test_a_dense_feed_forward_by_its_formula(batch, length):
    block, x = make(FeedForwardBlock, hidden_act="gelu", **SRU), make_input(batch, length)
    output, states = block(x)
    branch, expected_states = block.sru(x, None, None, None, False)
    expected = block.down_proj(nn.functional.gelu(block.up_proj(block.norm(x)))) + branch
    assert_close("output", output, expected, 1e-12)
    assert_close("states", states, expected_states, 1e-12)


@torch.no_grad()
def test_a_sparse_feed_forward_is_a_norm_and_its_layer():
    block, x = make(FeedForwardBlock, **FF, hidden_act="gelu", ff_inner_bias=True, ff_temperature=0.3), make_input(2, 7)
    output, states = block(x)
    assert_close("output", output, block.sparse(block.norm(x)), 1e-12)
    assert states == []
    assert (block.sparse.activation, block.sparse.temperature, block.sparse.block_size) == ("gelu", 0.3, 3)


@pytest.mark.parametrize("size", [1, 4, 21, 100])
@pytest.mark.parametrize("fields", [{}, {**FF, "ff_hard_probability": 0.0}, {**FF, **SRU, "ff_hard_probability": 0.0}])
def test_pieces_of_any_size_are_the_whole(fields, size):
    """In training, where nothing is dropped or drawn; the last piece of 21 tokens may be shorter."""
    results = []
    for chunk_size in (0, size):
        block, x = make(FeedForwardBlock, ff_chunk_size=chunk_size, **fields).train(), make_input(3, 7)
        x.requires_grad_()
        draws = []
        output, _ = block(x, draws=draws)
        output.square().sum().backward()
        assert len(draws) == (-(-21 // chunk_size) if chunk_size else 1)
        results.append({"output": output.detach(), "input": x.grad, **named_gradients(block)})
    assert_gradients_close(*results, 1e-12)


@pytest.mark.parametrize("chunk_size", [0, 4], ids=["whole", "pieces"])
def test_draws_that_are_given_again_choose_the_same_units(chunk_size):
    fields = {**FF, "ff_hard_probability": 1.0, "ff_temperature": 5.0, "ff_chunk_size": chunk_size}
    block, x, draws = make(FeedForwardBlock, **fields).train(), make_input(3, 7), []
    first = block(x, draws=draws)[0].detach()
    assert all(isinstance(drawn, UnitDraws) and drawn.winners is not None for drawn in draws)
    assert torch.equal(block(x, draws=draws)[0].detach(), first)
    assert not torch.equal(block(x)[0].detach(), first)


@pytest.mark.parametrize("shared", [False, True], ids=["elementwise", "shared"])
@pytest.mark.parametrize("fields", [{}, {**FF, "ff_hard_probability": 0.0}], ids=["dense", "sparse"])
def test_masks_of_the_feed_forward(fields, shared):
    """Elementwise; or one for all tokens of a row, and of a sparse layer for all tokens, which it sees in a line."""
    layer, x = make(FeedForwardBlock, dropout=0.5, share_dropout=shared, **fields).train(), make_input(3, 7)
    output = layer(x)[0].detach()
    layer.dropout = 0.0
    ratio = (output / layer(x)[0].detach()).round(decimals=6)
    assert set(ratio.unique().tolist()) == {0.0, 2.0}
    within_rows = bool((ratio == ratio[:, :1]).all())
    everywhere = bool((ratio == ratio[:1, :1]).all())
    assert (within_rows, everywhere) == (shared, shared and bool(fields))


def test_the_mask_before_the_activation_is_shared_by_a_row():
    layer, x, seen = make(FeedForwardBlock, activation_dropout=0.5).train(), make_input(3, 7), []
    layer.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    layer(x)
    layer.activation_dropout = 0.0
    layer(x)
    dropped = (seen[0] == 0) & (seen[1] > 0)
    kept = (seen[0] != 0) & (seen[1] > 0)
    assert dropped.any()
    assert not (dropped.any(1) & kept.any(1)).any(), "a unit is dropped for some tokens of a row"
    assert_close("kept", seen[0][kept], 2 * seen[1][kept], 1e-12)
