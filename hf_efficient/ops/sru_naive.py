"""The recurrence of SRU and SRU++ as a loop over time steps, written to be read.

`ops/sru.py` has the formulas. This loop states them one step at a time in plain torch and leaves the gradients to
autograd; it is slow, and the tests hold every other implementation against it.
"""

import torch
from torch import Tensor


def sru_recurrence_naive(
    u: Tensor, x: Tensor | None = None, weight_c: Tensor | None = None, bias: Tensor | None = None,
    c0: Tensor | None = None, mask: Tensor | None = None, document_start: Tensor | None = None,
    dropout_mask: Tensor | None = None, *, scale_x: float = 1.0, activation: str = "identity", reverse: bool = False,
    return_all_states: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Run SRU's recurrence over a sequence, one step after the other.

    Arguments and results are those of [`~hf_efficient.ops.sru.sru_recurrence`], except that no argument is checked.
    """
    batch, length, parts, width = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    h_dtype = u.dtype if x is None else x.dtype
    if mask is not None:
        # Padding may hold anything, NaN included, and autograd would carry NaN through a product with zero.
        u = u.masked_fill(~mask[:, :, None, None], 0.0)
        x = None if x is None else x.masked_fill(~mask[:, :, None], 0.0)
    u = u.to(dtype)
    highway = None if x is None else x.to(dtype) * scale_x
    if parts == 4:
        highway = u[:, :, 3]
    forget_gate_weight, output_gate_weight = u.new_zeros(2, width) if weight_c is None else weight_c.to(dtype)
    forget_gate_bias, output_gate_bias = u.new_zeros(2, width) if bias is None else bias.to(dtype)
    dropout = u.new_ones(batch, width) if dropout_mask is None else dropout_mask.to(dtype)

    state = u.new_zeros(batch, width) if c0 is None else c0.to(dtype)
    outputs, states = {}, {}
    for step in reversed(range(length)) if reverse else range(length):
        if document_start is not None:
            state = state.masked_fill(document_start[:, step, None], 0.0)
        candidate = u[:, step, 0]
        forget_gate = torch.sigmoid(u[:, step, 1] + forget_gate_bias + forget_gate_weight * state)
        output_gate = torch.sigmoid(u[:, step, 2] + output_gate_bias + output_gate_weight * state)
        new_state = candidate + (state - candidate) * forget_gate
        activated = torch.tanh(new_state) if activation == "tanh" else new_state
        skip = torch.zeros_like(candidate) if highway is None else highway[:, step]
        output = skip + (activated - skip) * dropout * output_gate
        if mask is not None:
            is_token = mask[:, step, None]
            output = torch.where(is_token, output, 0.0)
            new_state = torch.where(is_token, new_state, state)
        outputs[step], states[step], state = output, new_state, new_state

    h = torch.stack([outputs[step] for step in range(length)], 1).to(h_dtype)
    if return_all_states:
        return h, torch.stack([states[step] for step in range(length)], 1)
    return h, state
