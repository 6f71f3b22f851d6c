"""
Terraformer: an encoder-decoder of two streams whose decoder reads the encoder's output in front of the target.

Source: Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763, section 5, and the
authors' code. A layer changes two streams, each by what it sees of the other:

    (a, b) -> (b, a + Attention(LayerNorm(b)))       once or twice in the decoder
    (a, b) -> (b, a + FeedForward(b))                with its norm, dropout and branch of recurrences inside

The decoder is one causal stack over source and target: each row is laid out as [padding, source, target], the source's
vectors being both streams of the encoder, and there is no cross attention. `decoder_type="cross_attention"` is the
ordinary encoder-decoder of the article, with one stream; a decoder alone is a causal language model, and Reformer by
its settings.

Deviations from the code: it puts the target behind each row's last source token and leaves a tail there; here padding
stands in front, which gives the same numbers and makes a batch of unequal sources an ordinary left-padded one. Decoding
works for any batch and any length of the first call. An id outside the vocabulary is an error.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    SequenceClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from ...modules.causal_generation import StatefulGenerationMixin
from ...modules.causal_inputs import (
    check_room,
    scores_mask,
)
from ...modules.causal_window import false_first
from ...modules.few_rows import apply_to_few
from ...modules.input_checks import (
    check_flag,
    check_one_input,
    check_per_token,
)
from ...modules.keyword_checks import check_keywords
from ...modules.lm_heads import build_lm_head
from ...modules.losses import (
    kept_positions,
    next_token_targets,
    sequence_classification_loss,
    token_classification_loss,
)
from ...modules.packing import Packing
from ...modules.sparse_blocks import build_norm, shared_dropout
from ...modules.sparse_model import WeightsReadMixin
from ...modules.token_positions import share_starts
from ...ops.backend import is_transformed
from ...utils.cache_naming import CACHE_NAMES, accepts_cache_by_either_name, cache_kwarg
from ...utils.labels import IGNORE_INDEX
from .configuration_terraformer import TerraformerConfig
from .layers_terraformer import (
    DecoderCall,
    changed,
)
from .masking_terraformer import (
    TerraformerCausalLMOutput,
    TerraformerCausalModelOutput,
    TerraformerEncoderOutput,
    TerraformerModelOutput,
    TerraformerSeq2SeqLMOutput,
    TokensRead,
    as_encoder_output,
    behind_places,
    behind_tokens,
    check_both_parts,
    check_source_chunk_size,
    check_targets,
    cover_places,
    holds_source,
    mask_behind_source,
    mask_of_targets,
    real_source_tokens,
    refuse_quantized,
)
from .stacks_terraformer import (
    KEYWORDS,
    PACKING,
    TerraformerDecoder,
    TerraformerEncoder,
    TerraformerPreTrainedModel,
)


# What heads hand on to the model.
_HANDED_ON = KEYWORDS.union(CACHE_NAMES, ("inputs_embeds",))
_CAUSAL_KEYWORDS = KEYWORDS | PACKING


class TerraformerModel(TerraformerPreTrainedModel):
    """The encoder and the decoder, which reads the encoder's output in front of the target or by cross attention."""

    def __init__(self, config: TerraformerConfig):
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError("TerraformerModel is an encoder-decoder; without an encoder take TerraformerForCausalLM.")
        self.encoder = TerraformerEncoder(config)
        self.decoder = TerraformerDecoder(config)
        if config.position_shared_start:
            share_starts(self.encoder.positions, self.decoder.positions)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = cast(nn.Embedding, value)

    def _read_joined(
        self,
        streams: tuple[Tensor, Tensor],
        real_source: Tensor | None,
        target: Tensor,
        real_target: Any,
        **kwargs: Any,
    ) -> Any:
        """Read source and target in one stack."""
        join = behind_tokens if self.config.lsh_layout == "original" else behind_places
        first, second, real, wanted = join(streams, real_source, target, real_target)
        scores = scores_mask(self.config, first, real, None, None)
        call = DecoderCall(scores, real, None, self.decoder.token_order(real))
        return self.decoder(first, second, call, wanted, **kwargs)

    def _read_source(
        self, streams: tuple[Tensor, Tensor], real: Tensor | None, cache: EncoderDecoderCache, chunk_size: int | None
    ) -> None:
        """Read the source into the cache's part for cross attention, once: whole, or so many tokens at a time."""
        source = cache.cross_attention_cache
        batch, length = streams[0].shape[:2]
        first = torch.zeros(batch, 1, dtype=torch.long, device=streams[0].device)
        lengths = None
        if chunk_size is not None:
            lengths = first.new_full((batch,), length) if real is None else real.sum(1)
        size = chunk_size or length
        for begin in range(0, length, size):
            piece = [stream[:, begin : begin + size] for stream in streams]
            held, new = (None, None) if real is None else (real[:, : begin + size], real[:, begin : begin + size])
            scores = scores_mask(self.config, piece[0], held, source, None)
            call = DecoderCall(scores, new, None, self.decoder.token_order(new), source, lengths=lengths)
            self.decoder(*piece, call, first)
        cache.is_updated = dict.fromkeys(range(self.config.num_hidden_layers), True)

    @accepts_cache_by_either_name
    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        source_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TerraformerModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source length)`, *optional*): the source.
            attention_mask (`torch.Tensor` of shape `(batch, source length)`, *optional*): 1 for tokens of the source
                and 0 for padding, which stands before or behind them.
            decoder_input_ids (`torch.LongTensor` of shape `(batch, target length)`, *optional*): the target, which the
                model does not shift: it begins with `config.decoder_start_token_id`.
            decoder_attention_mask (`torch.Tensor` of shape `(batch, target length)`, *optional*): 0 for padding, which
                may stand anywhere; with a cache it may cover what that holds too.
            encoder_outputs (*optional*): output of an earlier call, or of the encoder, for the same source.
            cache (`EncoderDecoderCache`, *optional*): for generation. One that holds the source is all that is read of
                it, besides its `attention_mask`.
            inputs_embeds, decoder_inputs_embeds (`torch.FloatTensor`, *optional*): in the place of ids.
            use_cache (`bool`, *optional*): build a cache where none is given; never in training.
            source_chunk_size (`int`, *optional*): tokens of the encoded source that a joined decoder reads at a time
                into a cache, so that its memory beside the cache is that of so many; all by default. Attention to all
                keys gives the same. With hashing, tokens of the source are then read as by decoding, whatever the
                size, which is not what reading them at once gives. Ignored without a cache, and by one that holds the
                source.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that nothing reads.
            ValueError: for input that does not fit, and for a text beyond the table of positions.
        """
        check_flag("use_cache", use_cache)
        check_source_chunk_size(source_chunk_size, self.decoder.is_joined)
        check_keywords(kwargs, KEYWORDS, self)
        token_type_ids = cast(dict[str, Any], kwargs).pop("token_type_ids", None)
        embed = self.encoder.embed_tokens
        given = check_one_input(
            decoder_input_ids, decoder_inputs_embeds, embed, "hidden_size", self.decoder.width, "decoder_"
        )
        if cache is not None:
            check_both_parts(cache, self.decoder, given.shape[0])
        encoded = as_encoder_output(encoder_outputs)
        if encoded is None and not (cache is not None and holds_source(cache)):
            encoded = self.encoder(input_ids, attention_mask, inputs_embeds, token_type_ids=token_type_ids, **kwargs)
        trains = self.training and torch.is_grad_enabled()
        if use_cache and cache is None and not (trains or is_transformed()):
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        held = None if cache is None else cast(EncoderDecoderCache, cache).self_attention_cache
        target = self.decoder.read_tokens(given, embed, decoder_attention_mask, held, "decoder_")
        if cache is not None and encoded is not None and not holds_source(cast(EncoderDecoderCache, cache)):
            check_room(cast(Any, cache).cross_attention_cache, cast(Tensor, encoded.last_hidden_state).shape[1])
        real_source = real_source_tokens(
            encoded, attention_mask, target.vectors, self.config.num_attention_heads, cache
        )
        if self.decoder.is_joined:
            decoded = self._decode_joined(encoded, real_source, target, cache, source_chunk_size, **kwargs)
        else:
            decoded = self._decode_by_cross_attention(encoded, real_source, target, cache, **kwargs)
        encoded = TerraformerEncoderOutput() if encoded is None else encoded
        return TerraformerModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            **cache_kwarg(cache),
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=getattr(decoded, "cross_attentions", None),
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            encoder_second_stream=encoded.second_stream,
        )

    def _decode_joined(
        self,
        encoded: Any,
        real_source: Any,
        read: TokensRead,
        cache: Any,
        chunk_size: int | None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder over source and target, or over the target behind a source in the cache."""
        target, mask, real, _ = read
        order, packs = None, self.config.lsh_layout == "packed"
        if real_source is not None and packs:
            order = false_first(real_source)
        if order is not None:
            real_source = real_source.gather(1, order)
        streams: Any = None
        if encoded is not None and (cache is None or not holds_source(cache)):
            streams = (encoded.last_hidden_state, encoded.second_stream)
            if streams[1] is None and self.encoder.norm is None:
                raise ValueError(
                    "encoder_outputs lack second_stream: this model's decoder reads both streams of its encoder. Give "
                    "what model.get_encoder()(...) returns."
                )
            streams = (streams[0], streams[0] if streams[1] is None else streams[1])
            if order is not None:
                index = order.unsqueeze(-1).expand_as(streams[0])
                streams = tuple(stream.gather(1, index) for stream in streams)
        if cache is None:
            return self._read_joined(streams, real_source, target, real, **kwargs)
        if not packs:
            raise ValueError(
                "lsh_layout='original' has no decoding: its texts are laid out by the length of the longest one. "
                "Set config.lsh_layout='packed', which takes the same weights, or give use_cache=False."
            )
        held, source = cache.self_attention_cache, cache.cross_attention_cache
        if streams is not None:
            self._read_source(streams, real_source, cache, chunk_size)
        scores = mask_behind_source(real_source, mask, target, held, source)
        call = DecoderCall(scores, real, None, self.decoder.token_order(real), held, source)
        return self.decoder(target, target, call, **kwargs)

    def _decode_by_cross_attention(
        self, encoded: Any, real_source: Any, read: TokensRead, cache: Any, **kwargs: Any
    ) -> Any:
        target, mask, real, _ = read
        scores = scores_mask(self.config, target, mask, None if cache is None else cache.self_attention_cache, None)
        memory = None if encoded is None else encoded.last_hidden_state
        if cache is not None:
            real_source = cover_places(real_source, memory, cache.cross_attention_cache)
        memory_mask = None
        if real_source is not None:
            like = target[:, :1].expand(-1, real_source.shape[1], -1)  # in the place of keys that a cache may hold
            memory_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=target, attention_mask=real_source, encoder_hidden_states=like
            )
        call = DecoderCall(scores, real, None, self.decoder.token_order(real), cache, None, memory_mask)
        return self.decoder(target, None, call, memory=memory, **kwargs)


class TerraformerCausalModel(TerraformerPreTrainedModel):
    """The decoder as a causal language model, both streams of which begin as the embeddings."""

    def __init__(self, config: TerraformerConfig):
        super().__init__(config)
        if config.is_encoder_decoder:
            raise ValueError(
                "A causal Terraformer has no encoder: give is_encoder_decoder=False and num_encoder_layers=0."
            )
        self.decoder = TerraformerDecoder(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, self.decoder.width)
        self.post_init()

    @accepts_cache_by_either_name
    @can_return_tuple
    @merge_with_config_defaults
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        text_lengths: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TerraformerCausalModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): taken as they are; the model shifts
                nothing.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for tokens and 0 for padding,
                which may stand anywhere; with a cache it may cover what that holds too. With four dimensions,
                `(batch or 1, heads or 1, length, keys)`, it stands in the place of causality in the attention alone.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): of each token; by default tokens
                are counted from 0, padding left out. Where they restart in a row without a past, a new document begins:
                nothing before it is seen. `seq_idx` and `cu_seq_lens_q` say the same; see [`Packing`].
            cache (`Cache`, *optional*): for generation; keys, values and states.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, width)`, *optional*)
            use_cache (`bool`, *optional*): build a cache where none is given; never in training.
            text_lengths (`torch.LongTensor` of shape `(batch,)`, *optional*): tokens of each text as a whole, where it
                is read into a cache in several calls. Attention by hashing then reads it as by decoding, from the
                first call on, and mixed attention decides by these lengths.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that nothing reads.
            ValueError: for input that does not fit, and for a text beyond the table of positions.
        """
        check_flag("use_cache", use_cache)
        packing = Packing.taken_from(position_ids, kwargs)
        token_type_ids = kwargs.pop("token_type_ids", None)
        check_keywords(kwargs, _CAUSAL_KEYWORDS, self)
        given = check_one_input(input_ids, inputs_embeds, self.embed_tokens, "hidden_size", self.decoder.width)
        check_per_token("token_type_ids", token_type_ids, *given.shape[:2])
        if use_cache and cache is None and not ((self.training and torch.is_grad_enabled()) or is_transformed()):
            cache = DynamicCache(config=self.config)
        packing.check(*given.shape[:2])
        vectors, mask, real, starts = self.decoder.read_tokens(
            given, self.embed_tokens, attention_mask, cache, packing=packing
        )
        scores = scores_mask(self.config, vectors, mask, cache, starts)
        order = self.decoder.token_order(real, starts)
        call = DecoderCall(scores, real, starts, order, cache, lengths=text_lengths)
        outputs = self.decoder(vectors, vectors, call, **kwargs)
        return TerraformerCausalModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **cache_kwarg(cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TerraformerForConditionalGeneration(
    WeightsReadMixin, StatefulGenerationMixin, TerraformerPreTrainedModel, GenerationMixin
):
    """Encoder-decoder with an output layer, for summaries and other texts that are made of a text."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _read_once = (
        *(f"model.encoder.{part}" for part in ("positions", "layers", "between", "out_proj", "norm")),
        *("cross_attention.k_proj", "cross_attention.v_proj"),
    )

    def __init__(self, config: TerraformerConfig):
        super().__init__(config)
        self.model = TerraformerModel(config)
        self.lm_head = build_lm_head(changed(config, hidden_size=self.model.decoder.out_width))
        self.settle_vocabulary()
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask: Any = None, **kwargs: Any) -> Any:
        """Leave a static cache's mask to the model, whose queries see the source's keys before those of that cache."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_quantized(self.config, generation_config.cache_implementation)
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args, **kwargs) -> Any:
        """Let `prefill_chunk_size` bound what the decoder reads of the source at a time; the target's prompt is read at
        once. transformers would cut the prompt, and the source's mask at its lengths."""
        size = generation_config.prefill_chunk_size
        if size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            model_kwargs = {**model_kwargs, "source_chunk_size": size}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """
        Targets moved by one, behind the start token, as collators of transformers ask for them.

        Raises:
            ValueError: where the config names no start token, or no padding token to stand for -100.
        """
        start, padding = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or padding is None:
            raise ValueError(
                "To make decoder_input_ids of labels, config.decoder_start_token_id and config.pad_token_id must name "
                f"tokens, not {start} and {padding}: set them, or give decoder_input_ids."
            )
        before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, padding)
        return nn.functional.pad(before, (1, 0), value=start)

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        source_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TerraformerSeq2SeqLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, target length)`, *optional*): the target, -100 where there is
                nothing to learn. Moved by one they are the `decoder_input_ids` where those are not given. With them no
                cache is built unless `use_cache=True`, and the loss is that of the forward pass which training takes.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): number of last positions to compute logits for, or
                which; 0 for all.

        The other arguments are those of [`TerraformerModel`].
        """
        check_keywords(kwargs, KEYWORDS, self)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            check_targets(labels, self.config.vocab_size, self.model.encoder.embed_tokens.weight.device)
            decoder_input_ids = cast(torch.LongTensor, self.prepare_decoder_input_ids_from_labels(labels))
        if labels is not None and decoder_attention_mask is None and self.config.decoder_long_attention != "none":
            decoder_attention_mask = mask_of_targets(labels)
        if labels is not None and use_cache is None and cache is None:
            use_cache = False  # attention by hashing decodes by another rule than it is trained by
        outputs = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            cache,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            source_chunk_size,
            **kwargs,
        )
        logits = apply_to_few(self.lm_head, kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = token_classification_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return TerraformerSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


class TerraformerEncoderModel(TerraformerPreTrainedModel):
    """The encoder alone, which gives one vector for each token."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\."]

    def __init__(self, config: TerraformerConfig):
        super().__init__(config)
        self.encoder = TerraformerEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed_tokens = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """The arguments are those of [`TerraformerEncoder`]; where it keeps both streams, the output is their
        average."""
        check_keywords(kwargs, KEYWORDS, self)
        outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        if outputs.second_stream is not None:
            hidden_states = (hidden_states + outputs.second_stream) / 2
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TerraformerForSequenceClassification(TerraformerPreTrainedModel):
    """Classification or regression from the average of the encoder's vectors."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.decoder\.", r"^lm_head\."]

    def __init__(self, config: TerraformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TerraformerEncoderModel(config)
        width = self.model.encoder.width
        self.norm = build_norm(changed(config, hidden_size=width))
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.score = nn.Linear(width, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args:
            token_type_ids (*optional*): accepted because BERT's tokenizers give them, and ignored.
            labels (`torch.Tensor`, *optional*): `(batch,)` class indices, or numbers for regression (`num_labels=1`);
                `(batch, num_labels)` floats for several labels at once. See `config.problem_type`.

        The other arguments are those of [`TerraformerEncoder`].
        """
        check_keywords(kwargs, _HANDED_ON, self)
        outputs = self.model(input_ids, attention_mask, token_type_ids=token_type_ids, **kwargs)
        hidden_states = outputs.last_hidden_state
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            real = attention_mask.bool().unsqueeze(-1)
            # A sum over a long text is more than float16 holds.
            total = hidden_states.masked_fill(~real, 0.0).sum(
                1, dtype=torch.promote_types(hidden_states.dtype, torch.float)
            )
            pooled = (total / real.sum(1)).to(hidden_states.dtype)
        logits = self.score(self.dropout(self.norm(pooled)))
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(self.config, logits, labels, kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TerraformerForCausalLM(WeightsReadMixin, StatefulGenerationMixin, TerraformerPreTrainedModel, GenerationMixin):
    """
    Language model of two streams; with `stream_output="concatenate"` it is that of Reformer.

    Where it attends by hashing, assisted and prompt-lookup decoding may write something else than greedy decoding: they
    read the prompt together with a draft, and chunks depend on what follows.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TerraformerConfig):
        super().__init__(config)
        self.model = TerraformerCausalModel(config)
        self.dropout = config.dropout if config.final_dropout else 0.0
        self.lm_head = build_lm_head(changed(config, hidden_size=self.model.decoder.out_width))
        self.settle_vocabulary()
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_quantized(self.config, generation_config.cache_implementation)
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args, **kwargs) -> Any:
        """Say how long the texts are that `prefill_chunk_size` cuts."""
        if generation_config.prefill_chunk_size is not None and self.config.decoder_long_attention != "none":
            mask = model_kwargs.get("attention_mask")
            lengths = input_ids.new_full(input_ids.shape[:1], input_ids.shape[1]) if mask is None else mask.sum(1)
            model_kwargs = {**model_kwargs, "text_lengths": lengths}
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    @accepts_cache_by_either_name
    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids stand in TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TerraformerCausalLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids of the input, -100 where there is
                nothing to learn; moved by one inside. `shift_labels` in their place are taken as they are.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): number of last positions to compute logits for, or
                which; 0 for all.

        The other arguments are those of [`TerraformerCausalModel`].
        """
        shift_labels = kwargs.pop("shift_labels", None)
        check_keywords(kwargs, _HANDED_ON | PACKING | {"text_lengths"}, self)
        outputs = self.model(input_ids, attention_mask, position_ids, **kwargs)
        hidden_states = outputs.last_hidden_state
        shape = (hidden_states.shape[0], 1, hidden_states.shape[2])
        hidden_states = shared_dropout(hidden_states, self.dropout, self.training, shape)
        logits = apply_to_few(self.lm_head, kept_positions(hidden_states, logits_to_keep))
        targets = next_token_targets(labels, shift_labels)
        loss = None
        if targets is not None:
            loss = token_classification_loss(logits, targets, kwargs.get("num_items_in_batch"))
        return TerraformerCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_kwarg(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "TerraformerCausalModel",
    "TerraformerEncoderModel",
    "TerraformerForCausalLM",
    "TerraformerForConditionalGeneration",
    "TerraformerForSequenceClassification",
    "TerraformerModel",
    "TerraformerPreTrainedModel",
]
