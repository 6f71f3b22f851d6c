"""Two ways of learning nothing: all tokens end in one vector, or a detector stays blind. Measures, and watches."""

import logging
import math
from typing import Any

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


class _Watch(TrainerCallback):
    """Warns once when something that is logged has stayed bad for `patience` steps, over interruptions too."""

    def __init__(self, patience: int):
        self.patience = patience
        self.bad_since: int | None = None
        self.warned = False

    def is_bad(self, logs: dict[str, float]) -> bool | None:
        """Said by each watch: None if these logs do not tell."""
        raise NotImplementedError

    def warn(self, steps: int, state: Any, args: Any, logs: dict[str, float]) -> None:
        """Said by each watch, of logs that are bad."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self.bad_since = None
        for entry in state.log_history:  # of a run that is resumed
            self._follow(entry, entry["step"])

    def _follow(self, logs: dict[str, float], step: int) -> bool | None:
        bad = self.is_bad(logs)
        if bad is not None:
            self.bad_since = (step if self.bad_since is None else self.bad_since) if bad else None
        return bad

    def on_log(self, args, state, control, logs=None, **kwargs):
        bad = self._follow(logs or {}, state.global_step)
        if not bad or self.bad_since is None or self.warned or not state.is_world_process_zero:
            return
        steps = state.global_step - self.bad_since
        if steps >= self.patience:
            self.warned = True
            self.warn(steps, state, args, logs or {})


class CollapseWatch(_Watch):
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
        super().__init__(patience)
        self.threshold = threshold

    def is_bad(self, logs):
        share = logs.get("token_variance_share")
        return None if share is None else share < self.threshold

    def warn(self, steps, state, args, logs):
        logger.warning(
            "The encoder has collapsed: for %d steps up to step %d, almost nothing of its final states differs between "
            "tokens (share %.4f; 0.5 or more is usual). Stop, and start again with a lower learning rate (now %g; try "
            "a third of it, or 3e-4), a longer warm-up, gradients clipped at 1.0 (--max_grad_norm, now %g), and, where "
            "a second loss is added, a smaller weight for it.",
            steps,
            state.global_step,
            logs["token_variance_share"],
            args.learning_rate,
            args.max_grad_norm,
        )


class BlindnessWatch(_Watch):
    """
    Warns once, with advice, when a detector goes on to find none of the replaced tokens.

    Args:
        threshold (`float`, *optional*, defaults to 0.02):
            Share of replaced tokens found, `recall_replaced`, below which a detector counts as blind.
        patience (`int`, *optional*, defaults to 2,000):
            Steps for which it must have been so. A thousand are normal at the start.
    """

    def __init__(self, threshold: float = 0.02, patience: int = 2000):
        super().__init__(patience)
        self.threshold = threshold

    def is_bad(self, logs):
        recall = logs.get("recall_replaced")
        return None if recall is None else recall < self.threshold

    def warn(self, steps, state, args, logs):
        logger.warning(
            "The detector is blind: for %d steps up to step %d it has found next to none of the replaced tokens (%.1f "
            "%%). It may wake up late, or never. An encoder that starts as a masked language model sees at once: if "
            "this one did not, start again and add first_phase=masked_lm,detector_start_step=%d to "
            "--objective_overrides; else try a longer first phase, or a lower learning rate (now %g).",
            steps,
            state.global_step,
            100 * logs["recall_replaced"],
            2 * self.patience,
            args.learning_rate,
        )
