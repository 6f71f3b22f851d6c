"""
A sparse feed-forward layer fitted to a dense one, from the vectors that reach the dense one on some text.

The dense layer is y = sum over i of h_i D_i + b with h_i = act(U_i . x + c_i). The sparse one computes one unit of each
block. Three things are fitted, one after the other, none of them by a gradient through the model:

1. Blocks. What units i and j contribute together, the mean of |h_i D_i| |h_j D_j| over tokens that excite both, is what
   is lost, about, if they share a block. Units are dealt out so that its sum inside blocks is small.
2. The controller. In each block that unit wins which leaves the least of the block's output v: the largest
   2 h_i D_i . v - |h_i D_i|^2. The controller begins as the best approximation of low rank of what the units see,
   |D_i| (U_i . x + c_i), over the text's own x, and learns the winners by a few passes of logistic regression.
3. The rows D. With the controller's choices hidden units are given numbers, mostly 0, and the output is linear in them:
   rows and bias are those of least squares, held to the dense layer's rows by a small ridge. This is where the output
   gets its scale back, and where units that always fall away leave their mean to the bias, and what goes with another
   unit to that one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops.sparse_ff_reference import ACTIVATIONS


# Tokens whose hidden units are held at once, and rows of a step of the controller's regression.
_CHUNK, _BATCH = 4096, 512
# Tokens that say which units are active together.
_SAMPLE = 16_384
_RATE, _SHARPNESS = 3e-3, 3.0
_RIDGE = 1e-2


@dataclass
class DenseUnits:
    """
    The units of a dense feed-forward layer, or of blocks of them in their order.

    Args:
        up, down (`Tensor` of shape `(units, width)`): U and D, one row a unit.
        inner_bias (`Tensor` of shape `(units,)`): c.
        activation (`str`): one of those that a sparse layer takes.
    """

    up: Tensor
    down: Tensor
    inner_bias: Tensor
    activation: str

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden units of tokens, `(tokens, units)`."""
        return ACTIVATIONS[self.activation](nn.functional.linear(x, self.up, self.inner_bias))

    def active_share(self, x: Tensor) -> float:
        """Mean share of units above 0."""
        return sum(float((self.hidden(part) > 0).double().mean(1).sum()) for (part,) in _chunks(x)) / len(x)

    def ordered(self, order: Tensor) -> "DenseUnits":
        """The same units in another order."""
        return DenseUnits(self.up[order], self.down[order], self.inner_bias[order], self.activation)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(_CHUNK) for tensor in tensors), strict=True)


