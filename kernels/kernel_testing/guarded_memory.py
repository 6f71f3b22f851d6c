"""Tensors in guarded memory: what is written beside them shows."""

import torch


# Entries beside each tensor, in whatever dtype a multiple of the 16 bytes that the widest access has.
GUARD = 16


class GuardedTensor:
    """
    A contiguous tensor inside memory that is full of NaN, and NaN itself unless it is given values.

    Args:
        shape (`tuple[int, ...]`): the tensor's shape.
        dtype (`torch.dtype`): a floating-point dtype.
        misaligned (`bool`, defaults to `False`): whether the address is one entry beyond what wide accesses need.
        values (`Tensor`, *optional*): what the tensor holds at first.
        device (`torch.device` or `str`, defaults to `"cpu"`): where it is.
    """

    def __init__(self, shape, dtype, misaligned=False, values=None, device="cpu"):
        size = torch.Size(shape).numel()
        first = GUARD + (1 if misaligned else 0)
        self.memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        self.inside = slice(first, first + size)
        self.tensor = self.memory[self.inside].view(shape)
        if values is not None:
            self.tensor.copy_(values)

    def check(self, name: str) -> None:
        """Raise `AssertionError` if something was written beside the tensor."""
        outside = self.memory.clone()
        outside[self.inside] = float("nan")
        assert outside.isnan().all(), f"{name}: written outside"
