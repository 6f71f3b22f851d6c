"""The one place that decides which implementation of an op runs.

Every op has a `reference` implementation in plain torch. Some also have compiled kernels, which are looked up the
first time they are wanted, never at import. The choice is made by, in this order,

1. the innermost `with use_backend("reference"):`,
2. the environment variable `HF_EFFICIENT_BACKEND`,
3. `"auto"`: the compiled kernel of the tensors' device where there is one, else `reference`.

Asking for `cpu` or `cuda` by name where it is missing raises `BackendUnavailableError`; `auto` falls back and says so
once. `last_backend(op)` tells what ran.

Transforms of `torch.func`, forward mode and exporters to ONNX see a custom op from outside alone: they would take a
derivative for zero, or stop. Where one of them is active (`runs_as_plain_torch(op)`), the reference runs out of plain
operators, whatever was asked for, and says so once. A derivative of a gradient (`create_graph=True`) cannot be noticed
before the backward pass, which then takes the same form (`plain_gradients`).
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernel_loader import KernelNotBuiltError, build_command, how_to_build


_functorch = torch._C._functorch
logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "cuda")
ENVIRONMENT_VARIABLE = "HF_EFFICIENT_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


@dataclass
class _Op:
    """State of one op: its torch form, how to load its kernels, and what ran last."""

    reference: Any
    loaders: dict[str, Callable[[], Any]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    last_backend: str | None = None


# Of the process, not of this module: a copy of this code that was loaded beside a checkpoint shares the ops (see
# `define_custom_op`), and so must share what is chosen for them and what ran.
_shared = torch.ops.hf_efficient.__dict__.setdefault(
    "backend_state", {"requested": ContextVar("hf_efficient_backend", default=None), "ops": {}, "said": set()}
)
_requested: ContextVar[str | None] = _shared["requested"]
_ops: dict[str, _Op] = _shared["ops"]
_said: set[tuple[str, str]] = _shared["said"]


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}, but a backend is one of {', '.join(BACKENDS)}.")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """
    Choose the implementation of every op that runs inside the `with` block, in this thread or task. A backward pass
    follows its forward pass, wherever it runs, unless it was compiled; `HF_EFFICIENT_BACKEND` holds for all threads.

    Args:
        name (`str`): `"auto"`, `"reference"`, `"cpu"` or `"cuda"`.

    Raises:
        ValueError: if `name` is none of these.
    """
    token = _requested.set(_checked(name, "use_backend's argument"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """The backend asked for: by `use_backend`, else by `HF_EFFICIENT_BACKEND`, else `"auto"`."""
    chosen = _requested.get()
    if chosen is not None:
        return chosen
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def register_op(name: str, reference: Any, loaders: Mapping[str, Callable[[], Any]] | None = None) -> Any:
    """
    Make an op known, unless one of this name is.

    Args:
        name (`str`): the op's name.
        reference (`Any`): its implementation in plain torch: a function, or an object that holds several.
        loaders (`dict[str, Callable]`, *optional*): for each compiled backend (`"cpu"`, `"cuda"`) a function without
            arguments that returns an implementation of the same form, or raises `ImportError` or `OSError` saying what
            is missing. It is called when the kernel is first wanted.

    Returns:
        `Any`: the implementation in plain torch that [`select`] gives: of the copy of this code that was loaded first.
    """
    return _ops.setdefault(name, _Op(reference, dict(loaders or {}))).reference


def _load(op: _Op, name: str, backend: str) -> Any:
    if backend not in op.kernels and backend not in op.failures:
        try:
            op.kernels[backend] = op.loaders[backend]()
        except (ImportError, OSError) as error:
            op.failures[backend] = error.with_traceback(None)
    return op.kernels.get(backend)


def select(name: str, device: torch.device) -> Any:
    """
    The implementation of op `name` to run on tensors of `device`, noted as the last one that ran.

    Raises:
        BackendUnavailableError: if a compiled backend was asked for by name and is missing, or is for another device.
    """
    op = _ops[name]
    backend = requested_backend()
    explicit = backend in ("cpu", "cuda")
    device_type = device.type
    if backend == "auto":
        backend = device_type if device_type in op.loaders else "reference"
    if backend != "reference":
        kernel = op.kernels.get(backend)
        if kernel is None and backend in op.loaders:
            kernel = _load(op, name, backend)
        if kernel is not None and device_type not in (backend, "meta"):
            raise BackendUnavailableError(
                f"Op {name!r} was asked to run by {backend!r}, but its tensors are on {device}."
            )
        if kernel is not None:
            op.last_backend = backend
            return kernel
        if explicit:
            raise BackendUnavailableError(_unavailable(op, name, backend))
        _say_fallback_once(op, name, backend)
    op.last_backend = "reference"
    return op.reference


def fall_back(name: str, problem: str, advice: str) -> Any:
    """
    The torch form of op `name`, in the place of a kernel that was selected and does not take the arguments; noted as
    what ran, and said once.

    Args:
        name (`str`): the op's name.
        problem (`str`): what the kernel does not take.
        advice (`str`): how to make the kernel run.

    Raises:
        ValueError: if the kernel was asked for by name.
    """
    op = _ops[name]
    if requested_backend() != "auto":
        raise ValueError(f"The {op.last_backend!r} kernel of op {name!r} cannot run: {problem}. {advice}")
    if (name, problem) not in _said:
        _said.add((name, problem))
        logger.warning("Op %r runs in plain torch, since %s. %s", name, problem, advice)
    op.last_backend = "reference"
    return op.reference


def _unavailable(op: _Op, name: str, backend: str) -> str:
    if backend not in op.loaders:
        return (
            f"Op {name!r} has no {backend!r} kernel; it has {', '.join(['reference', *op.loaders])}. "
            f"Use backend 'auto' to run each op by the best implementation that it has."
        )
    return f"The {backend!r} kernel of op {name!r} could not be loaded: {op.failures[backend]}. {how_to_build()}"


def _say_fallback_once(op: _Op, name: str, backend: str) -> None:
    # By the reason: an op and its backward pass come from one kernel and lack it together.
    failure = op.failures[backend]
    reason = (backend, str(failure))
    if reason not in _said:
        _said.add(reason)
        if isinstance(failure, KernelNotBuiltError):
            message = "Op %r runs in plain torch, since its %r kernel is not built: `%s` builds it."
            logger.warning(message, name, backend, build_command())
        else:
            message = "Op %r runs in plain torch, since its %r kernel is not there: %s. %s"
            logger.warning(message, name, backend, failure, how_to_build())


def note_reference(name: str) -> None:
    """Note that what op `name` stands for ran in plain torch, where a caller decides that without asking for the op."""
    _ops[name].last_backend = "reference"


def last_backend(name: str) -> str | None:
    """The backend by which op `name` ran last in this process; `None` if it has not run."""
    return _ops[name].last_backend


def is_transformed() -> bool:
    """
    Return whether a transform of `torch.func` (`grad`, `vmap`, `jvp` and what is made of them) is at work, or a level
    of forward mode is open. They see through operators of torch alone.
    """
    # An instance, since `is not None` would hold for every call that torch.compile traces.
    return forward_ad._current_level >= 0 or isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter)


def is_onnx_export() -> bool:
    """Return whether this call is traced for an export to ONNX, by either exporter of `torch.onnx`."""
    return (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def is_at_most(count: int | torch.SymInt, limit: int) -> bool:
    """Return whether a size is at most `limit`, for a choice between two forms of an op; in an export that leaves the
    size open it is not, since one form has to serve for all sizes."""
    if isinstance(count, torch.SymInt) and torch.compiler.is_exporting():
        return False
    return bool(count <= limit)


def runs_as_plain_torch(name: str) -> bool:
    """
    Return whether op `name` has to run out of plain differentiable operators now, whatever backend is asked for: inside
    a transform or forward mode, see [`is_transformed`], and in an export to ONNX. Notes that it does.
    """
    if not (is_transformed() or is_onnx_export()):
        return False
    if not torch.compiler.is_compiling():  # else nothing runs yet
        _ops[name].last_backend = "reference"
        if requested_backend() != "reference" and _ops[name].loaders and (name, "plain") not in _said:
            _said.add((name, "plain"))
            logger.warning(
                "Op %r runs out of plain torch operators, slower than its kernels, wherever a transform of torch.func, "
                "forward-mode differentiation or an export to ONNX is active: none of them sees into a kernel.",
                name,
            )
    return True


def attention_context(query: Tensor, key: Tensor, value: Tensor) -> AbstractContextManager:
    """
    Context for attention among these tensors by `scaled_dot_product_attention`, whose fused kernels have neither a
    forward-mode derivative nor a batched form nor a second derivative.

    Under [`is_transformed`] it runs out of plain operators. A derivative of its gradient is refused in words that say
    what to do; before the backward pass nobody knows that it will be asked for.
    """
    if is_transformed():
        return sdpa_kernel(SDPBackend.MATH)
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        for tensor in (query, key, value):
            if tensor.requires_grad:
                tensor.register_hook(_explain_second_derivative)
    return nullcontext()


def _explain_second_derivative(gradient: Tensor) -> Tensor:
    """Hook of a tensor: let the error of torch's that a gradient ends in, if it does, be one of ours."""
    node = gradient.grad_fn  # None but under `create_graph=True`
    if node is None:
        return gradient
    nodes = [node, *(before for before, _ in node.next_functions if before is not None)]  # key and value at once: a sum
    refused = any(node.name().endswith("NotImplemented") for node in nodes)
    return _NoSecondDerivative.apply(gradient) if refused else gradient


