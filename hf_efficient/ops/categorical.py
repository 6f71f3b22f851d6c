"""Exact sampling from a softmax over a vocabulary, without storing the scores of all tokens."""

import math

import torch
from torch import Tensor, nn

from .backend import is_transformed


# Scores that are held at once: as many as a CPU's caches hold, or as fill a GPU. A product of fewer tokens than
# MIN_CHUNK_TOKENS is slow.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
MIN_CHUNK_TOKENS = 32


def _block_weights(scores: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """
    Write weights proportional to the exponentials of `scores` (tokens, ids) to `weights`, which may be the same tensor.

    Returns the weights in blocks (tokens, blocks, width), and the sum of each block.

    On a CPU the passes over all scores are what takes the time, so the largest one of a token is not subtracted first,
    unless a sum turns out to be too large or too small for that.
    """
    blocks = weights.unflatten(-1, (-1, width))
    if weights.device.type == "cpu" and weights.dtype != scores.dtype:  # else there is no way back
        sums = torch.exp(weights.copy_(scores), out=weights).view_as(blocks).sum(-1)
        least, most = sums.sum(-1).aminmax()
        limits = torch.finfo(weights.dtype)
        if least > limits.tiny**0.5 and most < limits.max**0.5:
            return blocks, sums
    weights.copy_(scores)
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    return blocks, blocks.sum(-1)


def _find_blocks(sums: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """First level of the inverse cumulative distribution: the block of each draw, and the weight left to go inside it.

    `sums` has shape (tokens, blocks), all else (tokens, draws); `uniforms` and the remaining weight are in float64."""
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    reached = uniforms * cumulative[:, -1:]  # below the last sum, since uniform numbers end 2^-52 below 1
    block = torch.searchsorted(cumulative, reached, right=True)
    block.clamp_(max=sums.shape[1] - 1)  # where the weights are NaN
    return block, reached - (cumulative - sums).gather(1, block)


def _find_places(weights: Tensor, rest: Tensor) -> Tensor:
    """Second level: the positions `(...)` inside blocks of `weights` `(..., width)`."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1]
    # The float64 remainder may round to the total in another precision, which lies behind the last position.
    rest = rest.to(cumulative.dtype).minimum(total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, rest.unsqueeze(-1), right=True).squeeze(-1)
    return place.clamp_(max=weights.shape[-1] - 1)


def _take_blocks(blocks: Tensor, block: Tensor) -> Tensor:
    """Select from `blocks` (tokens, blocks, width) by the indices `block` (tokens, draws): (tokens, draws, width)."""
    tokens, count, width = blocks.shape
    rows = torch.arange(tokens, device=blocks.device).unsqueeze(1) * count + block
    return blocks.reshape(-1, width).index_select(0, rows.flatten()).view(*block.shape, width)


def _draw_distinct(blocks: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (tokens, draws), drawn one after the other; a drawn id gets weight 0, in `blocks` and `sums` too."""
    tokens, _, width = blocks.shape
    rows = torch.arange(tokens, device=blocks.device)
    flat = blocks.view(tokens, -1)
    drawn = []
    for column in uniforms.split(1, dim=1):
        block, rest = _find_blocks(sums, column)
        index = (block * width + _find_places(_take_blocks(blocks, block), rest)).squeeze(1)
        flat[rows, index] = 0
        sums[rows, index // width] = blocks[rows, index // width].sum(-1)
        drawn.append(index)
    return torch.stack(drawn, dim=1)


class _BatchedDraws:
    """Draws with replacement, whose second level is done for several chunks at once, as it consists of small steps."""

    def __init__(self, held: int):
        self.held = held  # most weights to keep
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self.found: list[Tensor] = []

    def add(self, blocks: Tensor, sums: Tensor, uniforms: Tensor) -> None:
        block, rest = _find_blocks(sums, uniforms)
        self.waiting.append((block, rest, _take_blocks(blocks, block)))
        if sum(weights.numel() for *_, weights in self.waiting) >= self.held:
            self.finish()

    def finish(self) -> None:
        if self.waiting:
            block, rest, weights = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
            self.found.append(block * weights.shape[-1] + _find_places(weights, rest))
            self.waiting = []


def _draw_at_once(
    states: Tensor, weight: Tensor, uniforms: Tensor, width: int, vocab_size: int, replacement: bool
) -> Tensor:
    """Draws for all tokens in one chunk, nothing of which is written to memory made before: the form for transforms."""
    weights = (states @ weight.T).to(torch.promote_types(states.dtype, torch.float32))
    weights = (weights - weights.amax(-1, keepdim=True)).exp()
    if replacement:
        together = _BatchedDraws(0)
        blocks = weights.unflatten(-1, (-1, width))
        together.add(blocks, blocks.sum(-1), uniforms)
        return together.found[0]
    # What is written in place stands for as many tensors as the uniform numbers do.
    weights = weights + torch.zeros_like(uniforms[:, :1], dtype=weights.dtype)
    weights[:, :vocab_size].clamp_(min=torch.finfo(weights.dtype).tiny)
    blocks = weights.unflatten(-1, (-1, width))
    return _draw_distinct(blocks, blocks.sum(-1), uniforms)


@torch.no_grad()
def sample_categorical(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    uniforms: Tensor,
    temperature: float = 1.0,
    replacement: bool = True,
    chunk_tokens: int | None = None,
) -> Tensor:
    """
    Draw exactly from `softmax((states @ weight.T + bias) / temperature)`.

    Each uniform number goes through the inverse of the cumulative distribution, in two levels: sums over blocks of
    about sqrt(vocabulary) ids find the block, and only that block is summed up id by id. Tokens are processed in
    chunks, so that the scores stay in the processor's caches. Under autocast the product is computed in its dtype; all
    else is in float32 (float64 for float64 states).

    Args:
        states (`torch.FloatTensor` of shape `(tokens, width)`):
            States to compare with the vocabulary.
        weight (`torch.FloatTensor` of shape `(vocab_size, width)`), bias (`(vocab_size,)` or `None`):
            The output layer.
        uniforms (`torch.FloatTensor` of shape `(tokens, draws)`):
            Numbers in [0, 1), one for each draw.
        temperature (`float`, *optional*, defaults to 1.0):
            Above 1 flatter, below 1 sharper.
        replacement (`bool`, *optional*, defaults to `True`):
            Draw independently; else a token's draws differ, each from the distribution without those before it.
        chunk_tokens (`int`, *optional*):
            Tokens processed at once; by default a million scores on a CPU, at least 32 tokens.

    Returns:
        `torch.LongTensor` of shape `(tokens, draws)`.

    Raises:
        ValueError: if the temperature is not positive, the shapes do not agree, or more different ids are wanted than
            there are.
    """
    vocab_size, tokens, draws = weight.shape[0], states.shape[0], uniforms.shape[1]
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    if uniforms.shape[0] != tokens:
        raise ValueError(f"`uniforms` has rows for {uniforms.shape[0]} tokens, `states` for {tokens}.")
    if not replacement and draws > vocab_size:
        raise ValueError(f"{draws} different ids can't be drawn from {vocab_size}: draw fewer, or with replacement.")

    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    width = 2 ** int(math.log2(vocab_size) / 2)
    filler = -vocab_size % width  # ids without any probability, so that all blocks are full
    states, weight, uniforms = states.detach(), weight.detach(), uniforms.detach()
    bias = weight.new_zeros(vocab_size) if bias is None else bias.detach()
    # The bias is one more column, so that the product adds it.
    states = nn.functional.pad(states.to(sum_dtype) / temperature, (0, 1), value=1 / temperature).to(dtype)
    weight = torch.cat([weight.to(dtype), bias.to(dtype).unsqueeze(1)], dim=1)
    weight = nn.functional.pad(weight, (0, 0, 0, filler))
    weight[vocab_size:, -1] = -torch.inf
    uniforms = uniforms.double().clamp(max=1 - 2**-52)
    if is_transformed():
        with torch.autocast(kind, enabled=False):
            return _draw_at_once(states, weight, uniforms, width, vocab_size, replacement).clamp(max=vocab_size - 1)
    held = CHUNK_ELEMENTS.get(kind, CHUNK_ELEMENTS["cuda"])
    if chunk_tokens is None:
        chunk_tokens = max(MIN_CHUNK_TOKENS, held // weight.shape[0])
    # Used again for each chunk: fresh memory would cost more than the product.
    scores = weight.new_empty(min(chunk_tokens, tokens), weight.shape[0])
    weights = scores if dtype == sum_dtype else scores.to(sum_dtype)

    together, ids = _BatchedDraws(held), list[Tensor]()
    with torch.autocast(kind, enabled=False):
        for start in range(0, tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = slice(0, len(states[rows]))
            torch.mm(states[rows], weight.T, out=scores[chunk])
            blocks, sums = _block_weights(scores[chunk], weights[chunk], width)
            if replacement:
                together.add(blocks, sums, uniforms[rows])
            else:  # a row whose rest is too small for its dtype goes on with equal chances
                blocks.flatten(1)[:, :vocab_size].clamp_(min=torch.finfo(sum_dtype).tiny)
                ids.append(_draw_distinct(blocks, blocks.sum(-1), uniforms[rows]))
    together.finish()
    found = [*ids, *together.found]
    return torch.cat(found).clamp_(max=vocab_size - 1) if found else uniforms.new_empty(0, draws, dtype=torch.int64)
