"""Masked language modelling for any encoder with a masked-LM head, which runs at target positions only."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from ..modules.losses import cross_entropy
from ..utils.config_checks import LabelChecksMixin
from .base import PretrainingObjective, config_from_dict, position_inputs
from .callbacks import CollapseCallback, LossComponentsCallback
from .diagnostics import target_accuracy, target_positions, token_variance_fraction


@strict
class MaskedLMObjectiveConfig(LabelChecksMixin, PreTrainedConfig):
    """
    Args:
        model_config (`dict`, *optional*):
            Config of the wrapped model, with its `model_type`.
    """

    model_type = "masked_lm_objective"
    keys_to_ignore_at_inference = ["accuracy", "token_variance_fraction"]

    model_config: dict | None = None


@dataclass
class MaskedLMObjectiveOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Cross-entropy in nats: the sum over targets, divided by `num_items_in_batch` if given, else the mean.
        accuracy (`torch.FloatTensor` of shape `()`):
            Fraction of this batch's targets that the model ranks first; NaN if it has none.
        token_variance_fraction (`torch.FloatTensor` of shape `()`):
            See [`~hf_efficient.objectives.diagnostics.token_variance_fraction`].
    """

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    token_variance_fraction: Tensor | None = None


class _TargetRequest:
    """Positions of the targets, at which the head is to run, and the encoder's states at all positions."""

    states: Tensor

    def __init__(self, positions: Tensor):
        self.positions = positions


def _keep_targets(encoder: Any, args: tuple, output: ModelOutput) -> ModelOutput:
    """Forward hook: give the head the states at targets, `(1, targets, hidden)`, and keep those at all positions."""
    request = encoder._target_request
    if request is None:
        return output
    request.states = output["last_hidden_state"]
    targets = request.states.flatten(0, 1).index_select(0, request.positions)
    return type(output)(**{**output, "last_hidden_state": targets.unsqueeze(0)})


class MaskedLMObjective(PretrainingObjective):
    """
    Trains a masked language model of any architecture, with its head run at target positions only.

    `objective.model` is the whole model, whose `save_pretrained` gives what `AutoModelForMaskedLM`, pipelines and
    fine-tuning load; `objective.encoder` is its encoder. The objective itself is saved in checkpoints for resuming.

    Args:
        config ([`MaskedLMObjectiveConfig`], *optional*):
            Used by `from_pretrained`; a new model is built from `config.model_config`.
        model (`PreTrainedModel`, *optional*):
            A `...ForMaskedLM` of transformers or of this package. Its head must treat positions one by one.

    Raises:
        ValueError: if neither is given, or the model has no encoder of its own.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> objective = MaskedLMObjective(model=BertForMaskedLM(BertConfig()))
    ```
    """

    config_class = MaskedLMObjectiveConfig
    encoder_reads = "masked"

    def __init__(self, config: MaskedLMObjectiveConfig | None = None, model: PreTrainedModel | None = None):
        if model is None:
            if config is None or not config.model_config:
                raise ValueError("Give MaskedLMObjective a `model`, or a config with `model_config`.")
            # A config may name the dtype in which its weights were saved; training uses float32.
            model = AutoModelForMaskedLM.from_config(
                config_from_dict(config.model_config),
                dtype=torch.float32,
                attn_implementation=config._attn_implementation,
            )
        super().__init__(config or MaskedLMObjectiveConfig(model_config=model.config.to_dict()))
        self.model = model
        if self.encoder is model:
            raise ValueError(
                f"{type(model).__name__} has no encoder under `base_model_prefix` ({model.base_model_prefix!r}), so "
                "its head can't be run at targets only. Wrap a model with a head, such as BertForMaskedLM."
            )
        self.supports_gradient_checkpointing = model.supports_gradient_checkpointing
        self.encoder._target_request = None
        self.encoder.register_forward_hook(_keep_targets)
        self.post_init()
        # FSDP wraps modules by themselves, and breaks weights that are tied across two of them.
        self._exclude_from_sharding([self.get_parameter(name) for name in set(self.all_tied_weights_keys.values())])

    @property
    def encoder(self) -> Any:
        """The encoder of the wrapped model."""
        return self.model.base_model

    def callbacks(self) -> list[TrainerCallback]:
        """The callbacks that Trainer needs for this objective: loss components in the log, a warning of collapse."""
        return [LossComponentsCallback(self), CollapseCallback()]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def target_logits(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """
        Compute the logits at targets, in row order.

        Returns:
            `tuple`: logits `(targets, vocab_size)`, the targets' ids `(targets,)`, and the encoder's final states at
            all positions `(batch, length, hidden)`.
        """
        flat = labels.flatten()
        positions = target_positions(labels)
        request = _TargetRequest(positions)
        # A wrapper, such as FSDP's, keeps the module that has the hook in `.module`.
        encoder = getattr(self.encoder, "module", self.encoder)
        encoder._target_request = request
        try:
            logits = self.model(**inputs, return_dict=True).logits
        finally:
            encoder._target_request = None
        return logits.squeeze(0), flat.index_select(0, positions), request.states

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMObjectiveOutput:
        """
        Args:
            input_ids, labels (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens, and the true id at targets, -100 elsewhere.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of targets over all accumulated batches and processes, as Trainer counts them, so that their
                losses add up to that of one large batch.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that the model does not know.
            ValueError: if there are no labels, shapes do not agree, the mask holds other values than 0 and 1, or ids
                or labels lie outside the vocabulary.
        """
        self._check_keywords(kwargs)
        input_ids, labels = self._check_rows(input_ids, attention_mask, labels, self.model.config.vocab_size)
        if attention_mask is not None:  # which says where the padding is that no id tells any more
            kwargs = {**position_inputs(self.encoder, input_ids, attention_mask), **kwargs}
        logits, targets, states = self.target_logits(
            labels, input_ids=input_ids, attention_mask=attention_mask, **kwargs
        )
        loss = cross_entropy(logits, targets, num_items_in_batch)
        with torch.no_grad():
            accuracy = target_accuracy(logits, targets)
        return MaskedLMObjectiveOutput(loss, accuracy, token_variance_fraction(states, attention_mask))