class _NoSecondDerivative(torch.autograd.Function):
    """Identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        raise RuntimeError(
            "A gradient was to be differentiated (create_graph=True) that comes through torch's fused attention, whose "
            "backward pass has no derivative. The explicit form has one: model.set_attn_implementation('eager')."
        )


def plain_gradients(
    form: Callable, arguments: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """
    Gradients that can be differentiated in their turn, for the backward pass of an op under `create_graph=True` or a
    transform.

    Args:
        form (`Callable`): the op out of plain operators; returns a tensor or a tuple of them.
        arguments (`Sequence`): its arguments, tensors and others.
        cotangents (`Sequence[Tensor]`): the gradient of each result, or `None` for zero.

    Returns:
        `tuple`: for each argument the gradient, or `None` where it takes none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: an argument may be computed from another, and its share must not be counted there once more.
        aliases = [
            value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value for value in arguments
        ]
        results = form(*aliases)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(one, grad) for one, grad in zip(results, cotangents, strict=True) if grad is not None]
        places = [index for index, value in enumerate(aliases) if isinstance(value, Tensor) and value.requires_grad]
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            [aliases[index] for index in places],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    gradients: list[Tensor | None] = [None] * len(aliases)
    for index, gradient in zip(places, found, strict=True):
        gradients[index] = gradient
    return tuple(gradients)


