"""Shapes, gradients and the public function of the ops in C++."""

from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix, ops


def _forward_fake(u, x, weight_c, bias, c0, mask, document_start, dropout_mask, scale_x, activation, reverse):
    batch, length, _, width = u.shape
    h = u.new_empty(batch, length, width, dtype=u.dtype if x is None else x.dtype)
    return h, u.new_empty(batch, length + 1, width, dtype=torch.promote_types(u.dtype, torch.float32))


def _forward_last_fake(u, x, *rest):
    batch, length, _, width = u.shape
    h = u.new_empty(batch, length, width, dtype=u.dtype if x is None else x.dtype)
    return h, u.new_empty(batch, width, dtype=torch.promote_types(u.dtype, torch.float32))


def _backward_fake(grad_h, grad_states, states, u, x, weight_c, bias, c0, *rest):
    return tuple(
        states.new_empty(0) if given is None else torch.empty_like(given, memory_format=torch.contiguous_format)
        for given in (u, x, weight_c, bias, c0)
    )


def refuse_forward_mode(function):
    """Wrap a function so that it raises in forward mode, where torch would take its derivative for zero."""

    @wraps(function, updated=())  # an op's attributes are its own
    def run(*arguments, **named):
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "The compiled recurrence has no forward-mode derivative: call `sru_recurrence` of "
                "`hf_efficient.ops.sru`, which is made of plain torch operators there."
            )
        return function(*arguments, **named)

    return run


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.plain = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(output[1], *(value if isinstance(value, Tensor) else None for value in inputs))


@refuse_forward_mode
def _gradients(ctx, grad_h, grad_states):
    states, *tensors = ctx.saved_tensors
    arguments = [plain if tensor is None else tensor for plain, tensor in zip(ctx.plain, tensors, strict=False)]
    gradients = ops.backward.default(grad_h, grad_states, states, *arguments)
    given = (None if tensor is None else grad for grad, tensor in zip(gradients, tensors, strict=False))
    return (*given, *[None] * 6)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError(
        "The gradient of SRU's recurrence has no gradient of its own: it cannot be differentiated twice."
    )


torch.library.register_fake(add_op_namespace_prefix("forward"), _forward_fake)
torch.library.register_fake(add_op_namespace_prefix("forward_last"), _forward_last_fake)
torch.library.register_fake(add_op_namespace_prefix("backward"), _backward_fake)
for _name in ("forward_out", "backward_out"):
    torch.library.register_fake(add_op_namespace_prefix(_name), lambda *arguments: None)
torch.library.register_autograd(add_op_namespace_prefix("forward"), _gradients, setup_context=_setup_context)
torch.library.register_autograd(add_op_namespace_prefix("backward"), _no_second_derivative)


@refuse_forward_mode
def sru_recurrence(
    u: Tensor, x: Tensor | None = None, weight_c: Tensor | None = None, bias: Tensor | None = None,
    c0: Tensor | None = None, mask: Tensor | None = None, document_start: Tensor | None = None,
    dropout_mask: Tensor | None = None, scale_x: float = 1.0, activation: str = "identity", reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Run SRU's recurrence over a sequence, in one direction.

    State, gates and sums are in float32 (float64 for float64 `u`), whatever the dtype of the rest.

    Args:
        u (`Tensor` of shape `(batch, length, k, width)`): pre-activations, planar: candidate, forget gate, output gate
            and, with `k = 4`, the highway input. float32, float64, bfloat16 or float16, as all tensors but the flags.
        x (`Tensor` of shape `(batch, length, width)`, *optional*): highway input with `k = 3`. Without it, and with
            `k = 3`, there is no skip connection.
        weight_c (`Tensor` of shape `(2, width)`, *optional*): v_f and v_r; 0 by default.
        bias (`Tensor` of shape `(2, width)`, *optional*): b_f and b_r; 0 by default.
        c0 (`Tensor` of shape `(batch, width)`, *optional*): initial state; 0 by default.
        mask (`Tensor` of shape `(batch, length)`, *optional*): boolean, `False` at padding. There the state stays
            exactly as it was, h is 0, and nothing that stands in `u` or `x`, NaN included, has an effect.
        document_start (`Tensor` of shape `(batch, length)`, *optional*): boolean, `True` where the step starts
            from state 0.
        dropout_mask (`Tensor` of shape `(batch, width)`, *optional*): m, the same at all steps; no gradient.
        scale_x (`float`, defaults to 1): factor of `x`.
        activation (`str`, defaults to `"identity"`): g, `"identity"` or `"tanh"`.
        reverse (`bool`, defaults to `False`): run from the last step to the first.

    Returns:
        `tuple(Tensor, Tensor)`: h of shape `(batch, length, width)` in the dtype of `x` (of `u` without `x`), and c of
        every step, `(batch, length, width)`. In reverse the last state is that at step 0.

    Raises:
        RuntimeError: if shapes, dtypes, devices or options do not fit together; says which. In forward mode
            (`torch.func.jvp`, dual numbers), which torch would take the derivative for zero in.
    """
    h, states = ops.forward.default(
        u, x, weight_c, bias, c0, mask, document_start, dropout_mask, scale_x, activation, reverse
    )
    return h, states[:, :-1] if reverse else states[:, 1:]
