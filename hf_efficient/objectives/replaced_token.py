"""Replaced-token detection (ELECTRA): the encoder learns which tokens a small masked language model has replaced."""

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..modules.input_checks import stands_for_many
from ..modules.losses import in_float32
from ..ops.categorical import sample_categorical
from ..ops.counter_rng import counter_based_uniforms
from ..utils.config_checks import check_range
from ..utils.labels import IGNORE_INDEX
from .base import embedding_weight
from .diagnostics import token_variance_fraction
from .discriminator import DiscriminatorObjective, DiscriminatorObjectiveConfig
from .generator import GeneratorOutput, SampleSource


_SAMPLE_STREAM = 0  # of the counter-based random numbers


@strict
class ReplacedTokenObjectiveConfig(DiscriminatorObjectiveConfig):
    """
    Configuration of a [`ReplacedTokenObjective`]. The defaults are ELECTRA's; `preset("electra")` gives them by name,
    and `preset("mcbert_baseline")` the baseline of the MC-BERT repository.

    Args:
        discriminator_weight (`float`, *optional*, defaults to 50.0):
            Weight of the discriminator's loss, the paper's lambda.
        label_original (`int`, *optional*, defaults to 0):
            Label of an original token: 0, as in transformers' `ElectraForPreTraining` and the paper's code, or 1, as in
            the MC-BERT repository. A replaced token has the other one.
        discriminator_hidden_layer (`bool`, *optional*, defaults to `True`):
            Whether a dense layer and GELU come before the discriminator's output layer, as in transformers.
        initial_replaced_fraction (`float`, *optional*):
            Fraction of replaced tokens that the discriminator's initial bias predicts, 0.14 for instance, so that the
            encoder need not learn it by moving all its states to one side. By default the bias is 0, as released.

    The other fields are those of [`~hf_efficient.objectives.discriminator.DiscriminatorObjectiveConfig`].
    """

    model_type = "replaced_token_objective"
    published_settings = {
        "electra": {},
        # The repository of Xu et al. 2020: the other labels, and no hidden layer.
        "mcbert_baseline": {"label_original": 1, "discriminator_hidden_layer": False},
    }

    discriminator_weight: float | int = 50.0
    label_original: int = 0
    discriminator_hidden_layer: bool = True
    initial_replaced_fraction: float | None = None

    def validate_labels(self):
        """Checks of single fields; runs at construction and before saving."""
        if self.label_original not in (0, 1):
            raise ValueError(f"label_original is 0 or 1, not {self.label_original}.")
        if self.initial_replaced_fraction is not None and not 0 < self.initial_replaced_fraction < 1:
            raise ValueError(
                f"initial_replaced_fraction must lie between 0 and 1, not {self.initial_replaced_fraction}."
            )
        check_range(self, "discriminator_weight", least=0)


