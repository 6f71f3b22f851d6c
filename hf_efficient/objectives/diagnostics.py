"""Measures of what an encoder has learned, and of the two ways in which it learns nothing: collapse and blindness."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def token_variance_fraction(states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """
    Compute the fraction of the final states' second moment that differs between tokens.

    With h the states of all tokens of a batch, it is `sum |h - mean(h)|^2 / sum |h|^2`, in float32: about 0.99 for an
    encoder with random weights, 0.5 to 0.7 for masked language models in training, and 0 when every token has the same
    vector.

    Args:
        states (`torch.FloatTensor` of shape `(batch, length, hidden)`):
            Last hidden states.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
            1 for tokens, 0 for padding, which does not count.

    Returns:
        `torch.FloatTensor` of shape `()`: NaN if there is no token.
    """
    states = states.detach().float()
    if attention_mask is None:
        tokens = torch.tensor(float(states.shape[0] * states.shape[1]), device=states.device)
    else:
        kept = attention_mask.bool()
        states = states.masked_fill(~kept.unsqueeze(-1), 0.0)
        tokens = kept.sum()
    total = states.square().sum()
    common = states.sum((0, 1)).square().sum() / tokens
    return (1 - common / total).clamp(min=0.0)


def chance_level_loss(replaced_fraction: float, num_candidates: int | None = None) -> float:
    """
    Compute the loss of a discriminator that knows no more than how many tokens were replaced.

    A loss near it means that nothing was learned.

    Args:
        replaced_fraction (`float`):
            Fraction s of tokens that differ from the original, in [0, 1].
        num_candidates (`int`, *optional*):
            Number K of candidates, where the encoder chooses among some of which one is the reject option.

    Returns:
        `float`: nats per token: the entropy H(s), plus s ln(K - 1) for a choice among candidates.
    """
    s = replaced_fraction
    entropy = -sum(fraction * math.log(fraction) for fraction in (s, 1 - s) if fraction > 0)
    return entropy if num_candidates is None else entropy + s * math.log(num_candidates - 1)


def ranked_first(logits: Tensor, targets: Tensor) -> Tensor:
    """
    Tell which `targets` `(tokens,)` have the highest of their `logits` `(tokens, vocab_size)`.

    Among equal logits, as low precision makes them, the lowest id counts. The result is that of
    `logits.argmax(-1) == targets`, which takes several times as long on a CPU.
    """
    best = logits.amax(-1)
    first = logits.gather(1, targets.unsqueeze(1)).squeeze(1) == best
    rows = first.nonzero().squeeze(1)
    before = torch.arange(logits.shape[1], device=logits.device) < targets[rows].unsqueeze(1)
    first[rows] = ~((logits[rows] == best[rows].unsqueeze(1)) & before).any(-1)
    return first
