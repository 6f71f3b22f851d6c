"""Choosing the right token out of a few: the candidates of the meta-controller, and their scores."""

import torch
from torch import Tensor, nn


# Numbers of gathered rows that are held at once: on a CPU what its caches hold.
PIECE_ELEMENTS = {"cpu": 2**16, "cuda": 2**26}


def build_candidates(original: Tensor, replaced: Tensor, sampled: Tensor, nota_token_id: int) -> tuple[Tensor, Tensor]:
    """
    Candidates of each position, and which of them is right (Xu et al. 2020, section 3, as released).

    Column 0 is the reject option, "none of the above", right wherever the token was not replaced. Where it was, column
    1 holds the original token, and is right. All other columns are the draws as they are: the original token, the
    reject option or special tokens may be among them, and an id may come twice.

    Args:
        original (`torch.LongTensor` of shape `(...)`):
            The tokens of the text.
        replaced (`torch.LongTensor` of shape `(...)`):
            The tokens that the encoder sees.
        sampled (`torch.LongTensor` of shape `(..., candidates)`):
            Draws of every position; columns 0 and, where replaced, 1 are not used.
        nota_token_id (`int`):
            Id of the reject option.

    Returns:
        `tuple`: candidates `(..., candidates)` and labels `(...)`, 0 or 1.

    Raises:
        ValueError: if there are fewer than 2 candidates, or the shapes do not agree.
    """
    if sampled.shape[:-1] != original.shape or replaced.shape != original.shape:
        shapes = f"{tuple(original.shape)}, {tuple(replaced.shape)} and {tuple(sampled.shape)}"
        raise ValueError(f"`original`, `replaced` and `sampled` must have shapes (...), (...), (..., K), not {shapes}.")
    if sampled.shape[-1] < 2:
        raise ValueError(f"At least 2 candidates are needed, the reject option and a token, not {sampled.shape[-1]}.")
    wrong = replaced != original
    candidates = sampled.clone()
    candidates[..., 0] = nota_token_id
    candidates[..., 1] = torch.where(wrong, original, sampled[..., 1])
    return candidates, wrong.long()


def _pieces(candidates: Tensor, width: int) -> list[slice]:
    """Rows of which all candidates' vectors fit into one piece."""
    held = PIECE_ELEMENTS.get(candidates.device.type, PIECE_ELEMENTS["cuda"])
    step = max(1, held // (candidates.shape[1] * width))
    return [slice(start, start + step) for start in range(0, len(candidates), step)]


class _CandidateScores(torch.autograd.Function):
    """Products of states with rows of a table; neither pass holds the rows of all tokens at once."""

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
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        states, table, candidates = ctx.saved_tensors
        to_states = to_table = None
        if ctx.needs_input_grad[0]:
            to_states = nn.functional.embedding_bag(
                candidates, table, per_sample_weights=gradient.contiguous(), mode="sum"
            )
        if ctx.needs_input_grad[1]:
            to_table = torch.zeros_like(table)
            for rows in _pieces(candidates, table.shape[1]):
                vectors = gradient[rows].unsqueeze(-1) * states[rows].unsqueeze(1)
                to_table.index_add_(0, candidates[rows].flatten(), vectors.flatten(0, 1))
            if ctx.padding_idx is not None:
                to_table[ctx.padding_idx] = 0
        return to_states, to_table, None, None


def candidate_scores(
    states: Tensor, table: Tensor, bias: Tensor | None, candidates: Tensor, padding_idx: int | None = None
) -> Tensor:
    """
    Score of each candidate: the product of a token's state with the candidate's row of the table, plus its bias.

    The rows of all candidates, (tokens x candidates x width) numbers, are never held at once, neither forward nor
    backward: both gather them in pieces. A score depends on nothing but its own candidate. Computed in the table's
    dtype, under autocast too.

    Args:
        states (`torch.FloatTensor` of shape `(tokens, width)`):
            Final states, after the head's transform.
        table (`torch.FloatTensor` of shape `(vocab_size, width)`), bias (`(vocab_size,)` or `None`):
            The shared embedding table and the vocabulary bias.
        candidates (`torch.LongTensor` of shape `(tokens, candidates)`):
            Ids.
        padding_idx (`int`, *optional*):
            A row of the table that gets no gradient, as in `nn.Embedding`.

    Returns:
        `torch.FloatTensor` of shape `(tokens, candidates)`, differentiable once by states, table and bias.
    """
    scores = _CandidateScores.apply(states.to(table.dtype), table, candidates, padding_idx)
    return scores if bias is None else scores + bias[candidates]