def may_skip_dispatcher(tensor: torch.Tensor) -> bool:
    """
    Return whether nothing looks at a call on `tensor`: no gradient, compiler, tracer or mode; transforms see no op at
    all, see [`runs_as_plain_torch`]. Then an op may call its implementation directly, and saves what the dispatcher
    costs, which counts where a model decodes token by token.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # A private name, the same in torch 2.11 to 2.14; without it the dispatcher is always asked.
    try:
        modes = torch._C._len_torch_dispatch_stack() > 0
    except AttributeError:
        return False
    return not modes and type(tensor) is torch.Tensor and (tensor.is_cpu or tensor.is_cuda)


def define_custom_op(
    name: str,
    forward: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    schema: str | None = None,
) -> Callable:
    """
    Register `hf_efficient::name` with `torch.library`, so that `torch.compile` takes the op as one node.

    A process can hold this code twice, from the package and flattened beside a checkpoint that was loaded with
    `trust_remote_code`; torch allows one registration, so the second comer gets the first one's op.

    Args:
        name (`str`): the op's name.
        forward (`Callable`): the implementation.
        fake (`Callable`): the same signature; returns empty tensors of the right shape, dtype and device.
        setup_context, backward (`Callable`, *optional*): as `torch.library.register_autograd` takes them; without
            them the op has no gradient.
        schema (`str`, *optional*): the signature in torch's schema language; by default that of `forward`'s
            annotations.

    Returns:
        `Callable`: the op.
    """
    namespace = torch.ops.hf_efficient
    if hasattr(namespace, name):
        return getattr(namespace, name)

    @wraps(forward)
    def run(*arguments):
        # torch would go on without the tangents of the arguments, as if the derivative were zero.
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                f"torch.ops.hf_efficient.{name} has no forward-mode derivative. Call the function of "
                "hf_efficient.ops that stands before it, or compile or export the model anew with forward mode inside."
            )
        return forward(*arguments)

    op = torch.library.custom_op(f"hf_efficient::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op
