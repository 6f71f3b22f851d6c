"""Weights of a layer of attentions and feed-forward in the order in which compiled decoding takes them."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .cross_attention import CrossAttention, WindowedProjection
from .hashed_keys import KeyDigits
from .lsh_layers import LshAttention
from .quantized_layers import (
    QuantizedLinear,
    QuantizedModuleConv,
    QuantizedMultiplicativeDense,
    QuantizedSparseFeedForward,
)
from .sparse_blocks import FeedForwardBlock, FeedForwardHalf, SparseAttention, SruBranch
from .sparse_layers import ModuleConv, MultiplicativeDense, SparseFeedForward


# Kinds of a projection in a list of weights; one more where there is a bias.
_NONE, _LINEAR, _MULTIPLICATIVE = 0, 1, 3
_ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
_ALIASES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # but for their roundings
_ACTIVATION_TYPES = {
    type(ACT2FN[name]): _ACTIVATIONS.index(_ALIASES.get(name, name)) for name in (*_ACTIVATIONS, *_ALIASES)
}

_LINEAR_TYPES = (nn.Linear, QuantizedLinear)
_MULTIPLICATIVE_TYPES = (MultiplicativeDense, QuantizedMultiplicativeDense)
_CONVOLUTION_TYPES = (ModuleConv, QuantizedModuleConv)
_SPARSE_TYPES = (SparseFeedForward, QuantizedSparseFeedForward)
_BLOCK_TYPES = (FeedForwardBlock, FeedForwardHalf)


class PartKind(IntEnum):
    """Kinds of parts of a layer, by the numbers that compiled code knows them by."""

    ATTENTION = 0
    FEED_FORWARD = 1
    ATTENTION_BEHIND_SOURCE = 2
    CROSS_ATTENTION = 3
    HASHED_ATTENTION = 4
    HASHED_BEHIND_SOURCE = 5


_BEHIND_SOURCE = {
    PartKind.ATTENTION: PartKind.ATTENTION_BEHIND_SOURCE,
    PartKind.HASHED_ATTENTION: PartKind.HASHED_BEHIND_SOURCE,
}


@dataclass
class PartWeights:
    """
    Arguments of compiled code for a part of a layer.

    Args:
        kind (`PartKind`): of the part; an attention may stand behind a source in one call and not in another.
        tensors (`list[Tensor]`): weights, with those of its norm before them.
        settings (`list[int]`): of attention heads, whether the norm is a LayerNorm, window, width of the kernel,
            modules, and the kind of each projection; where it hashes rounds, places and factors of buckets before all
            of these. Of feed-forward whether the norm is a LayerNorm and the layer
            sparse, the activation, whether a unit is scaled by its probability, whether there is a bias and an inner
            bias, and the number of recurrences.
        epsilons (`list[float]`): of the norms.
        layer_idx (`int`, defaults to -1): of the cache's layer that holds its keys and values, if it has some.
        state_sizes (`list[int]`): numbers of a row of each state that it keeps from token to token.
        sparse (`nn.Module`, *optional*): the sparse feed-forward, whose choices may be observed.
        digits ([`KeyDigits`], *optional*): what stands behind the keys of attention by hashing.
        hashing (`nn.Module`, *optional*): that attention, whose layout may be changed.
    """

    kind: PartKind
    tensors: list[Tensor]
    settings: list[int]
    epsilons: list[float]
    layer_idx: int = -1
    state_sizes: list[int] = field(default_factory=list)
    sparse: Any = None
    digits: KeyDigits | None = None
    hashing: Any = None

    def numbers(self, behind_source: bool) -> list[int]:
        """Kind, number of weights and of settings, and settings."""
        kind = _BEHIND_SOURCE.get(self.kind, self.kind) if behind_source else self.kind
        return [int(kind), len(self.tensors), len(self.settings), *self.settings]


@dataclass
class LayerWeights:
    """
    Parts of a layer, in the order in which they run.

    Args:
        parts (`list[PartWeights]`): one or more attentions, and a feed-forward.
    """

    parts: list[PartWeights]

    def __post_init__(self) -> None:
        self.attentions = [part for part in self.parts if part.kind in _BEHIND_SOURCE]
        self.cross_attentions = [part for part in self.parts if part.kind is PartKind.CROSS_ATTENTION]
        self.state_sizes = [size for part in self.parts for size in part.state_sizes]
        self._sparse = [part.sparse for part in self.parts if part.sparse is not None]
        self._hashing = [part.hashing for part in self.parts if part.hashing is not None]
        tensors = [tensor for part in self.parts for tensor in part.tensors]
        self._is_quantized = any(not tensor.is_floating_point() for tensor in tensors)

    def is_refused(self) -> bool:
        """Return whether something wants to see the units that are chosen, or a layout without compiled form is set."""
        if any(sparse.observer is not None for sparse in self._sparse):
            return True
        return any(attention.layout != "packed" for attention in self._hashing)

    def room_dtype(self, held: torch.dtype, hidden: torch.dtype) -> torch.dtype:
        """The dtype that keys and values are kept in: of 16 bits where weights are quantised."""
        if held != torch.float32 or not self._is_quantized:
            return held
        return torch.bfloat16 if hidden == torch.bfloat16 else torch.float16


class _List:
    """Weights and kinds of projections, one after the other."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.kinds: list[int] = []

    def add_matrix(self, module: Any, name: str) -> None:
        self.tensors.append(getattr(module, name))
        scales = getattr(module, f"{name}_scales", None)
        if scales is not None:
            self.tensors.append(scales)

    def add_norm(self, norm: Any) -> int:
        """Add a LayerNorm's or an RMSNorm's weights; whether it is the former, as a number."""
        is_centered = isinstance(norm, nn.LayerNorm)
        self.tensors += [norm.weight, norm.bias] if is_centered else [norm.weight]
        return int(is_centered)

    def add_projection(self, module: Any) -> bool:
        """Add a map, or that there is none; `False` for a kind of module that has no compiled form."""
        if module is None:
            self.kinds.append(_NONE)
            return True
        names: tuple[str, ...]
        if type(module) in _LINEAR_TYPES:
            kind, names = _LINEAR, ("weight",)
        elif type(module) in _MULTIPLICATIVE_TYPES:
            kind, names = _MULTIPLICATIVE, ("gating", "projection")
        else:
            return False
        for name in names:
            self.add_matrix(module, name)
        if module.bias is not None:
            self.tensors.append(module.bias)
        self.kinds.append(kind + (module.bias is not None))
        return True

    def add_convolution(self, module: Any) -> bool:
        if module is None:
            self.kinds.append(0)
            return True
        if type(module) not in _CONVOLUTION_TYPES:
            return False
        self.add_matrix(module, "kernel")
        self.tensors.append(module.bias)
        self.kinds.append(1)
        return True

    def add_branch(self, branch: Any, is_centered: int) -> bool:
        """Add a branch of recurrences whose norm is of the kind of its neighbour's."""
        if type(branch) is not SruBranch or self.add_norm(branch.norm) != is_centered:
            return False
        for module in (branch.in_proj, *branch.layers, branch.out_proj):
            if type(module) not in _LINEAR_TYPES or module.bias is None:
                return False
            self.add_matrix(module, "weight")
            self.tensors.append(module.bias)
        return True


