"""Small stacks of half residuals for the tests of `ops/reversible.py`, with the feed-forward block of the models."""

from functools import partial

import torch
from torch import nn

from hf_efficient.modules.sparse_blocks import FeedForwardBlock
from hf_efficient.ops.reversible import HalfResidual, ReversibleChain, reversible_blocks
from tests.helpers.comparison import named_gradients
from tests.helpers.families import SCALING_TRANSFORMER


WIDTH = 5
SPARSE = {"ff_sparsity": 3, "ff_rank": 2, "ff_sru_layers": 2, "ff_sru_units": 4}
CALM = {"dropout": 0.0, "activation_dropout": 0.0, "ff_hard_probability": 0.0}  # nothing drawn at random


class AttentionHalf(nn.Module):
    """Norm and causal attention of one head, to another sequence where there is one."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.dropout = dropout

    def forward(self, x, memory, mask=None, states=None):
        normalized = self.norm(x)
        source = normalized if states is None else states
        scores = self.query(normalized) @ self.key(source).mT / x.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -1e9)
        weights = nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.output(weights @ self.value(source))


class BucketHalf(nn.Module):
    """Tokens scaled by a vector of their bucket, by random rotations drawn anew in each call, then dropout."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.scales = nn.Parameter(torch.ones(4, width))
        self.linear = nn.Linear(width, width)
        self.dropout = dropout
        self.seen = []

    def buckets_of(self, x):
        return (x @ torch.randn(x.shape[-1], 4, dtype=x.dtype)).argmax(-1).to(torch.uint8)

    def forward(self, x, memory):
        buckets = memory.remember("buckets", partial(self.buckets_of, x))
        self.seen.append(buckets)
        hidden = self.linear(x.tanh()) * self.scales[buckets.long()]
        return nn.functional.dropout(hidden, self.dropout, self.training)


class FeedForwardHalf(nn.Module):
    """The models' block, whose draws are remembered."""

    def __init__(self, width=WIDTH, **fields):
        super().__init__()
        config = SCALING_TRANSFORMER.make_config(hidden_size=width, num_attention_heads=1, **fields)
        self.block = FeedForwardBlock(config)

    def forward(self, x, memory, real=None):
        return self.block(x, real=real, draws=memory.remember("draws", list))[0]


class Block(nn.Module):
    """Attention, buckets and feed-forward, of which the last does not swap in every second block."""

    def __init__(self, swap=True, width=WIDTH, dropout=0.0, **fields):
        super().__init__()
        self.attention = AttentionHalf(width, dropout)
        self.buckets = BucketHalf(width, dropout)
        self.feed_forward = FeedForwardHalf(width, **{"dropout": dropout, "intermediate_size": 12, **SPARSE, **fields})
        self.swap = swap

    def halves(self, mask=None, states=None):
        return [
            HalfResidual(self.attention, {"mask": mask, "states": states}),
            HalfResidual(self.buckets),
            HalfResidual(self.feed_forward, {"real": mask}, self.swap),
        ]

    def forward(self, first, second, chain, **arguments):
        return chain.block(self.halves(**arguments), first, second)


class Stack(nn.Module):
    """Blocks between a linear map and a norm over both streams."""

    def __init__(self, count=3, width=WIDTH, **fields):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(index % 2 == 0, width, **fields) for index in range(count))
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x, reversible=True, real=None, stream_dtype=None, **arguments):
        start = self.embed(x)
        chain = ReversibleChain(reversible=reversible, real=real, stream_dtype=stream_dtype)
        first, second = chain.open(start, start)
        for block in self.blocks:
            first, second = block(first, second, chain=chain, **arguments)
        return self.norm(torch.cat(chain.close(first, second), dim=-1))


def make_stack(count=3, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    stack = Stack(count, **fields)
    for name, parameter in stack.named_parameters():
        if "norm" not in name and "scales" not in name:
            nn.init.normal_(parameter, std=0.3)
    return stack.to(dtype)


def make_input(batch=2, length=7, width=WIDTH, dtype=torch.float64):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(length)).to(dtype)


def loss_of(output):
    """A loss of which every number of the output has its own share."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    return (output.double() * weights).sum() + output.double().square().mean()


def train_step(stack, x, seed=1, **options):
    """Output, gradients by name, with that of the input, and the state of the generator behind both passes."""
    stack.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    output = stack(x, **options)
    states = [torch.get_rng_state()]
    loss_of(output).backward()
    states.append(torch.get_rng_state())
    return output.detach(), {"input": x.grad, **named_gradients(stack)}, states


def run_halves(modules, first, second, **options):
    """Each module as a half residual of a block of its own."""
    return reversible_blocks([[HalfResidual(module)] for module in modules], first, second, **options)
