"""The losses of a generator and a detector as one, and what each of their parts is a mean over."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .generator import Guesses


@dataclass
class DetectorObjectiveOutput(ModelOutput):
    """
    In a first phase without detector only `loss` and the generator's parts are there. Shares of what does not occur in
    a batch are not a number.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Generator loss plus weighted detector loss, in nats; see [`combine_losses`].
        generator_loss, detector_loss (`torch.FloatTensor` of shape `()`):
            This batch's means over its targets, and over its tokens.
        generator_accuracy (`torch.FloatTensor` of shape `()`):
            Share of targets that the generator ranks first.
        share_replaced (`torch.FloatTensor` of shape `()`):
            Share s of tokens that differ from the original.
        recall_replaced, accuracy_original (`torch.FloatTensor` of shape `()`):
            Share of replaced, and of original, tokens that the encoder takes for what they are.
        token_variance_share (`torch.FloatTensor` of shape `()`):
            See [`~hf_efficient.objectives.collapse.token_variance_share`].
        masked_lm_loss (`torch.FloatTensor` of shape `()`):
            This batch's mean over its targets of the encoder as a masked LM, in a first phase of that kind only.
    """

    loss: Tensor | None = None
    generator_loss: Tensor | None = None
    generator_accuracy: Tensor | None = None
    detector_loss: Tensor | None = None
    share_replaced: Tensor | None = None
    recall_replaced: Tensor | None = None
    accuracy_original: Tensor | None = None
    token_variance_share: Tensor | None = None
    masked_lm_loss: Tensor | None = None


def combine_losses(
    config: Any,
    generator_sum: Tensor,
    detector_sum: Tensor | None,
    guesses: Guesses,
    num_items_in_batch: Tensor | int | None,
    num_tokens_in_batch: Tensor | int | None,
) -> Tensor:
    """
    The mean of the generator's loss over targets, plus `config.detector_weight` times the mean of the detector's over
    tokens, as the papers have it.

    Over accumulated batches and processes each of them divides by the numbers of all: `num_items_in_batch` targets and
    `num_tokens_in_batch` tokens, so that the parts add up to the loss of one large batch. Trainer itself counts targets
    only; where the tokens are not given, their number is taken to be `num_items_in_batch / config.target_share`, a
    deviation that vanishes where the share of targets is exactly that. A batch without any target has the detector's
    loss alone.

    Args:
        config ([`~hf_efficient.objectives.configuration_detector.DetectorObjectiveConfig`]):
            Gives `detector_weight` and `target_share`.
        generator_sum (`torch.FloatTensor` of shape `()`):
            Summed over targets.
        detector_sum (`torch.FloatTensor` of shape `()`, *optional*):
            Summed over tokens, where there is a detector.
        guesses ([`~hf_efficient.objectives.generator.Guesses`]):
            The batch itself, which is counted where no numbers are given.
        num_items_in_batch, num_tokens_in_batch (`torch.Tensor` or `int`, *optional*):
            See [`~hf_efficient.objectives.detector.DetectorObjective.forward`].
    """
    device = generator_sum.device
    items = guesses.positions.numel() if num_items_in_batch is None else num_items_in_batch
    targets = torch.as_tensor(items, device=device).clamp(min=1)
    loss = generator_sum / targets
    if detector_sum is None:
        return loss
    tokens = guesses.num_tokens if num_tokens_in_batch is None else num_tokens_in_batch
    mean = detector_sum / torch.as_tensor(tokens, device=device).clamp(min=1)
    if num_items_in_batch is not None and num_tokens_in_batch is None:
        by_targets = config.target_share * detector_sum / targets
        mean = torch.where(torch.as_tensor(items, device=device) > 0, by_targets, mean)
    return loss + config.detector_weight * mean


def count_parts(outputs: DetectorObjectiveOutput, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the parts of `outputs` that are means over something else than targets, by how many tokens of `batch`."""
    share = outputs.share_replaced
    if share is None:
        return {}
    mask = batch.get("attention_mask")
    tokens = torch.as_tensor(batch["input_ids"].numel() if mask is None else mask.sum(), device=share.device)
    replaced = share * tokens
    counts = dict.fromkeys(("detector_loss", "share_replaced", "token_variance_share"), tokens)
    counts |= dict.fromkeys(("recall_replaced", "accuracy_replaced"), replaced)
    return {**counts, "accuracy_original": tokens - replaced}


def combine_parts(config: Any, parts: dict[str, Any]) -> float:
    """The loss that belongs to means of its parts; without any target there is no generator's."""
    loss = parts.get("generator_loss", 0.0) + parts.get("masked_lm_loss", 0.0)
    return loss + config.detector_weight * parts.get("detector_loss", 0.0)
