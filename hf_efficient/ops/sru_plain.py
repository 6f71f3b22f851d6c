"""SRU's recurrence out of plain operators, for all that cannot see into a custom op: transforms of `torch.func`,
forward mode, derivatives of gradients, and the exporter to ONNX; `ops/sru.py` has the formulas and the meaning of the
arguments.

Nothing is written in place, no value is read, and autograd knows every operator. A step costs one to five operators;
everything else is done for all steps at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan as scan_operator


def _loop(step: Callable[..., Tensor], state: Tensor, rows: list[Tensor], reverse: bool) -> Tensor:
    """The states after each step, (B, L, d), by a loop in Python; `rows` are (B, L, ...)."""
    steps = list(zip(*(row.unbind(1) for row in rows), strict=True))
    states = []
    for values in reversed(steps) if reverse else steps:
        state = step(state, *values)
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, 1)


def _scan(step: Callable[..., Tensor], state: Tensor, rows: list[Tensor], reverse: bool) -> Tensor:
    """[`_loop`] as one operator, whatever the length, which ONNX has under the name of `Scan`."""
    rows = [row.transpose(0, 1).flip(0) if reverse else row.transpose(0, 1) for row in rows]

    def combine(state: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        state = step(state, *values)
        return state, state.clone()

    _, states = scan_operator(combine, state, rows)
    return (states.flip(0) if reverse else states).transpose(0, 1)


def forward(
    u: Tensor, x: Tensor | None, weight_c: Tensor | None, bias: Tensor | None, c0: Tensor | None, mask: Tensor | None,
    document_start: Tensor | None, dropout_mask: Tensor | None, scale_x: float, activation: str, reverse: bool,
    scan: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Run the recurrence.

    Args:
        u, x, weight_c, bias, c0, mask, document_start, dropout_mask, scale_x, activation, reverse: the op's arguments.
        scan (`bool`, defaults to `False`): make the loop over time one operator, where the graph would otherwise hold
            every step.

    Returns:
        `tuple(Tensor, Tensor)`: h and the states, laid out as those of `sru_reference.forward`.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    h_dtype = u.dtype if x is None else x.dtype
    hidden = None if mask is None else ~mask.unsqueeze(-1)
    begins = None if document_start is None else document_start.unsqueeze(-1)
    if hidden is not None:  # a selection, not a product: a NaN in a pad must not leak
        u = u.masked_fill(hidden.unsqueeze(-1), 0.0)
        x = None if x is None else x.masked_fill(hidden, 0.0)
    candidate, forget, output, *highways = u.to(dtype).unbind(2)
    highway = highways[0] if highways else None if x is None else x.to(dtype) * scale_x
    if bias is not None:
        forget_bias, output_bias = bias.to(dtype).unbind(0)
        forget, output = forget + forget_bias, output + output_bias
    forget_weight, output_weight = (None, None) if weight_c is None else weight_c.to(dtype).unbind(0)
    if forget_weight is None:
        forget = forget.sigmoid()

    def step(state: Tensor, candidate: Tensor, gate: Tensor, *flags: Tensor) -> Tensor:
        if begins is not None:
            state = state.masked_fill(flags[0], 0.0)
        if forget_weight is not None:
            gate = torch.addcmul(gate, state, forget_weight).sigmoid()
        after = torch.lerp(candidate, state, gate)
        return after if hidden is None else torch.where(flags[-1], state, after)

    initial = torch.zeros_like(candidate[:, 0]) if c0 is None else c0.to(dtype)
    rows = [candidate, forget, *(flags for flags in (begins, hidden) if flags is not None)]
    after = (_scan if scan else _loop)(step, initial, rows, reverse)
    states = torch.cat([after, initial.unsqueeze(1)] if reverse else [initial.unsqueeze(1), after], 1)
    if output_weight is not None:
        before = states[:, 1:] if reverse else states[:, :-1]
        output = output + output_weight * (before if begins is None else before.masked_fill(begins, 0.0))
    gate = output.sigmoid()
    if dropout_mask is not None:
        gate = gate * dropout_mask.to(dtype).unsqueeze(1)
    activated = after.tanh() if activation == "tanh" else after
    h = activated * gate if highway is None else torch.lerp(highway, activated, gate)
    return (h if hidden is None else h.masked_fill(hidden, 0.0)).to(h_dtype), states
