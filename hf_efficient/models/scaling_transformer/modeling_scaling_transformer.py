"""
Scaling Transformer: a causal language model of which every layer can be sparse.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, sections 2 and 3,
and the authors' code. One layer, with x its input:

    y = x + Dropout(Attention(LayerNorm(x)))
    z = y + FeedForward(y)                     with its norm, dropout and branch of recurrences inside

Attention and feed-forward are in modules/sparse_blocks.py. Deviations from the code: inputs are never shifted inside
the model, as usual in transformers: the original puts a 0 in front and drops the last token. Padding may stand
anywhere, rows may hold several documents, and an id outside the vocabulary is an error where the original clips it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...modules.causal_generation import StatefulGenerationMixin
from ...modules.causal_inputs import (
    KeyPlace,
    check_cache,
    check_continuation,
    check_room,
    cover_cache,
    first_and_last_tokens,
    held_tokens,
    holds_tokens,
    padding_mask,
    scores_mask,
)
from ...modules.causal_window import TokenOrder
from ...modules.decoding import DecodingStep, LayerDecoder, decoding_step
from ...modules.few_rows import apply_to_few
from ...modules.input_checks import (
    check_flag,
    check_has_values,
    check_one_input,
    check_per_token,
    known_ids,
    read_attention_mask,
)
from ...modules.keyword_checks import TRANSFORMERS_KEYWORDS, check_keywords
from ...modules.layer_states import keep_states, read_state, records_all
from ...modules.lm_heads import build_lm_head
from ...modules.losses import (
    kept_positions,
    next_token_targets,
    sequence_classification_loss,
    token_classification_loss,
)
from ...modules.packing import Packing
from ...modules.quantization import QuantizableMixin
from ...modules.sparse_blocks import FeedForwardBlock, SparseAttention, build_norm
from ...modules.sparse_layers import UnitDraws
from ...modules.sparse_model import SparseModelMixin, WeightsReadMixin
from ...modules.stack_decoding import StackDecoder
from ...modules.token_positions import build_positions, token_positions
from ...ops.backend import is_transformed
from ...utils.cache_naming import CACHE_NAME, CACHE_NAMES, CacheOutputMixin, accepts_cache_by_either_name, cache_kwarg
from .configuration_scaling_transformer import ScalingTransformerConfig


_KEYWORDS = TRANSFORMERS_KEYWORDS | {"token_type_ids"}
# What heads hand on to the model.
_HANDED_ON = _KEYWORDS.union(CACHE_NAMES, ("inputs_embeds",))


class ScalingTransformerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ScalingTransformerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.state_size = config.state_size
        self.attention_norm = build_norm(config)
        self.attention = SparseAttention(config, layer_idx)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = FeedForwardBlock(config)
        self.decoder = LayerDecoder()

    def parts(self) -> list[tuple[nn.Module, nn.Module]]:
        """Norm and module of each part."""
        return [(self.attention_norm, self.attention), (self.feed_forward.norm, self.feed_forward)]

    def _state(self, cache: Cache | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """State of the attention and of the feed-forward after earlier calls."""
        state = read_state(cache, self.layer_idx) if self.state_size else None
        if state is None:
            return None, None
        size = sum(self.attention.state_sizes)
        return state[:, :size] if size else None, state[:, size:] if size < self.state_size else None

    @accepts_cache_by_either_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        document_start: torch.Tensor | None = None,
        order: TokenOrder | None = None,
        cache: Cache | None = None,
        draws: list[UnitDraws] | None = None,
        decoding: DecodingStep | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if decoding is not None:
            decoded = self.decoder(self, (hidden_states,), decoding)
            if decoded is not None:
                return decoded[0]
        attention_state, sru_state = self._state(cache)
        all_states = records_all(cache, self.layer_idx)
        attended, _, states = self.attention(
            self.attention_norm(hidden_states), attention_mask, cache, attention_state, order, all_states, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        output, recurrent = self.feed_forward(hidden_states, sru_state, padding_mask, document_start, all_states, draws)
        keep_states(cache, self.layer_idx, states + recurrent)
        return hidden_states + output


@dataclass
class ScalingTransformerModelOutput(CacheOutputMixin, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, whose cache is called `cache` under every release of transformers."""


