"""SRU's recurrence in plain torch; `ops/sru.py` has the formulas and the meaning of the arguments.

A step costs three operations forward and one backward. Everything else is done for many steps at once, in pieces that
stay in a core's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


# Entries of one array that a piece of a sequence holds on a CPU; about ten arrays are alive at a time. The size matters
# little as long as they fit into a core's cache: see training/LOG.md.
_PIECE = 1 << 15


def _pieces(length: int, step_size: int, device: torch.device, backwards: bool) -> Iterator[tuple[int, int]]:
    """Spans of time steps that are worked on together; on an accelerator all of them."""
    steps = length if device.type != "cpu" else max(1, _PIECE // max(step_size, 1))
    starts = range(0, length, max(steps, 1))
    for start in reversed(starts) if backwards else starts:
        yield start, min(start + steps, length)


def _activate(c: Tensor, activation: str) -> Tensor:
    return c if activation == "identity" else torch.tanh(c)


def _sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    """grad * output * (1 - output), in one pass."""
    return torch.ops.aten.sigmoid_backward(grad, output)


@dataclass
class _Inputs:
    """The op's arguments, in their order, and how both passes read them: piece by piece, in the dtype of the state."""

    u: Tensor  # (B, L, k, d)
    x: Tensor | None  # (B, L, d)
    weight_c: Tensor | None  # (2, d)
    bias: Tensor | None  # (2, d)
    c0: Tensor | None  # (B, d)
    mask: Tensor | None  # (B, L) bool
    document_start: Tensor | None  # (B, L) bool
    dropout_mask: Tensor | None  # (B, d)
    scale_x: float
    activation: str
    reverse: bool

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.u.dtype, torch.float32)
        self.weight_c, self.bias = self._wide(self.weight_c), self._wide(self.bias)
        self.forget_gate_weight, self.output_gate_weight = self._rows(self.weight_c)
        self.forget_gate_bias, self.output_gate_bias = self._rows(self.bias)
        if self.dropout_mask is not None:
            self.dropout_mask = self.dropout_mask.to(self.dtype).unsqueeze(1)

    def _wide(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(self.dtype)

    @staticmethod
    def _rows(parameter: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if parameter is None else (parameter[0], parameter[1])

    def part(self, index: int, start: int, stop: int) -> Tensor:
        """Sub-matrix `index` of a piece, (B, steps, d); zero at pads, whatever stood there."""
        return self.at_tokens(self.u[:, start:stop, index].to(self.dtype), start, stop)

    def highway(self, start: int, stop: int) -> Tensor | None:
        """x' of a piece; `None` without a skip connection."""
        if self.x is not None:
            x = self.at_tokens(self.x[:, start:stop].to(self.dtype), start, stop)
            return x if self.scale_x == 1.0 else x * self.scale_x
        return self.part(3, start, stop) if self.u.shape[2] == 4 else None

    def at_tokens(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        # A selection, not a product: a NaN in a pad must not leak.
        return tensor if self.mask is None else tensor.masked_fill(~self.mask[:, start:stop, None], 0.0)

    def forget_logits(self, start: int, stop: int) -> Tensor:
        """u1 + b_f in memory of its own; infinite at pads, where the gate must be one to leave the state as it is."""
        logits = self.u[:, start:stop, 1].to(self.dtype)
        logits = logits.clone() if self.forget_gate_bias is None else logits + self.forget_gate_bias
        return logits if self.mask is None else logits.masked_fill_(~self.mask[:, start:stop, None], float("inf"))

    def output_gate(self, before: Tensor, start: int, stop: int) -> Tensor:
        """r of a piece from the states before its steps."""
        logits = self.part(2, start, stop)
        logits = logits.clone() if self.output_gate_bias is None else logits + self.output_gate_bias
        if self.output_gate_weight is not None:
            logits.addcmul_(before, self.output_gate_weight)
        return logits.sigmoid_()

    def forget_gate(self, before: Tensor, start: int, stop: int) -> Tensor:
        """f of a piece from the states before its steps; one at pads."""
        logits = self.forget_logits(start, stop)
        if self.forget_gate_weight is not None:
            logits.addcmul_(before, self.forget_gate_weight)
        return logits.sigmoid_()

    def before(self, states: Tensor, start: int, stop: int) -> Tensor:
        """The states that the steps of a piece start from: (B, steps, d), zero where a document begins."""
        shift = 1 if self.reverse else 0
        before = states[:, start + shift : stop + shift]
        return (
            before if self.document_start is None else before.masked_fill(self.document_start[:, start:stop, None], 0.0)
        )

    def after(self, states: Tensor, start: int, stop: int) -> Tensor:
        shift = 0 if self.reverse else 1
        return states[:, start + shift : stop + shift]


def _scan(inputs: _Inputs, states: Tensor, start: int, stop: int) -> None:
    """Write the states of a piece, one step after the other: the only part that cannot be done at once."""
    candidates = inputs.part(0, start, stop).unbind(1)
    gates = inputs.forget_logits(start, stop)
    weight = inputs.forget_gate_weight
    if weight is None:
        gates.sigmoid_()
    steps, written = gates.unbind(1), inputs.after(states, start, stop).unbind(1)
    first = stop if inputs.reverse else start
    state = states[:, first]
    starts = None if inputs.document_start is None else inputs.document_start[:, start:stop].any(0).tolist()
    for index in reversed(range(stop - start)) if inputs.reverse else range(stop - start):
        if starts is not None and starts[index] and inputs.document_start is not None:
            state = state.masked_fill(inputs.document_start[:, start + index, None], 0.0)
        gate = steps[index]
        if weight is not None:
            torch.addcmul(gate, state, weight, out=gate).sigmoid_()
        state = torch.lerp(candidates[index], state, gate, out=written[index])


def _single_step(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """One step without padding, as decoding takes it: both gates at once, and as few calls as can be."""
    parts = inputs.u[:, 0].to(inputs.dtype)
    before = torch.zeros_like(parts[:, 0]) if inputs.c0 is None else inputs.c0.to(inputs.dtype)
    gates = parts[:, 1:3]
    if inputs.bias is not None:
        gates = gates + inputs.bias
    if inputs.weight_c is not None:
        gates = torch.addcmul(gates, inputs.weight_c, before.unsqueeze(1))
    gates = torch.sigmoid(gates)
    after = torch.lerp(parts[:, 0], before, gates[:, 0])
    activated, gate, highway = _activate(after, inputs.activation), gates[:, 1], inputs.highway(0, 1)
    if inputs.dropout_mask is not None:
        gate = gate * inputs.dropout_mask[:, 0]
    h = activated * gate if highway is None else torch.lerp(highway[:, 0], activated, gate)
    states = torch.stack([after, before] if inputs.reverse else [before, after], 1)
    return h.unsqueeze(1).to(inputs.u.dtype if inputs.x is None else inputs.x.dtype), states


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """h and the states, as [`empty_results`] lays them out, of the op's arguments in their order."""
    inputs = _Inputs(*arguments)
    batch, length, _, width = inputs.u.shape
    if length == 1 and inputs.mask is None and inputs.document_start is None:
        return _single_step(inputs)
    h, states = empty_results(*arguments)
    initial = states[:, length if inputs.reverse else 0]
    initial.zero_() if inputs.c0 is None else initial.copy_(inputs.c0)
    for start, stop in _pieces(length, batch * width, h.device, inputs.reverse):
        _scan(inputs, states, start, stop)
        gate = inputs.output_gate(inputs.before(states, start, stop), start, stop)
        if inputs.dropout_mask is not None:
            gate *= inputs.dropout_mask
        activated = _activate(inputs.after(states, start, stop), inputs.activation)
        highway = inputs.highway(start, stop)
        written = h[:, start:stop] if h.dtype == inputs.dtype else None
        if highway is None:
            piece = torch.mul(activated, gate, out=written)
        else:
            piece = torch.lerp(highway, activated, gate, out=written)
        if inputs.mask is not None:
            piece.masked_fill_(~inputs.mask[:, start:stop, None], 0.0)
        if written is None:
            h[:, start:stop] = piece
    return h, states


def forward_last(*arguments) -> tuple[Tensor, Tensor]:
    """h and the state after the last step, (B, d)."""
    h, states = forward(*arguments)
    return h, states[:, 0 if arguments[-1] else -1]


def empty_results(*arguments) -> tuple[Tensor, Tensor]:
    """Room for h, (B, L, d), and for the states before the first step and after each, (B, L + 1, d)."""
    u, x = arguments[:2]
    batch, length, _, width = u.shape
    h = u.new_empty(batch, length, width, dtype=u.dtype if x is None else x.dtype)
    return h, u.new_empty(batch, length + 1, width, dtype=torch.promote_types(u.dtype, torch.float32))


class _Gradients:
    """The backward pass: what it accumulates, and its work on one piece."""

    def __init__(self, inputs: _Inputs, states: Tensor, grad_h: Tensor | None, grad_states: Tensor | None):
        u, x = inputs.u, inputs.x
        batch, length, _, width = u.shape
        self.inputs, self.states, self.grad_states = inputs, states, grad_states
        self.grad_h = u.new_zeros(()).expand(batch, length, width) if grad_h is None else grad_h
        self.u = torch.empty_like(u, memory_format=torch.contiguous_format)
        self.x = None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        self.weight_c, self.bias = (u.new_zeros(2, width, dtype=inputs.dtype) for _ in range(2))
        # The gradient that reaches the state after the last step of the next piece from the steps beyond it.
        self.carried = u.new_zeros(batch, width, dtype=inputs.dtype)

    def piece(self, start: int, stop: int) -> None:
        inputs = self.inputs
        before = inputs.before(self.states, start, stop)
        forget = inputs.forget_gate(before, start, stop)
        grad, grad_output = self._output_side(start, stop, before)
        slope = _sigmoid_backward(before - inputs.part(0, start, stop), forget)  # dc_t / du1_t
        factor = (
            forget if inputs.forget_gate_weight is None else torch.addcmul(forget, slope, inputs.forget_gate_weight)
        )
        through_gate = None if inputs.output_gate_weight is None else grad_output * inputs.output_gate_weight
        if inputs.document_start is not None:
            begins = inputs.document_start[:, start:stop, None]
            factor = factor.masked_fill(begins, 0.0)
            through_gate = None if through_gate is None else through_gate.masked_fill_(begins, 0.0)
        self._scan(grad, factor, through_gate)
        self.u[:, start:stop, 0] = torch.addcmul(grad, grad, forget, value=-1.0)
        # Sums are taken of contiguous tensors: a reduction over the strides of `u` takes ten times as long.
        for index, grad_gate in enumerate((slope.mul_(grad), grad_output)):
            self.u[:, start:stop, 1 + index] = grad_gate
            if inputs.bias is not None:
                self.bias[index] += grad_gate.sum((0, 1))
            if inputs.weight_c is not None:
                self.weight_c[index] += grad_gate.mul_(before).sum((0, 1))

    def _output_side(self, start: int, stop: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients at the states of a piece, not yet through time, and at the output gate's logits; writes that of
        x'."""
        inputs = self.inputs
        after, gate = inputs.after(self.states, start, stop), inputs.output_gate(before, start, stop)
        activated, highway = _activate(after, inputs.activation), inputs.highway(start, stop)
        grad = inputs.at_tokens(self.grad_h[:, start:stop].to(inputs.dtype), start, stop)
        dropped = grad if inputs.dropout_mask is None else grad * inputs.dropout_mask
        through = dropped * gate
        if self.x is not None:
            self.x[:, start:stop] = grad - through if inputs.scale_x == 1.0 else (grad - through) * inputs.scale_x
        elif highway is not None:
            self.u[:, start:stop, 3] = grad - through
        difference = activated if highway is None else activated - highway
        grad_gate = _sigmoid_backward(dropped * difference, gate)
        if inputs.activation == "tanh":
            through *= 1.0 - activated * activated
        return (
            through if self.grad_states is None else through.add_(inputs.after(self.grad_states, start, stop)),
            grad_gate,
        )

    def _scan(self, grad: Tensor, factor: Tensor, through_gate: Tensor | None) -> None:
        """In place: the gradient at each state becomes what it is with all later steps; `factor` is K, `through_gate`
        what a step's output gate gives to the state before it."""
        reverse = self.inputs.reverse
        if through_gate is not None and reverse:
            grad[:, 1:] += through_gate[:, :-1]
        elif through_gate is not None:
            grad[:, :-1] += through_gate[:, 1:]
        steps, factors = grad.unbind(1), factor.unbind(1)
        first, last = (len(steps) - 1, 0) if reverse else (0, len(steps) - 1)
        steps[last].add_(self.carried)
        for later in range(last, first) if reverse else range(last, first, -1):
            earlier = later + 1 if reverse else later - 1
            steps[earlier].addcmul_(factors[later], steps[later])
        self.carried = factors[first] * steps[first]
        if through_gate is not None:
            self.carried += through_gate[:, first]


def backward(grad_h: Tensor | None, grad_states: Tensor | None, states: Tensor, *arguments):
    """Gradients of u, x, weight_c, bias and c0; empty where the argument is not given."""
    inputs = _Inputs(*arguments)
    gradients = _Gradients(inputs, states, grad_h, grad_states)
    batch, length, _, width = inputs.u.shape
    for start, stop in _pieces(length, batch * width, states.device, not inputs.reverse):
        gradients.piece(start, stop)
    initial = gradients.carried
    if grad_states is not None:
        initial = initial + grad_states[:, length if inputs.reverse else 0]
    results = (gradients.u, gradients.x, gradients.weight_c, gradients.bias, initial)
    return tuple(
        states.new_empty(0) if wanted is None or result is None else result.to(wanted.dtype)
        for wanted, result in zip(arguments, results, strict=False)
    )
