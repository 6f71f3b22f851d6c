"""Scores of candidates against the plain product, without a tensor that holds the rows of all of them."""

import pytest
import torch

from hf_efficient.ops import candidate_scores as module
from hf_efficient.ops.candidate_scores import candidate_scores


SHARED = 9


def make_inputs(tokens=13, width=5, vocab_size=11, count=4):
    torch.manual_seed(tokens)
    states, table = torch.randn(tokens, width).double(), torch.randn(vocab_size, width).double()
    ids = torch.randint(vocab_size, (tokens, count))
    ids[:, 0] = SHARED  # a row that all tokens share
    ids[::3, -1] = ids[::3, 1]
    return states.requires_grad_(), table.requires_grad_(), torch.randn(vocab_size).double().requires_grad_(), ids


@pytest.mark.parametrize("piece", [1, 60, 2**18])
def test_scores_and_gradients_equal_the_plain_product(piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE_ELEMENTS", {"cpu": piece, "cuda": piece})
    *inputs, ids = make_inputs()
    scores = candidate_scores(*inputs, ids)
    states, table, bias = inputs
    expected = torch.einsum("nd,nkd->nk", states, table[ids]) + bias[ids]
    torch.testing.assert_close(scores, expected)
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((scores * weights).sum(), inputs)
    for ours, plain in zip(got, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, plain)
    assert torch.autograd.gradcheck(lambda *given: candidate_scores(*given, ids), inputs)
    assert torch.autograd.gradcheck(lambda states, table: candidate_scores(states, table, None, ids), inputs[:2])


def test_a_table_or_states_without_a_gradient():
    states, table, bias, ids = make_inputs()
    whole = torch.autograd.grad(candidate_scores(states, table, bias, ids).sum(), (states, table))
    candidate_scores(states, table.detach(), bias.detach(), ids).sum().backward()
    torch.testing.assert_close(states.grad, whole[0])
    candidate_scores(states.detach(), table, None, ids).sum().backward()
    torch.testing.assert_close(table.grad, whole[1])


def test_the_padding_row_is_not_trained():
    """As by the look-ups of an nn.Embedding."""
    states, table, bias, ids = make_inputs()
    assert (ids == 3).any()
    vectors = torch.nn.functional.embedding(ids, table, padding_idx=3)
    expected = torch.autograd.grad(
        (torch.einsum("nd,nkd->nk", states, vectors) + bias[ids]).sum(), (states, table, bias)
    )
    got = torch.autograd.grad(candidate_scores(states, table, bias, ids, padding_idx=3).sum(), (states, table, bias))
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    assert not got[1][3].any()


def test_a_score_does_not_know_its_column():
    """Else the model could tell the right answer by its place: only columns 0 and 1 are ever right."""
    states, table, bias, ids = make_inputs()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(candidate_scores(states, table, bias, ids[:, order]), candidate_scores(*make_inputs())[:, order])


def test_odd_sizes_and_no_token():
    for sizes in ((1, 1, 10, 2), (7, 3, 12, 3)):
        *inputs, ids = make_inputs(*sizes)
        assert torch.autograd.gradcheck(lambda *given, ids=ids: candidate_scores(*given, ids), inputs)
    states, table, bias, ids = make_inputs()
    nothing = candidate_scores(states[:0], table, bias, ids[:0])
    assert nothing.shape == (0, 4)
    nothing.sum().backward()
    assert not table.grad.any()


def test_bf16_states_under_autocast():
    states, table, bias, ids = (tensor.detach() for tensor in make_inputs())
    table = table.float().requires_grad_()
    rounded = states.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = candidate_scores(rounded, table, bias.float(), ids)
    scores.sum().backward()
    assert (scores.dtype, rounded.grad.dtype, table.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected = torch.einsum("nd,nkd->nk", rounded.float(), table[ids]) + bias.float()[ids]
    torch.testing.assert_close(scores, expected)


def test_no_tensor_holds_the_rows_of_all_candidates():
    """The largest tensor that either pass makes, seen by every operation that runs."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            made = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            Largest.elements = max([Largest.elements, *made])
            return output

    tokens, width, count, vocab_size = 4096, 64, 10, 500
    states = torch.randn(tokens, width, requires_grad=True)
    table = torch.randn(vocab_size, width, requires_grad=True)
    ids = torch.randint(vocab_size, (tokens, count))
    with Largest():
        candidate_scores(states, table, None, ids).sum().backward()
    held = max(tokens * width, module.PIECE_ELEMENTS["cpu"])  # a gradient, or a piece
    assert tokens * width <= Largest.elements <= held < tokens * count * width / 8
