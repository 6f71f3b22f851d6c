"""Output layers of language models that read fewer weights than one row a token: low rank, multiplicative, or mixed.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 3.3 (the
sparse loss layer), and the authors' code.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.backend import is_transformed
from .few_rows import apply_to_few
from .sparse_layers import MultiplicativeDense


class LowRankHead(nn.Module):
    """Output layer of two linear maps with a few units between them, both with a bias."""

    def __init__(self, width: int, vocab_size: int, rank: int):
        super().__init__()
        self.in_proj = nn.Linear(width, rank)
        self.out_proj = nn.Linear(rank, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return apply_to_few(self.out_proj, self.in_proj(x))


class MixedHead(nn.Module):
    """
    A multiplicative and a dense output layer, of which each training call uses one; in evaluation it is the first.

    The other one gets no gradient, or zeros where `torch.distributed` is initialised.

    Args:
        width, vocab_size (`int`): of input and output.
        modules (`int`): of the multiplicative one.
        probability (`float`): share of training calls that use it.
    """

    def __init__(self, width: int, vocab_size: int, modules: int, probability: float):
        super().__init__()
        self.probability = probability
        self.sparse = MultiplicativeDense(width, vocab_size, modules)
        self.dense = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return apply_to_few(self.sparse, x)
        if torch.compiler.is_compiling() or is_transformed():
            return torch.where(torch.rand((), device=x.device) < self.probability, self.sparse(x), self.dense(x))
        chosen, other = (self.sparse, self.dense) if torch.rand(()) < self.probability else (self.dense, self.sparse)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return chosen(x)
        # Data-parallel training waits for a gradient of each parameter.
        return chosen(x) + 0.0 * sum(parameter.sum() for parameter in other.parameters())


def build_lm_head(config: Any) -> nn.Module:
    """Build the output layer that a config asks for."""
    width, vocab_size = config.hidden_size, config.vocab_size
    if config.lm_head_type == "low_rank":
        return LowRankHead(width, vocab_size, config.lm_head_rank)
    if config.lm_head_type == "multiplicative":
        if config.lm_head_sparse_probability is not None:
            return MixedHead(width, vocab_size, config.loss_sparsity, config.lm_head_sparse_probability)
        return MultiplicativeDense(width, vocab_size, config.loss_sparsity, config.lm_head_bias)
    return nn.Linear(width, vocab_size, bias=config.lm_head_bias)