def _attention_weights(norm: Any, attention: SparseAttention) -> PartWeights | None:
    found, window, kernel_width, modules = _List(), 0, 0, 0
    is_centered, heads = found.add_norm(norm), attention.config.num_attention_heads
    # Compiled code divides the width among heads, and scales scores by the size of one.
    if attention.head_dim * heads != norm.weight.numel() or attention.scaling != attention.head_dim**-0.5:
        return None
    if attention.output_conv is not None:
        return None
    projections = attention.projections
    if projections is None:
        if attention.k_proj is None and type(attention) is not LshAttention:
            return None
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        counts = {len(layer.gating) for layer in layers if isinstance(layer, _MULTIPLICATIVE_TYPES)}
        if len(counts) > 1 or not all(map(found.add_projection, layers)):
            return None
        modules = counts.pop() if counts else 0
    else:
        if projections.value_input != "shared":
            return None
        modules, window = projections.modules_count, projections.window.window
        convolutions = (projections.query_conv, projections.key_conv, projections.value_conv)
        fits = found.add_projection(projections.shared) and all(map(found.add_convolution, convolutions))
        if not (fits and found.add_projection(attention.o_proj)):
            return None
        kernel_width = _kernel_width(projections.query_conv)
    return PartWeights(
        PartKind.ATTENTION,
        found.tensors,
        [heads, is_centered, window, kernel_width, modules, *found.kinds],
        [norm.eps],
        attention.layer_idx,
        [size for size in attention.state_sizes if size],
    )


def _hashed_attention_weights(norm: Any, attention: LshAttention) -> PartWeights | None:
    found, rounds = _attention_weights(norm, attention), attention.eval_rounds
    digits = attention.digits(rounds)
    if found is None or digits.dtype != torch.int16:
        return None
    found.kind, found.digits, found.hashing = PartKind.HASHED_ATTENTION, digits, attention
    found.tensors.insert(0, attention.rotations_of(rounds).contiguous())
    found.settings[:0] = [rounds, attention.places, len(attention.factors), *attention.factors]
    return found