@dataclass
class ScalingTransformerCausalLMOutput(CacheOutputMixin, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, whose cache is called `cache` under every release of transformers."""


@dataclass
class ScalingTransformerSequenceClassifierOutput(CacheOutputMixin, SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast`, whose cache is called `cache` under every release of transformers."""


class ScalingTransformerPreTrainedModel(SparseModelMixin, QuantizableMixin, PreTrainedModel):
    config: ScalingTransformerConfig
    base_model_prefix = "model"
    float_modules = ("score",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScalingTransformerLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # its kernels know no rows of several documents
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = True  # all losses are sums divided by `num_items_in_batch`
    _can_record_outputs = {"hidden_states": ScalingTransformerLayer, "attentions": SparseAttention}

    def __init__(self, config: ScalingTransformerConfig, *inputs: Any, **kwargs: Any):
        config.validate()  # its fields may have been set since, as `from_pretrained(..., field=value)` does
        super().__init__(config, *inputs, **kwargs)


class ScalingTransformerModel(ScalingTransformerPreTrainedModel):
    """The embeddings, the stack of layers and the norm at its end."""

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__(config)
        # No padding row: id 0 is padding and start in the original's data, and has a vector.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.positions = build_positions(config)
        self.layers = nn.ModuleList(ScalingTransformerLayer(config, index) for index in range(config.num_hidden_layers))
        self.decoder = StackDecoder(ScalingTransformerLayer)
        self.norm = build_norm(config)
        heads = config.num_attention_heads
        self.key_place = KeyPlace(0, heads, config.hidden_size // heads)
        # Read at every token; of a config that costs a microsecond each.
        self.state_size, self.layer_types = config.state_size, config.layer_types
        self.gradient_checkpointing = False
        self.post_init()

    def get_post_embedding_module(self) -> nn.Module:
        """Return the module that the embeddings go through first, for hooks that mix something into its input."""
        return self.dropout

    def _checked(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        packing: Packing,
        cache: Cache | None,
        token_type_ids: torch.Tensor | None,
    ) -> tuple[Any, Any, torch.Tensor | None]:
        """Check what was given; return ids, the mask as [`read_attention_mask`] gives it, and that of padding."""
        config = self.config
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(
                f"The model has {len(self.layers)} layers, but config.num_hidden_layers is "
                f"{config.num_hidden_layers}; a cache is made for the latter. Change both."
            )
        inputs = check_one_input(input_ids, inputs_embeds, self.embed_tokens, "hidden_size", config.hidden_size)
        batch, length = inputs.shape[:2]
        if isinstance(attention_mask, torch.Tensor):
            check_has_values("attention_mask", attention_mask, inputs.device)
        if length == 0:
            raise ValueError("The input has length 0; give at least one token.")
        if cache is not None:
            check_cache(cache, batch, self.layer_types, self.state_size, "this family")
            check_room(cache, length)
        packing.check(batch, length)
        check_per_token("token_type_ids", token_type_ids, batch, length)
        held, key_length = 0, None
        if cache is not None and isinstance(attention_mask, torch.Tensor):
            held, key_length = held_tokens(cache, attention_mask, length)
        mask = read_attention_mask(attention_mask, batch, length, self.key_place.heads, held, key_length)
        real = padding_mask(mask, length)
        ids = None if input_ids is None else known_ids(input_ids, config.vocab_size, real)
        return ids, mask, real

    def _positions(self, given, mask, starts, real, cache: Cache | None, shape, device) -> torch.Tensor:
        if given is not None:
            return given if real is None else given.expand(real.shape).masked_fill(~real, 0)
        held: Any = 0 if cache is None else cache.get_seq_length()
        return token_positions(mask, starts, real, held, shape, device)

    @accepts_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ScalingTransformerModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): taken as they are; the model shifts
                nothing, and without a mask no id is padding.
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 for tokens and 0 for padding, which may
                stand anywhere, with any id, and leaves no trace. With a cache it may cover what that holds too;
                otherwise nothing in a cache is padding. With four dimensions, `(batch or 1, heads or 1, length, keys)`,
                it stands in the place of causality in the attention alone.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): of each token; by default tokens
                are counted from 0, padding left out. Where they restart in a row without a past, a new document begins:
                nothing before it is seen. `seq_idx` and `cu_seq_lens_q` say the same; see [`Packing`].
            cache (`Cache`, *optional*): for generation; keys, values and the state of convolutions and recurrences.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*)
            use_cache (`bool`, *optional*): build a cache where none is given; never in a training step, which would pay
                for it, or under a transform of `torch.func`, since a cache is written in place.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that nothing reads.
            ValueError: for input that does not fit, and for a text beyond the table of positions or a static cache.
        """
        check_flag("use_cache", use_cache)
        packing = Packing.taken_from(position_ids, kwargs)
        token_type_ids = kwargs.pop("token_type_ids", None)  # BERT's tokenizers give them
        check_keywords(kwargs, _KEYWORDS, self)
        ids, attention_mask, real = self._checked(
            input_ids, inputs_embeds, attention_mask, packing, cache, token_type_ids
        )
        hidden_states = self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds
        trains = self.training and torch.is_grad_enabled()
        if use_cache and cache is None and not (trains or is_transformed()):
            cache = DynamicCache(config=self.config)
        batch, length = hidden_states.shape[:2]
        if real is not None:
            hidden_states = hidden_states.masked_fill(~real.unsqueeze(-1), 0.0)
        starts = packing.starts(real, batch, length)
        if cache is not None and holds_tokens(cache):
            check_continuation(cache, self.key_place, starts, hidden_states)
            starts, attention_mask = None, cover_cache(attention_mask, cache, length)
        hidden_states = self.dropout(hidden_states)
        if self.positions is not None:
            device = hidden_states.device
            positions = self._positions(position_ids, attention_mask, starts, real, cache, (batch, length), device)
            hidden_states = hidden_states + self.positions(positions, batch).to(hidden_states.dtype)
        mask = scores_mask(self.config, hidden_states, attention_mask, cache, starts)
        order = None
        if self.config.attention_type == "multiplicative_conv" and not (real is None and starts is None):
            window = self.config.attention_window
            order = TokenOrder.of(real, starts, window, (batch, length), hidden_states.device)
        step = decoding_step(self, hidden_states, cache, mask, real, starts, order)
        decoded = None if step is None else self.decoder(self.layers, (hidden_states,), step)
        if decoded is not None:
            hidden_states = decoded[0]
        else:
            shared = {**cache_kwarg(cache), "decoding": step}
            for layer in self.layers:
                hidden_states = layer(hidden_states, mask, real, starts, order, draws=[], **shared, **kwargs)
        return ScalingTransformerModelOutput(last_hidden_state=self.norm(hidden_states), **cache_kwarg(cache))


class ScalingTransformerForCausalLM(
    WeightsReadMixin, StatefulGenerationMixin, ScalingTransformerPreTrainedModel, GenerationMixin
):
    """Language model; its output layer is dense, multiplicative or of low rank."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__(config)
        self.model = ScalingTransformerModel(config)
        self.lm_head: nn.Module = build_lm_head(config)
        self.settle_vocabulary()
        self.post_init()

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ScalingTransformerCausalLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the input, -100 where there is
                nothing to learn; moved by one inside. `shift_labels` in their place are taken as they are.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): number of last positions to compute logits for, or
                which; 0 for all.

        The other arguments are those of [`ScalingTransformerModel`].
        """
        shift_labels = kwargs.pop("shift_labels", None)
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = apply_to_few(self.lm_head, kept_positions(outputs.last_hidden_state, logits_to_keep))
        targets = next_token_targets(labels, shift_labels)
        loss = None
        if targets is not None:
            loss = token_classification_loss(logits, targets, kwargs.get("num_items_in_batch"))
        return ScalingTransformerCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ScalingTransformerForSequenceClassification(ScalingTransformerPreTrainedModel):
    """Classification or regression from the last real token of each row."""

    def __init__(self, config: ScalingTransformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ScalingTransformerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ScalingTransformerSequenceClassifierOutput:
        """
        Args:
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): without one the last token is taken,
                whatever its id: the original's padding, 0, starts its texts too.
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.
            labels (`torch.Tensor`, *optional*): `(batch,)` class indices, or numbers for regression (`num_labels=1`);
                `(batch, num_labels)` floats for several labels at once. See `config.problem_type`.

        The other arguments are those of [`ScalingTransformerModel`].
        """
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        _, last = first_and_last_tokens(self.config, None, attention_mask, hidden_states)
        pooled = hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(self.config, logits, labels, kwargs.get("num_items_in_batch"))
        return ScalingTransformerSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "ScalingTransformerForCausalLM",
    "ScalingTransformerForSequenceClassification",
    "ScalingTransformerModel",
    "ScalingTransformerPreTrainedModel",
]
