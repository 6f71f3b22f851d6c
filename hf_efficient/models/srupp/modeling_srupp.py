"""
SRU++: language models and encoders that mix a fast elementwise recurrence with a little attention.

Source: Lei, "When Attention Meets Fast Recurrence: Training Language Models with Reduced Compute", EMNLP 2021, arXiv
2102.12459, section 2, and the author's code, from which the released checkpoints come. One layer, with x its input:

    z = W_1 x                                             d' wide
    y = LayerNorm(z + alpha Attention(z, W_k z, W_v z))   alpha starts at 0; without attention y = LayerNorm(z)
    u = W_3 y                                             what the recurrence takes (ops/sru.py), highway x

Deviations from the code: a softmax over nothing but padding is finite; pre-activations are planar (all candidates, then
all forget gates, ...) where the original interleaves them; the state is float32 under every mixed precision.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...modules.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax
from ...utils.cache_naming import (
    CACHE_NAME,
    CacheGenerationMixin,
    CacheOutputMixin,
    accepts_cache_by_either_name,
    cache_kwarg,
)
from .configuration_srupp import SruppConfig
from .layers_srupp import SruppAttention, SruppLayer
from .masking_srupp import cover_cache, document_starts, padding_mask, scores_mask
from .memory_srupp import SegmentMemory
from .validation_srupp import check_inputs, check_memory_dtype


@dataclass
class SruppModelOutput(CacheOutputMixin, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and `memory`, for the next segment."""

    memory: SegmentMemory | None = None


