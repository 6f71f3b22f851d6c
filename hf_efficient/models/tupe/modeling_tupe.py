"""
TUPE-BERT: BERT with untied positional encoding.

Source: Ke, He, Liu, "Rethinking Positional Encoding in Language Pre-training", ICLR 2021, arXiv 2006.15595, and the
authors' code, which the released checkpoints were trained with. Where the two differ, this file follows the code:

- U^Q and U^K have biases (the paper writes none), and the d of 1 / sqrt(2 d) is the width of one head;
- [CLS]'s logits theta_1 and theta_2 come from the first two rows of the position table, not from vectors of their own;
- the reset of [CLS]'s row and column precedes the sum with the relative bias, which has a bucket for each of them.

Deviations from the code: under mixed precision the position term is computed in float32 and rounded once (the code
keeps all of it in half precision), ids are checked, and a row that is all padding attends evenly, without NaN.

A position is the column of a token. So the input must start with [CLS] and be padded on the right; left padding raises.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...modules.input_checks import (
    additive_mask,
    check_has_values,
    check_labels,
    check_one_input,
    check_per_token,
    check_tensor,
    compute_dtype,
    known_ids,
    read_attention_mask,
    stands_for_many,
    under_autocast,
    values_can_be_read,
)
from ...modules.keyword_checks import TRANSFORMERS_KEYWORDS, check_keywords
from ...modules.losses import (
    cross_entropy,
    question_answering_loss,
    sequence_classification_loss,
    token_classification_loss,
)
from ...ops.backend import attention_context, is_transformed
from ...ops.position_bias import relative_position_bucket, untied_position_bias
from ...utils.cache_naming import CACHE_NAMES
from ...utils.labels import IGNORE_INDEX
from .configuration_tupe import TupeConfig


AUTO_ATTENTION = "tupe_auto"
# From here on padded rows attend one by one in inference on a CPU. Both forms are measured at lengths below and above
# in `training/results/encoder_speed.json`.
ROWWISE_MIN_LENGTH = 256


def eager_attention_forward(
    module, query, key, value, attention_mask, position_bias=None, scaling=None, dropout=0.0, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference form of TUPE's attention: softmax(s q k^T + position_bias) v; (B, H, T, D) in, (B, T, H, D) out."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scaling, key.transpose(2, 3))  # (B, H, T, T)
    if position_bias is not None and not is_transformed():
        # In place: a fresh (B, H, T, T) tensor costs more than the sum.
        scores = scores.add_(position_bias.to(scores.dtype))
    elif position_bias is not None:
        scores = scores + position_bias.to(scores.dtype)
    if attention_mask is not None:
        scores = mask_scores(scores, attention_mask)
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def mask_scores(scores: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Adds an additive mask, or drops to the lowest finite value where a boolean one is False: a row that masks
    everything stays finite."""
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    return scores + attention_mask


