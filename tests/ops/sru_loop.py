"""Inputs of the recurrence, and the loop over its steps that all its forms are held against."""

import torch


TENSORS = ("x", "weight_c", "bias", "c0", "mask", "reset", "dropout_mask")


def make_inputs(*names, batch=3, length=7, width=5, parts=3, dtype=torch.float64, requires_grad=True):
    """`u` and those of the optional arguments that are named."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)

    makers = {
        "x": lambda: random(batch, length, width),
        "weight_c": lambda: random(2, width),
        "bias": lambda: random(2, width),
        "c0": lambda: random(batch, width),
        "mask": lambda: torch.rand(batch, length) < 0.7,
        "reset": lambda: torch.rand(batch, length) < 0.3,
        "dropout_mask": lambda: (torch.rand(batch, width) < 0.7).to(dtype) / 0.7,
    }
    return {"u": random(batch, length, parts, width), **{name: makers[name]() for name in names}}


def step_by_step(
    u, x=None, weight_c=None, bias=None, c0=None, mask=None, reset=None, dropout_mask=None, *, scale_x=1.0,
    activation="identity", reverse=False
):  # fmt: skip
    """h and c of every step, by the formulas at the head of `ops/sru.py`, with autograd's gradients."""
    state = torch.zeros_like(u[:, 0, 0]) if c0 is None else c0
    outputs, states = [None] * u.shape[1], [None] * u.shape[1]
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None], torch.zeros_like(state), state)
        forget, output = u[:, t, 1], u[:, t, 2]
        if weight_c is not None:
            forget, output = forget + weight_c[0] * state, output + weight_c[1] * state
        if bias is not None:
            forget, output = forget + bias[0], output + bias[1]
        c = u[:, t, 0] + (state - u[:, t, 0]) * forget.sigmoid()
        g = c.tanh() if activation == "tanh" else c
        gate = output.sigmoid() * (1.0 if dropout_mask is None else dropout_mask)
        highway = 0.0
        if u.shape[2] == 4:
            highway = u[:, t, 3]
        elif x is not None:
            highway = x[:, t] * scale_x
        h = highway + (g - highway) * gate
        if mask is not None:
            h, c = torch.where(mask[:, t, None], h, 0.0), torch.where(mask[:, t, None], c, state)
        outputs[t], states[t], state = h, c, c
    return torch.stack(outputs, 1), torch.stack(states, 1)


def leaves_of(inputs):
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def gradients(outputs, weights, leaves):
    return torch.autograd.grad(
        sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)), leaves, retain_graph=True
    )