@dataclass
class SruppCausalLMOutput(CacheOutputMixin, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, `memory` for the next segment and, from an adaptive softmax, `token_losses`: the loss
    of each position in nats, in the order of positions."""

    memory: SegmentMemory | None = None
    token_losses: torch.FloatTensor | None = None


@dataclass
class SruppSequenceClassifierOutput(CacheOutputMixin, SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast`, whose cache is called `cache` under every release of transformers."""


class SruppPreTrainedModel(PreTrainedModel):
    config: SruppConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SruppLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_flex_attn = True
    # Its kernels know no rows of several documents, and heads of 256 at most; the published models have 480 to 1,024.
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SruppLayer, "attentions": SruppAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        As the original: Xavier over whole stacked matrices; embeddings and output uniform with variance 1 / d.

        transformers asks for no module of a third party that has no parameters of its own, such as `SruppProjection`;
        what is in those is seen to where it is itself the module, or by `SruppLayer`.
        """
        bound = (3.0 / self.config.hidden_size) ** 0.5
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if module is getattr(self, "lm_head", None):
                init.uniform_(module.weight, -bound, bound)
            else:
                init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, SruppLayer):
            reach = self.config.weight_c_init if self.config.use_peephole else 0.0
            init.uniform_(module.weight_c, -reach, reach)
            forget_bias = torch.zeros_like(module.bias[0])
            # Whole, not by halves: only then is a bias that was loaded left alone.
            init.copy_(module.bias, torch.stack([forget_bias, forget_bias + self.config.highway_bias]))
            projection = module.projection
            if projection.down_proj is not None:
                init.xavier_uniform_(projection.out_proj.weight, gain=(1.0 - projection.dropout.p) ** 0.5)
        elif isinstance(module, SruppAttention):
            init.zeros_(module.alpha)
            keys = module.q_proj if module.single_head else module.k_proj
            for half in (keys, module.v_proj):  # of one matrix, twice as high
                init.xavier_uniform_(half.weight, gain=(2 / 3) ** 0.5)
        elif isinstance(module, AdaptiveSoftmax):
            init.uniform_(module.cluster_weight, -bound, bound)
            for bias in (module.cluster_bias, *module.biases):
                init.zeros_(bias)


class SruppModel(SruppPreTrainedModel):
    """The stack of layers. There is no norm at the end and there are no positional encodings."""

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        if config.adaptive_cutoffs is None:
            self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        else:
            self.embed_tokens = AdaptiveEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.attending = frozenset(config.attending)
        projects = config.project_input and config.embedding_size != config.hidden_size
        self.input_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False) if projects else None
        self.layers = nn.ModuleList(SruppLayer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

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
        memory: SegmentMemory | None = None,
        return_memory: bool = False,
        attention_window: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SruppModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*)
            attention_mask (`torch.Tensor`, *optional*): `(batch, length)`, 1 for tokens and 0 for padding, which may
                stand anywhere and leaves no trace. With a cache or a memory it may cover what these hold too;
                otherwise nothing in a cache is padding, and a memory knows its own.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): where they restart at 0 in a row
                without a past, a new document begins: nothing before it is seen. They have no other effect.
            cache (`Cache`, *optional*): for generation; per layer c, and keys and values where it attends.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, embedding_size)`, *optional*)
            use_cache (`bool`, *optional*): build a cache where none is given; never in a training step, which would pay
                for it.
            memory (`SegmentMemory`, *optional*): of the previous segment, for training and evaluation by segments.
            return_memory (`bool`, defaults to `False`): give `output.memory` for the next segment; not detached.
            attention_window (`int`, *optional*): attend to at most so many positions back.

        Raises:
            ValueError: for input that does not fit; see `check_inputs` and `check_memory_dtype`.
        """
        check_inputs(
            self.config,
            input_ids,
            inputs_embeds,
            attention_mask,
            memory,
            cache,
            position_ids,
            return_memory,
        )
        segments = memory is not None or return_memory
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if memory is not None:
            check_memory_dtype(memory, hidden_states)
        trains = self.training and torch.is_grad_enabled()
        if use_cache and cache is None and self.config.is_causal and not segments and not trains:
            cache = DynamicCache(config=self.config)
        batch, length = hidden_states.shape[:2]
        real = padding_mask(attention_mask, length)
        if real is not None:
            hidden_states = hidden_states.masked_fill(~real.unsqueeze(-1), 0.0)
        continues = cache is not None and cache.has_previous_state(0)
        if continues:
            attention_mask = cover_cache(attention_mask, cache, length)
        starts = None if continues else document_starts(position_ids, real, batch, length)
        mask = scores_mask(self.config, hidden_states, attention_mask, cache, starts, memory, attention_window)
        hidden_states = self.dropout(hidden_states)
        if self.input_proj is not None:
            hidden_states = self.input_proj(hidden_states)
        inputs, states = [], []
        for index, layer in enumerate(self.layers):
            inputs.append(hidden_states if index in self.attending else None)
            carried = (None, None) if memory is None else (memory.cell_states[index], memory.layer_inputs[index])
            hidden_states, state = layer(hidden_states, *carried, mask, real, starts, **cache_kwarg(cache), **kwargs)
            states.append(state)
        return SruppModelOutput(
            last_hidden_state=hidden_states,
            **cache_kwarg(cache),
            memory=SegmentMemory(tuple(states), tuple(inputs), real) if return_memory else None,
        )


def _targets(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """What each position is to predict; `labels` are those of the input, `shift_labels` are already moved."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]


class SruppForCausalLM(CacheGenerationMixin, SruppPreTrainedModel, GenerationMixin):
    """Language model; with `config.adaptive_cutoffs` through an adaptive embedding and softmax."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError("A causal LM must not see what it predicts: set bidirectional=False and is_causal=True.")
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.adaptive_cutoffs is None:
            self.lm_head: nn.Linear | AdaptiveSoftmax = nn.Linear(
                config.hidden_size, config.vocab_size, bias=config.lm_head_bias
            )
        else:
            self.lm_head = AdaptiveSoftmax(config)
            self._tied_weights_keys = self._adaptive_ties(config)
        self.post_init()

    @staticmethod
    def _adaptive_ties(config: SruppConfig) -> dict[str, str]:
        tied = ("tables", "projections") if config.tie_adaptive_projections else ("tables",)
        clusters = range(len(config.adaptive_cutoffs or ()) + 1)
        names = [f"{part}.{cluster}.weight" for part in tied for cluster in clusters]
        return {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in names}

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head if isinstance(self.lm_head, nn.Linear) else None

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs):
        if self.config.adaptive_cutoffs is not None:
            raise ValueError("An adaptive embedding cannot be resized: its clusters are sorted by frequency.")
        return super().resize_token_embeddings(*args, **kwargs)

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        memory: SegmentMemory | None = None,
        return_memory: bool = False,
        attention_window: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SruppCausalLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the input, -100 where there is
                nothing to learn; moved by one inside. `shift_labels` in their place are taken as they are, so that a
                segment's last position can be asked for the next segment's first token.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): number of last positions to compute logits for, or
                which; 0 for all.

        The other arguments, `memory` among them, are those of [`SruppModel`]. An adaptive softmax gives
        log-probabilities as logits, and none beside a loss: all words of all positions would not fit.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            memory=memory,
            return_memory=return_memory,
            attention_window=attention_window,
            **kwargs,
        )
        hidden_states = self.dropout(_keep(outputs.last_hidden_state, logits_to_keep))
        targets = _targets(labels, shift_labels)
        loss = logits = token_losses = None
        if isinstance(self.lm_head, nn.Linear):
            logits = self.lm_head(hidden_states)
            if targets is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=None,
                    shift_labels=targets.contiguous(),
                    vocab_size=self.config.vocab_size,
                    **kwargs,
                )
        elif targets is None:
            logits = self.lm_head.log_probs(hidden_states)
        else:
            token_losses = -self.lm_head(hidden_states, targets)
            count = kwargs.get("num_items_in_batch")
            loss = token_losses.sum() / ((targets != -100).sum() if count is None else count)
        return SruppCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=outputs.memory,
            token_losses=token_losses,
        )


