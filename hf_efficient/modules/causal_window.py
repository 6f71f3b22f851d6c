"""The tokens before each token, for convolutions over time: through padding, documents that share a row, and caches."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def false_first(mask: Tensor) -> Tensor:
    """
    Order the places of each row by a mask, those of equal value as they stand.

    Distinct numbers are sorted, and not the mask by a stable sort, which ONNX does not have.

    Args:
        mask (`Tensor` of shape `(batch, length)`): booleans.

    Returns:
        `Tensor` of shape `(batch, length)`: indices, first of the places where the mask is false.
    """
    length, device = mask.shape[1], mask.device
    behind = torch.arange(length, 2 * length, device=device)
    return torch.where(mask, behind, torch.arange(length, device=device)).argsort(dim=1)


@dataclass
class TokenOrder:
    """
    Tokens that stand before each one, where that is not the position before it: padding may stand anywhere, and rows
    may hold several documents.

    Args:
        places (`Tensor` of shape `(batch, length, window)`): for each token the last `window` tokens, the oldest first
            and itself the last, as indices into a zero, the `window - 1` tokens before the call and those of the call;
            at padding those of the token before.
    """

    places: Tensor

    @classmethod
    def of(
        cls, real: Tensor | None, starts: Tensor | None, window: int, shape: tuple[int, int], device
    ) -> "TokenOrder":
        """
        Args:
            real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding.
            starts (`Tensor` of shape `(batch, length)`, *optional*): `True` where a document begins.
            window (`int`): number of tokens that a convolution sees.
            shape (`tuple[int, int]`): batch and length.
            device (`torch.device`): of the result.
        """
        batch, length = shape
        real = torch.ones(batch, length, dtype=torch.bool, device=device) if real is None else real
        rank = real.cumsum(1)  # of the last token up to here, from 1
        position_of = false_first(~real)  # of the token of each rank, from 0
        ranks = rank.unsqueeze(-1) - torch.arange(window - 1, -1, -1, device=device)
        earlier = ranks + window - 1  # what came before the call lies behind the zeros: the last of it has rank 0
        here = window + position_of.gather(1, (ranks - 1).clamp(min=0).flatten(1)).view_as(ranks)
        places = torch.where(ranks > 0, here, earlier)
        if starts is not None:
            first = torch.where(starts & real, rank, 0).cummax(1).values  # rank of the document's first token
            places = torch.where(ranks >= first.unsqueeze(-1), places, 0)
        return cls(places)

    def gather(self, extended: Tensor) -> Tensor:
        """Windows `(batch, length, window, width)` of `extended`, `(batch, window + length, width)`."""
        batch, length, window = self.places.shape
        rows = extended.shape[1] * torch.arange(batch, device=extended.device).view(-1, 1, 1)
        index = (self.places + rows).flatten()
        return extended.flatten(0, 1).index_select(0, index).view(batch, length, window, -1)


class CausalWindow(nn.Module):
    """
    The last tokens' vectors for a convolution, and what the next call has to know of them.

    Args:
        window (`int`): number of tokens that the convolution sees.
        width (`int`): of a vector.
    """

    def __init__(self, window: int, width: int):
        super().__init__()
        self.window, self.width = window, width

    @property
    def state_size(self) -> int:
        """Numbers of a row that the next call has to know."""
        return (self.window - 1) * self.width

    def forward(
        self, values: Tensor, state: Tensor | None, order: TokenOrder | None, all_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            values (`Tensor` of shape `(batch, length, width)`): vectors of the tokens of this call.
            state (`Tensor` of shape `(batch, state_size)`, *optional*): of the call before; zeros by default.
            order (`TokenOrder`, *optional*): where the token before is not at the position before.
            all_states (`bool`): whether to give the state after every token, or that after the last one.

        Returns:
            `tuple`: what [`ModuleConv`] takes, and the states, `(batch, length or 1, state_size)`; `None` for a window
            of one token, which has none.
        """
        batch = values.shape[0]
        if self.window == 1:
            return values, None
        if state is None:
            past = values.new_zeros(batch, self.window - 1, self.width)
        else:
            past = state.view(batch, self.window - 1, self.width).to(values.dtype)
        if order is None:
            windows = torch.cat([past, values], dim=1)
            if all_states:
                states = windows[:, 1:].unfold(1, self.window - 1, 1).transpose(2, 3).flatten(2)
            else:
                states = windows[:, -(self.window - 1) :].flatten(1).unsqueeze(1)
            return windows, states
        windows = order.gather(torch.cat([past.new_zeros(batch, 1, self.width), past, values], dim=1))
        states = windows[:, :, 1:].flatten(2)
        return windows, states if all_states else states[:, -1:]