def _room_for_winners(x: Tensor, units: int, block_size: int) -> Tensor:
    """Uninitialised indices in blocks for each token of `x`, in 16 bits where these hold them."""
    dtype = torch.int16 if block_size <= 1 << 15 else torch.int64
    return torch.empty(len(x), units // block_size, dtype=dtype, device=x.device)


def coactivation(units: DenseUnits, x: Tensor) -> Tensor:
    """
    Measure how much pairs of units contribute to the output together.

    Args:
        units (`DenseUnits`): of the layer.
        x (`Tensor` of shape `(tokens, width)`): what reaches the layer.

    Returns:
        `Tensor` of shape `(units, units)`: means of the products of their contributions, tokens at which GELU or SiLU
        are below 0 counted as none.
    """
    norms = units.down.norm(dim=1)
    x = x[:: max(1, len(x) // _SAMPLE)]
    found = x.new_zeros(len(norms), len(norms))
    for (part,) in _chunks(x):
        contributions = units.hidden(part).clamp(min=0) * norms
        found += contributions.T @ contributions
    return found / len(x)


def assign_units(together: Tensor, block_size: int, passes: int = 4) -> Tensor:
    """
    Share units out among blocks of equal size, so that the sum of `together` over pairs of one block is small.

    Units go one by one, those first that contribute most in company, to the block with room where they add least; then
    units of two blocks are exchanged as long as that helps. Deterministic; units squared operations a pass.

    Args:
        together (`Tensor` of shape `(units, units)`): symmetric cost of each pair; the diagonal does not count.
        block_size (`int`): units in a block; divides their number.
        passes (`int`, defaults to 4): times that exchanges of each unit are looked for.

    Returns:
        `Tensor` of shape `(units,)`: the units block by block, those of a block in their old order.
    """
    cost = together.detach().double().cpu().clone().fill_diagonal_(0.0)
    units, blocks = len(cost), len(cost) // block_size
    inside = cost.new_zeros(units, blocks)  # what each unit has in common with each block
    room = torch.full((blocks,), block_size)
    block = torch.empty(units, dtype=torch.long)
    for unit in cost.sum(1).argsort(descending=True, stable=True).tolist():
        chosen = int(inside[unit].masked_fill(room == 0, math.inf).argmin())
        block[unit] = chosen
        room[chosen] -= 1
        inside[:, chosen] += cost[:, unit]
    least = 1e-9 * float(cost.sum()) / max(units, 1)
    for _ in range(passes):
        if not sum(_exchange(unit, cost, inside, block, least) for unit in range(units)):
            break
    return block.argsort(stable=True)


def _exchange(unit: int, cost: Tensor, inside: Tensor, block: Tensor, least: float) -> bool:
    """Exchange a unit with the one of another block that saves most, if one saves more than `least`."""
    here = int(block[unit])
    own = inside.gather(1, block.unsqueeze(1)).squeeze(1)
    change = inside[unit, block] - own[unit] + inside[:, here] - own - 2 * cost[unit]
    other = int(change.masked_fill(block == here, 0.0).argmin())
    there = int(block[other])
    if here == there or change[other] >= -least:
        return False
    moved = cost[:, other] - cost[:, unit]
    inside[:, here] += moved
    inside[:, there] -= moved
    block[unit], block[other] = there, here
    return True


@torch.no_grad()
def best_units(units: DenseUnits, x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """
    Find the unit of each block that leaves the least of the block's output.

    Args:
        units (`DenseUnits`): in the order of blocks.
        x (`Tensor` of shape `(tokens, width)`): what reaches the layer.
        block_size (`int`): units in a block.

    Returns:
        `tuple(Tensor, Tensor)`: the winners by their index in their block, `(tokens, blocks)`, int16 for blocks of up
        to 32,768 units, and by how much they shorten the rest, squared.
    """
    rows = units.down.unflatten(0, (-1, block_size))
    products = rows @ rows.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    winners = _room_for_winners(x, len(units.up), block_size)
    gains = x.new_empty(winners.shape)
    for part, winner, gain in _chunks(x, winners, gains):
        hidden = units.hidden(part).unflatten(1, (-1, block_size))
        along = torch.einsum("tkn,knm->tkm", hidden, products)
        found = (2 * hidden * along - hidden.square() * squares).max(-1)
        winner.copy_(found.indices)
        gain.copy_(found.values)
    return winners, gains


@dataclass
class Controller:
    """Weights of a controller: `(rank, width)`, `(units, rank)` and `(units,)`."""

    down: Tensor
    up: Tensor
    bias: Tensor

    def winners(self, x: Tensor, block_size: int) -> Tensor:
        """The first maximum of each block's logits, `(tokens, blocks)`, of the dtype of [`best_units`]."""
        winners = _room_for_winners(x, len(self.up), block_size)
        for part, winner in _chunks(x, winners):
            winner.copy_(self._logits(part).unflatten(1, (-1, block_size)).argmax(-1))
        return winners

    def _logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


def begin_controller(units: DenseUnits, x: Tensor, rank: int) -> Controller:
    """
    Approximate what units see, scaled by what they weigh in the output, by a map of low rank: the best one of least
    squares over `x`, `(tokens, width)`.
    """
    weights = units.down.norm(dim=1, keepdim=True) * units.up
    bias = units.down.norm(dim=1) * units.inner_bias
    mean = x.mean(0)
    centred = x - mean
    covariance = (centred.T @ centred).double() / len(x)
    covariance.diagonal().add_(1e-4 * covariance.diagonal().mean().clamp(min=1e-12))
    root = torch.linalg.cholesky(covariance)
    left, values, right = torch.linalg.svd(weights.double() @ root, full_matrices=False)
    rank = min(rank, len(values))
    roots = values[:rank].sqrt()
    up = left[:, :rank] * roots
    down = torch.linalg.solve_triangular(root, roots[:, None] * right[:rank], upper=False, left=False)
    seen = weights.double() @ mean.double() + bias.double()
    deviation = (values.square().sum() / len(values)).sqrt().clamp(min=1e-12) * math.sqrt(len(values) / len(weights))
    scale = _SHARPNESS / deviation
    bias = scale * (seen - up @ (down @ mean.double()))
    return Controller(*(part.to(x.dtype).contiguous() for part in (down, scale * up, bias)))


def fit_controller(
    begun: Controller, x: Tensor, winners: Tensor, gains: Tensor, rank: int, epochs: int, generator: torch.Generator
) -> Controller:
    """
    Teach a controller the winners, those first by which most is gained.

    Args:
        begun (`Controller`): where to begin; filled up to `rank` where it has less.
        x (`Tensor` of shape `(tokens, width)`): what it sees.
        winners, gains (`Tensor` of shape `(tokens, blocks)`): of [`best_units`].
        rank (`int`): its inner width.
        epochs (`int`): passes over the tokens.
        generator (`torch.Generator`): decides their order.
    """
    more = rank - len(begun.down)
    down, up = begun.down, begun.up
    if more > 0:
        noise = torch.randn(more, down.shape[1], generator=generator).to(down) / math.sqrt(down.shape[1])
        down, up = torch.cat([down, noise]), torch.cat([up, up.new_zeros(len(up), more)], dim=1)
    parts = [part.clone().requires_grad_() for part in (down, up, begun.bias)]
    optimizer = torch.optim.Adam(parts, lr=_RATE, betas=(0.9, 0.98))
    steps = epochs * math.ceil(len(x) / _BATCH)
    mean_gain = gains.mean().clamp(min=1e-30)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / max(steps, 1), max(steps, 1))
    fitted = Controller(*parts)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(_BATCH):
                logits = fitted._logits(x[rows]).unflatten(1, (winners.shape[1], -1))
                targets = winners[rows].flatten().long()
                losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
                (losses * (gains[rows] / mean_gain).flatten()).mean().backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return Controller(*(part.detach() for part in parts))


def chosen_units(units: DenseUnits, x: Tensor, winners: Tensor, block_size: int) -> Tensor:
    """Hidden units with 0 in the place of those that are not chosen."""
    hidden = units.hidden(x)
    indices = winners + torch.arange(winners.shape[1], device=x.device) * block_size
    return torch.zeros_like(hidden).scatter_(1, indices, hidden.gather(1, indices))


def fit_rows(
    units: DenseUnits, x: Tensor, winners: Tensor, target: Tensor, block_size: int, ridge: float = _RIDGE
) -> tuple[Tensor, Tensor]:
    """
    Fit rows and bias to what the layer shall put out, given the choices: least squares with a ridge that draws the rows
    to those there are, so that on `x` the squared error cannot grow beyond theirs with the best bias.

    Args:
        units (`DenseUnits`): in the order of blocks.
        x, target (`Tensor` of shape `(tokens, width)`): what reaches the layer, and what shall leave it.
        winners (`Tensor` of shape `(tokens, blocks)`): the choices.
        block_size (`int`): units in a block.
        ridge (`float`, defaults to 0.01): its weight, as a share of the units' mean variance.

    Returns:
        `tuple(Tensor, Tensor)`: rows, `(units, width)`, and bias, `(width,)`.
    """
    count, width = units.down.shape
    square = torch.zeros(count, count, dtype=torch.float64, device=x.device)
    product = torch.zeros(count, width, dtype=torch.float64, device=x.device)
    sums, rests = torch.zeros(count, dtype=torch.float64, device=x.device), square.new_zeros(width)
    for part, chosen, wanted in _chunks(x, winners, target):
        hidden = chosen_units(units, part, chosen, block_size)
        rest = wanted - hidden @ units.down
        square += hidden.T @ hidden
        product += hidden.T @ rest
        sums += hidden.sum(0)
        rests += rest.sum(0)
    square -= torch.outer(sums, sums) / len(x)
    product -= torch.outer(sums, rests) / len(x)
    square.diagonal().add_(ridge * square.diagonal().mean().clamp(min=1e-12))
    change = torch.linalg.solve(square, product)
    bias = (rests - sums @ change) / len(x)
    return (units.down + change).to(units.down.dtype), bias.to(units.down.dtype)


def squared_error(
    units: DenseUnits, bias: Tensor, x: Tensor, winners: Tensor, target: Tensor, block_size: int
) -> float:
    """Squared error of a layer's output given the choices, as a share of the variance of the target."""
    error = spread = 0.0
    mean = target.mean(0)
    for part, chosen, wanted in _chunks(x, winners, target):
        output = chosen_units(units, part, chosen, block_size) @ units.down + bias
        error += float((output - wanted).square().sum())
        spread += float((wanted - mean).square().sum())
    return error / max(spread, 1e-30)
