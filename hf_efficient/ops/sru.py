"""The elementwise recurrence of SRU and SRU++.

Sources: Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", EMNLP 2018, arXiv 1709.02755; Lei,
"When Attention Meets Fast Recurrence" (SRU++), EMNLP 2021, arXiv 2102.12459, section 2. For one unit, with u0, u1, u2
its pre-activations at step t, x' the highway input and g the activation,

    f_t = sigmoid(u1_t + v_f c_{t-1} + b_f)
    r_t = sigmoid(u2_t + v_r c_{t-1} + b_r)
    c_t = u0_t + (c_{t-1} - u0_t) f_t
    h_t = x'_t + (g(c_t) - x'_t) m r_t

m is a dropout mask shared over time. Only c is sequential, and given the c of all steps the gradient that runs
backwards through time is linear:

    dc_t = E_t + K_{t+1} dc_{t+1}      K_t = f_t + v_f (c_{t-1} - u0_t) f_t (1 - f_t)
    E_t  = dh_t m r_t g'(c_t) + v_r dr_{t+1}

`sru_naive.py` states the formulas step by step. `sru_reference.py` is the fast form in plain torch, always available;
kernels/sru-recurrence holds the compiled ones. `sru_plain.py` is what transforms and exporters see through.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from .backend import (
    define_custom_op,
    may_skip_dispatcher,
    plain_gradients,
    register_op,
    requested_backend,
    runs_as_plain_torch,
    select,
    use_backend,
)
from .kernel_loader import load_implementation
from .sru_plain import forward as plain_forward
from .sru_reference import backward, empty_results, forward, forward_last


OP_NAME = "sru_recurrence"
BACKWARD_NAME = "sru_recurrence_backward"
KERNEL = "sru-recurrence"
ACTIVATIONS = ("identity", "tanh")


def _backward_fake(grad_h: Tensor | None, grad_states: Tensor | None, states: Tensor, *arguments):
    return tuple(
        states.new_empty(0) if wanted is None else torch.empty_like(wanted, memory_format=torch.contiguous_format)
        for wanted in arguments[:5]
    )


def _run(name: str, function: str, device: torch.device, *arguments):
    implementation = getattr(select(name, device), function)
    if not torch.is_autocast_enabled(device.type):
        return implementation(*arguments)
    with torch.autocast(device.type, enabled=False):
        return implementation(*arguments)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.backend = requested_backend()  # autograd may run the backward pass in a thread of its own
    ctx.arguments = [None if isinstance(value, Tensor) else value for value in inputs]
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad_h: Tensor | None, grad_states: Tensor | None):
    states, *tensors = ctx.saved_tensors
    arguments = [plain if tensor is None else tensor for plain, tensor in zip(ctx.arguments, tensors, strict=True)]
    if torch.is_grad_enabled() or runs_as_plain_torch(BACKWARD_NAME):
        return plain_gradients(plain_forward, arguments, (grad_h, grad_states))
    with use_backend(ctx.backend):
        grads = _backward_op(grad_h, grad_states, states, *arguments)
    given = (grad if tensor is not None else None for grad, tensor in zip(grads, tensors, strict=False))
    return *given, *(None for _ in arguments[5:])


# What an implementation of the op holds; `forward_last` is for calls without a gradient.
_IN_TORCH = SimpleNamespace(forward=forward, forward_last=forward_last, backward=backward)
for _name in (OP_NAME, BACKWARD_NAME):
    register_op(
        _name,
        _IN_TORCH,
        {device: partial(load_implementation, KERNEL, vars(_IN_TORCH), device) for device in ("cpu", "cuda")},
    )
_ARGUMENTS = (
    "Tensor u, Tensor? x, Tensor? weight_c, Tensor? bias, Tensor? c0, Tensor? mask, Tensor? document_start, "
    "Tensor? dropout_mask, float scale_x, str activation, bool reverse"
)
_backward_op = define_custom_op(
    BACKWARD_NAME,
    lambda grad_h, grad_states, states, *arguments: _run(
        BACKWARD_NAME, "backward", states.device, grad_h, grad_states, states, *arguments
    ),
    _backward_fake,
    schema=f"(Tensor? grad_h, Tensor? grad_states, Tensor states, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_op = define_custom_op(
    OP_NAME,
    lambda u, *arguments: _run(OP_NAME, "forward", u.device, u, *arguments),
    empty_results,
    _setup_context,
    _backward,
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)


def sru_recurrence(
    u: Tensor,
    x: Tensor | None = None,
    weight_c: Tensor | None = None,
    bias: Tensor | None = None,
    c0: Tensor | None = None,
    mask: Tensor | None = None,
    document_start: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    *,
    scale_x: float = 1.0,
    activation: str = "identity",
    reverse: bool = False,
    return_all_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Run SRU's recurrence over a sequence, in one direction.

    The state and the gates are computed in float32 (float64 for float64 input), whatever the dtype of the input.

    Under the transforms of `torch.func`, in forward mode, in a backward pass with `create_graph=True` and in an export
    to ONNX it runs out of plain operators, whatever backend is asked for: right to any order of derivative, but a loop
    in Python over the steps (in ONNX one `Scan`), which keeps several tensors of every step.

    Args:
        u (`Tensor` of shape `(batch, length, k, width)`): pre-activations, planar: candidate, forget gate, output gate
            and, with `k = 4`, the highway input. The last dimension should be contiguous.
        x (`Tensor` of shape `(batch, length, width)`, *optional*): highway input with `k = 3`. Without it, and with
            `k = 3`, there is no skip connection: h = g(c) m r.
        weight_c (`Tensor` of shape `(2, width)`, *optional*): v_f and v_r, how the gates look at the state. Without
            it they do not (SRU's `v1`, and the SRU of the Scaling Transformer).
        bias (`Tensor` of shape `(2, width)`, *optional*): b_f and b_r.
        c0 (`Tensor` of shape `(batch, width)`, *optional*): initial state, in the order of time of `reverse`.
        mask (`Tensor` of shape `(batch, length)`, *optional*): boolean, `False` at padding. There the state stays
            exactly as it was, h is 0, and nothing that stands in `u` or `x`, NaN included, has an effect.
        document_start (`Tensor` of shape `(batch, length)`, *optional*): boolean, `True` where a new document
            begins: the step starts from a state of zero. In reverse that is a document's last token.
        dropout_mask (`Tensor` of shape `(batch, width)`, *optional*): m, the same at all steps; no gradient.
        scale_x (`float`, defaults to 1): factor of `x` (not of the highway input with `k = 4`, as in the original).
        activation (`str`, defaults to `"identity"`): g, `"identity"` or `"tanh"`.
        reverse (`bool`, defaults to `False`): run from the last step to the first.
        return_all_states (`bool`, defaults to `False`): return c of every step in place of the last one's.

    Returns:
        `tuple(Tensor, Tensor)`: h of shape `(batch, length, width)` in the dtype of `x` (of `u` without `x`), and the
        state after the last step, `(batch, width)`, or after every step, `(batch, length, width)`, in the dtype of the
        state. It is c itself, never g(c).

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
    """
    _check(u, x, weight_c, bias, c0, mask, document_start, dropout_mask, activation)
    arguments = (u, x, weight_c, bias, c0, mask, document_start, dropout_mask, float(scale_x), activation, reverse)
    if runs_as_plain_torch(OP_NAME):
        # An exporter takes the loop over time as one operator; no transform knows that one well.
        h, states = plain_forward(*arguments, scan=torch.compiler.is_exporting())
    elif not may_skip_dispatcher(u):
        h, states = _op(*arguments)
    elif return_all_states:
        h, states = _run(OP_NAME, "forward", u.device, *arguments)
    else:
        return _run(OP_NAME, "forward_last", u.device, *arguments)
    if return_all_states:
        return h, states[:, :-1] if reverse else states[:, 1:]
    return h, states[:, 0] if reverse else states[:, -1]


def _check(u, x, weight_c, bias, c0, mask, document_start, dropout_mask, activation: str) -> None:
    if u.dim() != 4 or u.shape[2] not in (3, 4):
        raise ValueError(f"u must have shape (batch, length, 3 or 4, width); got {tuple(u.shape)}.")
    if not u.is_floating_point():
        raise ValueError(f"u must be of a floating-point dtype, not {u.dtype}.")
    batch, length, parts, width = u.shape
    if length == 0:
        raise ValueError("The recurrence needs at least one step; u has length 0.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    if parts == 4 and x is not None:
        raise ValueError("With four sub-matrices the highway input is the fourth of u: give no x.")
    expected = {
        "x": (x, (batch, length, width)),
        "weight_c": (weight_c, (2, width)),
        "bias": (bias, (2, width)),
        "c0": (c0, (batch, width)),
        "mask": (mask, (batch, length)),
        "document_start": (document_start, (batch, length)),
        "dropout_mask": (dropout_mask, (batch, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}.")
        if name in ("mask", "document_start") and tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be boolean, not {tensor.dtype}.")
        if name not in ("mask", "document_start") and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, not {tensor.dtype}.")
