"""Names for weights of trax that come without, as its files hold them: told by their order and shapes."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from .trax_layout import BASE, DIGITS, START


Shape = tuple[int, ...]
# Leaves of a norm with a bias, and of the output layer that has most.
LONGEST_END = 7
CUT_OFF = "they are cut off, or of another kind of model"


class Leaves:
    """
    Arrays without names, taken one after the other; each part is told by the shapes that come next.

    Args:
        arrays (`Iterable[Tensor]`): in the order of the stream.

    Attributes:
        named (`dict[str, Tensor]`): those that were taken, by name.
        next (`int`): index of the first that was not.
    """

    def __init__(self, arrays: Iterable[Tensor]):
        self.arrays, self.next, self.named = list(arrays), 0, dict[str, Tensor]()

    def take_embedding(self) -> tuple[int, int]:
        """Name the first array; returns the number of ids and the width."""
        if self.dims(1) != [2]:
            raise ValueError(
                f"The first array has shape {self.shape()}, but must be the embedding, (vocab_size, width)."
            )
        vocab_size, width = self.shape()
        self.take("embedding", vocab_size, width)
        return vocab_size, width

    @property
    def left(self) -> int:
        return len(self.arrays) - self.next

    def shape(self, ahead: int = 0) -> Shape:
        return tuple(self.arrays[self.next + ahead].shape) if ahead < self.left else ()

    def dims(self, count: int) -> list[int]:
        """Numbers of dimensions of the next arrays."""
        return [len(self.shape(ahead)) for ahead in range(count)]

    def take(self, name: str, *expected: int) -> None:
        """Name the next array, which must have the expected shape."""
        if not self.left:
            raise ValueError(f"The weights end before {name}: {CUT_OFF}.")
        if self.shape() != expected:
            raise ValueError(
                f"Array {self.next} has shape {self.shape()}, but {name} would have {expected}: an array is missing or "
                "one too many before it, or it is another kind of model."
            )
        self.named[name] = self.arrays[self.next]
        self.next += 1

    def take_dense(self, name: str, inputs: int, outputs: int) -> None:
        self.take(f"{name}.kernel", inputs, outputs)
        self.take(f"{name}.bias", outputs)


def take_positions(leaves: Leaves, width: int, side: str = "", twice: bool = False) -> None:
    """Name what tells positions, if anything does: of one side of an encoder-decoder, or, if `twice`, of the first of
    two that follow each other."""
    shape = leaves.shape()
    if len(shape) == 3 and shape[0] == 1 and shape[2] == width:  # as older checkpoints have it
        leaves.arrays[leaves.next] = leaves.arrays[leaves.next].squeeze(0)
        shape = leaves.shape()
    if len(shape) != 2:
        return
    of_another = twice and shape[1] == width and leaves.shape(1)[-2:] == shape
    if of_another or leaves.dims(2) == [2, 1]:  # a norm follows
        leaves.take(f"{side}position_table", shape[0], width)
    elif shape[0] == 1 and leaves.shape(1)[:1] == (1,):
        digits = 0
        while len(leaves.shape()) == 2:
            leaves.take(side + BASE.format(*divmod(digits, DIGITS)), 1, width // DIGITS)
            digits += 1
        if digits % DIGITS:
            raise ValueError(f"Positions in fixed bases have {DIGITS} digits each; found {digits}: one is missing.")
        leaves.take(side + START, 1, 1, width)
    else:
        leaves.take(f"{side}position_table", *shape)
        leaves.take(f"{side}position_projection", shape[1], width)


def take_multiplicative(leaves: Leaves, name: str, width: int) -> None:
    """Name the weights of a multiplicative layer, with a matrix of each module if one follows."""
    modules = leaves.shape()[0] if leaves.shape() else 1
    size = width // max(1, modules)
    leaves.take(f"{name}.gating", modules, width)
    leaves.take(f"{name}.projection", width, size)
    if len(leaves.shape()) == 3:
        leaves.take(f"{name}.module_kernel", modules, size, size)
    leaves.take(f"{name}.bias", width)


def _shares_queries(leaves: Leaves, size: int, overrides: dict[str, Any]) -> bool:
    """Tell one convolution for queries and keys and one for values, which come next, from one for each of the three."""
    convs = 0
    while len(leaves.shape(2 * convs)) == 4:
        convs += 1
    kernels = [leaves.shape(2 * conv) for conv in range(convs)]
    # Values see one module. Where others do too, inputs twice as wide tell values; otherwise the number of
    # convolutions does, unless the third may be the output's.
    values = [conv for conv, kernel in enumerate(kernels) if kernel[2] == 2 * size]
    if not values and kernels[0][1] != 1:
        values = [conv for conv, kernel in enumerate(kernels) if kernel[1] == 1]
    if values:
        return values[0] == 1
    if convs == 3 and leaves.dims(9)[6:] != [2, 2, 1]:
        if "attention_share_qk" in overrides:
            return bool(overrides["attention_share_qk"])
        if "attention_output" in overrides:
            return overrides["attention_output"] == "conv"
        raise ValueError(
            "Three convolutions that see one module each: whether queries and keys share the first, and the last is "
            "that of the output, is not told by the checkpoint. Say so with --set attention_share_qk=true, or false."
        )
    return convs == 2


def take_conv(leaves: Leaves, name: str, size: int) -> None:
    """Name the weights of a convolution whose modules are of `size`."""
    kernel = leaves.shape()
    fits = len(kernel) == 4 and kernel[2] in ((size, 2 * size) if name.endswith("conv_v") else (size,))
    leaves.take(f"{name}.kernel", *((*kernel[:3], size) if fits else (1, 1, size, size)))
    leaves.take(f"{name}.bias", size)


def take_attention(leaves: Leaves, name: str, width: int, overrides: dict[str, Any]) -> None:
    """Name the weights of an attention, by `overrides` where its shapes do not tell of which kind it is."""
    if leaves.dims(2) == [2, 1]:
        # Of attention by hashing, queries may be keys: three maps, behind which a norm comes.
        for letter in "qvo" if leaves.dims(8) == [2, 1, 2, 1, 2, 1, 1, 1] else "qkvo":
            leaves.take_dense(f"{name}.{letter}", width, width)
        return
    if leaves.dims(1) == [3]:
        heads, _, size = leaves.shape()
        for letter in "qkvo" if leaves.dims(4) == [3, 3, 3, 3] else "qvo":
            leaves.take(f"{name}.w_{letter}", *((heads, size, width) if letter == "o" else (heads, width, size)))
        return
    if leaves.dims(4) != [2, 2, 1, 4]:
        for letter in "qkvo":
            take_multiplicative(leaves, f"{name}.{letter}", width)
        return
    size = leaves.shape(1)[1]
    take_multiplicative(leaves, f"{name}.shared_mult", width)
    queries = ["conv_qk"] if _shares_queries(leaves, size, overrides) else ["conv_q", "conv_k"]
    for conv in [*queries, "conv_v"]:
        take_conv(leaves, f"{name}.{conv}", size)
    if leaves.dims(3) == [2, 2, 1]:
        take_multiplicative(leaves, f"{name}.out_mult", width)
    if len(leaves.shape()) == 4:
        take_conv(leaves, f"{name}.out_conv", size)


def take_norm(leaves: Leaves, name: str, width: int, centers: bool) -> None:
    """Name the weights of a norm, which has a bias if it `centers`."""
    leaves.take(f"{name}.scale", width)
    if centers:
        leaves.take(f"{name}.bias", width)


def take_feed_forward(leaves: Leaves, name: str, width: int, centers: bool) -> None:
    """Name the weights of a feed-forward block: its norm, the layer, and a branch of recurrences if one follows."""
    take_norm(leaves, f"{name}.norm", width, centers)
    if 3 in leaves.dims(2):
        (rank, blocks, size), sparse = (*leaves.shape(1), 1, 1, 1)[:3], f"{name}.sparse_ff"
        leaves.take(f"{sparse}.controller.m1", width, rank)
        leaves.take(f"{sparse}.controller.m2", rank, blocks, size)
        leaves.take(f"{sparse}.controller.bias", blocks, size)
        leaves.take(f"{sparse}.w1", width, blocks, size)
        leaves.take(f"{sparse}.w2", size, blocks, width)
        leaves.take(f"{sparse}.b2", width)
    else:
        units = (*leaves.shape(), 1, 1)[1]
        leaves.take_dense(f"{name}.in", width, units)
        leaves.take_dense(f"{name}.out", units, width)
    # A norm follows in any case: of a branch of recurrences, of the next block, or of the end.
    norms, branch = 1 + centers, f"{name}.sru_branch"
    units = leaves.shape(norms)[1] if len(leaves.shape(norms)) == 2 else 0
    # Two more are the least that a model ends with; without them it is an output layer of low rank that looks alike.
    if units and leaves.shape(norms + 2) == (units, 3 * units) and leaves.left >= norms + 8:
        take_norm(leaves, f"{branch}.norm", width, centers)
        leaves.take_dense(f"{branch}.in_proj", width, units)
        layer = 0
        while leaves.shape() == (units, 3 * units):
            leaves.take_dense(f"{branch}.sru.{layer}", units, 3 * units)
            layer += 1
        leaves.take_dense(f"{branch}.out_proj", units, width)


def head_names(shapes: list[Shape], width: int, vocab_size: int) -> list[str]:
    """Names of the output layer's leaves, of which the shapes come first; none if they are no output layer."""
    first, second, third, fourth = shapes
    bias = (vocab_size,)
    if len(first) != 2:
        return []
    if len(second) == 2 and first[1] == second[0] == width and first[0] * second[1] == vocab_size:
        if third != bias:
            return ["lm_head.gating", "lm_head.projection"]
        if fourth != (width, vocab_size):
            return [f"lm_head.{leaf}" for leaf in ("gating", "projection", "bias")]
        sparse = [f"lm_head.sparse.{leaf}" for leaf in ("gating", "projection", "bias")]
        return [*sparse, "lm_head.dense.kernel", "lm_head.dense.bias"]
    is_square = first == (width, vocab_size) == (vocab_size, width)  # no low rank, but dense queries look like it
    if (
        first[0] == width
        and not is_square
        and second == first[1:]
        and third == (first[1], vocab_size)
        and fourth == bias
    ):
        return [f"lm_head.{side}.{leaf}" for side in ("in", "out") for leaf in ("kernel", "bias")]
    if first in ((width, vocab_size), (vocab_size, width)):
        return ["lm_head.kernel", "lm_head.bias"] if second == bias else ["lm_head.kernel"]
    return []


