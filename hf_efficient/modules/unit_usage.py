"""What the controllers of sparse feed-forward layers choose: dead units, uneven use, and controllers that collapse.

A controller collapses where it sends all tokens to the same units: the layer is then a small dense one, and the weights
of its other units are never read. The loss shows that late; the figures here show it at once.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sparse_layers import SparseFeedForward


logger = logging.getLogger(__name__)


class UnitUsage:
    """
    Counts of the winners of one layer.

    Args:
        blocks (`int`), block_size (`int`): of the layer.
        device (`torch.device`): of the layer.
    """

    def __init__(self, blocks: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self.counts = torch.zeros(blocks * block_size, device=device)
        self.killed = torch.zeros((), device=device)

    def __call__(self, winners: Tensor, passes: Tensor) -> None:
        """
        Count.

        Args:
            winners (`Tensor` of shape `(tokens, blocks)`): chosen units, by their index in their block.
            passes (`Tensor` of shape `(tokens, blocks)`): whether the unit is above 0, where ReLU lets it pass.
        """
        blocks = torch.arange(winners.shape[-1], device=winners.device) * self.block_size
        self.counts += torch.bincount((winners + blocks).flatten(), minlength=len(self.counts))
        self.killed += (~passes).sum()

    def figures(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: `dead_units`, the share that nothing chose; `entropy` of the choice, averaged over
            blocks, as a share of its largest value; `top_share` of the most used unit of a block, averaged over blocks;
            `killed_winners`, the share that ReLU kills.
        """
        counts = self.counts.view(-1, self.block_size).double()
        total = counts.sum(1, keepdim=True).clamp(min=1)
        shares = counts / total
        entropy = -torch.where(shares > 0, shares * shares.clamp(min=1e-30).log(), 0.0).sum(1)
        most = math.log(self.block_size) if self.block_size > 1 else 1.0
        return {
            "dead_units": (counts == 0).double().mean().item(),
            "entropy": (entropy.mean() / most).item() if self.block_size > 1 else 1.0,
            "top_share": shares.amax(1).mean().item(),
            "killed_winners": (self.killed / total.sum()).item(),
        }


def sparse_feed_forwards(model: nn.Module) -> dict[str, SparseFeedForward]:
    """The sparse feed-forward layers of a model, by the names of their modules, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseFeedForward)}


@contextmanager
def observed_units(model: nn.Module) -> Iterator[dict[str, UnitUsage]]:
    """
    Count the winners of all sparse feed-forward layers of a model inside the `with` block.

    Args:
        model (`nn.Module`): any model; without such layers there is nothing to count.

    Yields:
        `dict[str, UnitUsage]`: by the names of the modules.
    """
    layers = sparse_feed_forwards(model)
    usage = {}
    for name, layer in layers.items():
        blocks, block_size = layer.controller_bias.shape
        usage[name] = UnitUsage(blocks, block_size, layer.up.device)
        layer.observer = usage[name]
    try:
        yield usage
    finally:
        for layer in layers.values():
            layer.observer = None
