"""Replaced-token detection (ELECTRA): an encoder learns which tokens a small masked language model has put in."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .categorical import sample_categorical
from .collapse import token_variance_share
from .configuration_detector import ReplacedTokenObjectiveConfig
from .detector import DetectorObjective
from .draws import SampleSource, row_uniforms
from .generator import Guesses, SharedTableGenerator, token_table
from .precision import in_float32


_SAMPLES = 0  # the stream of random numbers


class ReplacedTokenObjective(DetectorObjective):
    """
    Pretrains an encoder as a detector of replaced tokens (Clark et al., ICLR 2020, arXiv 2003.10555).

    A small masked language model, trained beside the encoder and sharing its token table, fills in each target by a
    sample. The encoder says of every token whether it is the original one; a sample that happens to be right counts
    as original. No gradient passes through the samples.

    `objective.encoder` is what pretraining is for: its `save_pretrained` gives what `AutoModel` and fine-tuning load.
    The objective itself is saved in checkpoints for resuming.

    Deviations: see [`~hf_efficient.objectives.detector_loss.combine_losses`] for accumulated batches under plain
    Trainer, and [`~hf_efficient.objectives.generator.SharedTableGenerator`] for how the table is shared: through a
    projection, as in the MC-BERT repository, where ELECTRA's generator has embeddings of the encoder's width.

    Args:
        config ([`ReplacedTokenObjectiveConfig`], *optional*), encoder (`PreTrainedModel`, *optional*), options:
            See [`DetectorObjective`].

    Example:

    ```python
    >>> from transformers import AutoModel, BertConfig
    >>> objective = ReplacedTokenObjective(encoder=AutoModel.from_config(BertConfig()), generator_divider=3)
    ```
    """

    config_class = ReplacedTokenObjectiveConfig

    def __init__(
        self,
        config: ReplacedTokenObjectiveConfig | None = None,
        encoder: PreTrainedModel | None = None,
        **options: Any,
    ):
        super().__init__(config, encoder, **options)
        width = self.encoder.config.hidden_size
        self.generator = self._make_generator(vocabulary_bias=True)
        self.dense = nn.Linear(width, width) if self.config.discriminator_hidden_layer else None
        self.discriminator = nn.Linear(width, 1)
        if self.config.first_phase == "masked_lm" and token_table(self.encoder).shape[1] != width:
            raise ValueError(
                f"first_phase='masked_lm' compares the states of {type(self.encoder).__name__}, {width} wide, with its "
                f"embeddings, {token_table(self.encoder).shape[1]} wide: take first_phase='generator', or make both "
                "widths the same."
            )
        self.post_init()

    @property
    def small_network(self) -> SharedTableGenerator:
        return self.generator

    @torch.no_grad()
    def _sample(self, guesses: Guesses, source: SampleSource) -> Tensor:
        """An id for each target: injected, or drawn from the generator's distribution; see `forward`."""
        sampled_ids, draw_seeds, generator = source
        labels, positions = guesses.labels, guesses.positions
        if sampled_ids is not None:
            if sampled_ids.shape[:2] != labels.shape or sampled_ids.numel() != labels.numel():
                raise ValueError(f"`sampled_ids` must have the shape {tuple(labels.shape)} of `labels`.")
            return sampled_ids.flatten().index_select(0, positions)
        if draw_seeds is not None:
            uniforms = row_uniforms(draw_seeds, labels.shape[1], 1, _SAMPLES).flatten(0, 1).index_select(0, positions)
        else:
            uniforms = torch.rand(len(positions), 1, generator=generator, device=labels.device, dtype=torch.float64)
        return sample_categorical(
            guesses.hidden,
            guesses.projected,
            self.vocabulary_bias,
            uniforms,
            temperature=self.config.temperature,
        ).squeeze(1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        share = self.config.initial_share_replaced
        if share is not None and module is getattr(self, "discriminator", None):
            logit = math.log(share) - math.log1p(-share)
            init.constant_(module.bias, logit if self.config.label_original == 0 else -logit)

    def vocabulary_states(self, states: Tensor) -> Tensor:
        if self.dense is not None:
            states = nn.functional.gelu(self.dense(states))
        return nn.functional.layer_norm(states, states.shape[-1:])

    def detector_logits(self, states: Tensor) -> Tensor:
        """One logit per token, `(batch, length)`: above 0 for the token whose label is 1."""
        if self.dense is not None:
            states = nn.functional.gelu(self.dense(states))
        return self.discriminator(states).squeeze(-1)

    def detect(self, guesses: Guesses, source: SampleSource) -> tuple[Tensor, dict[str, Tensor]]:
        original, attention_mask = guesses.original_ids, guesses.attention_mask
        samples = self._sample(guesses, source)
        replaced_ids = original.flatten().index_copy(0, guesses.positions, samples).view_as(original)
        is_replaced = replaced_ids != original
        is_token = torch.ones_like(is_replaced) if attention_mask is None else attention_mask.bool()
        is_replaced = is_replaced & is_token
        states = self.encode(replaced_ids, guesses)
        logits = in_float32(self.detector_logits(states))
        is_one = is_replaced if self.config.label_original == 0 else ~is_replaced
        losses = nn.functional.binary_cross_entropy_with_logits(logits, is_one.to(logits.dtype), reduction="none")
        detector_sum = losses.masked_fill(~is_token, 0.0).sum()
        with torch.no_grad():
            is_right = (logits > 0) == is_one
            is_original = is_token & ~is_replaced
            tokens, replaced = is_token.sum(), is_replaced.sum()
            parts = {
                "detector_loss": detector_sum / tokens,
                "share_replaced": replaced / tokens,
                "recall_replaced": (is_right & is_replaced).sum() / replaced,
                "accuracy_original": (is_right & is_original).sum() / is_original.sum(),
                "token_variance_share": token_variance_share(states, attention_mask),
            }
        return detector_sum, parts
