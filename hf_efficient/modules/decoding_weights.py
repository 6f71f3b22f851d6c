"""Weights of a layer of attention and feed-forward in the order in which compiled decoding takes them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sparse_blocks import FeedForwardBlock, SparseAttention
from .sparse_layers import ModuleConv, MultiplicativeDense, SparseFeedForward


# Kinds of a projection in a list of weights; one more where there is a bias.
_NONE, _LINEAR, _MULTIPLICATIVE = 0, 1, 3


@dataclass
class LayerWeights:
    """
    Arguments of one layer's compiled calls.

    Args:
        attention (`list[Tensor]`): norm and projections.
        settings (`list[int]`): heads, whether the norm is a LayerNorm, window, width of the kernel, modules, and the kind
            of each projection.
        epsilon (`float`): of the norm.
        state_size (`int`): numbers of a row that convolutions keep.
        block (`nn.Module`): the feed-forward.
    """

    attention: list[Tensor]
    settings: list[int]
    epsilon: float
    state_size: int
    block: FeedForwardBlock

    def is_observed(self) -> bool:
        """Return whether something wants to see the units that are chosen."""
        sparse = self.block.sparse
        return sparse is not None and sparse.observer is not None

    def room_dtype(self, held: torch.dtype, hidden: torch.dtype) -> torch.dtype:
        """The dtype that keys and values are kept in: of 16 bits where the weights are quantised."""
        if held != torch.float32 or self.attention[2].is_floating_point():
            return held
        return torch.bfloat16 if hidden == torch.bfloat16 else torch.float16

    def feed_forward(self, kernel: Any, hidden: Tensor) -> None:
        """Add to `hidden` what the feed-forward makes of it."""
        dtype = next(self.block.parameters()).dtype
        hidden += self.block(hidden.to(dtype))[0]


class _List:
    """Weights and kinds of projections, one after the other."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.kinds: list[int] = []

    def add_matrix(self, module: nn.Module, name: str) -> None:
        self.tensors.append(getattr(module, name))
        scales = getattr(module, f"{name}_scales", None)
        if scales is not None:
            self.tensors.append(scales)

    def add_projection(self, module: nn.Module | None) -> bool:
        """Add a map, or that there is none; `False` for a kind of module that has no compiled form."""
        if module is None:
            self.kinds.append(_NONE)
            return True
        if type(module) is nn.Linear:
            kind, names = _LINEAR, ("weight",)
        elif type(module) is MultiplicativeDense:
            kind, names = _MULTIPLICATIVE, ("gating", "projection")
        else:
            return False
        for name in names:
            self.add_matrix(module, name)
        if module.bias is not None:
            self.tensors.append(module.bias)
        self.kinds.append(kind + (module.bias is not None))
        return True

    def add_convolution(self, module: nn.Module | None) -> bool:
        if module is None:
            self.kinds.append(0)
            return True
        if type(module) is not ModuleConv:
            return False
        self.add_matrix(module, "kernel")
        self.tensors.append(module.bias)
        self.kinds.append(1)
        return True


def _attention_weights(norm: nn.Module, attention: SparseAttention) -> tuple[_List, list[int]] | None:
    found, window, kernel_width, modules = _List(), 0, 0, 0
    found.tensors += [norm.weight, norm.bias] if type(norm) is nn.LayerNorm else [norm.weight]
    if attention.output_conv is not None:
        return None
    projections = attention.projections
    if projections is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        for layer in layers:
            if not found.add_projection(layer):
                return None
            if isinstance(layer, MultiplicativeDense):
                modules = len(layer.gating)
    else:
        if projections.value_input != "shared":
            return None
        modules, window = projections.modules_count, projections.window.window
        kernel_width = projections.query_conv.kernel.shape[-1]
        convolutions = (projections.query_conv, projections.key_conv, projections.value_conv)
        fits = found.add_projection(projections.shared)
        fits = fits and all([found.add_convolution(convolution) for convolution in convolutions])
        if not (fits and found.add_projection(attention.o_proj)):
            return None
    heads = attention.config.num_attention_heads
    return found, [heads, int(type(norm) is nn.LayerNorm), window, kernel_width, modules, *found.kinds]


def _is_norm(norm: nn.Module) -> bool:
    return type(norm) in (nn.LayerNorm, nn.RMSNorm) and norm.weight is not None


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
    if not (_is_norm(norm) and _is_norm(block.norm)) or type(layer.dropout) is not nn.Dropout:
        return None
    if block.sparse is not None and type(block.sparse) is not SparseFeedForward:
        return None
    found = _attention_weights(norm, attention)
    if found is None:
        return None
    weights, settings = found
    return LayerWeights(weights.tensors, settings, norm.eps, sum(attention.state_sizes), block)
