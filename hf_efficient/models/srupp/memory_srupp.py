"""What one segment of a long text hands to the next."""

from typing import NamedTuple

import torch


class SegmentMemory(NamedTuple):
    """
    The memory of SRU++'s training and evaluation by segments (section 3 of the paper, and its code): the states of all
    layers, which reach back without limit, and the inputs that attending layers had in the previous segment alone.

    Args:
        cell_states (`tuple(Tensor)`): per layer c after the segment, `(batch, hidden_size)`, float32. In a
            bidirectional model, whose second half runs backwards, these are initial states and nothing that a text's
            next segment could go on from.
        layer_inputs (`tuple(Tensor or None)`): per layer its input in the segment, before any norm, `(batch, length,
            input size)`; `None` for layers that do not attend. Gradients flow through the projections of memory; detach
            it to keep them within a segment, as the paper does.
        mask (`Tensor` of shape `(batch, length)`, *optional*): `False` where the segment had padding.
    """

    cell_states: tuple[torch.Tensor, ...]
    layer_inputs: tuple[torch.Tensor | None, ...]
    mask: torch.Tensor | None = None

    def detach(self) -> "SegmentMemory":
        """The same values without their history."""
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in self.layer_inputs)
        return SegmentMemory(tuple(state.detach() for state in self.cell_states), inputs, self.mask)

    @property
    def length(self) -> int:
        """Number of positions that can be attended to."""
        return next((tensor.shape[1] for tensor in self.layer_inputs if tensor is not None), 0)


__all__ = ["SegmentMemory"]
