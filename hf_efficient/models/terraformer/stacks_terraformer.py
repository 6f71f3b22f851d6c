"""Stacks of Terraformer: its encoder with the embeddings, and its decoder over one or two streams.

See modeling_terraformer.py for the source.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, output_capturing
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...modules.causal_inputs import (
    KeyPlace,
    check_cache,
    check_continuation,
    check_room,
    cover_cache,
    held_tokens,
    holds_tokens,
    padding_mask,
)
from ...modules.causal_window import TokenOrder
from ...modules.cross_attention import CrossAttention
from ...modules.decoding import decoding_step
from ...modules.input_checks import (
    check_has_values,
    known_ids,
    read_attention_mask,
)
from ...modules.keyword_checks import TRANSFORMERS_KEYWORDS, check_keywords
from ...modules.packing import Packing
from ...modules.quantization import QuantizableMixin
from ...modules.sparse_blocks import SparseAttention, build_norm, shared_dropout
from ...modules.sparse_model import SparseModelMixin
from ...modules.stack_decoding import StackDecoder
from ...modules.token_positions import build_positions, token_positions
from ...ops.reversible import ReversibleChain
from ...utils.cache_naming import CACHE_NAME
from .configuration_terraformer import TerraformerConfig
from .layers_terraformer import (
    DecoderCall,
    PlainDecoderLayer,
    PlainEncoderLayer,
    TerraformerDecoderLayer,
    TerraformerEncoderLayer,
    between_layers,
    changed,
    encoder_view,
    new_memories,
    sized,
    width_factors,
)
from .masking_terraformer import (
    TerraformerEncoderOutput,
    TokensRead,
    read_flat_mask,
    read_source,
    refuse_quantized,
)


# Those that tell several documents in a row apart, which no encoder-decoder of this family does, would be lost.
PACKING = {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
KEYWORDS = (TRANSFORMERS_KEYWORDS - PACKING) | {"token_type_ids"}


class TerraformerPreTrainedModel(SparseModelMixin, QuantizableMixin, PreTrainedModel):
    config: TerraformerConfig
    base_model_prefix = "model"
    float_modules = ("score",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "TerraformerEncoderLayer",
        "TerraformerDecoderLayer",
        "PlainEncoderLayer",
        "PlainDecoderLayer",
    ]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = True  # all losses are sums divided by `num_items_in_batch`

    def __init__(self, config: TerraformerConfig, *inputs: Any, **kwargs: Any):
        config.validate()  # its fields may have been set since, as `from_pretrained(..., field=value)` does
        super().__init__(config, *inputs, **kwargs)


class Stack(TerraformerPreTrainedModel):
    """Layers, and the position vectors of the tokens that they read."""

    def __init__(self, config: TerraformerConfig, factor: float):
        super().__init__(config)
        self.width = int(config.hidden_size * factor)
        self.positions = build_positions(sized(config, factor))

    def add_positions(self, vectors: Tensor, places: Tensor) -> Tensor:
        """Embeddings after dropout, with their position vectors."""
        length = 1 if self.config.share_dropout else vectors.shape[1]
        shape = (vectors.shape[0], length, vectors.shape[2])
        vectors = shared_dropout(vectors, self.config.dropout, self.training, shape)
        if self.positions is None:
            return vectors
        return vectors + self.positions(places, vectors.shape[0]).to(vectors.dtype)

    def run_streams(
        self,
        first: Tensor,
        second: Tensor,
        *shared: Any,
        real: Tensor | None = None,
        rebuilds: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """
        Run both streams through all layers and what stands between them.

        Args:
            first, second (`Tensor` of shape `(batch, length, width)`): streams.
            shared: arguments of all layers.
            real (`Tensor` of shape `(batch, length)`, *optional*): `False` at padding.
            rebuilds (`bool`, defaults to `True`): `False` for layers that write into a cache, which run once.
            kwargs: of the layers' attention.
        """
        checkpointed = self.gradient_checkpointing and self.training
        # Hooks that record what layers give would see the second run as well. A compiler would break its graph here.
        records = not torch.compiler.is_compiling() and bool(output_capturing._active_collector.get())
        reversible = self.config.reversible and not checkpointed and not records
        chain, between = None, cast(nn.ModuleDict, self.between)
        for index, layer in enumerate(cast(Any, self.layers)):
            if chain is None and rebuilds:
                chain = ReversibleChain(reversible=reversible, real=real)
                first, second = chain.open(first, second)
            memories = new_memories(layer.num_halves) if checkpointed and rebuilds else None
            first, second = layer(first, second, chain, *shared, memories=memories, **kwargs)
            is_last = index == len(self.layers) - 1
            if chain is not None and (is_last or str(index) in between):
                first, second = chain.close(first, second)
                chain = None
            if str(index) in between:
                first, second = between[str(index)](first, second)
        return first, second


class TerraformerEncoder(Stack):
    """The embeddings of source and target, and the encoder's layers."""

    _can_record_outputs = {
        "hidden_states": [OutputRecorder(TerraformerEncoderLayer, index=0), OutputRecorder(PlainEncoderLayer, index=0)],
        "attentions": OutputRecorder(SparseAttention, index=1),
    }

    def __init__(self, config: TerraformerConfig):
        factor = width_factors(config)[0]
        super().__init__(config, factor)
        view = encoder_view(sized(config, factor))
        # No padding row: id 0 is padding and start in the original's data, and has a vector.
        self.embed_tokens = nn.Embedding(config.vocab_size, self.width)
        self.is_joined = config.decoder_type == "joined"
        layer = TerraformerEncoderLayer if self.is_joined else PlainEncoderLayer
        self.layers = nn.ModuleList(layer(config, view, index) for index in range(config.num_encoder_layers))
        factors = [factor] * (config.num_encoder_layers + 1)
        self.between = nn.ModuleDict(between_layers(config.forget_every, factors, config.hidden_size))
        ends = not (self.is_joined and config.encoder_keeps_streams)
        self.out_proj = nn.Linear(self.width, self.width) if ends and self.is_joined else None
        self.norm = build_norm(view) if ends else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TerraformerEncoderOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): the source.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for tokens and 0 for padding,
                which stands before or behind them.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, width)`, *optional*)
            labels (*optional*): ignored; `generate` hands on those of a batch of `Seq2SeqTrainer`.

        Raises:
            TypeError: for an argument that is no tensor, or a keyword that nothing reads.
            ValueError: for input that does not fit, a source without tokens or with padding inside, and one beyond the
                table of positions.
        """
        options = cast(dict[str, Any], kwargs)
        token_type_ids = options.pop("token_type_ids", None)  # BERT's tokenizers give them
        for name in ("labels", "logits_to_keep"):  # which `generate` hands on in some releases, with an assistant
            options.pop(name, None)
        check_keywords(kwargs, KEYWORDS, self)
        ids, mask, real = read_source(self, input_ids, inputs_embeds, attention_mask, token_type_ids)
        hidden_states = self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden_states.shape[:2]
        is_token = real
        if self.config.lsh_layout == "original":  # whose padding is read like tokens, and hidden as keys
            mask = real = None
        if real is not None:
            hidden_states = hidden_states.masked_fill(~real.unsqueeze(-1), 0.0)
        places = token_positions(mask, None, real, 0, (batch, length), hidden_states.device)
        hidden_states = self.add_positions(hidden_states, places)
        scores = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=is_token)
        if not self.is_joined:
            for layer in self.layers:
                hidden_states = layer(hidden_states, scores, real, **kwargs)
            return TerraformerEncoderOutput(last_hidden_state=cast(nn.Module, self.norm)(hidden_states))
        first, second = self.run_streams(hidden_states, hidden_states, scores, is_token, real, real=real, **kwargs)
        if self.norm is None or self.out_proj is None:
            return TerraformerEncoderOutput(last_hidden_state=first, second_stream=second)
        return TerraformerEncoderOutput(last_hidden_state=self.norm(self.out_proj((first + second) / 2)))


class TerraformerDecoder(Stack):
    """The decoder's layers over one or two streams, and the norm at their end."""

    _can_record_outputs = {
        "hidden_states": [OutputRecorder(TerraformerDecoderLayer, index=0), OutputRecorder(PlainDecoderLayer, index=0)],
        "attentions": OutputRecorder(SparseAttention, index=1),
        "cross_attentions": OutputRecorder(CrossAttention, index=1),
    }

    def __init__(self, config: TerraformerConfig):
        factors = width_factors(config)
        super().__init__(config, factors[0])
        self.is_joined = config.decoder_type == "joined"
        if self.is_joined:
            layers: Any = [
                TerraformerDecoderLayer(config, sized(config, factors[index]), index)
                for index in range(config.num_decoder_layers)
            ]
        else:
            layers = [PlainDecoderLayer(config, index) for index in range(config.num_decoder_layers)]
        self.layers = nn.ModuleList(layers)
        self.decoder = StackDecoder(TerraformerDecoderLayer if self.is_joined else PlainDecoderLayer)
        self.between = nn.ModuleDict(between_layers(config.forget_every, factors, config.hidden_size))
        self.concatenates = config.stream_output == "concatenate"
        self.out_width = int(config.hidden_size * factors[-1]) * (2 if self.concatenates else 1)
        self.norm = build_norm(changed(config, hidden_size=self.out_width))
        first = layers[0].attentions[0].attention if self.is_joined else layers[0].attention
        self.key_place = KeyPlace(0, config.num_attention_heads, first.key_size)
        self.state_size, self.layer_types = sum(layers[0].state_sizes), config.layer_types
        self.gradient_checkpointing = False
        self.post_init()

    def token_order(self, real: Tensor | None, starts: Tensor | None = None) -> TokenOrder | None:
        """Tokens before each one, which convolutions see, where padding or documents come between."""
        convolves = self.config.attention_type == "multiplicative_conv" or "multiplicative_conv" in (
            self.config.cross_query_type,
            self.config.cross_output_type,
        )
        given = real if real is not None else starts
        if given is None or not convolves:
            return None
        return TokenOrder.of(real, starts, self.config.attention_window, tuple(given.shape), given.device)

    def read_tokens(
        self,
        tokens: Tensor,
        embed: nn.Module,
        mask: Any,
        cache: Cache | None,
        prefix: str = "",
        packing: Packing | None = None,
    ) -> TokensRead:
        """
        Look tokens up.

        Args:
            tokens (`Tensor`): ids or embeddings, as [`check_one_input`] returns them.
            embed (`nn.Module`): the embeddings.
            mask (*optional*): for the tokens of this call, or of the cache as well.
            cache (`Cache`, *optional*): of earlier calls.
            prefix (`str`, defaults to `""`): of the arguments' names; with one, the mask has two dimensions.
            packing ([`Packing`], *optional*): positions, and where documents begin.

        Raises:
            TypeError, ValueError: for input or a cache that does not fit.
        """
        config, (batch, length) = self.config, tokens.shape[:2]
        name = f"{prefix}attention_mask"
        if isinstance(mask, Tensor):
            check_has_values(name, mask, tokens.device)
        if length == 0:
            raise ValueError(f"The input has length 0: give {prefix}input_ids, or embeddings, of at least one token.")
        if cache is not None:
            refuse_quantized(config, cache)
            check_cache(cache, batch, self.layer_types, self.state_size, "this family")
            check_room(cache, length)
        held, key_length = 0, None
        if cache is not None and isinstance(mask, Tensor):
            held, key_length = held_tokens(cache, mask, length)
        if prefix:
            mask = read_flat_mask(name, mask, tokens, config.num_attention_heads, held)
        else:
            mask = read_attention_mask(mask, batch, length, config.num_attention_heads, held, key_length)
        real = padding_mask(mask, length)
        if tokens.is_floating_point():
            vectors = tokens
        else:
            vectors = embed(known_ids(tokens, config.vocab_size, real, f"{prefix}input_ids"))
        if real is not None:
            vectors = vectors.masked_fill(~real.unsqueeze(-1), 0.0)
        starts = None if packing is None else packing.starts(real, batch, length)
        if starts is not None and config.decoder_long_attention != "none":
            raise ValueError(
                "Packed documents (by position_ids, seq_idx or cu_seq_lens_q) want attention that sees all keys: "
                "decoder_long_attention='none', or a row for each document."
            )
        past: Any = 0
        if cache is not None and holds_tokens(cache):
            check_continuation(cache, self.key_place, starts, vectors)
            starts, mask, past = None, cover_cache(mask, cache, length), cache.get_seq_length()
        places = None if packing is None else packing.position_ids
        if places is None:
            places = token_positions(mask, starts, real, past, (batch, length), vectors.device)
        elif real is not None:
            places = places.expand(real.shape).masked_fill(~real, 0)
        return TokensRead(self.add_positions(vectors, places), mask, real, starts)

    def _run_layers(
        self, first: Tensor, second: Tensor | None, memory: Tensor | None, call: DecoderCall, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        if second is not None:
            return self.run_streams(first, second, call, real=call.real, rebuilds=call.cache is None, **kwargs)
        for layer in self.layers:
            first = layer(first, memory, call, **kwargs)
        return (first,)

    @capture_outputs
    def forward(
        self,
        first: Tensor,
        second: Tensor | None,
        call: DecoderCall,
        wanted: Tensor | None = None,
        memory: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            first, second (`Tensor` of shape `(batch, length, width)`): both streams; `second` is `None` with cross
                attention, which has one.
            call ([`DecoderCall`]): masks, caches and the like.
            wanted (`Tensor` of shape `(batch, tokens)`, *optional*): places whose output is wanted; all by default.
            memory (`Tensor` of shape `(batch, source length, width)`, *optional*): output of the encoder, for cross
                attention.
        """
        unsupported = (call.real, call.starts, call.order, wanted)
        step = decoding_step(
            self, first, call.cache, call.mask, *unsupported, source=call.source, cross_mask=call.memory_mask
        )
        call = call._replace(decoding=step)
        given = (first,) if second is None else (first, second)
        streams = None if step is None or len(self.between) else self.decoder(self.layers, given, step)
        if streams is None:
            streams = self._run_layers(first, second, memory, call, **kwargs)
        first = streams[0]
        if second is not None:
            first = torch.cat(streams, dim=-1) if self.concatenates else (first + streams[1]) / 2
        if wanted is not None:
            first = first.gather(1, wanted.unsqueeze(-1).expand(-1, -1, first.shape[2]))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(first))
