"""
The base class of pretraining objectives, and the protocol of encoders.

An objective is a `PreTrainedModel` that owns all that it trains: the encoder, its heads, and where it has one the
generator. `Trainer` trains it as it stands and saves it whole for resuming; `objective.encoder.save_pretrained(folder)`
gives the pretrained encoder.

Objectives know encoders through this protocol alone. An encoder is a `PreTrainedModel` with

- `config.hidden_size`,
- `get_input_embeddings()`,
- a `forward` that takes `input_ids` or `inputs_embeds`, and `attention_mask`, and returns `last_hidden_state`.

Two methods are optional. Without them the defaults for transformers' own models apply.

- `config.scale_down(divider, hidden_size, num_hidden_layers, num_attention_heads)` returns the config of a smaller
  encoder of the same kind, from which objectives with a generator build it. Implement it where fields other than those
  of BERT-like models depend on the width or the depth. See [`scale_down_config`] for the arguments and the default.
- `model.get_post_embedding_module()` returns the first module that is applied to the complete sum of embeddings, as
  its first positional argument. Notes on rare words are mixed into that argument. See [`post_embedding_module`] for the
  default.
"""

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..modules.adaptive_softmax import AdaptiveEmbedding
from ..modules.input_checks import check_one_input, known_ids, values_can_be_read
from ..modules.keyword_checks import TRANSFORMERS_KEYWORDS, check_keywords
from .masking import check_labels, token_mask


# Usual names of the norm that follows the sum of embeddings: BERT, RoBERTa, ELECTRA and their kin; ModernBERT; TUPE.
_EMBEDDING_NORMS = ("embeddings.LayerNorm", "embeddings.norm", "embed_norm")


