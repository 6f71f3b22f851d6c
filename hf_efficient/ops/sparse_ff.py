"""The sparse feed-forward layer of the Scaling Transformer, of which each token uses one unit in each block.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 3.1, and
the authors' code. The F hidden units stand in K blocks of N. A controller of low rank r chooses one of each block:

    logits[k, n] = C_up[k, n] . (C_down x) + c[k, n]
    m[k, n]      = 1 where n is the first maximum of logits[k], else 0
    y            = sum over k, n of relu(m[k, n] (U[k, n] . x)) D[k, n] + b

In training m is p = softmax(logits[k]) (soft), or the one-hot vector of a winner that is drawn from softmax(logits[k] /
temperature), with the gradient of p in its place (hard, straight-through). One draw for the whole call decides which.

`sparse_ff_naive.py` states this block by block. `sparse_ff_reference.py` is the fast form in plain torch, always
available; kernels/sparse-ff holds the compiled ones, which read the chosen rows alone.

Deviations from the paper, with the code: the controller has a bias, there is none before the activation (`inner_bias`
is an option), and its noise is scaled by the temperature. Both matrices are stored alike, one row a unit.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from .backend import (
    define_custom_op,
    fall_back,
    is_onnx_export,
    is_transformed,
    may_skip_dispatcher,
    plain_gradients,
    register_op,
    runs_as_plain_torch,
    select,
    use_backend,
)
from .kernel_loader import load_implementation
from .sparse_ff_reference import (
    ACTIVATIONS,
    evaluation_form,
    forward,
    in_pieces,
    plain_controlled_units,
    plain_gated_units,
    relu_units,
    relu_units_backward,
    units_at,
)
from .sparse_ff_reference import controller_code as _controller_code
from .sparse_ff_reference import controller_logits as _controller_logits
from .sparse_ff_reference import logits_of_code as _logits_of_code


OP_NAME = "sparse_ff"
KERNEL = "sparse-ff"

_WEIGHTS = ("controller_down", "controller_up", "controller_bias", "up", "down", "bias", "inner_bias")
_VECTORS = ("controller_bias", "bias", "inner_bias")

_IN_TORCH = SimpleNamespace(forward=forward)
_IN_TORCH = register_op(
    OP_NAME,
    _IN_TORCH,
    {device: partial(load_implementation, KERNEL, vars(_IN_TORCH), device) for device in ("cpu", "cuda")},
)


def _without_autocast(function, x: Tensor, *arguments):
    if not torch.is_autocast_enabled(x.device.type):
        return function(x, *arguments)
    with torch.autocast(x.device.type, enabled=False):
        return function(x, *arguments)


def _run(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    in_float64, is_strided = x.dtype == torch.float64, False
    for weight in arguments[: len(_WEIGHTS)]:
        if weight is not None:
            in_float64 = in_float64 or weight.dtype == torch.float64
            is_strided = is_strided or not (weight.is_contiguous() or weight.stride(-1) == 1)
    if in_float64:  # kernels compute in float32
        with use_backend("reference"):
            implementation = select(OP_NAME, x.device)
    else:
        implementation = select(OP_NAME, x.device)
    if implementation is not _IN_TORCH:
        if not is_strided:
            return implementation.forward(x, *arguments)  # in which autocast changes nothing
        implementation, arguments = _taking_strided(implementation, arguments)
    return _without_autocast(implementation.forward, x, *arguments)


def _taking_strided(kernel, arguments: tuple) -> tuple:
    """Implementation and arguments where a last dimension is not contiguous, since kernels read rows. Vectors are
    copied; for a matrix, of which a kernel would read a part, that would cost more than the torch form."""
    taken = list(arguments)
    for place, name in enumerate(_WEIGHTS):
        weight = taken[place]
        if weight is None or weight.shape[-1] == 1 or weight.stride(-1) == 1:
            continue
        if name in _VECTORS:
            taken[place] = weight.contiguous()
            continue
        problem = f"{name} is not contiguous in its last dimension"
        return fall_back(OP_NAME, problem, f"Give {name}.contiguous()."), arguments
    return kernel, tuple(taken)


_op = define_custom_op(
    OP_NAME,
    _run,
    lambda x, *arguments: (torch.empty_like(x), x.new_empty(x.shape[0], arguments[2].shape[0], dtype=torch.int32)),
    schema="(Tensor x, Tensor controller_down, Tensor controller_up, Tensor controller_bias, Tensor up, Tensor down, "
    "Tensor? bias, Tensor? inner_bias, str activation, bool multiply_by_controller) -> (Tensor, Tensor)",
)


def controller_logits(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """
    Logits by which a controller chooses units, in float32 (float64 for float64 input) whatever the dtype of the input,
    under autocast too: rounded to 16 bits many would be equal.

    Args:
        x (`Tensor` of shape `(..., width)`): the layer's input.
        down (`Tensor` of shape `(rank, width)`): C_down.
        up (`Tensor` of shape `(blocks, block size, rank)`): C_up.
        bias (`Tensor` of shape `(blocks, block size)`): c.

    Returns:
        `Tensor` of shape `(..., blocks, block size)`.
    """
    return _without_autocast(_controller_logits, x, down, up, bias)


def controller_code(x: Tensor, down: Tensor) -> Tensor:
    """
    Inner vectors of a controller, `(..., rank)`, in the precision of [`controller_logits`].

    Args:
        x (`Tensor` of shape `(..., width)`): the layer's input.
        down (`Tensor` of shape `(rank, width)`): C_down.
    """
    return _without_autocast(_controller_code, x, down)


def logits_of_code(code: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """
    Logits of a controller as [`controller_logits`] gives them.

    Args:
        code (`Tensor` of shape `(..., rank)`): its inner vectors, of [`controller_code`].
        up, bias: see [`controller_logits`].
    """
    return _without_autocast(_logits_of_code, code, up, bias)


def draw_winners(logits: Tensor, temperature: float, uniforms: Tensor | None = None) -> Tensor:
    """
    Draw one unit of each block, from softmax(logits / temperature).

    Args:
        logits (`Tensor` of shape `(..., blocks, block size)`): the controller's.
        temperature (`float`): scale of the noise.
        uniforms (`Tensor` of the shape of `logits`, *optional*): numbers between 0 and 1 that Gumbel noise is made of,
            of which the maximum wins, the first one among equals. By default one number is drawn for each block, by
            [`draw_levels`], and the unit wins at which the sum of probabilities exceeds it.

    Returns:
        `Tensor` of shape `(..., blocks)`: indices within the block.
    """
    logits = logits.detach()
    if uniforms is not None:
        return (logits.log_softmax(-1) - temperature * (-uniforms.log()).log()).argmax(-1)
    levels = draw_levels(logits.shape[:-1], logits.device).to(logits.dtype)
    if torch.compiler.is_compiling() or is_transformed() or logits.dim() != 3:
        return units_at(logits, levels, temperature)
    pieces = in_pieces(len(logits), logits[0].numel(), logits.device)
    return torch.cat([units_at(logits[piece], levels[piece], temperature) for piece in pieces])


def draw_levels(shape: torch.Size, device: torch.device) -> Tensor:
    """Draw the numbers that [`draw_winners`] would draw, of the shape of winners."""
    return torch.rand(shape, dtype=torch.float32, device=device)


class _ReluUnits(torch.autograd.Function):
    """Hidden units with ReLU, which keeps the pre-activations and the controller's inner vectors for its backward pass
    and nothing of the size of the hidden layer besides."""

    @staticmethod
    def forward(
        pre_activations: Tensor, code: Tensor, up: Tensor, bias: Tensor, winners: Tensor | None, multiply: bool
    ) -> Tensor:
        return relu_units(pre_activations, code, up, bias, winners, multiply)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.multiply = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        tensors = ctx.saved_tensors
        # With `is_grads_batched` a gradient stands for several, which nothing can be written into.
        if torch.is_grad_enabled() or is_transformed() or is_legacy_batchedtensor(gradient):
            return *plain_gradients(plain_controlled_units, (*tensors, ctx.multiply), (gradient,))[:4], None, None
        # Under autocast still, where the caller runs its backward pass there.
        return *_without_autocast(relu_units_backward, gradient, *tensors, ctx.multiply), None, None


def gated_units(
    pre_activations: Tensor,
    code: Tensor,
    up: Tensor,
    bias: Tensor,
    winners: Tensor | None,
    activation: str = "relu",
    multiply_by_controller: bool = False,
) -> Tensor:
    """
    Hidden units of the training form.

    Args:
        pre_activations (`Tensor` of shape `(tokens, blocks * block size)`): all units' products with the input.
        code (`Tensor` of shape `(tokens, rank)`): the controller's inner vectors, as [`controller_code`] gives them.
        up (`Tensor` of shape `(blocks, block size, rank)`): C_up.
        bias (`Tensor` of shape `(blocks, block size)`): c.
        winners (`Tensor` of shape `(tokens, blocks)`, *optional*): chosen units, by their index in their block; the
            mask is hard then, with the gradient of the soft one. Without them it is soft.
        activation (`str`, defaults to `"relu"`): one of `relu`, `gelu`, `gelu_new` and `silu`.
        multiply_by_controller (`bool`, defaults to `False`): scale a winner by its probability, which gets no gradient
            from this; a soft mask has scaled it already.

    Returns:
        `Tensor`: of the shape and dtype of `pre_activations`.
    """
    return _without_autocast(_gated_units, pre_activations, code, up, bias, winners, activation, multiply_by_controller)


def _gated_units(pre_activations: Tensor, code: Tensor, up: Tensor, bias: Tensor, winners, activation, multiply):
    up, bias = up.to(code.dtype), bias.to(code.dtype)
    if activation != "relu" or torch.compiler.is_compiling() or is_transformed() or is_onnx_export():
        logits = _logits_of_code(code, up, bias)
        return plain_gated_units(pre_activations, logits, winners, activation, multiply)
    return _ReluUnits.apply(pre_activations, code, up, bias, winners, multiply)


def sparse_ff(
    x: Tensor,
    controller_down: Tensor,
    controller_up: Tensor,
    controller_bias: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    inner_bias: Tensor | None = None,
    *,
    activation: str = "relu",
    multiply_by_controller: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    Apply the sparse feed-forward layer as in evaluation and decoding: each token's winners alone.

    Compiled kernels compute in float32 and read the rows of winners alone; with any argument in float64 it runs in
    plain torch, whatever backend is asked for.

    A row of `down` counts where its unit is not 0: rows of losers, and of winners that ReLU kills, may hold inf or NaN.
    Plain torch on another device than the CPU, and with a gradient as below, multiplies all by 0: NaN comes out.

    Where a gradient is wanted, and under the transforms of `torch.func`, it runs out of differentiable operators. The
    winners are constants then: the controller gets a gradient by `multiply_by_controller` alone.

    Args:
        x (`Tensor` of shape `(..., width)`): the layer's input.
        controller_down, controller_up, controller_bias: see [`controller_logits`].
        up, down (`Tensor` of shape `(blocks, block size, width)`): U and D. Units may lie apart, as in records that
            hold both rows of a unit; with another last dimension than a contiguous one, here or in the controller's
            matrices, backend `"auto"` runs in plain torch and says so once.
        bias (`Tensor` of shape `(width,)`, *optional*): b.
        inner_bias (`Tensor` of shape `(blocks, block size)`, *optional*): added to a unit's product with the input.
        activation (`str`, defaults to `"relu"`): one of `relu`, `gelu`, `gelu_new` and `silu`.
        multiply_by_controller (`bool`, defaults to `False`): scale a winner by its probability in its block.

    Returns:
        `tuple(Tensor, Tensor)`: the output, of the shape and dtype of `x`, and the winners, `(..., blocks)`, int32.

    Raises:
        ValueError: if shapes or dtypes do not fit together, the activation is none of these, or a kernel is asked for
            by name and a matrix is not contiguous in its last dimension.
    """
    _check(x, controller_down, controller_up, controller_bias, up, down, bias, inner_bias, activation)
    given = x
    if x.dim() != 2:  # a view costs a microsecond
        x = x.reshape(-1, x.shape[-1])
    weights = (controller_down, controller_up, controller_bias, up, down, bias, inner_bias)
    arguments = (*weights, activation, multiply_by_controller)
    if runs_as_plain_torch(OP_NAME) or _wants_gradient(x, *weights):
        logits = controller_logits(x, controller_down, controller_up, controller_bias)
        output, winners = _without_autocast(
            evaluation_form, x, logits, *weights[3:], activation, multiply_by_controller
        )
    else:
        output, winners = _run(x, *arguments) if may_skip_dispatcher(x) else _op(x, *arguments)
    if given.dim() == 2:
        return output, winners
    return output.reshape_as(given), winners.reshape(*given.shape[:-1], up.shape[0])


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(x, controller_down, controller_up, controller_bias, up, down, bias, inner_bias, activation: str) -> None:
    if up.dim() != 3:
        raise ValueError(f"up must have shape (blocks, block size, width); got {tuple(up.shape)}.")
    blocks, size, width = up.shape
    rank = controller_down.shape[0]
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x must have shape (..., {width}), as wide as the rows of up; got {tuple(x.shape)}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    for name, tensor, shape in (
        ("x", x, None),
        ("controller_down", controller_down, (rank, width)),
        ("controller_up", controller_up, (blocks, size, rank)),
        ("controller_bias", controller_bias, (blocks, size)),
        ("up", up, None),
        ("down", down, (blocks, size, width)),
        ("bias", bias, (width,)),
        ("inner_bias", inner_bias, (blocks, size)),
    ):
        if tensor is None:
            continue
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, not {tensor.dtype}.")