def _kernel_width(conv: Any) -> int:
    return conv.width if isinstance(conv, QuantizedModuleConv) else conv.kernel.shape[-1]


def _cross_attention_weights(norm: Any, attention: CrossAttention) -> PartWeights | None:
    found, kinds, seen = _List(), [], set()
    is_centered, heads = found.add_norm(norm), attention.config.num_attention_heads
    if attention.head_dim * heads != norm.weight.numel() or attention.scaling != attention.head_dim**-0.5:
        return None
    for module in (attention.q_proj, attention.o_proj):
        inner: Any = module
        conv = None
        if type(module) is WindowedProjection:
            inner, conv = module.shared, module.conv
            seen.add((module.window.window, _kernel_width(conv)))
        if not (found.add_projection(inner) and found.add_convolution(conv)):
            return None
        modules = len(inner.gating) if isinstance(inner, _MULTIPLICATIVE_TYPES) else 0
        kinds += [modules, *found.kinds[-2:]]
    if len(seen) > 1:
        return None
    window, kernel_width = seen.pop() if seen else (0, 0)
    return PartWeights(
        PartKind.CROSS_ATTENTION,
        found.tensors,
        [heads, is_centered, window, kernel_width, *kinds],
        [norm.eps],
        attention.layer_idx,
        [size for size in attention.state_sizes if size],
    )


def _feed_forward_weights(norm: Any, block: FeedForwardBlock) -> PartWeights | None:
    found, sparse = _List(), block.sparse
    is_centered = found.add_norm(norm)
    if sparse is not None:
        if type(sparse) not in _SPARSE_TYPES or sparse.activation not in _ACTIVATIONS:
            return None
        found.add_matrix(sparse, "controller_down")
        found.add_matrix(sparse, "controller_up")
        found.tensors.append(sparse.controller_bias)
        found.tensors += [sparse.up, sparse.down] if isinstance(sparse, SparseFeedForward) else [sparse.units]
        biases, activation = (sparse.bias, sparse.inner_bias), _ACTIVATIONS.index(sparse.activation)
        found.tensors += [bias for bias in biases if bias is not None]
        has_biases = [int(bias is not None) for bias in biases]
        settings = [is_centered, 1, activation, int(sparse.multiply_by_controller), *has_biases]
    else:
        if type(block.act) not in _ACTIVATION_TYPES:
            return None
        for module in (block.up_proj, block.down_proj):
            if type(module) not in _LINEAR_TYPES:
                return None
            found.add_projection(module)
        has_biases = [int(module.bias is not None) for module in (block.down_proj, block.up_proj)]
        settings = [is_centered, 0, _ACTIVATION_TYPES[type(block.act)], 0, *has_biases]
    epsilons, state_sizes = [norm.eps], []
    branch: Any = block.sru
    if branch is not None:
        if not (_is_norm(branch.norm) and found.add_branch(branch, is_centered)):
            return None
        epsilons.append(branch.norm.eps)
        state_sizes.append(len(branch.layers) * branch.units)
    settings.append(0 if branch is None else len(branch.layers))
    return PartWeights(PartKind.FEED_FORWARD, found.tensors, settings, epsilons, state_sizes=state_sizes, sparse=sparse)


def _is_norm(norm: Any) -> bool:
    if type(norm) is nn.LayerNorm:
        return norm.weight is not None and norm.bias is not None
    return type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps is not None


def _part_weights(norm: Any, module: Any) -> PartWeights | None:
    if not _is_norm(norm):
        return None
    if type(module) is SparseAttention:
        return _attention_weights(norm, module)
    if type(module) is LshAttention:
        return _hashed_attention_weights(norm, module)
    if type(module) is CrossAttention:
        return _cross_attention_weights(norm, module)
    return _feed_forward_weights(norm, module) if type(module) in _BLOCK_TYPES else None


def layer_weights(layer: Any) -> LayerWeights | None:
    """
    Find the weights of a layer.

    Args:
        layer (`nn.Module`): as its class built it, or with anything in the place of its modules. Its method
            `parts` gives the norm and the module of each part, and its `dropout`, if it has one, is behind attentions.

    Returns:
        [`LayerWeights`]: or `None` where one of its modules has no compiled form.
    """
    if type(getattr(layer, "dropout", None)) not in (nn.Dropout, type(None)):
        return None
    found = [_part_weights(norm, module) for norm, module in layer.parts()]
    parts = [part for part in found if part is not None]
    tensors = (tensor for part in parts for tensor in part.tensors)
    return LayerWeights(parts) if len(parts) == len(found) and all(map(Tensor.is_contiguous, tensors)) else None