class ReplacedTokenObjective(DiscriminatorObjective):
    """
    Pretrains an encoder as a discriminator of replaced tokens (Clark et al., ICLR 2020, arXiv 2003.10555).

    A small masked language model, trained beside the encoder and sharing its token embeddings, replaces each target by
    a sample. The encoder predicts for every token whether it is the original one; a sample that happens to be right
    counts as original. No gradient passes through the samples.

    `objective.encoder.save_pretrained(folder)` gives what `AutoModel` and fine-tuning load. The objective itself is
    saved in checkpoints for resuming.

    Deviations: under plain Trainer, accumulated batches balance the two losses by `config.target_fraction`. The
    generator shares the embeddings through a projection, as in the MC-BERT repository, where ELECTRA's generator has
    embeddings of the encoder's width.

    Args:
        config ([`ReplacedTokenObjectiveConfig`], *optional*), encoder (`PreTrainedModel`, *optional*), options:
            See [`~hf_efficient.objectives.discriminator.DiscriminatorObjective`].

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
        if self.config.stage_one == "masked_lm" and embedding_weight(self.encoder).shape[1] != width:
            raise ValueError(
                f"stage_one='masked_lm' compares the states of {type(self.encoder).__name__}, {width} wide, with its "
                f"embeddings, {embedding_weight(self.encoder).shape[1]} wide: take stage_one='generator', or make both "
                "widths the same."
            )
        self.post_init()

    @torch.no_grad()
    def _sample(self, generated: GeneratorOutput, source: SampleSource) -> Tensor:
        """Take an id for each target from `source`, or draw it from the generator's distribution."""
        sampled_ids, sample_seeds, generator = source
        labels, positions = generated.labels, generated.positions
        if sampled_ids is not None:
            if sampled_ids.shape[:2] != labels.shape or sampled_ids.numel() != labels.numel():
                raise ValueError(f"`sampled_ids` must have the shape {tuple(labels.shape)} of `labels`.")
            return sampled_ids.flatten().index_select(0, positions)
        if sample_seeds is not None:
            uniforms = (
                counter_based_uniforms(sample_seeds, labels.shape[1], 1, _SAMPLE_STREAM)
                .flatten(0, 1)
                .index_select(0, positions)
            )
        else:
            uniforms = torch.rand(len(positions), 1, generator=generator, device=labels.device, dtype=torch.float64)
        return sample_categorical(
            generated.hidden,
            generated.projected,
            self.vocabulary_bias,
            uniforms,
            temperature=self.config.temperature,
        ).squeeze(1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        fraction = self.config.initial_replaced_fraction
        if fraction is not None and module is getattr(self, "discriminator", None):
            logit = math.log(fraction) - math.log1p(-fraction)
            init.constant_(module.bias, logit if self.config.label_original == 0 else -logit)

    def vocabulary_states(self, states: Tensor) -> Tensor:
        if self.dense is not None:
            states = nn.functional.gelu(self.dense(states))
        return nn.functional.layer_norm(states, states.shape[-1:])

    def discriminator_logits(self, states: Tensor) -> Tensor:
        """Compute one logit per token, `(batch, length)`, above 0 for tokens whose label is predicted as 1."""
        if self.dense is not None:
            states = nn.functional.gelu(self.dense(states))
        return self.discriminator(states).squeeze(-1)

    def discriminator_loss(self, generated: GeneratorOutput, source: SampleSource) -> tuple[Tensor, dict[str, Tensor]]:
        original, attention_mask = generated.original_ids, generated.attention_mask
        samples = self._sample(generated, source)
        replaced_ids = original.flatten().index_copy(0, generated.positions, samples).view_as(original)
        if stands_for_many(generated.labels):  # the positions are not those of targets alone
            replaced_ids = torch.where(generated.labels == IGNORE_INDEX, original, replaced_ids)
        is_replaced = replaced_ids != original
        is_token = torch.ones_like(is_replaced) if attention_mask is None else attention_mask.bool()
        is_replaced = is_replaced & is_token
        states = self.encode(replaced_ids, generated)
        logits = in_float32(self.discriminator_logits(states))
        is_one = is_replaced if self.config.label_original == 0 else ~is_replaced
        losses = nn.functional.binary_cross_entropy_with_logits(logits, is_one.to(logits.dtype), reduction="none")
        discriminator_sum = losses.masked_fill(~is_token, 0.0).sum()
        with torch.no_grad():
            is_right = (logits > 0) == is_one
            is_original = is_token & ~is_replaced
            tokens, replaced = is_token.sum(), is_replaced.sum()
            parts = {
                "discriminator_loss": discriminator_sum / tokens,
                "replaced_fraction": replaced / tokens,
                "recall_replaced": (is_right & is_replaced).sum() / replaced,
                "accuracy_original": (is_right & is_original).sum() / is_original.sum(),
                "token_variance_fraction": token_variance_fraction(states, attention_mask),
            }
        return discriminator_sum, parts