def auto_attention_forward(
    module, query, key, value, attention_mask, position_bias, dropout=0.0, key_lengths=None, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The fastest exact form for the device and mode; all are measured in `training/results/encoder_speed.json`.

    On a CPU torch's fused kernel takes neither a bias that requires grad nor dropout; the general path that it then
    falls to is slower than the explicit product. Without them the fused kernel is the faster.
    `key_lengths` are those of [`real_key_lengths`], in place of a mask.
    """
    if key_lengths is not None:
        return _attend_by_rows(query, key, value, position_bias, kwargs.get("scaling"), key_lengths), None
    # Not by whether gradients are recorded now: reentrant checkpointing records none the first time that it runs a
    # layer and does the second time, and both have to round alike.
    unfused = query.device.type == "cpu" and (position_bias.requires_grad or dropout > 0.0)
    explicit = unfused or wants_weights(module.config, kwargs)
    attend = eager_attention_forward if explicit else ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(module, query, key, value, attention_mask, position_bias=position_bias, dropout=dropout, **kwargs)


def wants_weights(config: TupeConfig, options: Mapping[str, Any]) -> bool:
    """Return whether a call is to return attention weights, by its own options or else by the config."""
    given = options.get("output_attentions")
    return bool(config.output_attentions if given is None else given)


def _is_recorded() -> bool:
    """Return whether this call is traced into a graph for other inputs, which must not depend on values of this one, or
    transformed into one for many."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()


def real_key_lengths(attention_mask: torch.Tensor) -> list[int] | None:
    """
    The number of real tokens of each row, where it is faster to let each row attend to them alone.

    With a mask and a bias the fused kernel wants their sum, a (B, H, T, T) tensor, and computes products with padding,
    only to discard them. A call for each row has a cost of its own, which short inputs do not earn back.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, length)`): 1 for tokens, 0 for padding.

    Returns:
        `list[int]`, or `None` where the mask has to be used: short inputs, other devices than a CPU, compiled and
        traced code, padding inside a row, and rows of nothing but padding.
    """
    length, device = attention_mask.shape[1], attention_mask.device
    if length < ROWWISE_MIN_LENGTH or device.type != "cpu" or _is_recorded():
        return None
    real = attention_mask.bool()
    lengths = real.sum(1)
    if lengths.min() == 0 or not torch.equal(real, torch.arange(length, device=device) < lengths[:, None]):
        return None
    return lengths.tolist()


def _attend_by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_bias: torch.Tensor,
    scaling: float | None,
    key_lengths: list[int],
) -> torch.Tensor:
    """(B, H, T, D) in, (B, T, H, D) out; neighbouring rows of one length share a call."""
    output = query.new_empty(query.transpose(1, 2).shape)
    start = 0
    for keys, run in groupby(key_lengths):
        rows = slice(start, start := start + len(list(run)))
        bias = position_bias[..., :keys].to(query.dtype)
        attended = nn.functional.scaled_dot_product_attention(
            query[rows], key[rows, :, :keys], value[rows, :, :keys], attn_mask=bias, scale=scaling
        )
        output[rows] = attended.transpose(1, 2)
    return output


