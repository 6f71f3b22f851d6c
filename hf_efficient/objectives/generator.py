"""The generator: a small masked language model that shares the token embeddings of the encoder it helps to train."""

import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..modules.losses import in_float32
from ..utils.labels import IGNORE_INDEX
from .base import drop_pooler, embedding_weight, position_inputs, scale_down_config
from .diagnostics import ranked_first
from .masking import original_ids


class SampleSource(NamedTuple):
    """
    Source of an objective's samples: the first of these that is given, else torch's global generator.

    Args:
        sampled_ids (`torch.LongTensor`, *optional*):
            The samples themselves.
        sample_seeds (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Seeds of the rows, which decide all samples.
        generator (`torch.Generator`, *optional*):
            A random number generator.
    """

    sampled_ids: Tensor | None = None
    sample_seeds: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass
class GeneratorOutput:
    """
    A masked batch, and the generator's states and loss on it.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(batch, length)`):
            Masked tokens, and the true id at targets, -100 elsewhere.
        attention_mask (`torch.Tensor` of shape `(batch, length)` or `None`):
            1 for tokens, 0 for padding.
        projected (`torch.FloatTensor` of shape `(vocab_size, width)`):
            The encoder's token embeddings, projected to the generator's width.
        states (`torch.FloatTensor` of shape `(batch, length, width)`):
            The generator's final states.
        positions (`torch.LongTensor` of shape `(targets,)`):
            Indices of the targets in the flattened batch.
        hidden (`torch.FloatTensor` of shape `(targets, width)`):
            States at targets after the head's transform, ready for the product with `projected`.
        loss_sum, accuracy (`torch.FloatTensor` of shape `()`):
            Cross-entropy summed over targets, and the fraction of targets that are ranked first, NaN without targets.
        inputs (`dict`):
            Further inputs of the encoder.
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
        """Number of tokens, padding not counted."""
        return self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum()


class TiedEmbeddingGenerator(nn.Module):
    """
    A small masked language model without token embeddings of its own, after the MC-BERT repository.

    It reads and predicts tokens through one projection of the encoder's embeddings. The network is of the encoder's own
    architecture. Its input is `projection(table[ids])`, and its logits are
    `transform(states) @ projection(table).T + bias`. The table is passed to the methods, so it belongs to the encoder
    alone.

    Args:
        encoder (`PreTrainedModel`):
            Gives the architecture, the sizes, the vocabulary, dtype and device. Nothing of it is kept.
        divider, hidden_size, num_hidden_layers, num_attention_heads:
            See [`~hf_efficient.objectives.base.scale_down_config`].
        vocabulary_bias (`bool`, *optional*, defaults to `True`):
            Own a bias `(vocab_size,)`, 0 at the start. Without it, `bias` is None and callers pass one in.

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
        table = embedding_weight(encoder)
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
            network = type(encoder)(scale_down_config(config, **sizes))
        except (AttributeError, TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
            raise ValueError(
                f"No generator can be made by scaling down {name} ({config.model_type}): {error} Another width "
                "(`hidden_size`, in place of the divider) or `num_hidden_layers` may fit."
            ) from error
        if embedding_weight(network).shape[1] != network.config.hidden_size:
            raise ValueError(f"{name} has token embeddings of a width of their own, which a generator cannot set.")
        drop_pooler(network).set_input_embeddings(None)  # type: ignore[arg-type]
        return network

    def project(self, table: Tensor) -> Tensor:
        """Project the embeddings `(vocab_size, embedding width)` to the generator's width, `(vocab_size, width)`."""
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
        Compute the final states of the network, of shape `(batch, length, width)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Masked tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding.
            table (`torch.Tensor` of shape `(vocab_size, embedding width)`):
                The encoder's token embeddings.
            projected (`torch.Tensor` of shape `(vocab_size, width)`, *optional*):
                `project(table)`, if it is computed for the logits anyway; rows are then taken from it.
            inputs:
                Further inputs of the network.

        Raises:
            ValueError: if both tables are missing.
        """
        if projected is not None:
            # In the weights' own dtype, since under autocast gradients of a row are sums over many tokens.
            embeds = nn.functional.embedding(input_ids, projected.to(self.norm.weight.dtype))
        elif table is not None:
            embeds = self.projection(nn.functional.embedding(input_ids, table))
        else:
            raise ValueError("Give the encoder's `table`, or the table `projected`.")
        inputs = {**position_inputs(self.network, input_ids, attention_mask), **inputs}
        output = self.network(inputs_embeds=embeds, attention_mask=attention_mask, return_dict=True, **inputs)
        return output.last_hidden_state

    def transform(self, states: Tensor) -> Tensor:
        """Apply the head's transform to states `(..., width)`; the product with the vocabulary follows it."""
        return self.norm(nn.functional.gelu(self.dense(states)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        table: Tensor,
        bias: Tensor | None,
        **inputs: Any,
    ) -> GeneratorOutput:
        """
        Run the generator on a masked batch and compute its loss, with logits at targets only.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask (the same shape or `None`):
                Masked tokens, and 1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch, length)`):
                The true id at targets, -100 elsewhere.
            table (`torch.Tensor` of shape `(vocab_size, embedding width)`), bias (`(vocab_size,)` or `None`):
                The encoder's token embeddings, and the bias of the logits.
            inputs:
                Further inputs of the network.
        """
        flat = labels.flatten()
        positions = (flat != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = flat.index_select(0, positions)
        projected = self.project(table)
        states = self.states(input_ids, attention_mask, projected=projected, **inputs)
        hidden = self.transform(states.flatten(0, 1).index_select(0, positions))
        logits = nn.functional.linear(hidden, projected, bias)
        loss_sum = nn.functional.cross_entropy(in_float32(logits), targets, reduction="sum")
        accuracy = ranked_first(logits.detach(), targets).float().mean()
        return GeneratorOutput(
            input_ids, labels, attention_mask, projected, states, positions, hidden, loss_sum, accuracy, inputs
        )
