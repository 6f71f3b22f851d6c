"""One block of half residuals in its two runs: forward, and again in the backward pass; see `reversible.py`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .rerun import Remembered, autocast_as, autocast_modes, read_generators, refuse_captured, write_generators


@dataclass(frozen=True)
class HalfResidual:
    """
    One half residual of a block, for one call: `first + module(second, memory, **arguments)`.

    Args:
        module (`nn.Module`): maps a stream to a tensor of the same shape. It takes gradients of its own parameters
            alone, and its buffers do not mind that it runs twice. `memory` is a
            [`~hf_efficient.ops.rerun.Remembered`], for what a second run must not decide anew.
        arguments (`Mapping[str, Any]`, *optional*): what it takes by keyword. A tensor that needs a gradient gets one
            if it stands here itself, not inside a list or dict.
        swap (`bool`, defaults to `True`): whether the streams change places behind it.
        memory (`Remembered`, *optional*): of a caller that runs the whole block again itself, as gradient checkpointing
            does.
    """

    module: nn.Module
    arguments: Mapping[str, Any] = field(default_factory=dict)
    swap: bool = True
    memory: Remembered | None = None

    def describe(self, block: int, place: int) -> str:
        """Name the half residual in an error."""
        return f"Half residual {place} of block {block} ({type(self.module).__name__})"


@dataclass(frozen=True)
class StreamForm:
    """
    Form of the streams of a chain.

    Args:
        dtype (`torch.dtype`): of what halves are given.
        pads (`Tensor` of shape `(..., 1)`, *optional*): `True` where the streams are held at zero.
    """

    dtype: torch.dtype
    pads: Tensor | None

    def branch(self, call: Callable, stream: Tensor, memory: Remembered, arguments: Mapping, where: str) -> Tensor:
        """Run f of a half residual and return what is added to the other stream."""
        memory.begin(stream.device)
        output = call(stream.to(self.dtype), memory, **arguments)
        if not isinstance(output, Tensor) or output.shape != stream.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(f"{where} must return a tensor of its input's shape {tuple(stream.shape)}; got {got}.")
        output = output.to(stream.dtype)
        return output if self.pads is None else output.masked_fill(self.pads, 0.0)


def _refuse_sharded_parts(module: nn.Module, where: str) -> None:
    """Raise where FSDP shards a part of a block: its weights would be gathered, and their gradients reduced, inside the
    block's node, out of sight of autograd."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    if not kinds:
        return
    for part in module.modules():
        if isinstance(part, kinds):
            raise ValueError(
                f"{where} is sharded by FSDP, itself or in its part {type(part).__name__}. Shard the model, or whole "
                "blocks: modules whose forward calls ReversibleChain.block."
            )


def _refuse_nested(value: Any, path: str, where: str) -> None:
    """Raise for a tensor inside a container of arguments that would lose its gradient."""
    parts: Any = ()
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{where} takes {path}, which needs a gradient: hand it over as an argument of its own.")
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    for key, part in parts:
        _refuse_nested(part, f"{path}[{key!r}]", where)


@dataclass
class _Step:
    """One half residual. Tensors that it uses are named by their place among the inputs of the block's node."""

    module: nn.Module
    swap: bool
    memory: Remembered
    where: str
    constants: dict[str, Any]
    tensors: dict[str, int]
    parameters: dict[str, int]
    training: bool
    generators: list[Tensor] = field(default_factory=list)

    def arguments(self, values: Sequence[Tensor]) -> dict[str, Any]:
        return {**self.constants, **{name: values[place] for name, place in self.tensors.items()}}

    def call_again(self, values: Sequence[Tensor]) -> Callable:
        """The module with its parameters taken from `values`, so that hooks on parameters see nothing."""
        if self.training != self.module.training:
            raise RuntimeError(
                f"{self.where} ran forward with training={self.training} and would run again with "
                f"training={self.module.training}: call train() or eval() before the forward pass, or after the "
                "backward pass."
            )
        replaced = {name: values[place] for name, place in self.parameters.items()}
        return lambda *given, **named: functional_call(self.module, replaced, given, named)