AttentionInterface.register(AUTO_ATTENTION, auto_attention_forward)
AttentionMaskInterface.register(AUTO_ATTENTION, sdpa_mask)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Context with autocast off, on devices that have it (the meta device does not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class TupePositionBias(nn.Module):
    """
    The positional part of the attention logits, shared by all layers and all rows of a batch.

    Rows of the position table: row 0 gives theta_1 ([CLS] to anything), row 1 gives theta_2 (anything to [CLS]), and
    token i >= 1 uses row i + 1. Without `untie_cls` row 0 is unused.
    """

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = (config.attention_scale_factor * self.head_dim) ** -0.5
        self.untie_cls = config.untie_cls
        self.max_distance = config.relative_attention_max_distance
        self.num_buckets = config.relative_attention_num_buckets
        self.position_embeddings = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.relative_attention_bias = (
            nn.Embedding(self.num_buckets + 1, self.num_heads) if config.relative_attention else None
        )

    def forward(self, length: int, device: torch.device | None = None) -> torch.Tensor:
        """
        Args:
            length (`int`): number of tokens T, [CLS] included.
            device (`torch.device`, *optional*): where the model computes; by default where the weights are. The two
                differ when weights are offloaded.

        Returns:
            `torch.Tensor` of shape `(heads, T, T)`, in the parameters' dtype even under autocast: it is computed once a
            call and read by every layer.
        """
        device = self.norm.weight.device if device is None else device
        with _without_autocast(device.type):
            return self._compute(length, device)

    def _compute(self, length: int, device: torch.device) -> torch.Tensor:
        rows = torch.arange(0 if self.untie_cls else 1, length + 1, device=device)
        table = self.norm(self.position_embeddings(rows))
        query, key = self._heads(self.query(table)), self._heads(self.key(table))
        relative = to_cls = from_cls = None
        if self.relative_attention_bias is not None:
            offsets = torch.arange(1 - length, length, device=device)
            buckets = relative_position_bucket(offsets, self.num_buckets, self.max_distance)
            relative = self.relative_attention_bias(buckets).t()  # (H, 2T - 1)
        if self.untie_cls:
            thetas = self.scaling * (query[:, :2] * key[:, :2]).sum(-1)
            from_cls, to_cls = thetas.unbind(1)  # theta_1, theta_2
            if self.relative_attention_bias is not None:
                # The formula never gives bucket num_buckets // 2, so [CLS]'s own row uses it.
                cls_buckets = torch.tensor([self.num_buckets // 2, self.num_buckets], device=device)
                from_bucket, to_bucket = self.relative_attention_bias(cls_buckets)
                from_cls, to_cls = from_cls + from_bucket, to_cls + to_bucket
            query, key = query[:, 1:], key[:, 1:]
        return untied_position_bias(query, key, relative, to_cls, from_cls, scale=self.scaling)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(-1, self.num_heads, self.head_dim).transpose(0, 1)


class TupeAttention(nn.Module):
    """Multi-head self-attention whose logits take a positional part that is computed elsewhere."""

    is_causal = False

    def __init__(self, config: TupeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = (config.attention_scale_factor * self.head_dim) ** -0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        implementation, attend = self.config._attn_implementation, cast(Callable, auto_attention_forward)
        # The registry belongs to the process: remote code of another revision puts its own function under our name.
        if implementation != AUTO_ATTENTION:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        learned = position_bias is not None and position_bias.requires_grad and attention_mask is not None
        if learned and implementation == "sdpa" and not (torch.is_grad_enabled() or _is_recorded()):
            # The first run of a reentrant checkpoint: sdpa takes the kernel of the second if the sum asks for grad.
            position_bias, attention_mask = mask_scores(position_bias, attention_mask).requires_grad_(), None
        with attention_context(query, key, value):
            output, weights = attend(
                self,
                query,
                key,
                value,
                attention_mask,
                position_bias=position_bias,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class TupeMLP(nn.Module):
    def __init__(self, config: TupeConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.act(self.fc1(hidden_states))))


class TupeLayer(GradientCheckpointingLayer):
    def __init__(self, config: TupeConfig, layer_idx: int):
        super().__init__()
        self.normalize_before = config.normalize_before
        self.self_attn = TupeAttention(config, layer_idx)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TupeMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, position_bias=None, attention_mask=None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        branch = self.self_attn_norm(hidden_states) if self.normalize_before else hidden_states
        branch, _ = self.self_attn(branch, position_bias, attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(branch)
        if not self.normalize_before:
            hidden_states = self.self_attn_norm(hidden_states)
        branch = self.mlp_norm(hidden_states) if self.normalize_before else hidden_states
        hidden_states = hidden_states + self.dropout(self.mlp(branch))
        return hidden_states if self.normalize_before else self.mlp_norm(hidden_states)


class TupePreTrainedModel(PreTrainedModel):
    config: TupeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TupeLayer", "TupePositionBias"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash attention has no input for an additive bias
    _supports_attention_backend = True
    accepts_loss_kwargs = True  # all losses are sums divided by `num_items_in_batch`
    _can_record_outputs = {"hidden_states": TupeLayer, "attentions": TupeAttention}

    def __init__(self, config: TupeConfig, *inputs: Any, **kwargs: Any):
        config.validate()  # its fields may have been set since, as `from_pretrained(..., field=value)` does
        super().__init__(config, *inputs, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Nothing requested means the fastest form for the device and mode; anything requested is taken as it is."""
        return super().get_correct_attn_implementation(requested_attention or AUTO_ATTENTION, is_init_check)

    @property
    def _encoder(self) -> "TupeModel":
        return cast("TupeModel", self.base_model)

    def get_position_embeddings(self) -> nn.Embedding:
        """The position table: `max_position_embeddings + 1` rows."""
        return self._encoder.position_bias.position_embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int):
        """
        Change the longest input. Rows that stay keep their weights; new ones are drawn like at initialisation and
        want training.

        Args:
            new_num_position_embeddings (`int`): new `max_position_embeddings`, at least 1.
        """
        if new_num_position_embeddings < 1:
            raise ValueError(f"An encoder needs at least 1 position, not {new_num_position_embeddings}.")
        old = self.get_position_embeddings()
        rows = new_num_position_embeddings + 1
        new = nn.Embedding(rows, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            new.weight.normal_(mean=0.0, std=self.config.initializer_range)
            kept = min(rows, old.num_embeddings)
            new.weight[:kept] = old.weight[:kept]
        new.weight.requires_grad_(old.weight.requires_grad)
        self._encoder.position_bias.position_embeddings = new
        self.config.max_position_embeddings = new_num_position_embeddings


def check_inputs(
    model: "TupeModel",
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: Any,
    token_type_ids: torch.Tensor | None,
) -> tuple[torch.Tensor | None, Any]:
    """
    Returns:
        `tuple`: `input_ids` with 0 where the mask hides an id, whatever that is, and the mask in the form that
        [`read_attention_mask`] gives it.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: neither or both inputs, an input of the wrong shape or dtype, a mask that is none, an id outside the
            vocabulary, left padding, or a row that does not start with [CLS] (the last two only where
            `config.cls_token_id` is set).
    """
    config = model.config
    inputs = check_one_input(input_ids, inputs_embeds, model.embed_tokens, size=config.hidden_size)
    batch, length = inputs.shape[:2]
    if isinstance(attention_mask, torch.Tensor):
        check_has_values("attention_mask", attention_mask, inputs.device)
    mask = read_attention_mask(attention_mask, batch, length, config.num_attention_heads)
    check_per_token("token_type_ids", token_type_ids, batch, length)
    real = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    if input_ids is not None:
        input_ids = known_ids(input_ids, config.vocab_size, real)
    if inputs.numel() > 0:
        _check_layout(config, input_ids, real)
    return input_ids, mask


def hide_padding(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Set the states of tokens that nobody sees to zero. Not by a product, which would let NaN and infinity through.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`)
        attention_mask (`torch.Tensor` of shape `(batch, length)` or `(batch or 1, heads or 1, length, length)`): 0 or
            `False` hides; floats of four dimensions hide where they are the lowest number.
    """
    mask = attention_mask
    if mask.dim() == 4:
        sees = mask > torch.finfo(mask.dtype).min if mask.is_floating_point() else mask != 0
        seen = sees.any(1).any(1)
    else:
        seen = mask != 0
    return hidden_states.masked_fill(~seen.unsqueeze(-1), 0.0)


def check_length(config: TupeConfig, length: int) -> None:
    """
    Raises:
        ValueError: if `length` is 0 or exceeds the position table.
    """
    if length == 0:
        raise ValueError("The input has length 0; TUPE needs at least the [CLS] token.")
    limit = config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"The input has {length} tokens, but the position table ends at {limit}. Truncate it "
            f"(tokenizer(..., truncation=True, max_length={limit})), or raise the limit with "
            f"model.resize_position_embeddings({length}) and train the new positions."
        )


def check_options(model: TupePreTrainedModel, options: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: for a keyword that is neither transformers' own nor this model's.
        ValueError: positions, packed rows, a cache or causality, none of which this model knows.
    """
    for name in ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
        if options.get(name) is not None:
            raise ValueError(
                f"TUPE takes no {name}: a position is a column. Give packed sequences a row each "
                "(DataCollatorWithPadding in place of DataCollatorWithFlattening)."
            )
    for name in CACHE_NAMES:
        if options.pop(name, None) is not None:
            raise ValueError(
                f"TUPE is an encoder and takes no {name}. Prefix tuning, which hands its prefixes over in one, does "
                "not work with it: take LoRA or prompt tuning."
            )
    if options.get("is_causal"):
        raise ValueError("TUPE attends to both sides: is_causal=True does not fit. Give a mask of four dimensions.")
    check_keywords(options, TRANSFORMERS_KEYWORDS, model)


def _layout_faults(config: TupeConfig, input_ids: torch.Tensor | None, real: torch.Tensor | None):
    """Boolean tensors over rows: padded on the left, and not starting with [CLS]. All-padding rows are neither."""
    left_padded = missing_cls = None
    if config.cls_token_id is not None:
        if real is not None:
            left_padded = ~real[:, 0] & real.any(1)
        if input_ids is not None:
            missing_cls = input_ids[:, 0] != config.cls_token_id
            if real is not None:
                missing_cls = missing_cls & real.any(1)
    return left_padded, missing_cls


def _check_layout(config: TupeConfig, input_ids: torch.Tensor | None, real: torch.Tensor | None) -> None:
    tensor = input_ids if input_ids is not None else real
    if tensor is None or torch.compiler.is_compiling() or tensor.is_meta:
        return
    if tensor.device.type == "cuda":  # other accelerators have no asynchronous assertion
        _assert_on_device(config, input_ids, real)
        return
    if not values_can_be_read(tensor):
        return
    left_padded, missing_cls = _layout_faults(config, input_ids, real)
    if left_padded is not None and left_padded.any():
        raise ValueError(
            f"Row {int(left_padded.nonzero()[0])} is padded on the left. TUPE's positions are columns and the first "
            "one belongs to [CLS]: pad on the right (tokenizer.padding_side = 'right')."
        )
    if input_ids is not None and missing_cls is not None and missing_cls.any():
        row = int(missing_cls.nonzero()[0])
        raise ValueError(
            f"Row {row} starts with id {int(input_ids[row, 0])}, not with [CLS] (id {config.cls_token_id}), "
            "which TUPE expects at index 0. Tokenise with add_special_tokens=True, or set config.cls_token_id to your "
            "tokenizer's id (None switches this check off)."
        )


def _assert_on_device(config: TupeConfig, input_ids: torch.Tensor | None, real: torch.Tensor | None) -> None:
    if input_ids is not None:
        inside = ((input_ids >= 0) & (input_ids < config.vocab_size)).all()
        torch._assert_async(inside, f"input_ids holds an id outside the vocabulary of {config.vocab_size}")
    left_padded, missing_cls = _layout_faults(config, input_ids, real)
    if left_padded is not None:
        torch._assert_async(~left_padded.any(), "TUPE takes right padding only: positions are columns")
    if missing_cls is not None:
        torch._assert_async(~missing_cls.any(), f"a row does not start with [CLS] (id {config.cls_token_id})")


class TupeModel(TupePreTrainedModel):
    """The encoder. It has no pooler; the hidden state at index 0 stands for the sequence."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_bias = TupePositionBias(config)
        self.layers = nn.ModuleList(TupeLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.normalize_before else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): starts with [CLS].
            attention_mask (`torch.Tensor` of shape `(batch, length)` or `(batch or 1, heads or 1, length, length)`,
                *optional*): 1 for tokens, 0 for padding, which stands on the right. With four dimensions 1 lets a query
                attend to a key, and floats are added to the logits. Ids of padding may be anything.
            token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): accepted because BERT's
                tokenizers give them, and ignored: TUPE has no segment embedding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): token embeddings
                before the embedding norm, instead of `input_ids`.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that nothing reads.
            ValueError: neither or both of `input_ids` and `inputs_embeds`, an id outside the vocabulary, an input
                longer than the position table, left padding, a row that does not start with [CLS], or whatever else
                does not fit; see `check_inputs` and `check_options`.
        """
        check_options(self, kwargs)
        ids, attention_mask = check_inputs(self, input_ids, inputs_embeds, attention_mask, token_type_ids)
        hidden_states = self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds
        check_length(self.config, hidden_states.shape[1])
        if attention_mask is not None and inputs_embeds is not None:
            # Before the norm too, which would pass NaN on to the gradients of its weights.
            hidden_states = hide_padding(hidden_states, attention_mask)
        hidden_states = self.dropout(self.embed_norm(hidden_states))
        if attention_mask is not None and attention_mask.dim() == 2:
            hidden_states = hide_padding(hidden_states, attention_mask)
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = additive_mask(attention_mask, hidden_states)
        device = hidden_states.device
        position_bias = self.position_bias(hidden_states.shape[1], device).to(device).unsqueeze(0)
        if self.training and not (torch.is_grad_enabled() or _is_recorded()):
            # Kernels are chosen by whether the bias requires grad, and a training step may run this again with grad.
            learned = any(parameter.requires_grad for parameter in self.position_bias.parameters())
            position_bias = position_bias.detach().requires_grad_(learned)
        position_bias, mask, by_rows = self._combine(position_bias, attention_mask, hidden_states, kwargs)
        for layer in self.layers:
            # Positional, so that gradient checkpointing of either kind sees the tensors that need a gradient.
            hidden_states = layer(hidden_states, position_bias, mask, **by_rows, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_states))

    def _combine(self, position_bias: torch.Tensor, attention_mask, hidden_states: torch.Tensor, options):
        """(1, H, T, T) bias and what the user gave as mask, as the layers want them. They become one tensor, once
        for all layers, when there is padding and nothing is to be differentiated; in training a (B, H, T, T) bias would
        cost a gradient of that size. Where rows had better attend one by one there is no mask, but their lengths."""
        if under_autocast(hidden_states.device.type):
            position_bias = position_bias.to(compute_dtype(hidden_states))
        differentiable = position_bias.requires_grad
        implementation = self.config._attn_implementation
        padded = attention_mask is not None and attention_mask.dim() == 2
        if padded and implementation == AUTO_ATTENTION and not (differentiable or self.training):
            lengths = None if wants_weights(self.config, options) else real_key_lengths(attention_mask)
            if lengths is not None:
                return position_bias, None, {"key_lengths": lengths}
        if padded and stands_for_many(attention_mask):
            mask = attention_mask.bool()[:, None, None, :].expand(-1, -1, attention_mask.shape[1], -1)
        else:
            mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        if implementation == "flex_attention":
            if isinstance(mask, torch.Tensor):  # flex_attention reads the first head's row of a mask for all heads
                position_bias, mask = position_bias + mask, None
            # flex_attention indexes the bias by batch row; an expanded view takes no memory.
            return position_bias.expand(hidden_states.shape[0], -1, -1, -1), mask, {}
        if differentiable or mask is None:
            return position_bias, mask, {}
        return mask_scores(position_bias, mask), None, {}


class TupeLMHead(nn.Module):
    """dense, activation, LayerNorm, then the token table (tied) and a bias of its own."""

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.act(self.dense(hidden_states))))


class TupeHeadModel(TupePreTrainedModel):
    """An encoder with a head on its final states: the forward pass that all heads share but those of more inputs."""

    output_class: type[ModelOutput]

    def logits_and_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Run the head.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): final states of the encoder.
            labels (`torch.Tensor`, *optional*): targets; the class's docstring says which.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): number of targets that the loss is divided by, as
                Trainer counts it over accumulated batches and processes.

        Returns:
            `tuple`: logits, and the loss where there are labels.
        """
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """The arguments are those of [`TupeModel`], and the `labels` that the class's docstring describes."""
        check_options(self, kwargs)
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, kwargs.get("num_items_in_batch"))
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return self.output_class(loss=loss, logits=logits, **states)


class TupeForMaskedLM(TupeHeadModel):
    """
    Masked language model.

    `labels` of shape `(batch, length)` are ids where there is a target and -100 elsewhere. Logits have shape `(batch,
    length, vocab_size)`.
    """

    output_class = MaskedLMOutput
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.model = TupeModel(config)
        self.lm_head = TupeLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head.decoder = new_embeddings

    def logits_and_loss(self, hidden_states, labels, num_items_in_batch):
        logits = self.lm_head(hidden_states)
        if labels is None:
            return logits, None
        return logits, token_classification_loss(logits, labels, num_items_in_batch)


class TupeForPreTraining(TupeForMaskedLM):
    """
    The paper's pretraining task: masked LM whose head runs at the target positions only, which at 15 % targets saves
    most of the output layer. (BERT's next-sentence task is not part of it: section 4.1 of the paper.)

    `labels` are those of [`TupeForMaskedLM`]. With them the logits have shape `(targets, vocab_size)`, in row-major
    order over `(batch, length)`; without, `(batch, length, vocab_size)`.
    """

    def logits_and_loss(self, hidden_states, labels, num_items_in_batch):
        if labels is None:
            return self.lm_head(hidden_states), None
        check_labels(labels, tuple(hidden_states.shape[:2]), "(batch, length)")
        if stands_for_many(labels):  # which positions are targets cannot be asked: the head runs at all of them
            return super().logits_and_loss(hidden_states, labels, num_items_in_batch)
        check_has_values("labels", labels, hidden_states.device)
        is_target = labels != IGNORE_INDEX
        logits = self.lm_head(hidden_states[is_target])
        return logits, cross_entropy(logits, labels[is_target], num_items_in_batch)


class TupeClassificationHead(nn.Module):
    """Hidden state of [CLS]: dense, tanh, dropout, output layer; no dropout before the dense layer, as in the
    original."""

    def __init__(self, config: TupeConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.pooler_activation]
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.act(self.dense(hidden_states[:, 0]))))


class TupeForSequenceClassification(TupeHeadModel):
    """
    Classification of a sequence or a pair; regression and multi-label by `config.problem_type`.

    `labels` are class ids of shape `(batch,)`, floats of shape `(batch,)` for regression on one value, or floats of
    shape `(batch, num_labels)` for several values or multi-label. Logits have shape `(batch, num_labels)`.
    """

    output_class = SequenceClassifierOutput

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TupeModel(config)
        self.classifier = TupeClassificationHead(config, config.num_labels)
        self.post_init()

    def logits_and_loss(self, hidden_states, labels, num_items_in_batch):
        logits = self.classifier(hidden_states)
        if labels is None:
            return logits, None
        return logits, sequence_classification_loss(self.config, logits, labels, num_items_in_batch)


class TupeForTokenClassification(TupeHeadModel):
    """
    Classification of every token.

    `labels` of shape `(batch, length)` are class ids, -100 where a token has none. Logits have shape `(batch, length,
    num_labels)`.
    """

    output_class = TokenClassifierOutput

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TupeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits_and_loss(self, hidden_states, labels, num_items_in_batch):
        logits = self.classifier(self.dropout(hidden_states))
        if labels is None:
            return logits, None
        return logits, token_classification_loss(logits, labels, num_items_in_batch)


class TupeForQuestionAnswering(TupePreTrainedModel):
    """Extractive question answering: logits of an answer's first and last token."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.model = TupeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(batch,)`, *optional*): index of the answer's
                first and last token; an index outside the input is ignored.

        The other arguments are those of [`TupeModel`]. Returns two sets of logits of shape `(batch, length)`.
        """
        check_options(self, kwargs)
        outputs = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(self.dropout(outputs.last_hidden_state))
        start_logits, end_logits = (part.contiguous() for part in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            count = kwargs.get("num_items_in_batch")
            loss = question_answering_loss(start_logits, end_logits, start_positions, end_positions, count)
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits, **states)


class TupeForMultipleChoice(TupePreTrainedModel):
    """Choice of one among several sequences, scored one by one."""

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.model = TupeModel(config)
        self.classifier = TupeClassificationHead(config, num_labels=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, choices, length)`, *optional*), and likewise the others.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): index of the right choice.

        Returns logits of shape `(batch, choices)`.
        """
        check_options(self, kwargs)
        given = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        for name, value in zip(("input_ids", "attention_mask", "token_type_ids", "inputs_embeds"), given, strict=True):
            if value is not None:
                check_tensor(name, value)
                if value.dim() < 3:
                    raise ValueError(f"{name} must have shape (batch, choices, length); got {tuple(value.shape)}.")
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None or inputs.dim() != (3 if input_ids is not None else 4):
            raise ValueError("Multiple choice takes input_ids of shape (batch, choices, length).")
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and value.shape[:2] != inputs.shape[:2]:
                wanted = tuple(inputs.shape[:3])
                raise ValueError(f"{name} must have shape {wanted} (batch, choices, length); got {tuple(value.shape)}.")
        outputs = self.model(*(None if value is None else value.flatten(0, 1) for value in given), **kwargs)
        logits = self.classifier(outputs.last_hidden_state).view(-1, inputs.shape[1])
        loss = None
        if labels is not None:
            check_labels(labels, (logits.shape[0],), "(batch,): the right choice of each row")
            loss = cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **states)


__all__ = [
    "TupeForMaskedLM",
    "TupeForMultipleChoice",
    "TupeForPreTraining",
    "TupeForQuestionAnswering",
    "TupeForSequenceClassification",
    "TupeForTokenClassification",
    "TupeModel",
    "TupePreTrainedModel",
]
