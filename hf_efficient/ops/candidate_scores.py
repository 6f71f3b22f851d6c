"""Scores of a few candidate ids per token, without gathering the embeddings of all candidates at once."""

import torch
from torch import Tensor, nn

from .backend import is_transformed, plain_gradients


# Elements of gathered rows that are held at once; a CPU's caches hold that many.
PIECE_ELEMENTS = {"cpu": 2**16, "cuda": 2**26}


def _pieces(candidates: Tensor, width: int) -> list[slice]:
    """Slices of tokens whose candidates' vectors fit into one piece."""
    held = PIECE_ELEMENTS.get(candidates.device.type, PIECE_ELEMENTS["cuda"])
    step = max(1, held // (candidates.shape[1] * width))
    return [slice(start, start + step) for start in range(0, len(candidates), step)]


def _plain_scores(states: Tensor, table: Tensor, candidates: Tensor, padding_idx: int | None) -> Tensor:
    """Scores of all candidates at once, out of plain operators: the form for transforms and second derivatives."""
    vectors = nn.functional.embedding(candidates, table)
    if padding_idx is not None:  # `nn.functional.embedding` leaves the row out of the gradient, but not of a tangent
        vectors = torch.where((candidates == padding_idx).unsqueeze(-1), vectors.detach(), vectors)
    return (vectors * states.unsqueeze(1)).sum(-1)


class _CandidateScores(torch.autograd.Function):
    """Products of states with rows of a table, gathered piece by piece in both passes."""

    @staticmethod
    def forward(states: Tensor, table: Tensor, candidates: Tensor, padding_idx: int | None) -> Tensor:
        scores = states.new_empty(candidates.shape)
        for rows in _pieces(candidates, table.shape[1]):
            vectors = nn.functional.embedding(candidates[rows], table)  # (piece, K, width)
            scores[rows] = vectors.mul_(states[rows].unsqueeze(1)).sum(-1)
        return scores

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.padding_idx = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        states, table, candidates = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed():
            return plain_gradients(_plain_scores, (states, table, candidates, ctx.padding_idx), (gradient,))
        to_states = to_table = None
        if ctx.needs_input_grad[0]:
            to_states = nn.functional.embedding_bag(
                candidates, table, per_sample_weights=gradient.contiguous(), mode="sum"
            )
        if ctx.needs_input_grad[1]:
            to_table = gradient.new_zeros(table.shape)  # as many as there are gradients, with `is_grads_batched`
            for rows in _pieces(candidates, table.shape[1]):
                vectors = gradient[rows].unsqueeze(-1) * states[rows].unsqueeze(1)
                to_table.index_add_(0, candidates[rows].flatten(), vectors.reshape(-1, table.shape[1]))
            if ctx.padding_idx is not None:
                to_table[ctx.padding_idx] = 0
        return to_states, to_table, None, None


def candidate_scores(
    states: Tensor, table: Tensor, bias: Tensor | None, candidates: Tensor, padding_idx: int | None = None
) -> Tensor:
    """
    Score each candidate by the product of the token's state with the candidate's row of the table, plus its bias.

    The rows of all candidates, `tokens * candidates * width` numbers, are never held at once: forward and backward
    gather them in pieces, except under transforms of `torch.func`, in forward mode and where a gradient is to be
    differentiated. A score depends on its own candidate alone. The dtype is the table's, under autocast too.

    Args:
        states (`torch.FloatTensor` of shape `(tokens, width)`):
            States to compare with the candidates.
        table (`torch.FloatTensor` of shape `(vocab_size, width)`), bias (`(vocab_size,)` or `None`):
            Embedding table and bias of the vocabulary.
        candidates (`torch.LongTensor` of shape `(tokens, candidates)`):
            Candidate ids of each token.
        padding_idx (`int`, *optional*):
            Row of the table that gets no gradient, as in `nn.Embedding`.

    Returns:
        `torch.FloatTensor` of shape `(tokens, candidates)`, differentiable by states, table and bias.
    """
    score = _plain_scores if is_transformed() else _CandidateScores.apply
    scores = score(states.to(table.dtype), table, candidates, padding_idx)
    return scores if bias is None else scores + bias[candidates]
