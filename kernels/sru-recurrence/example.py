"""A small example of every op, against a plain loop; `kernels/build.py` runs it on what it has built."""

import torch


def run(kernel, device):
    """
    Run forward and backward with a mask and an initial state on `device`.

    Args:
        kernel (`ModuleType`): the loaded package.
        device (`torch.device`): where.

    Raises:
        AssertionError: if states, results or a gradient are not those of the loop.
    """
    torch.manual_seed(0)
    batch, length, width = 2, 7, 37
    u = torch.randn(batch, length, 3, width, device=device, requires_grad=True)
    x = torch.randn(batch, length, width, device=device, requires_grad=True)
    weight_c = torch.randn(2, width, device=device, requires_grad=True)
    bias = torch.randn(2, width, device=device, requires_grad=True)
    c0 = torch.randn(batch, width, device=device, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    mask[1, 4:] = False
    inputs = (u, x, weight_c, bias, c0)
    expected = plain_loop(*inputs, mask)
    grads = [torch.randn_like(value) for value in expected]
    expected_grads = torch.autograd.grad(expected, inputs, grads)

    given = (*(value.detach() for value in inputs), mask, None, None, 1.5, "tanh", False)
    h, states = kernel.forward(*given)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close((h, states), tuple(expected), **close)
    torch.testing.assert_close(kernel.backward(*grads, states, *given), expected_grads, **close)


def plain_loop(u, x, weight_c, bias, c0, mask, scale_x=1.5, activation=torch.tanh):
    """The recurrence step by step; where `mask` is false the state stays and the output is zero."""
    state, states, outputs = c0, [c0], []
    for step in range(u.shape[1]):
        candidate, forget, output = u[:, step].unbind(1)
        forget = torch.sigmoid(forget + weight_c[0] * state + bias[0])
        output = torch.sigmoid(output + weight_c[1] * state + bias[1])
        taken, highway = mask[:, step, None], scale_x * x[:, step]
        state = torch.where(taken, candidate + (state - candidate) * forget, state)
        outputs.append(torch.where(taken, highway + (activation(state) - highway) * output, 0.0))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)
