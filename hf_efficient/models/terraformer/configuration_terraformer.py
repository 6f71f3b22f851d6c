"""Configuration of Terraformer, and of the encoder-decoder with cross attention that it is measured against."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ...modules.sparse_config import SparseLayersConfig
from ...utils.config_checks import check_choice, check_range, check_token_ids


DECODER_TYPES = ("joined", "cross_attention")
STREAM_OUTPUTS = ("average", "concatenate")
CROSS_TYPES = ("dense", "multiplicative_conv", "none")
LONG_ATTENTIONS = ("none", "lsh", "mixed")
LSH_LAYOUTS = ("packed", "original")
_MOST_BUCKETS = 2**16

_SPARSE_FF = {"ff_sparsity": 64, "ff_rank": 96, "intermediate_size": 6144}
_SPARSE_QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 16}
_SPARSE_LOSS = {"lm_head_type": "multiplicative", "loss_sparsity": 4}
_CROSS = {"decoder_type": "cross_attention", "attentions_per_layer": 1}
_RECURRENCE = {"ff_sru_layers": 1, "ff_sru_units": 32}
_WIDE_SPARSE = {
    **{"hidden_size": 9216, "num_attention_heads": 96, "intermediate_size": 65536, "ff_sparsity": 256, "ff_rank": 32},
    **{"attention_type": "multiplicative_conv", "attention_sparsity": 64},
    **_SPARSE_LOSS,
}

# Widths, sparsities and depths of arXiv 2111.12763 and its code. That of the model called 17B is not in the code: six
# and six layers have 17.0 billion parameters. `reformer-lm` is the language model of the earlier Reformer, by the
# defaults of its code, with attention to all keys as there; `decoder_long_attention="lsh"` is the article's.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "24+24x1024-dense": {**_CROSS},
    "24+24x1024-all": {**_CROSS, **_SPARSE_FF, **_SPARSE_QKV, **_SPARSE_LOSS},
    "24+24x1024-all-cross": {
        **_CROSS,
        **_SPARSE_FF,
        **_SPARSE_QKV,
        **_SPARSE_LOSS,
        **{"cross_query_type": "multiplicative_conv", "cross_query_sparsity": 16, "cross_output_type": "none"},
    },
    "terraformer-medium": {**_SPARSE_FF, **_SPARSE_QKV, **_SPARSE_LOSS, **_RECURRENCE},
    "6+6x9216-dense": {
        **_CROSS,
        **{"hidden_size": 9216, "num_attention_heads": 96, "intermediate_size": 40960},
        **{"num_encoder_layers": 6, "num_decoder_layers": 6},
    },
    "terraformer-17b": {**_WIDE_SPARSE, "num_encoder_layers": 6, "num_decoder_layers": 6, "attentions_per_layer": 1},
    "terraformer-54b": {**_WIDE_SPARSE, "num_encoder_layers": 6, "num_decoder_layers": 36, "attentions_per_layer": 2},
    "reformer-lm": {
        **{"is_encoder_decoder": False, "num_encoder_layers": 0, "num_decoder_layers": 6, "attentions_per_layer": 1},
        **{"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "hidden_act": "gelu_new"},
        **{"stream_output": "concatenate", "attention_bias": False, "final_dropout": True},
    },
}


@strict
class TerraformerConfig(SparseLayersConfig):
    r"""
    Configuration of Terraformer (Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv
    2111.12763, section 5), an encoder-decoder whose decoder reads the encoder's output in front of the target.

    Both stacks have two streams and are reversible: training keeps no activations of a layer. Feed-forward, decoder
    attention and output layer are each dense or sparse; attention may be by locality-sensitive hashing (LSH). With
    `decoder_type="cross_attention"` it is the ordinary encoder-decoder of the article, with one stream, and without an
    encoder (`is_encoder_decoder=False`, as in the preset `"reformer-lm"`) the reversible language model that Reformer
    (Kitaev et al., ICLR 2020, arXiv 2001.04451) is.

    Args:
        num_encoder_layers (`int`, defaults to 24): 0 without an encoder.
        num_decoder_layers (`int`, defaults to 24)
        num_hidden_layers (`int`, *optional*): the decoder's attentions, each of which has a layer in a cache; computed.
        decoder_type (`str`, defaults to `"joined"`): `"joined"`, one causal stack over source and target, or
            `"cross_attention"`.
        attentions_per_layer (`int`, defaults to 2): attentions of a decoder layer, one after the other.
        encoder_keeps_streams (`bool`, defaults to `True`): hand both streams of the encoder to the decoder; `False` for
            their average through a linear map and a norm, which ends what can be reversed.
        encoder_swaps (`int`, defaults to 2): how often an encoder layer exchanges its streams, 1 or 2.
        forget_every (`int`, defaults to 0): replace both streams by a linear map of their average after so many layers,
            but not before the last `forget_every + 1` of a stack; 0 for never.
        half_width_layers (`int`, defaults to 0): layers of the decoder, from the first, of half the width; the whole
            encoder and the embeddings have it too. Wants a dense feed-forward layer.
        double_width_after (`int`, *optional*): layers of the decoder after this one, counted from 0, have twice the
            width.
        stream_output (`str`, defaults to `"average"`): what the output layer sees of both streams: their average, or
            one beside the other (`"concatenate"`), as Reformer.
        position_shared_start (`bool`, defaults to `False`): with `position_max_offset`, let each row of a batch begin
            at a random position, its source and its target at the same one. The original draws one start for all
            sources and another for all targets, by which a place in the source is hard to find by its position.
        head_dim (`int`, *optional*): size of a head of dense attention, by default `hidden_size` over their number.
        attention_bias (`bool`, defaults to `True`): biases of dense attention.
        cross_query_type, cross_output_type (`str`, default to `"dense"`): of cross attention: `"dense"`,
            `"multiplicative_conv"` or `"none"`, which takes the vectors as they are.
        cross_query_sparsity, cross_output_sparsity (`int`, *optional*): modules of `"multiplicative_conv"`.
        encoder_long_attention, decoder_long_attention (`str`, default to `"none"`): `"none"` for attention to all keys,
            `"lsh"`, or `"mixed"`, which is LSH for texts longer than `lsh_full_length`. Queries are keys in both.
        lsh_full_length (`int`, defaults to 512): see above.
        lsh_chunk_length (`int`, defaults to 64): neighbours in the order of buckets that see each other.
        lsh_rounds (`int`, defaults to 2), lsh_eval_rounds (`int`, *optional*): hashings, and those of evaluation.
        lsh_buckets (`list[int]`, *optional*): even numbers, whose product is the number of buckets; by default what the
            longest text, `max_position_embeddings`, wants.
        lsh_chunks_before (`int`, defaults to 1), lsh_encoder_chunks_after (`int`, defaults to 1): chunks beside its own
            that a token sees; the decoder sees none after.
        lsh_seed (`int`, defaults to 0): of the random rotations, the same for all calls.
        lsh_layout (`str`, defaults to `"packed"`): `"packed"`, in which padding takes no place in a chunk, or
            `"original"`, as the authors' code lays rows out.
        reversible (`bool`, defaults to `True`): rebuild activations in the backward pass; `False` keeps them.
        final_dropout (`bool`, defaults to `False`): dropout before the output layer, as the authors' Reformer has it.

    The other fields are those of [`~hf_efficient.modules.sparse_config.SparseLayersConfig`].

    Example:

    ```python
    >>> from hf_efficient import TerraformerConfig, TerraformerForConditionalGeneration

    >>> config = TerraformerConfig.preset("terraformer-medium", num_encoder_layers=2, num_decoder_layers=2)
    >>> model = TerraformerForConditionalGeneration(config)
    ```
    """

    model_type = "terraformer"
    published_settings: ClassVar[dict[str, dict[str, Any]]] = _PUBLISHED
    attribute_map = {
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "encoder_layers": "num_encoder_layers",
        "decoder_layers": "num_decoder_layers",
    }

    num_hidden_layers: int | None = None  # type: ignore[assignment]
    num_encoder_layers: int = 24
    num_decoder_layers: int = 24
    decoder_type: str = "joined"
    attentions_per_layer: int = 2
    encoder_keeps_streams: bool = True
    encoder_swaps: int = 2
    forget_every: int = 0
    half_width_layers: int = 0
    double_width_after: int | None = None
    stream_output: str = "average"
    position_shared_start: bool = False
    head_dim: int | None = None
    attention_bias: bool = True
    cross_query_type: str = "dense"
    cross_query_sparsity: int | None = None
    cross_output_type: str = "dense"
    cross_output_sparsity: int | None = None
    encoder_long_attention: str = "none"
    decoder_long_attention: str = "none"
    lsh_full_length: int = 512
    lsh_chunk_length: int = 64
    lsh_rounds: int = 2
    lsh_eval_rounds: int | None = None
    lsh_buckets: list[int] | None = None
    lsh_chunks_before: int = 1
    lsh_encoder_chunks_after: int = 1
    lsh_seed: int = 0
    lsh_layout: str = "packed"
    reversible: bool = True
    final_dropout: bool = False
    share_dropout: bool = True
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = 0
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        if self.num_hidden_layers is None:
            self.num_hidden_layers = self.num_decoder_layers * self.attentions_per_layer
        super().__post_init__(**kwargs)

    @property
    def decoder_state_size(self) -> int:
        """Numbers that the cache holds of a row and a decoder layer besides keys and values."""
        windows = 0
        if self.attention_type == "multiplicative_conv":
            windows += 1 + (self.attention_value_input != "shared") + ("conv" in self.attention_output)
            windows *= self.attentions_per_layer
        # Whatever `decoder_type` says: transformers asks a copy of the config for its layers that has lost this field.
        windows += (self.cross_query_type, self.cross_output_type).count("multiplicative_conv")
        return windows * (self.attention_window - 1) * self.hidden_size + self.ff_sru_layers * self.ff_sru_units

    @property
    def layer_types(self) -> list[str]:
        """Kinds of cache that the decoder's attentions want: of each layer the first one holds its states too."""
        first = "hybrid" if self.decoder_state_size else "full_attention"
        of_layer = [first, *["full_attention"] * (self.attentions_per_layer - 1)]
        return of_layer * self.num_decoder_layers

    @property
    def queries_may_be_keys(self) -> bool:
        """Permission for dense attention to have one map for queries and keys, as attention by hashing may."""
        return self.decoder_long_attention != "none"

    def validate_architecture(self):
        """Check the fields against each other; called at construction and before saving."""
        super().validate_architecture()
        check_range(self, "num_decoder_layers", least=1)
        check_range(self, "num_encoder_layers", "forget_every", "half_width_layers", "double_width_after", least=0)
        check_range(self, "attentions_per_layer", "encoder_swaps", "head_dim", "lsh_chunk_length", least=1)
        check_range(self, "cross_query_sparsity", "cross_output_sparsity", "lsh_rounds", "lsh_eval_rounds", least=1)
        check_range(self, "encoder_swaps", most=2)
        check_range(self, "lsh_full_length", "lsh_chunks_before", "lsh_encoder_chunks_after", least=0)
        check_choice(self, "decoder_type", DECODER_TYPES)
        check_choice(self, "stream_output", STREAM_OUTPUTS)
        check_choice(self, "cross_query_type", CROSS_TYPES)
        check_choice(self, "cross_output_type", CROSS_TYPES)
        check_choice(self, "encoder_long_attention", LONG_ATTENTIONS)
        check_choice(self, "decoder_long_attention", LONG_ATTENTIONS)
        check_choice(self, "lsh_layout", LSH_LAYOUTS)
        check_token_ids(self, "decoder_start_token_id")
        self._validate_stacks()
        self._validate_widths()
        self._validate_shared_start()
        self._validate_cross_attention()
        self._validate_lsh()

    def _validate_stacks(self):
        if self.num_hidden_layers != self.num_decoder_layers * self.attentions_per_layer:
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) is the number of the decoder's attentions, here "
                f"{self.num_decoder_layers * self.attentions_per_layer} (num_decoder_layers x attentions_per_layer): "
                "leave it out, or give it as well."
            )
        if self.is_encoder_decoder != (self.num_encoder_layers > 0):
            raise ValueError(
                f"is_encoder_decoder={self.is_encoder_decoder} and num_encoder_layers={self.num_encoder_layers} do not "
                "go together: a model has encoder layers if, and only if, it is an encoder-decoder."
            )
        if self.decoder_type == "joined":
            return
        given = [
            name
            for name in ("forget_every", "half_width_layers", "double_width_after", "stream_output")
            if getattr(self, name) != getattr(type(self), name)
        ]
        given += [] if self.attentions_per_layer == 1 else ["attentions_per_layer"]
        if given or not self.is_encoder_decoder:
            raise ValueError(
                "decoder_type='cross_attention' is an encoder-decoder of one stream with one attention a layer: it "
                f"does not go with {', '.join(given) or 'is_encoder_decoder=False'}."
            )

    def _validate_widths(self):
        if self.half_width_layers and self.ff_sparsity is not None:
            raise ValueError(
                "half_width_layers wants a dense feed-forward layer: leave out ff_sparsity. (The original fails on "
                "sparse layers of half the width.)"
            )
        if self.half_width_layers and self.intermediate_size % 2:
            raise ValueError(f"half_width_layers wants an even intermediate_size, not {self.intermediate_size}.")
        digits = 8 if self.position_embedding_type == "fixed_base" else None
        parts = {name: getattr(self, name) for name in ("num_attention_heads", "attention_sparsity")}
        for name, count in {**parts, "the digits of positions": digits}.items():
            if self.half_width_layers and count is not None and self.hidden_size % (2 * count):
                raise ValueError(
                    f"half_width_layers wants a hidden_size whose half is a multiple of {name} ({count}), not "
                    f"{self.hidden_size}."
                )
        for name in ("half_width_layers", "double_width_after"):
            value, most = getattr(self, name), self.num_decoder_layers - (name == "double_width_after")
            if value is not None and value > most:
                raise ValueError(f"{name} ({value}) is beyond the decoder's {self.num_decoder_layers} layers.")
        widens = self.half_width_layers or self.double_width_after is not None or self.stream_output == "concatenate"
        if self.tie_word_embeddings and widens:
            raise ValueError(
                "tie_word_embeddings wants an output layer as wide as the embeddings: leave out half_width_layers, "
                "double_width_after and stream_output='concatenate'."
            )

    def _validate_shared_start(self):
        tables = self.position_embedding_type in ("learned", "low_rank")
        if self.position_shared_start and not (self.is_encoder_decoder and tables):
            raise ValueError(
                "position_shared_start is of an encoder-decoder with a table of positions (position_embedding_type="
                "'learned' or 'low_rank'): leave it out."
            )

    def _validate_cross_attention(self):
        if self.head_dim is not None and (self.attention_type != "dense" or self.decoder_type != "joined"):
            raise ValueError(
                "head_dim goes with attention_type='dense' and decoder_type='joined': the width of other attentions is "
                "shared out among their heads."
            )
        for part in ("query", "output"):
            kind, name = getattr(self, f"cross_{part}_type"), f"cross_{part}_sparsity"
            modules = getattr(self, name)
            if (kind == "multiplicative_conv") != (modules is not None):
                raise ValueError(f"cross_{part}_type='multiplicative_conv' wants {name}, and no other type does.")
            if modules is not None:
                self._check_multiple("hidden_size", name)

    def _validate_lsh(self):
        kinds = (self.encoder_long_attention, self.decoder_long_attention)
        if kinds == ("none", "none"):
            return
        if self.decoder_type == "cross_attention" and self.decoder_long_attention != "none":
            raise ValueError(
                "decoder_long_attention wants decoder_type='joined': with cross attention only the encoder, "
                "encoder_long_attention, reads long texts."
            )
        if self.lsh_buckets is not None and (not self.lsh_buckets or any(n < 2 or n % 2 for n in self.lsh_buckets)):
            raise ValueError(
                f"lsh_buckets must be even numbers, since a direction and its opposite are two buckets; got "
                f"{self.lsh_buckets}."
            )
        if self.lsh_buckets is not None and math.prod(self.lsh_buckets) > _MOST_BUCKETS:
            raise ValueError(
                f"lsh_buckets {self.lsh_buckets} make {math.prod(self.lsh_buckets):,} buckets, but keys that are held "
                f"in 16 bits tell {_MOST_BUCKETS:,} apart."
            )
        if self.lsh_chunk_length > self.max_position_embeddings:
            raise ValueError(
                f"lsh_chunk_length ({self.lsh_chunk_length}) is more than max_position_embeddings "
                f"({self.max_position_embeddings}): attention would be to all keys. Lower it, or leave LSH out."
            )


__all__ = ["TerraformerConfig"]
