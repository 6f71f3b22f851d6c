"""Masked language modelling for any encoder with a masked-LM head, at the cost of its targets only."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from .collapse import CollapseWatch, token_variance_share
from .labels import IGNORE_INDEX, check_labels, ranked_first
from .parts_log import PartsLog
from .precision import in_float32


@strict
class MaskedLMObjectiveConfig(PreTrainedConfig):
    """
    Args:
        model_config (`dict`, *optional*):
            The config of the wrapped model, with its `model_type`.
    """

    model_type = "masked_lm_objective"
    keys_to_ignore_at_inference = ["accuracy", "token_variance_share"]

    model_config: dict | None = None


@dataclass
class MaskedLMObjectiveOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Cross-entropy in nats: the sum over targets, divided by `num_items_in_batch` if given, else the mean.
        accuracy (`torch.FloatTensor` of shape `()`):
            Share of this batch's targets that the model ranks first; not a number if it has none.
        token_variance_share (`torch.FloatTensor` of shape `()`):
            See [`~hf_efficient.objectives.collapse.token_variance_share`].
    """

    loss: Tensor | None = None
    accuracy: Tensor | None = None
    token_variance_share: Tensor | None = None


class _TargetRequest:
    """What a running objective asks of the encoder's output, and the whole states it gets besides."""

    states: Tensor

    def __init__(self, positions: Tensor):
        self.positions = positions


def _keep_targets(encoder: Any, args: tuple, output: ModelOutput) -> ModelOutput:
    """Forward hook: hand the head the states at targets, `(1, targets, hidden)`, and put the whole ones aside."""
    request = encoder._target_request
    if request is None:
        return output
    request.states = output["last_hidden_state"]
    targets = request.states.flatten(0, 1).index_select(0, request.positions)
    return type(output)(**{**output, "last_hidden_state": targets.unsqueeze(0)})


class MaskedLMObjective(PreTrainedModel):
    """
    Trains a masked language model, and runs its head at target positions only, whatever the architecture.

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
    base_model_prefix = ""
    # Notes that were attached to the objective stand in its checkpoints; they are attached anew, or left.
    _keys_to_ignore_on_load_unexpected = [r"^notes\."]
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MaskedLMObjectiveConfig | None = None, model: PreTrainedModel | None = None):
        if model is None:
            if config is None or not config.model_config:
                raise ValueError("Give MaskedLMObjective a `model`, or a config with `model_config`.")
            settings = dict(config.model_config)
            model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            # A config may say bfloat16, in which its weights were saved; what is trained is kept in float32.
            model = AutoModelForMaskedLM.from_config(
                model_config, dtype=torch.float32, attn_implementation=config._attn_implementation
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
        # FSDP wraps each of these by itself, and what is tied across two such units breaks it.
        sources = set(self.all_tied_weights_keys.values())
        self._no_split_modules = set(self._no_split_modules or ()) - {
            type(module).__name__
            for name, module in self.named_modules()
            if any(source.startswith(f"{name}.") for source in sources)
        }

    @property
    def encoder(self) -> Any:
        """What pretraining is for."""
        return self.model.base_model

    def callbacks(self) -> list[TrainerCallback]:
        """What Trainer needs to be given for this objective: its parts in the log, and a watch for collapse."""
        return [PartsLog(self), CollapseWatch()]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def target_logits(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """
        Logits at targets, in row order.

        Returns:
            `tuple`: logits `(targets, vocab_size)`, the targets' ids `(targets,)`, and all of the encoder's final
            states `(batch, length, hidden)`.
        """
        flat = labels.flatten()
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(-1)
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
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMObjectiveOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch, length)`):
                The true id at targets, -100 elsewhere.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Number of targets over all accumulated batches and processes, as Trainer counts them, so that the
                losses of these parts add up to that of one large batch.

        Raises:
            ValueError: if there are no labels, or not one for each token.
        """
        labels = check_labels(input_ids, labels)
        logits, targets, states = self.target_logits(
            labels, input_ids=input_ids, attention_mask=attention_mask, **kwargs
        )
        total = nn.functional.cross_entropy(in_float32(logits), targets, reduction="sum")
        count = targets.numel() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        with torch.no_grad():
            accuracy = ranked_first(logits, targets).float().mean()
        return MaskedLMObjectiveOutput(loss, accuracy, token_variance_share(states, attention_mask))
