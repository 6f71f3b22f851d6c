"""Weights of a layer of attention and feed-forward in the order in which compiled decoding takes them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .quantized_layers import (
    QuantizedLinear,
    QuantizedModuleConv,
    QuantizedMultiplicativeDense,
    QuantizedSparseFeedForward,
)
from .sparse_blocks import FeedForwardBlock, SparseAttention
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


@dataclass
class LayerWeights:
    """
    Arguments of one layer's compiled calls.

    Args:
        attention, feed_forward (`list[Tensor]`): weights, each with those of its norm before them.
        attention_settings (`list[int]`): heads, whether the norm is a LayerNorm, window, width of the kernel, modules,
            and the kind of each projection.
        feed_forward_settings (`list[int]`): whether the norm is a LayerNorm and the layer sparse, the activation,
            whether a unit is scaled by its probability, and whether there is a bias and an inner bias.
        attention_epsilon, feed_forward_epsilon (`float`): of the norms.
        state_size (`int`): numbers of a row that convolutions keep.
        sparse (`nn.Module`, *optional*): the sparse feed-forward, whose choices may be observed.
    """

    attention: list[Tensor]
    attention_settings: list[int]
    attention_epsilon: float
    feed_forward: list[Tensor]
    feed_forward_settings: list[int]
    feed_forward_epsilon: float
    state_size: int
    sparse: Any

    def __post_init__(self) -> None:
        self._is_quantized = any(not tensor.is_floating_point() for tensor in self.attention + self.feed_forward)

    def is_observed(self) -> bool:
        """Return whether something wants to see the units that are chosen."""
        return self.sparse is not None and self.sparse.observer is not None

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


def _attention_weights(norm: nn.Module, attention: SparseAttention) -> tuple[list[Tensor], list[int]] | None:
    found, window, kernel_width, modules = _List(), 0, 0, 0
    is_centered = found.add_norm(norm)
    # Compiled code scales scores by the size of a head.
    if attention.output_conv is not None or attention.scaling != attention.head_dim**-0.5:
        return None
    projections = attention.projections
    if projections is None:
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
        kernel = projections.query_conv
        kernel_width = kernel.width if isinstance(kernel, QuantizedModuleConv) else kernel.kernel.shape[-1]
    heads = attention.config.num_attention_heads
    return found.tensors, [heads, is_centered, window, kernel_width, modules, *found.kinds]


def _feed_forward_weights(block: FeedForwardBlock) -> tuple[list[Tensor], list[int]] | None:
    found, sparse = _List(), block.sparse
    is_centered = found.add_norm(block.norm)
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
        return found.tensors, [is_centered, 1, activation, int(sparse.multiply_by_controller), *has_biases]
    if type(block.act) not in _ACTIVATION_TYPES:
        return None
    for module in (block.up_proj, block.down_proj):
        if type(module) not in _LINEAR_TYPES:
            return None
        found.add_projection(module)
    has_biases = [int(module.bias is not None) for module in (block.down_proj, block.up_proj)]
    return found.tensors, [is_centered, 0, _ACTIVATION_TYPES[type(block.act)], 0, *has_biases]


def _is_norm(norm: nn.Module) -> bool:
    if type(norm) is nn.LayerNorm:
        return norm.weight is not None and norm.bias is not None
    return type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps is not None


def layer_weights(layer: Any) -> LayerWeights | None:
    """
    Find the weights of a layer with `attention_norm`, `attention` and `feed_forward`.

    Args:
        layer (`nn.Module`): as its class built it, or with anything in the place of its modules.

    Returns:
        [`LayerWeights`]: or `None` where one of its modules has no compiled form.
    """
    norm, attention, block = layer.attention_norm, layer.attention, layer.feed_forward
    if type(attention) is not SparseAttention or type(block) is not FeedForwardBlock or block.sru is not None:
        return None
    second: Any = block.norm
    if not (_is_norm(norm) and _is_norm(second)) or type(layer.dropout) is not nn.Dropout:
        return None
    attends, feeds = _attention_weights(norm, attention), _feed_forward_weights(block)
    if attends is None or feeds is None or not all(map(Tensor.is_contiguous, attends[0] + feeds[0])):
        return None
    return LayerWeights(*attends, norm.eps, *feeds, second.eps, sum(attention.state_sizes), block.sparse)
