"""A small masked language model over the token table of the encoder that it helps to train."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .labels import IGNORE_INDEX, original_ids, ranked_first
from .precision import in_float32
from .shrink import shrink_config


def token_table(encoder: PreTrainedModel) -> Tensor:
    """
    The encoder's token embeddings, of shape `(vocab_size, embedding width)`.

    Raises:
        ValueError: if they are not one matrix.
    """
    weight = getattr(encoder.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"The token embeddings of {type(encoder).__name__} are no single table, so nothing can share them. Take an "
            "encoder with a plain nn.Embedding (an SRU++ without `adaptive_cutoffs`, say)."
        )
    return weight


def drop_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """Take away a pooler, which no objective trains: parameters that never get a gradient stop distributed training."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # type: ignore[assignment]
    return encoder


def token_positions(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """The `position_ids` of an encoder that counts positions from the first token, not from the first column (RoBERTa),
    by the mask: by itself it takes every padding token for padding, though it may be a sample. Nothing for others."""
    embeddings: Any = getattr(encoder, "embeddings", None)
    count = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if count is None:
        return {}
    padding = embeddings.padding_idx
    is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"position_ids": count(torch.where(is_token.bool(), padding + 1, padding), padding)}


@dataclass
class Guesses:
    """
    A masked batch, and what a generator makes of it.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(batch, length)`):
            Masked tokens, and the true id at targets, -100 elsewhere.
        attention_mask (`torch.Tensor` of shape `(batch, length)` or `None`):
            1 for tokens, 0 for padding.
        projected (`torch.FloatTensor` of shape `(vocab_size, width)`):
            The token table as the generator sees it.
        states (`torch.FloatTensor` of shape `(batch, length, width)`):
            Its final states.
        positions (`torch.LongTensor` of shape `(targets,)`):
            Places of the targets in the flattened batch.
        hidden (`torch.FloatTensor` of shape `(targets, width)`):
            Their states behind the transform, ready for the product with `projected`.
        loss_sum, accuracy (`torch.FloatTensor` of shape `()`):
            Cross-entropy, summed over targets, and the share of targets that are ranked first (in low precision, among
            equals: by id), not a number without any.
        inputs (`dict`):
            What else the encoder takes.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    projected: Tensor
    states: Tensor
    positions: Tensor
    hidden: Tensor
    loss_sum: Tensor
    accuracy: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def original_ids(self) -> Tensor:
        """The rows before masking."""
        return original_ids(self.input_ids, self.labels)

    @property
    def num_tokens(self) -> Tensor | int:
        """Without padding."""
        return self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum()


class SharedTableGenerator(nn.Module):
    """
    A small masked language model without token embeddings of its own (MC-BERT's repository, there `mc` and
    `generator`): it reads and predicts tokens through one projection of the encoder's table.

    The network is of the encoder's own architecture. Its input is `projection(table[ids])`; its logits are
    `transform(states) @ projection(table).T + bias`. The table is handed to the methods, so it belongs to the encoder
    alone.

    Args:
        encoder (`PreTrainedModel`):
            Gives the architecture, the sizes, the vocabulary, dtype and device. Nothing of it is kept.
        divider, hidden_size, num_hidden_layers, num_attention_heads:
            See [`~hf_efficient.objectives.shrink.shrink_config`].
        vocabulary_bias (`bool`, *optional*, defaults to `True`):
            Own a bias `(vocab_size,)`, 0 at the start. Without, `bias` is None, for users that hand one in.

    Raises:
        ValueError: if the encoder cannot have a generator of its kind; the message says why.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        divider: int = 3,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        vocabulary_bias: bool = True,
    ):
        super().__init__()
        table = token_table(encoder)
        self.network = self._build(
            encoder,
            divider=divider,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
        )
        width = self.network.config.hidden_size
        self.projection = nn.Linear(table.shape[1], width)
        self.dense = nn.Linear(width, width)
        eps = getattr(encoder.config, "layer_norm_eps", getattr(encoder.config, "norm_eps", 1e-5))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(table.shape[0])) if vocabulary_bias else None
        self.to(device=table.device, dtype=table.dtype)

    @staticmethod
    def _build(encoder: PreTrainedModel, **sizes: Any) -> PreTrainedModel:
        name = type(encoder).__name__
        config = encoder.config
        kind = config.model_type
        only_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if only_causal or getattr(config, "is_decoder", False) or getattr(config, "is_causal", False):
            raise ValueError(f"{name} is causal, but a generator of masked tokens sees both sides: take an encoder.")
        if "inputs_embeds" not in inspect.signature(encoder.forward).parameters:
            raise ValueError(f"{name} takes no `inputs_embeds`, so no generator of its kind can share a token table.")
        try:
            network = type(encoder)(shrink_config(config, **sizes))
        except (AttributeError, TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
            raise ValueError(
                f"No generator can be made by shrinking {name} ({config.model_type}): {error} Another width "
                "(`hidden_size`, in place of the divider) or `num_hidden_layers` may fit."
            ) from error
        if token_table(network).shape[1] != network.config.hidden_size:
            raise ValueError(f"{name} has token embeddings of a width of their own, which a generator cannot set.")
        drop_pooler(network).set_input_embeddings(None)  # type: ignore[arg-type]
        return network

    def project(self, table: Tensor) -> Tensor:
        """The table as the generator sees it: `(vocab_size, embedding width)` becomes `(vocab_size, width)`."""
        return self.projection(table)

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        table: Tensor | None = None,
        projected: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """
        Final states of the network, `(batch, length, width)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            table (`torch.Tensor` of shape `(vocab_size, embedding width)`):
                The encoder's token table.
            projected (`torch.Tensor` of shape `(vocab_size, width)`, *optional*):
                `project(table)`, where it is at hand for the logits too: rows are then taken from it.
            inputs:
                What else the network takes.

        Raises:
            ValueError: if both tables are missing.
        """
        if projected is not None:
            # In the weights' own dtype, since under autocast gradients of a row are sums over many tokens.
            embeds = nn.functional.embedding(input_ids, projected.to(self.projection.weight.dtype))
        elif table is not None:
            embeds = self.projection(nn.functional.embedding(input_ids, table))
        else:
            raise ValueError("Give the encoder's `table`, or the table `projected`.")
        inputs = {**token_positions(self.network, input_ids, attention_mask), **inputs}
        output = self.network(inputs_embeds=embeds, attention_mask=attention_mask, return_dict=True, **inputs)
        return output.last_hidden_state

    def transform(self, states: Tensor) -> Tensor:
        """The head up to the vocabulary: `(..., width)` to the same shape."""
        return self.norm(nn.functional.gelu(self.dense(states)))

    def guess(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        table: Tensor,
        bias: Tensor | None,
        **inputs: Any,
    ) -> Guesses:
        """What it makes of a masked batch and the network's other `inputs`, by the encoder's `table` and a `bias`
        `(vocab_size,)` of the logits; scores are computed at targets only."""
        flat = labels.flatten()
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = flat.index_select(0, positions)
        projected = self.project(table)
        states = self.states(input_ids, attention_mask, projected=projected, **inputs)
        hidden = self.transform(states.flatten(0, 1).index_select(0, positions))
        logits = nn.functional.linear(hidden, projected, bias)
        loss_sum = nn.functional.cross_entropy(in_float32(logits), targets, reduction="sum")
        accuracy = ranked_first(logits.detach(), targets).float().mean()
        return Guesses(
            input_ids, labels, attention_mask, projected, states, positions, hidden, loss_sum, accuracy, inputs
        )