class BlockCall:
    """
    One call of a block, and all that its second run needs besides tensors.

    Args:
        halves (`Sequence[HalfResidual]`): of the block, in their order.
        number (`int`): of the block, for errors.
        form (`StreamForm`): of the streams.
        device (`torch.device`): of the streams.

    Attributes:
        inputs (`list[Tensor]`): parameters, and tensors among arguments, each once. They are to be kept by autograd,
            which notices when one is changed; `run` and `undo` take them as they come from there.
    """

    def __init__(self, halves: Sequence[HalfResidual], number: int, form: StreamForm, device: torch.device):
        self._form = form
        self._autocast = autocast_modes(device)
        self.inputs: list[Tensor] = []
        places: dict[int, int] = {}

        def place(tensor: Tensor) -> int:
            if id(tensor) not in places:
                places[id(tensor)] = len(self.inputs)
                self.inputs.append(tensor)
            return places[id(tensor)]

        self._steps: list[_Step] = []
        for index, half in enumerate(halves):
            where, constants, tensors = half.describe(number, index), {}, {}
            _refuse_sharded_parts(half.module, where)
            for name, value in half.arguments.items():
                if isinstance(value, Tensor):
                    tensors[name] = place(value)
                else:
                    _refuse_nested(value, repr(name), where)
                    constants[name] = value
            parameters = {name: place(parameter) for name, parameter in half.module.named_parameters()}
            memory = Remembered() if half.memory is None else half.memory
            training = half.module.training
            self._steps.append(_Step(half.module, half.swap, memory, where, constants, tensors, parameters, training))

    def run(self, first: Tensor, second: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run forward, without a graph."""
        with torch.no_grad(), autocast_as(self._autocast):
            for step in self._steps:
                step.generators = read_generators(second.device)
                arguments = step.arguments(inputs)
                first = first + self._form.branch(step.module, second, step.memory, arguments, step.where)
                if step.swap:
                    first, second = second, first
        return first, second

    def undo(
        self,
        streams: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor],
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
        """
        Rebuild the streams in front of the block from those behind it, and find gradients on the way.

        Args:
            streams, grads (`tuple[Tensor, Tensor]`): behind the block.
            inputs (`Sequence[Tensor]`): as `run` had them.
            needs (`Sequence[bool]`): whether each of `inputs` needs a gradient.

        Returns:
            `tuple`: the streams in front; gradients of both streams and of each of `inputs`.
        """
        (first, second), (grad_first, grad_second) = streams, grads
        values = [value.detach().requires_grad_(need) for value, need in zip(inputs, needs, strict=True)]
        found: list[Tensor | None] = [None] * len(values)
        states = read_generators(second.device)
        try:
            for step in reversed(self._steps):
                if step.swap:
                    first, second, grad_first, grad_second = second, first, grad_second, grad_first
                write_generators(second.device, step.generators)
                leaf, call, arguments = (
                    second.detach().requires_grad_(),
                    step.call_again(values),
                    step.arguments(values),
                )
                with torch.enable_grad(), autocast_as(self._autocast):
                    output = self._form.branch(call, leaf, step.memory, arguments, step.where)
                first = first - output.detach()
                if not output.requires_grad:
                    continue
                places = [place for place in {*step.parameters.values(), *step.tensors.values()} if needs[place]]
                wanted = [leaf, *(values[place] for place in places)]
                refuse_captured(step.module, output, wanted, step.where)
                own, *others = torch.autograd.grad(output, wanted, grad_first, allow_unused=True)
                grad_second = grad_second if own is None else grad_second + own
                for place, grad in zip(places, others, strict=True):
                    earlier = found[place]
                    found[place] = earlier if grad is None else grad if earlier is None else earlier + grad
        finally:
            write_generators(second.device, states)
        return (first, second), [grad_first, grad_second, *found]
