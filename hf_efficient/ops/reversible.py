"""Half residuals over two streams, whose backward pass rebuilds inputs from outputs and keeps no activations for it.

Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, arXiv 1707.04585; Kitaev et al., "Reformer", ICLR
2020, arXiv 2001.04451, section 3. A half residual changes one of two streams by a function of the other:

    (a, b) -> (a + f(b), b)        and most often a swap behind it: (b, a + f(b))
    (y, b) -> (y - f(b), b)        undoes it

So the outputs of a whole stack are enough to find the inputs of each f again, one after the other, while the gradients
come down. A *block* is a row of half residuals and one node of autograd: its inputs are both streams and its
parameters, whose gradients it returns. Hence data-parallel wrappers see each parameter once, and hooks fire as always.

f runs twice. Both runs draw from the same state of the generators, which is kept for each half residual: 5 kB on a CPU,
16 bytes on a GPU, whatever the length. Neither the numbers nor the state that is left differ from those of ordinary
autograd. What rounding could decide otherwise in the second run, such as the choice of a unit or of a bucket, f keeps
in [`~hf_efficient.ops.rerun.Remembered`].

Inputs are rebuilt up to rounding, for (a + f(b)) - f(b) is not a to the bit. The error is that of the largest value a
stream takes, whatever the size of what is rebuilt, so streams are held in float32 at least: in bfloat16, over 24 blocks
whose weights let streams grow, it can more than double the error of a gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import is_transformed
from .rerun import Remembered
from .reversible_block import BlockCall, HalfResidual, StreamForm


_REASON = "reversible blocks rebuild their inputs in a backward pass of their own, outside of graphs"


class _Block(torch.autograd.Function):
    """Node of a block. It saves parameters and arguments, which exist anyway, and no stream."""

    @staticmethod
    def forward(
        ctx: Any, chain: "ReversibleChain", call: BlockCall, first: Tensor, second: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.chain, ctx.number, ctx.call = chain, chain.count, call
        ctx.save_for_backward(*inputs)
        return call.run(first, second, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A gradient was to be differentiated (create_graph=True) that comes through reversible blocks, which "
                "keep no graph for it. Use reversible=False."
            )
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
        streams = ctx.chain.take(ctx.number)
        streams, found = ctx.call.undo(streams, grads, inputs, needs)
        if ctx.number > 0:
            ctx.chain.hand_on(ctx.number, streams)
        return None, None, *found


class _Close(torch.autograd.Function):
    """Node behind the last block: the one place where streams are saved. It hands them to the block before."""

    @staticmethod
    def forward(ctx: Any, chain: "ReversibleChain", first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.chain, ctx.count = chain, chain.count
        ctx.save_for_backward(first, second)
        return first.view_as(first), second.view_as(second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.chain.hand_on(ctx.count, ctx.saved_tensors)
        return None, *grads


@torch.compiler.disable(reason=_REASON)
def _rebuilding_block(
    chain: "ReversibleChain", halves: Sequence[HalfResidual], first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    chain.check_untouched(first, second)
    call = BlockCall(halves, chain.count, chain.form, second.device)
    inputs, call.inputs = call.inputs, []  # autograd keeps them from here on
    first, second = _Block.apply(chain, call, first, second, *inputs)
    chain.count += 1
    chain.mark(first, second)
    return first, second


@torch.compiler.disable(reason=_REASON)
def _rebuilding_close(chain: "ReversibleChain", first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    chain.check_untouched(first, second)
    return _Close.apply(chain, first, second)


def _trace(first: Tensor, second: Tensor) -> list[tuple[int, int, torch.dtype]]:
    """Identity of two streams that keeps neither of them."""
    return [(stream.data_ptr(), stream._version, stream.dtype) for stream in (first, second)]


class ReversibleChain:
    """
    Both streams on their way through blocks, one after the other: `open`, any number of `block`, `close`. One chain
    serves one forward pass. [`reversible_blocks`] does all of it where no module of its own stands around a block.

    A block rebuilds its inputs, if `reversible`, where something needs a gradient. Where nothing does, it runs as it
    stands, and so it does by ordinary autograd inside transforms of `torch.func` and forward mode, when exported or
    traced, and in compiled evaluation. In compiled training a block breaks the graph and runs uncompiled.

    Args:
        reversible (`bool`, defaults to `True`): whether to rebuild inputs in the backward pass.
        real (`Tensor` of the streams' shape without the last dimension, *optional*): boolean, `False` at padding, where
            streams become zero and stay so. Padding that is merely ignored can be rebuilt wrong, and as NaN: after
            adding 1e30 to 1 and taking it off again, nothing is left of the 1.
        stream_dtype (`torch.dtype`, *optional*): of the streams inside the chain, with autocast and without; by default
            float32, or float64 for streams that come in it. Halves get, and `close` returns, the dtype that came.
    """

    def __init__(self, *, reversible: bool = True, real: Tensor | None = None, stream_dtype: torch.dtype | None = None):
        self.reversible, self.real, self.stream_dtype = reversible, real, stream_dtype
        self.form = StreamForm(torch.float32, None)
        self.count = 0  # of blocks that rebuild their inputs
        self._blocks = 0
        self._rebuilt: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._last: list[tuple[int, int, torch.dtype]] | None = None

    def open(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """
        Take streams in, by dtype and padding.

        Args:
            first, second (`Tensor` of shape `(..., width)`): may be one and the same.

        Returns:
            `tuple`: the streams to give to the first block.

        Raises:
            ValueError: if they differ in shape, dtype or device or are not of a floating-point dtype, if `real` does
                not fit, or `stream_dtype` is narrower than they are.
        """
        for name in ("shape", "dtype", "device"):
            one, other = getattr(first, name), getattr(second, name)
            if one != other:
                one, other = (tuple(each) if name == "shape" else each for each in (one, other))
                raise ValueError(f"Both streams must have the same {name}; got {one} and {other}.")
        dtype, wide, pads = first.dtype, self.stream_dtype, None
        if not first.is_floating_point():
            raise ValueError(f"Streams must be of a floating-point dtype, not {dtype}.")
        if wide is None:
            wide = torch.promote_types(dtype, torch.float32)
        elif not wide.is_floating_point or torch.promote_types(wide, dtype) != wide:
            raise ValueError(f"stream_dtype={wide} cannot hold streams of {dtype}: take a wider one, or none.")
        first, second = first.to(wide), second.to(wide)
        if self.real is not None:
            if self.real.shape != first.shape[:-1] or self.real.dtype != torch.bool:
                raise ValueError(
                    f"real must be boolean of shape {tuple(first.shape[:-1])}; got {self.real.dtype} of shape "
                    f"{tuple(self.real.shape)}."
                )
            pads = ~self.real.unsqueeze(-1)
            first, second = first.masked_fill(pads, 0.0), second.masked_fill(pads, 0.0)
        self.form = StreamForm(dtype, pads)
        return first, second

    def block(self, halves: Sequence[HalfResidual], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """
        Run one block.

        Args:
            halves (`Sequence[HalfResidual]`): of the block, in their order.
            first, second (`Tensor` of shape `(..., width)`): as `open` or the block before returned them.

        Returns:
            `tuple`: both streams.

        Raises:
            ValueError: if a half returns another shape, needs the gradient of a tensor inside a list or dict, or is
                sharded in itself; if the streams are others than those that the block before returned.
        """
        if self._rebuilds(halves, first, second):
            return _rebuilding_block(self, halves, first, second)
        number, self._blocks = self._blocks, self._blocks + 1
        for place, half in enumerate(halves):
            memory = Remembered(keeps=False) if half.memory is None else half.memory
            first = first + self.form.branch(half.module, second, memory, half.arguments, half.describe(number, place))
            if half.swap:
                first, second = second, first
        return first, second

    def close(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams of the last block, in the dtype of those that were opened. They alone are saved."""
        if self.count > 0:
            first, second = _rebuilding_close(self, first, second)
        return first.to(self.form.dtype), second.to(self.form.dtype)

    def _rebuilds(self, halves: Sequence[HalfResidual], first: Tensor, second: Tensor) -> bool:
        if not (self.reversible and torch.is_grad_enabled()) or is_transformed() or torch.jit.is_tracing():
            return False
        if torch.compiler.is_compiling() and (
            torch.compiler.is_exporting() or not any(half.module.training for half in halves)
        ):
            return False
        if first.requires_grad or second.requires_grad:
            return True
        given = (value for half in halves for value in half.arguments.values() if isinstance(value, Tensor))
        parameters = (parameter for half in halves for parameter in half.module.parameters())
        return any(tensor.requires_grad for tensor in given) or any(tensor.requires_grad for tensor in parameters)

    def mark(self, first: Tensor, second: Tensor) -> None:
        """Note the streams that a block returned."""
        self._last = _trace(first, second)

    def check_untouched(self, first: Tensor, second: Tensor) -> None:
        """Raise where streams are not those that the block before returned, which could not be rebuilt from them."""
        if self._last is not None and self._last != _trace(first, second):
            raise ValueError(
                "The streams are not those that the block before returned, or were changed in place. Nothing may stand "
                "between two blocks of a chain: close it and open another. Under FSDP, shard blocks with "
                "MixedPrecisionPolicy(cast_forward_inputs=False)."
            )

    def hand_on(self, number: int, streams: tuple[Tensor, Tensor]) -> None:
        """Leave the outputs of block `number - 1` for it, in the backward pass."""
        self._rebuilt = (number, streams)

    def take(self, number: int) -> tuple[Tensor, Tensor]:
        """Take the outputs of block `number`."""
        rebuilt, self._rebuilt = self._rebuilt, None
        if rebuilt is None or rebuilt[0] != number + 1:
            raise RuntimeError(
                f"The backward pass came to reversible block {number} without the outputs of the chain. The loss must "
                "depend on what ReversibleChain.close returned; for one that uses streams between blocks alone, take "
                "reversible=False."
            )
        return rebuilt[1]


def reversible_blocks(
    blocks: Sequence[Sequence[HalfResidual]],
    first: Tensor,
    second: Tensor,
    *,
    reversible: bool = True,
    real: Tensor | None = None,
    stream_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Run blocks of half residuals over two streams; what is saved for the backward pass does not grow with their number.

    Args:
        blocks (`Sequence[Sequence[HalfResidual]]`): the half residuals of each block.
        first, second (`Tensor` of shape `(..., width)`): streams, which may be one and the same tensor.
        reversible, real, stream_dtype: see [`ReversibleChain`].

    Returns:
        `tuple`: both streams, in the dtype that came.

    Raises:
        ValueError: see [`ReversibleChain`].
    """
    chain = ReversibleChain(reversible=reversible, real=real, stream_dtype=stream_dtype)
    first, second = chain.open(first, second)
    for halves in blocks:
        first, second = chain.block(halves, first, second)
    return chain.close(first, second)
