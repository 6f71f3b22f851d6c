"""Position vectors of the Scaling Transformer and of Terraformer: learned, of low rank, or from digits in fixed bases.

Source: the code of Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .input_checks import values_can_be_read
from .sparse_layers import glorot_


def sinusoids(length: int, width: int) -> Tensor:
    """Interleaved sines (even columns) and cosines (odd columns) of positions, `(length, width)`."""
    positions = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10_000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(positions * rates)
    table[:, 1::2] = torch.cos(positions * rates)[:, : width // 2]
    return table


def _uniform(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers between 0 and 1, on the device of `like`."""
    return torch.rand(shape, device=like.device)


def _integers(bound: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Integers below a bound, on the device of `like`."""
    return torch.randint(bound, shape, device=like.device)


def check_positions(positions: Tensor, count: int, end: str) -> None:
    """
    Check positions whose values can be read.

    Raises:
        ValueError: for one that is negative, or not below `count`; the message says that `end` before it.
    """
    if not values_can_be_read(positions):
        return
    lowest, highest = (int(value) for value in positions.aminmax())
    if lowest < 0:
        raise ValueError(f"position_ids hold {lowest}, but positions begin at 0.")
    if highest >= count:
        raise ValueError(
            f"The text reaches position {highest}, but {end} at {count - 1}: shorten the text, or begin a new one."
        )


class SharedStarts:
    """
    Random starts of the rows of a batch, drawn where its sources are read and kept for their targets.

    Args:
        max_offset (`int`): bound of a start, excluded.
        zero_probability (`float`): share of rows that begin at 0 all the same.
    """

    def __init__(self, max_offset: int, zero_probability: float):
        self.max_offset, self.zero_probability = max_offset, zero_probability
        self.kept: Tensor | None = None

    def of_sources(self, room: Tensor, rows: int, trains: bool) -> Tensor | None:
        """Draw starts, `(rows, 1)`, none above `room`, `(rows or 1, 1)`; `None` outside of training, where all begin at
        0."""
        self.kept, shape = None, (rows, 1)
        if trains and self.max_offset:
            starts = _integers(self.max_offset, shape, room)
            starts = torch.where(_uniform(shape, room) < self.zero_probability, 0, starts)
            self.kept = starts.minimum(room)
        return self.kept

    def of_targets(self, room: Tensor, rows: int, trains: bool) -> Tensor | None:
        """
        Take the starts of the sources that were read last, or the last one that leaves room for the target.

        Raises:
            ValueError: if those were of another number of rows.
        """
        if self.kept is None or not trains:
            return None
        if len(self.kept) != rows:
            raise ValueError(
                f"position_shared_start wants a source for each target: {len(self.kept)} sources were read for {rows} "
                "targets."
            )
        return self.kept.minimum(room)


class LearnedPositions(nn.Module):
    """
    Learned table of positions, which begins as sinusoids; with a `rank`, one of low rank times a matrix.

    In training all rows of a batch may begin at one random position, so that every part of the table is learned. Two
    tables, of sources and of their targets, may have one start for each row, see [`share_starts`].
    Dropout has one mask over features for all positions and rows.

    Deviation: the original cuts a table of low rank to the length of the call, so that decoding token by token always
    adds position 0, and a random start has no effect. Here each token has its own position in every case.

    Args:
        length (`int`): number of positions.
        width (`int`): of a vector.
        rank (`int`, *optional*): width of the table, if that is not `width`.
        dropout (`float`, defaults to 0.0): of the vectors.
        max_offset (`int`, defaults to 0): bound of the random start, excluded; 0 for none.
        zero_probability (`float`, defaults to 1.0): share of batches that begin at 0 all the same.
        init_scale (`float`, defaults to 1.0): factor of the sinusoids that the table begins as.
    """

    def __init__(
        self,
        length: int,
        width: int,
        rank: int | None = None,
        dropout: float = 0.0,
        max_offset: int = 0,
        zero_probability: float = 1.0,
        init_scale: float = 1.0,
    ):
        super().__init__()
        self.dropout, self.max_offset, self.zero_probability = dropout, max_offset, zero_probability
        self.init_scale = init_scale
        self.table = nn.Parameter(torch.empty(length, width if rank is None else rank))
        self.projection = None if rank is None else nn.Parameter(torch.empty(rank, width))
        self.row_starts: Callable[[Tensor, int, bool], Tensor | None] | None = None

    def _start(self, positions: Tensor, rows: int) -> Tensor | int:
        """The position at which the batch, or each row, begins."""
        if self.row_starts is not None:
            starts = self.row_starts(len(self.table) - 1 - positions.amax(1, True), rows, self.training)
            return 0 if starts is None else starts
        if not self.training or self.max_offset == 0 or self.zero_probability == 1.0:
            return 0
        free = len(self.table) - 1 - positions.max()  # the table's last position is the last one to be reached
        start = torch.minimum(_integers(self.max_offset, (), positions), free)
        return torch.where(_uniform((), positions) < self.zero_probability, 0, start)

    def forward(self, positions: Tensor, rows: int | None = None) -> Tensor:
        """
        Args:
            positions (`Tensor` of shape `(batch or 1, length)`): from 0.
            rows (`int`, *optional*): of the batch, each of which may have a start of its own; by default those of
                `positions`.

        Returns:
            `Tensor` of shape `(batch or 1, length, width)`.

        Raises:
            ValueError: for a position outside the table.
        """
        end = f"the table of positions (max_position_embeddings={len(self.table)}) ends"
        check_positions(positions, len(self.table), end)
        vectors = nn.functional.embedding(positions + self._start(positions, rows or positions.shape[0]), self.table)
        if self.projection is not None:
            vectors = vectors @ self.projection
        if not self.training or self.dropout == 0.0:
            return vectors
        return vectors * nn.functional.dropout(vectors.new_ones(vectors.shape[-1]), self.dropout)

    def extra_repr(self) -> str:
        length, width = self.table.shape
        return f"{length}, {width}" if self.projection is None else f"{length}, {width}, {self.projection.shape[1]}"

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialise the table by sinusoids, and the matrix Glorot."""
        init.copy_(self.table, self.init_scale * sinusoids(*self.table.shape))
        if self.projection is not None:
            glorot_(self.projection, *self.projection.shape)


class FixedBasePositions(nn.Module):
    """
    Position vectors from the digits of the position in several bases, for texts of any length.

    Each digit's value scales a vector of its own; those of a base stand side by side, the lowest digit first, and the
    bases are added. A start vector is added to the first position. In training half of the rows begin at a random
    position, and one row in a hundred has no position but the start vector.

    Args:
        width (`int`): of a vector, a multiple of `digits`.
        bases (`list[int]`): such as `[11, 13, 14, 15]`.
        digits (`int`, defaults to 8): of each base.
    """

    def __init__(self, width: int, bases: list[int], digits: int = 8):
        super().__init__()
        self.digits, self.bases = digits, list(bases)
        self.largest = min(bases) ** digits
        self.vectors = nn.Parameter(torch.empty(len(bases), digits, width // digits))
        self.start = nn.Parameter(torch.empty(width))

    def _drawn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions from random starts, and which rows keep them, `(batch, 1)`."""
        shape = (positions.shape[0], 1)
        begins_at_zero = _uniform(shape, positions) < 0.5
        # A text of all positions that digits can say begins at the first.
        starts = _integers(max(self.largest - positions.shape[1], 1), shape, positions)
        return positions + torch.where(begins_at_zero, 0, starts), _uniform(shape, positions) >= 0.01

    def forward(self, positions: Tensor, rows: int | None = None) -> Tensor:
        """
        Args:
            positions (`Tensor` of shape `(batch or 1, length)`): from 0.
            rows (`int`, *optional*): of the batch, each of which has a random start of its own in training; by default
                those of `positions`.

        Returns:
            `Tensor` of shape `(batch or 1, length, width)`.

        Raises:
            ValueError: for a position below 0, or beyond what the digits can say.
        """
        check_positions(positions, self.largest, "the digits of the smallest base end")
        is_first, kept = positions == 0, None
        if self.training:
            positions, kept = self._drawn(positions.expand(rows or positions.shape[0], -1))
        vectors = torch.zeros((), dtype=self.vectors.dtype, device=positions.device)
        for base, weights in zip(self.bases, self.vectors, strict=True):
            powers = torch.tensor([base**digit for digit in range(self.digits)], device=positions.device)
            values = positions.unsqueeze(-1) // powers % base
            vectors = vectors + (values.unsqueeze(-1).to(weights.dtype) * weights).flatten(-2)
        if kept is not None:
            vectors = vectors * kept.unsqueeze(-1)
        return vectors + is_first.unsqueeze(-1) * self.start

    def extra_repr(self) -> str:
        return f"{len(self.start)}, bases={self.bases}, digits={self.digits}"

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Initialise uniformly within 1e-4, as the original does."""
        init.uniform_(self.vectors, -1e-4, 1e-4)
        init.uniform_(self.start, -1e-4, 1e-4)


def share_starts(source: LearnedPositions, target: LearnedPositions) -> None:
    """Let a target begin where its source does in training, at a random position of each row; both begin
    earlier where the source would go beyond its table, and the target alone where it would."""
    starts = SharedStarts(source.max_offset, source.zero_probability)
    source.row_starts, target.row_starts = starts.of_sources, starts.of_targets


def build_positions(config: Any) -> nn.Module | None:
    """Build the position vectors that a config asks for; `None` where it wants none."""
    kind, length, width = config.position_embedding_type, config.max_position_embeddings, config.hidden_size
    if kind == "none":
        return None
    if kind == "fixed_base":
        return FixedBasePositions(width, config.position_bases)
    rank = config.position_rank if kind == "low_rank" else None
    offset, zero_probability = config.position_max_offset, config.position_zero_probability
    scale = config.position_init_scale
    return LearnedPositions(length, width, rank, config.dropout, offset, zero_probability, scale)


def token_positions(
    attention_mask: Tensor | None, starts: Tensor | None, real: Tensor | None, held: Any, shape: tuple[int, int], device
) -> Tensor:
    """
    Number the tokens of a call, padding left out.

    Args:
        attention_mask (`Tensor` of shape `(batch, at least length)`, *optional*): over the past as well.
        starts, real (`Tensor` of shape `(batch, length)`, *optional*): where documents begin; `False` at padding.
        held (`int` or `Tensor`): number of tokens that a cache holds.
        shape (`tuple[int, int]`): batch and length.
        device (`torch.device`): of the result.

    Returns:
        `Tensor` of shape `(batch or 1, length)`.
    """
    length = shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        positions = attention_mask.long().cumsum(1)[:, -length:] - 1
    elif real is not None:
        positions = held + real.long().cumsum(1) - 1
    else:
        positions = held + torch.arange(length, device=device).unsqueeze(0)
    positions = positions.clamp(min=0)
    if starts is not None:
        positions = positions - torch.where(starts, positions, 0).cummax(1).values
    return positions