def _keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions whose logits are wanted: the last ones (0: all), or those that a tensor names for all rows or for
    each, by index or as a mask."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


class SruppForMaskedLM(SruppPreTrainedModel):
    """Masked language model over an encoder: bidirectional, or with attention that is not causal."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        if config.is_causal or config.adaptive_cutoffs is not None:
            raise ValueError("A masked LM sees both sides: set bidirectional=True. It has no adaptive softmax.")
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the targets, -100 elsewhere.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SruppForSequenceClassification(SruppPreTrainedModel):
    """Classification or regression from where each direction has read the whole row: its last real token and, running
    backwards, its first."""

    def __init__(self, config: SruppConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _ends(self, input_ids, attention_mask, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the first and of the last real token of each row: by the mask, else by the padding id."""
        batch, length = hidden_states.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:].bool()
        elif input_ids is not None and pad is not None:
            real = input_ids != pad
        else:
            real = hidden_states.new_ones(batch, length, dtype=torch.bool)
        places = torch.arange(length, device=hidden_states.device)
        last = (places * real).argmax(-1)
        first = ((length - places) * real).argmax(-1)
        return first, last

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SruppSequenceClassifierOutput:
        """
        Args:
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.
            labels (`torch.Tensor`, *optional*): `(batch,)` class indices, or numbers for regression (`num_labels=1`);
                `(batch, num_labels)` floats for several labels at once. See `config.problem_type`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        first, last = self._ends(input_ids, attention_mask, hidden_states)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        pooled = hidden_states[rows, last]
        if self.config.bidirectional:
            half = self.config.hidden_size // 2
            pooled = torch.cat([pooled[:, :half], hidden_states[rows, first, half:]], -1)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SruppSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SruppForTokenClassification(GenericForTokenClassification, SruppPreTrainedModel):
    """A label for each token, from its last hidden state."""

    def __init__(self, config: SruppConfig):
        # Not the generic head's own: that asks AutoModel, which refuses code that came with a checkpoint.
        SruppPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = SruppModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SruppForQuestionAnswering(GenericForQuestionAnswering, SruppPreTrainedModel):
    """Start and end of an answer within the text."""

    def __init__(self, config: SruppConfig):
        SruppPreTrainedModel.__init__(self, config)  # see SruppForTokenClassification
        self.model = SruppModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "SruppForCausalLM",
    "SruppForMaskedLM",
    "SruppForQuestionAnswering",
    "SruppForSequenceClassification",
    "SruppForTokenClassification",
    "SruppModel",
    "SruppPreTrainedModel",
]
