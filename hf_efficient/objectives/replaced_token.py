"""Replaced-token detection (ELECTRA): an encoder learns which tokens a small masked language model has put in."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .categorical import sample_categorical
from .collapse import token_variance_share
from .detector import DetectorObjective, DetectorObjectiveConfig, check_labels, in_float32, original_ids
from .draws import row_uniforms
from .generator import token_table
from .masking import IGNORE_INDEX
from .phases import add_idle


_SAMPLES = 0  # the stream of random numbers


@strict
class ReplacedTokenObjectiveConfig(DetectorObjectiveConfig):
    """
    Configuration of a [`ReplacedTokenObjective`]. The defaults are ELECTRA's.

    Args:
        detector_weight (`float`, *optional*, defaults to 50.0):
            Weight of the detector's loss, the paper's lambda.
        label_original (`int`, *optional*, defaults to 0):
            The detector's label of an original token: 0, as transformers' `ElectraForPreTraining` and the paper's
            code have it, or 1, as in the MC-BERT repository. A replaced token has the other one.
        discriminator_hidden_layer (`bool`, *optional*, defaults to `True`):
            Dense layer and GELU before the detector's output, as in transformers; else the output layer alone.

    The other fields are those of [`DetectorObjectiveConfig`].
    """

    model_type = "replaced_token_objective"
    keys_to_ignore_at_inference = [
        "generator_loss",
        "detector_loss",
        "share_replaced",
        "recall_replaced",
        "accuracy_original",
        "token_variance_share",
        "generator_accuracy",
    ]

    detector_weight: float | int = 50.0
    label_original: int = 0
    discriminator_hidden_layer: bool = True

    @classmethod
    def mcbert_baseline(cls, **overrides: Any) -> "ReplacedTokenObjectiveConfig":
        """The baseline of the MC-BERT repository: the other labels, no hidden layer; `overrides` replace fields."""
        return cls(**{"label_original": 1, "discriminator_hidden_layer": False, **overrides})

    def validate_labels(self):
        """Checks the labels; runs at construction and before saving."""
        if self.label_original not in (0, 1):
            raise ValueError(f"label_original is 0 or 1, not {self.label_original}.")


@dataclass
class ReplacedTokenObjectiveOutput(ModelOutput):
    """
    In a first phase without detector only `loss`, `generator_loss` and `generator_accuracy` are there. Shares of what
    does not occur in a batch are not a number.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Generator loss plus weighted detector loss, in nats; see [`DetectorObjective.total_loss`].
        generator_loss, detector_loss (`torch.FloatTensor` of shape `()`):
            This batch's means over its targets, and over its tokens.
        share_replaced (`torch.FloatTensor` of shape `()`):
            Share of tokens that differ from the original: s of the entropy H(s) that a blind detector reaches.
        recall_replaced, accuracy_original (`torch.FloatTensor` of shape `()`):
            Share of replaced, and of original, tokens that the detector takes for what they are.
        token_variance_share (`torch.FloatTensor` of shape `()`):
            See [`~hf_efficient.objectives.collapse.token_variance_share`].
        generator_accuracy (`torch.FloatTensor` of shape `()`):
            Share of targets that the generator ranks first.
    """

    loss: Tensor | None = None
    generator_loss: Tensor | None = None
    detector_loss: Tensor | None = None
    share_replaced: Tensor | None = None
    recall_replaced: Tensor | None = None
    accuracy_original: Tensor | None = None
    token_variance_share: Tensor | None = None
    generator_accuracy: Tensor | None = None


class ReplacedTokenObjective(DetectorObjective):
    """
    Pretrains an encoder as a detector of replaced tokens (Clark et al., ICLR 2020, arXiv 2003.10555).

    A small masked language model, trained beside the encoder and sharing its token table, fills in each target by a
    sample. The encoder says of every token whether it is the original one; a sample that happens to be right counts
    as original. No gradient passes through the samples.

    `objective.encoder` is what pretraining is for: its `save_pretrained` gives what `AutoModel` and fine-tuning load.
    The objective itself is saved in checkpoints for resuming.

    Deviations: see [`DetectorObjective.total_loss`] for the weights of accumulated batches, and
    [`~hf_efficient.objectives.generator.SharedTableGenerator`] for how the table is shared: through a projection, as
    in the MC-BERT repository, where ELECTRA's generator has embeddings of the encoder's width.

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
        self.post_init()

    def _sample(self, hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor, sources: dict) -> Tensor:
        """An id for each target: injected, or drawn from the generator's distribution; see `forward`."""
        sampled_ids, draw_seeds, generator = (sources[name] for name in ("sampled_ids", "draw_seeds", "generator"))
        if sampled_ids is not None:
            if sampled_ids.shape[:2] != labels.shape or sampled_ids.numel() != labels.numel():
                raise ValueError(f"`sampled_ids` must have the shape {tuple(labels.shape)} of `labels`.")
            return sampled_ids.flatten().index_select(0, positions)
        if draw_seeds is not None:
            uniforms = row_uniforms(draw_seeds, labels.shape[1], 1, _SAMPLES).flatten(0, 1).index_select(0, positions)
        else:
            uniforms = torch.rand(len(positions), 1, generator=generator, device=labels.device, dtype=torch.float64)
        return sample_categorical(
            hidden, weight, self.generator.bias, uniforms, temperature=self.config.temperature
        ).squeeze(1)

    def detector_logits(self, states: Tensor) -> Tensor:
        """One logit per token, `(batch, length)`: above 0 for the token whose label is 1."""
        if self.dense is not None:
            states = nn.functional.gelu(self.dense(states))
        return self.discriminator(states).squeeze(-1)

    def _detect(self, input_ids: Tensor, is_replaced: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, dict]:
        """The detector's loss, summed over tokens, and what is logged of it."""
        is_token = torch.ones_like(is_replaced) if attention_mask is None else attention_mask.bool()
        is_replaced = is_replaced & is_token
        states = self.encode(input_ids, attention_mask)
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        draw_seeds: Tensor | None = None,
        sampled_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ReplacedTokenObjectiveOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch, length)`):
                The true id at targets, -100 elsewhere.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of targets over all accumulated batches and processes, as Trainer counts them.
            draw_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Numbers of the rows that decide all samples, from `MaskingCollator(..., draw_seeds=True)`.
            sampled_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                The samples themselves; read at targets only. They come before `draw_seeds`.
            generator (`torch.Generator`, *optional*):
                Source of samples if neither is given, in place of torch's global one.

        Raises:
            ValueError: if there are no labels, or shapes do not agree.
        """
        labels = check_labels(input_ids, labels)
        flat = labels.flatten()
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = flat.index_select(0, positions)
        projected = self.generator.project(token_table(self.encoder))
        states = self.generator.states(input_ids, attention_mask, projected=projected)
        hidden = self.generator.transform(states.flatten(0, 1).index_select(0, positions))
        logits = nn.functional.linear(hidden, projected, self.generator.bias)
        generator_sum = nn.functional.cross_entropy(in_float32(logits), targets, reduction="sum")
        with torch.no_grad():
            generator_loss = generator_sum / targets.numel()
            generator_accuracy = (logits.argmax(-1) == targets).float().mean()

        detector_sum: Tensor | None = None
        parts: dict[str, Tensor] = {}
        if self.detector_on:
            with torch.no_grad():
                sources = {"sampled_ids": sampled_ids, "draw_seeds": draw_seeds, "generator": generator}
                samples = self._sample(hidden, projected, positions, labels, sources)
                original = original_ids(input_ids, labels)
                replaced_ids = original.flatten().index_copy(0, positions, samples).view_as(original)
            detector_sum, parts = self._detect(replaced_ids, replaced_ids != original, attention_mask)
        tokens = input_ids.new_tensor(input_ids.numel()) if attention_mask is None else attention_mask.sum()
        loss = self.total_loss(
            generator_sum, targets.numel(), detector_sum, tokens, self.config.detector_weight, num_items_in_batch
        )
        if detector_sum is None:
            loss = add_idle(loss, self, self.idle_parameters())
        return ReplacedTokenObjectiveOutput(
            loss=loss, generator_loss=generator_loss, generator_accuracy=generator_accuracy, **parts
        )
