"""Documents that share a row, packed without padding."""

from typing import Any, NamedTuple

import torch
from torch import nn

from .input_checks import check_per_token, check_tensor, values_can_be_read, values_exist


class Packing(NamedTuple):
    """
    Marks that tell the documents of a packed batch apart, as transformers' `DataCollatorWithFlattening` gives it.

    Args:
        position_ids (`Tensor` of shape `(batch or 1, length)`, *optional*): begin anew with each document, at 0 or any
            other number. Numbers that never rise say nothing, but for 0.
        seq_idx (`Tensor` of shape `(batch or 1, length)`, *optional*): number of each token's document.
        cu_seq_lens (`Tensor` of shape `(documents + 1,)`, *optional*): where documents begin and end in a batch of one
            row.
    """

    position_ids: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None

    @classmethod
    def taken_from(cls, position_ids: torch.Tensor | None, options: dict[str, Any]) -> "Packing":
        """Take the keyword arguments that are of this kind out of `options`."""
        queries, keys = (options.pop(f"cu_seq_lens_{side}", None) for side in "qk")
        for side in "qk":
            options.pop(f"max_length_{side}", None)
        return cls(position_ids, options.pop("seq_idx", None), keys if queries is None else queries)

    def check(self, batch: int, length: int) -> None:
        """
        Raises:
            TypeError: for what is no tensor.
            ValueError: for shapes, dtypes and boundaries that do not fit the input.
        """
        for name in ("position_ids", "seq_idx"):
            check_per_token(name, getattr(self, name), batch, length, broadcasts=True)
        ends = self.cu_seq_lens
        if ends is None:
            return
        check_tensor("cu_seq_lens_q", ends)
        if batch != 1 or ends.dim() != 1 or len(ends) < 2 or ends.is_floating_point():
            raise ValueError(
                "cu_seq_lens_q must hold integers, (documents + 1,), for a batch of one row; got "
                f"{tuple(ends.shape)} of {ends.dtype} for {batch} rows."
            )
        if values_can_be_read(ends) and not (ends[0] == 0 and ends[-1] == length and (ends.diff() > 0).all()):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the input's length, {length}; got {ends.tolist()}.")

    def starts(self, real: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """
        Args:
            real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding, where the rest means nothing.

        Returns:
            `Tensor` of shape `(batch, length)`: `True` where a document begins; `None` where each row is one document.
        """
        if length == 1 or not any(value is not None for value in self):
            return None
        found = []
        if self.position_ids is not None:
            before = _before(self.position_ids, real)
            rises = self.position_ids > before
            rises = (rises if real is None else rises & real).any(1, keepdim=True)
            found.append((self.position_ids == 0) | ((self.position_ids <= before) & rises))
        if self.seq_idx is not None:
            found.append(self.seq_idx != _before(self.seq_idx, real))
        if self.cu_seq_lens is not None:
            begins = torch.zeros(length + 1, dtype=torch.bool, device=self.cu_seq_lens.device)
            found.append(begins.index_fill(0, self.cu_seq_lens.long(), True)[None, :length])
        starts = torch.stack([one.expand(batch, -1) for one in found]).any(0)
        if real is not None:
            starts = starts & real
        if values_exist(starts):  # worth a stall of an accelerator: every layer is spared work
            tokens = starts.new_ones(batch, length) if real is None else real
            if not (starts & (tokens.cumsum(1) > 1)).any():
                return None
        return starts


def _before(values: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The value of the token before each one, padding left out; the first one's own."""
    places = torch.arange(values.shape[1], device=values.device)
    if real is None:
        return values[:, (places - 1).clamp(min=0)]
    last = torch.where(real, places, -1).cummax(1).values
    before = nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return values.expand(real.shape[0], -1).gather(1, torch.where(before < 0, places, before))