def take_head(leaves: Leaves, names: list[str], vocab_size: int, overrides: dict[str, Any]) -> None:
    """
    Name the weights of the output layer, of which nothing may be left.

    Args:
        leaves ([`Leaves`]): where they come next.
        names (`list[str]`): of them, as [`head_names`] finds them.
        vocab_size (`int`): ids.
        overrides (`dict[str, Any]`): fields of the config; `lm_head_bias=False` allows a layer without a bias.

    Raises:
        ValueError: if arrays are lacking or left over.
    """
    for name in names:
        expected = (vocab_size,) if name == "lm_head.dense.bias" else leaves.shape()
        leaves.take(name, *expected)
    if names[-1].endswith(".bias"):
        if overrides.get("lm_head_sparse_probability") is not None and "lm_head.dense.bias" not in names:
            raise ValueError(f"The weights end before lm_head.dense.kernel: {CUT_OFF}.")
    elif overrides.get("lm_head_bias", True):
        raise ValueError(
            "The weights end before lm_head.bias: they are cut off, or of another kind of model. If the model has an "
            "output layer without a bias, say so with --set lm_head_bias=false."
            if not leaves.left
            else f"Array {leaves.next} has shape {leaves.shape()}, but lm_head.bias would have {(vocab_size,)}: it is "
            "missing. If the model has an output layer without a bias, arrays are left over behind it."
        )
    if leaves.left:
        raise ValueError(f"{leaves.left} arrays are left over behind the output layer: it is another kind of model.")


def named_leaves(
    original: dict[str, Tensor], overrides: dict[str, Any], name_leaves: Callable[..., dict[str, Tensor]]
) -> dict[str, Tensor]:
    """
    Find a checkpoint's weights by name.

    Args:
        original (`dict[str, Tensor]`): as [`~hf_efficient.utils.conversion.load_original`] reads it: a weight file,
            whose arrays have numbers for names; a recorded case, whose weights stand among other tensors; or names.
        overrides (`dict[str, Any]`): fields of the config, handed on.
        name_leaves (`Callable`): names a weight file's arrays.
    """
    if all(name.isdigit() for name in original):
        return name_leaves([original[str(index)] for index in range(len(original))], **overrides)
    weights = {name.removeprefix("weights."): t for name, t in original.items() if name.startswith("weights.")}
    return weights or original
