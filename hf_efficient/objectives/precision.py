"""In which precision losses are computed."""

import torch
from torch import Tensor


def in_float32(values: Tensor) -> Tensor:
    """At least float32, for sums that lower precision would spoil."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
