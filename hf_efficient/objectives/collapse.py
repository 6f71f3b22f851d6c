"""Collapse: all tokens ending in one and the same vector. How far an encoder is from it, and a watch for Trainer."""

import logging
import math

import torch
from torch import Tensor
from transformers import TrainerCallback


logger = logging.getLogger(__name__)


@torch.no_grad()
def token_variance_share(states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """
    Share of the final states' second moment that differs between tokens.

    With h the states of all tokens of a batch, this is `sum |h - mean(h)|^2 / sum |h|^2`, in fp32: about 0.99 for an
    encoder with random weights, 0.5 to 0.7 for masked language models in training, and 0 when every token has the
    same vector.

    Args:
        states (`torch.FloatTensor` of shape `(batch, length, hidden)`):
            Last hidden states.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
            1 for tokens, 0 for padding, which does not count.

    Returns:
        `torch.FloatTensor` of shape `()`, not a number if there is no token.
    """
    states = states.detach().float()
    if attention_mask is None:
        tokens = torch.tensor(float(states.shape[0] * states.shape[1]), device=states.device)
    else:
        kept = attention_mask.to(states.dtype)
        states = states * kept.unsqueeze(-1)
        tokens = kept.sum()
    total = states.square().sum()
    common = states.sum((0, 1)).square().sum() / tokens
    return (1 - common / total).clamp(min=0.0)


def blind_loss(share_replaced: float, num_candidates: int | None = None) -> float:
    """
    What a detector reaches that knows no more than how many tokens were replaced; a loss near it has learned nothing.

    Args:
        share_replaced (`float`):
            Share s of tokens that differ from the original, in [0, 1].
        num_candidates (`int`, *optional*):
            K, where it must choose among candidates of which one is the reject option.

    Returns:
        `float`: nats a token, the entropy H(s), and s ln(K - 1) besides for a choice.
    """
    s = share_replaced
    entropy = -sum(share * math.log(share) for share in (s, 1 - s) if share > 0)
    return entropy if num_candidates is None else entropy + s * math.log(num_candidates - 1)


class CollapseWatch(TrainerCallback):
    """
    Warns once, with advice, when the logged `token_variance_share` stays near zero.

    A dip is normal: masked language models pass through one in their first steps, while they learn no more than how
    frequent each word is.

    Args:
        threshold (`float`, *optional*, defaults to 0.1):
            Share below which an encoder counts as collapsed.
        patience (`int`, *optional*, defaults to 200):
            Steps for which the share must have stayed below.
    """

    def __init__(self, threshold: float = 0.1, patience: int = 200):
        self.threshold = threshold
        self.patience = patience
        self.below_since: int | None = None
        self.warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        share = (logs or {}).get("token_variance_share")
        if share is None or self.warned or not state.is_world_process_zero:
            return
        if share >= self.threshold:
            self.below_since = None
            return
        if self.below_since is None:
            self.below_since = state.global_step
        steps = state.global_step - self.below_since
        if steps < self.patience:
            return
        self.warned = True
        logger.warning(
            "The encoder has collapsed: for %d steps up to step %d, almost nothing of its final states differs between "
            "tokens (share %.4f; 0.5 or more is usual). Stop, and start again with a lower learning rate (now %g; try "
            "a third of it, or 3e-4), a longer warm-up, gradients clipped at 1.0 (--max_grad_norm, now %g), and, where "
            "a second loss is added, a smaller weight for it.",
            steps,
            state.global_step,
            share,
            args.learning_rate,
            args.max_grad_norm,
        )