class PretrainingObjective(PreTrainedModel):
    """Base class of objectives: an encoder with all that is trained beside it."""

    base_model_prefix = ""
    # Notes that were attached to the objective are part of its checkpoints; they are attached anew, or left out.
    _keys_to_ignore_on_load_unexpected = [r"^notes\."]
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Whether the encoder reads the rows as the collator has masked them, or with tokens replaced by a generator.
    encoder_reads = "replaced"

    encoder: Any

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
        config.validate()  # its fields may have been set since, as `from_pretrained(..., field=value)` does
        super().__init__(config, *inputs, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def _check_keywords(self, keywords: dict[str, Any]) -> None:
        """
        Check what is handed on to the encoder: those of transformers take any keyword and read those that they know.

        Raises:
            TypeError: for one that neither the encoder nor this objective knows.
        """
        if not keywords:
            return
        encoder = getattr(self.encoder, "module", self.encoder)  # within a wrapper, such as FSDP's
        encoder_class: Any = type(encoder)
        check_keywords(keywords, _keywords_of(encoder_class), self)

    def _check_rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        """
        Check a batch of masked rows.

        Returns:
            `tuple`: ids, and labels of int64, both of shape `(batch, length)`. The ids are the tensor that was given,
            by which notes know masked rows; where padding holds what is no id, a copy with 0 at padding. That is
            looked at on a CPU alone.

        Raises:
            TypeError: for an argument that is no tensor.
            ValueError: if there are no labels, shapes or dtypes do not agree, the mask holds other values than 0 and 1,
                or an id that is not padding lies outside the vocabulary of `vocab_size` ids.
        """
        labels = check_labels(input_ids, labels)
        check_one_input(input_ids, None, self.get_input_embeddings())
        rows = known_ids(input_ids, vocab_size, token_mask(attention_mask, input_ids))
        if values_can_be_read(input_ids) and bool(((input_ids < 0) | (input_ids >= vocab_size)).any()):
            return rows, labels
        return input_ids, labels

    def _exclude_from_sharding(self, weights: Sequence[Tensor]) -> None:
        """Keep FSDP from wrapping modules that hold these `weights` by themselves: the weights are used outside too."""
        shared = {id(weight) for weight in weights}
        holders = {
            type(module).__name__
            for module in self.modules()
            if any(id(parameter) in shared for parameter in module.parameters())
        }
        self._no_split_modules = set(self._no_split_modules or ()) - holders


@functools.lru_cache
def _keywords_of(encoder_class: Any) -> frozenset[str]:
    """Names that an encoder's forward pass takes, those of transformers among them."""
    return TRANSFORMERS_KEYWORDS.union(inspect.signature(encoder_class.forward).parameters)


def add_frozen_parameters(loss: Tensor, objective: nn.Module, frozen: list[nn.Parameter]) -> Tensor:
    """
    Add a gradient of zero for parameters that take no part in a loss, where DistributedDataParallel would wait for one.

    On one process and under FSDP, which wait for nothing, they get no gradient at all.
    [`~hf_efficient.objectives.callbacks.StartDiscriminatorCallback`] sets it to None in each case, so that optimisers
    leave them and their moments alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()):
        return loss
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    frozen = [parameter for parameter in frozen if parameter.requires_grad]
    if not frozen:
        return loss
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in objective.modules())
    if sharded or any(isinstance(parameter, DTensor) for parameter in frozen):
        return loss
    return loss + 0.0 * torch.stack([parameter.sum() for parameter in frozen]).sum()


def config_from_dict(fields: dict[str, Any]) -> PreTrainedConfig:
    """Build the config that `config.to_dict()` was made from, by its `model_type`."""
    fields = dict(fields)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def embedding_weight(encoder: PreTrainedModel) -> Tensor:
    """
    Return the encoder's token embeddings, of shape `(vocab_size, embedding width)`.

    Raises:
        ValueError: if they are not one matrix.
    """
    embeddings = encoder.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    if isinstance(embeddings, AdaptiveEmbedding) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"The token embeddings of {type(encoder).__name__} are no single table, so nothing can share them. Take an "
            "encoder with a plain nn.Embedding (an SRU++ without `adaptive_cutoffs`, say)."
        )
    return weight


def drop_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """Remove a pooler, which no objective trains: parameters that never get a gradient stop distributed training."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # type: ignore[assignment]
    return encoder


def position_inputs(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """
    Return the `position_ids` of an encoder that counts positions from the first token (RoBERTa), by the mask.

    By itself it takes every padding token for padding, though it may be a sample. Empty for other encoders.
    """
    embeddings: Any = getattr(encoder, "embeddings", None)
    count = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if count is None:
        return {}
    padding = embeddings.padding_idx
    is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"position_ids": count(torch.where(is_token.bool(), padding + 1, padding), padding)}


def post_embedding_module(encoder: PreTrainedModel) -> nn.Module:
    """
    Return the first module that is applied to the complete sum of embeddings.

    It is what the encoder's `get_post_embedding_module()` returns, or without that method the embedding norm under one
    of its usual names.

    Raises:
        ValueError: if there is neither.
    """
    declared = getattr(encoder, "get_post_embedding_module", None)
    if declared is not None:
        return declared()
    for name in _EMBEDDING_NORMS:
        try:
            return encoder.get_submodule(name)
        except AttributeError:
            continue
    raise ValueError(
        f"Nothing can be mixed into the embeddings of {type(encoder).__name__}: it has no embedding norm under one of "
        f"the names {', '.join(_EMBEDDING_NORMS)}, and no method `get_post_embedding_module` that names another module."
    )


def _number_of_heads(width: int, head_size: int) -> int:
    """The number of heads that keeps their size best, even if it can be, as rotary positions want it."""
    fitting = [heads for heads in range(1, width + 1) if width % heads == 0]
    even = [heads for heads in fitting if (width // heads) % 2 == 0]
    return min(even or fitting, key=lambda heads: (abs(width // heads - head_size), heads))


def scale_down_config(
    config: PreTrainedConfig,
    divider: int = 3,
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
) -> PreTrainedConfig:
    """
    Return the config of a smaller encoder of the same architecture, by the config's own `scale_down` if it has one.

    By default width and feed-forward width are divided, with heads of the same size if the new width allows it; the
    depth stays, as in ELECTRA-Base (Clark et al. 2020, table 6) and MC-BERT.

    Args:
        config (`PreTrainedConfig`):
            Config of the large encoder; left unchanged.
        divider (`int`, *optional*, defaults to 3):
            The new width is `config.hidden_size // divider`, rounded down further where the architecture needs it.
        hidden_size (`int`, *optional*):
            The new width itself, in place of `divider`.
        num_hidden_layers (`int`, *optional*):
            The new depth; the first layers' settings are kept where layers differ.
        num_attention_heads (`int`, *optional*):
            The new number of heads, in place of one that keeps their size.

    Raises:
        ValueError: for a width or depth that is not positive, or heads that do not divide the width.
        StrictDataclassError: if the architecture refuses the sizes.
    """
    width = config.hidden_size // divider if hidden_size is None else hidden_size
    depth = getattr(config, "num_hidden_layers", 1) if num_hidden_layers is None else num_hidden_layers
    if width < 1 or depth < 1:
        raise ValueError(f"A generator needs a positive width and depth, not {width} and {depth} (divider {divider}).")
    if hasattr(config, "scale_down"):
        return config.scale_down(divider, hidden_size, num_hidden_layers, num_attention_heads)
    small = copy.deepcopy(config)
    for name, value in _scaled_fields(config, divider, width, depth, num_attention_heads, hidden_size is None).items():
        setattr(small, name, value)
    small.validate()
    return small


def _scaled_fields(
    config: PreTrainedConfig, divider: int, width: int, depth: int, heads: int | None, divides: bool
) -> dict[str, Any]:
    """Fields of a BERT-like config that change with the width and the depth; `divides` if `divider` gave the width."""
    large = config.hidden_size
    fields: dict[str, Any] = {"hidden_size": width, "architectures": None}
    if hasattr(config, "num_hidden_layers"):
        fields["num_hidden_layers"] = depth
    for name in ("intermediate_size", "num_key_value_heads"):
        if getattr(config, name, None) is not None:
            fields[name] = max(1, getattr(config, name) * width // large)
    if divides and "intermediate_size" in fields:
        fields["intermediate_size"] = max(1, config.intermediate_size // divider)
    if hasattr(config, "embedding_size"):
        fields["embedding_size"] = width
    if hasattr(config, "num_attention_heads"):
        if heads is None:
            heads = _number_of_heads(width, large // config.num_attention_heads)
        elif heads < 1 or width % heads:
            raise ValueError(
                f"A width of {width} can't be divided among {heads} heads (generator_num_attention_heads)."
            )
        fields["num_attention_heads"] = heads
    layer_types = getattr(config, "layer_types", None)
    if isinstance(layer_types, list) and not isinstance(getattr(type(config), "layer_types", None), property):
        fields["layer_types"] = layer_types[:depth]
    return fields
