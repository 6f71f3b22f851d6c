"""Configuration of SRU and SRU++."""

import copy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...utils.cache_naming import CACHE_NAME
from ...utils.carried_code import CarriedCodeMixin
from ...utils.config_checks import LabelChecksMixin, check_choice, check_range, check_rates, check_token_ids
from ...utils.presets import PresetMixin


_ENWIK8 = {"vocab_size": 205, "highway_bias": -2.0}
_WORDS = {
    "adaptive_embedding_size": 1024,
    "adaptive_divisor": 4,
    "tie_word_embeddings": True,
    "lm_head_bias": True,
}
_WIKITEXT = {
    **_WORDS,
    "vocab_size": 267_735,
    "adaptive_cutoffs": [19_997, 39_997, 199_997],
    "tie_adaptive_projections": True,
}
_BILLION = {
    **_WORDS,
    "vocab_size": 793_471,
    "adaptive_cutoffs": [59_998, 159_998],
    "tie_adaptive_projections": False,
}


def _rates(dropout: float, attention: float, embedding: float = 0.0) -> dict[str, float]:
    return {"dropout": dropout, "attention_dropout": attention, "embedding_dropout": embedding}


# Where the publications give no dropout, none is set. Sizes and rates: arXiv 2102.12459, section 4 and its code.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "enwik8-42m": {**_ENWIK8, **_rates(0.1, 0.1), "hidden_size": 1920, "projection_size": 480},
    "enwik8-base": {**_ENWIK8, **_rates(0.22, 0.22), "hidden_size": 3072, "projection_size": 768},
    "enwik8-base-k5": {
        **_ENWIK8,
        **_rates(0.22, 0.22),
        "hidden_size": 3072,
        "projection_size": 768,
        "attention_every_n_layers": 5,
    },
    "enwik8-large": {**_ENWIK8, **_rates(0.32, 0.32), "hidden_size": 4096, "projection_size": 1024},
    "enwik8-large-ratio8": {**_ENWIK8, "hidden_size": 6016, "projection_size": 752},
    "wikitext103-base": {**_WIKITEXT, **_rates(0.15, 0.15, 0.15), "hidden_size": 3072, "projection_size": 768},
    "wikitext103-large": {**_WIKITEXT, **_rates(0.2, 0.2, 0.2), "hidden_size": 4096, "projection_size": 1024},
    "wikitext103-large-ratio8": {**_WIKITEXT, "hidden_size": 5952, "projection_size": 744},
    "wikitext103-large-ratio8-k5": {
        **_WIKITEXT,
        "hidden_size": 5952,
        "projection_size": 744,
        "attention_every_n_layers": 5,
    },
    "billionword-base": {**_BILLION, **_rates(0.05, 0.0), "hidden_size": 4096, "projection_size": 1024},
    "billionword-large": {
        **_BILLION,
        **_rates(0.1, 0.0),
        "hidden_size": 7616,
        "projection_size": 1024,
        "attention_every_n_layers": 5,
    },
}


@strict
class SruppConfig(PresetMixin, CarriedCodeMixin, LabelChecksMixin, PreTrainedConfig):
    r"""
    Configuration of SRU++ (Lei, EMNLP 2021, arXiv 2102.12459) and of SRU (Lei et al., EMNLP 2018, arXiv 1709.02755).

    A layer maps its input to the pre-activations of an elementwise recurrence. Figure 1 of the SRU++ paper shows three
    ways to do so; they are settings here:

    | | layer | settings |
    | --- | --- | --- |
    | (a) | SRU: one linear map | `projection_size=0, attention_layers=[]` |
    | (b) | SRU with a low-rank map | `projection_size=d', attention_layers=[], attention_layer_norm=False` |
    | (c) | SRU++: attention inside | `projection_size=d'` |

    The defaults are the enwik8 base model, for raw bytes. [`SruppConfig.preset`] gives the published models.

    There are no positional encodings; the recurrence encodes order.

    Args:
        vocab_size (`int`, defaults to 256): number of ids.
        hidden_size (`int`, defaults to 3072): width of a layer's output; both directions together.
        embedding_size (`int`, *optional*): width of the embeddings, `hidden_size` by default. If the two differ, the
            first layer's highway has a matrix of its own (k = 4), or `project_input` makes them equal.
        projection_size (`int` or `list[int]`, defaults to 768): d' of the paper, one for all layers or one each; 0 for
            a single linear map.
        num_attention_heads (`int`, defaults to 1): heads, which share d'.
        attention_layers (`list[int]`, *optional*): layers that attend, counted from 0. It overrides the next two.
        attention_every_n_layers (`int`, defaults to 1): the paper's k: layer i attends if `(i + 1) % k == 0`.
        attention_last_n_layers (`int`, *optional*): only the last n layers attend.
        bidirectional (`bool`, defaults to `False`): half of `hidden_size` runs backwards in time. Implies
            `is_causal=False`.
        is_causal (`bool`, *optional*): whether attention is causal; `not bidirectional` by default.
        layer_norm (`bool`, defaults to `False`): LayerNorm around each layer, before it, or after it with
            `normalize_after`. With the norm before it, the original normalises the input of a layer but not its
            memory: a token's key changes once the segment, or the call, that it stands in is over. So results then
            depend on how a text is cut into segments, or generation into calls. This code follows the original.
        attention_layer_norm (`bool`, defaults to `True`): LayerNorm on the projected vector, after the attention, or
            before it with `attention_normalize_after=False`.
        has_skip_term (`bool`, defaults to `True`): highway connection around each layer.
        rescale (`bool`, defaults to `False`): scale the highway by `sqrt(1 + 2 exp(highway_bias))`.
        use_peephole (`bool`, defaults to `True`): gates look at the state. `False` is the original's `v1`.
        recurrence_activation (`str`, defaults to `"identity"`): or `"tanh"`.
        project_input (`bool`, defaults to `False`): a linear map from `embedding_size` to `hidden_size` comes first.
        highway_bias (`float`, defaults to -2.0): initial bias of the output gate. SRU's own default is 0.
        weight_c_init (`float`, defaults to 1.0): bound of the uniform initial weights of the peephole.
        dropout (`float`, defaults to 0.0): of a layer's output, one mask for all steps, in all layers but the last; of
            embeddings and of the top, elementwise.
        projection_dropout (`float`, *optional*): elementwise before a layer's last map; `dropout` by default (SRU++),
            0 in SRU.
        attention_dropout (`float`, defaults to 0.0): of attention weights.
        input_dropout (`float`, defaults to 0.0): of a layer's input but not of its highway, one mask for all steps
            (SRU's deprecated `rnn_dropout`).
        embedding_dropout (`float`, defaults to 0.0): inside the adaptive embedding and softmax.
        classifier_dropout (`float`, *optional*): before the output layer of classification heads.
        adaptive_cutoffs (`list[int]`, *optional*): first ids of the rarer clusters of an adaptive embedding and
            softmax; cluster i has vectors of `adaptive_embedding_size // adaptive_divisor**i`.
        tie_adaptive_projections (`bool`, defaults to `False`): tie the projections of embedding and softmax as well as
            their tables (WikiText-103); with `False` only the tables (Billion Word).
        lm_head_bias (`bool`, defaults to `True`): bias of the output layer.

    Example:

    ```python
    >>> from hf_efficient import SruppConfig, SruppForCausalLM

    >>> base = SruppConfig.preset("enwik8-base")
    >>> small = SruppConfig(hidden_size=512, projection_size=128, num_hidden_layers=8, attention_layers=[7])
    >>> model = SruppForCausalLM(small)
    ```
    """

    model_type = "srupp"
    published_settings: ClassVar[dict[str, dict[str, Any]]] = _PUBLISHED
    keys_to_ignore_at_inference = [CACHE_NAME, "memory", "token_losses"]
    attribute_map = {
        "n_d": "hidden_size",
        "n_proj": "projection_size",
        "depth": "num_hidden_layers",
        "attn_heads": "num_attention_heads",
        "attn_every_n_layers": "attention_every_n_layers",
    }

    vocab_size: int = 256
    hidden_size: int = 3072
    embedding_size: int | None = None
    projection_size: int | list[int] = 768
    num_hidden_layers: int = 10
    num_attention_heads: int = 1
    attention_layers: list[int] | None = None
    attention_every_n_layers: int = 1
    attention_last_n_layers: int | None = None
    bidirectional: bool = False
    is_causal: bool | None = None
    layer_norm: bool = False
    normalize_after: bool = False
    attention_layer_norm: bool = True
    attention_normalize_after: bool = True
    layer_norm_eps: float | int = 1e-5
    has_skip_term: bool = True
    rescale: bool = False
    use_peephole: bool = True
    recurrence_activation: str = "identity"
    project_input: bool = False
    highway_bias: float | int = -2.0
    weight_c_init: float | int = 1.0
    dropout: float | int = 0.0
    projection_dropout: float | int | None = None
    attention_dropout: float | int = 0.0
    input_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    adaptive_cutoffs: list[int] | None = None
    adaptive_embedding_size: int | None = None
    adaptive_divisor: int = 4
    tie_adaptive_projections: bool = False
    lm_head_bias: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.is_causal is None:
            self.is_causal = not self.bidirectional
        if self.adaptive_cutoffs is not None and self.adaptive_embedding_size is None:
            self.adaptive_embedding_size = self.hidden_size
        # An adaptive softmax always shares its tables with the embedding.
        self.tie_word_embeddings = self.tie_word_embeddings or self.adaptive_cutoffs is not None
        super().__post_init__(**kwargs)

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def attention_layer_indices(self) -> list[int]:
        """Indices of the layers with attention."""
        if self.attention_layers is not None:
            return sorted({layer % self.num_hidden_layers for layer in self.attention_layers})
        if self.attention_last_n_layers is not None:
            return list(range(max(0, self.num_hidden_layers - self.attention_last_n_layers), self.num_hidden_layers))
        every = max(1, self.attention_every_n_layers)  # asked for before it is validated
        return [layer for layer in range(self.num_hidden_layers) if (layer + 1) % every == 0]

    @property
    def layer_types(self) -> list[str]:
        """Kinds of cache that the layers want: keys, values and a state (`hybrid`), or a state (`linear_attention`).
        Where no layer attends, the first one counts tokens by keys of one byte: generation asks a cache for its length.
        """
        attending = set(self.attention_layer_indices or [0])
        return ["hybrid" if layer in attending else "linear_attention" for layer in range(self.num_hidden_layers)]

    @property
    def projection_sizes(self) -> list[int]:
        """d' of each layer; 0 where there is one linear map."""
        if isinstance(self.projection_size, list):
            return self.projection_size
        return [self.projection_size] * self.num_hidden_layers

    @property
    def input_sizes(self) -> list[int]:
        """Width of each layer's input."""
        assert self.embedding_size is not None
        first = self.hidden_size if self.project_input else self.embedding_size
        return [first, *[self.hidden_size] * (self.num_hidden_layers - 1)]

    def scale_down(
        self,
        divider: int = 3,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
    ) -> "SruppConfig":
        """
        Return the config of a smaller model of the same kind, such as the generator of a pretraining objective.

        Args:
            divider (`int`, defaults to 3): how many times narrower it is; the width of both directions stays even.
            hidden_size (`int`, *optional*): its width, in place of `divider`.
            num_hidden_layers (`int`, *optional*): its depth; it keeps the settings of the first layers.
            num_attention_heads (`int`, *optional*): its heads, which share d'. By default their number is scaled with
                the width, as d' is.
        """
        width = self.hidden_size // divider if hidden_size is None else hidden_size
        if self.bidirectional and hidden_size is None:
            width -= width % 2
        heads = num_attention_heads or max(1, self.num_attention_heads * width // self.hidden_size)
        sizes = self.projection_size if isinstance(self.projection_size, list) else [self.projection_size]
        sizes = [size and max(1, size * width // (self.hidden_size * heads)) * heads for size in sizes]
        small = copy.deepcopy(self)
        small.architectures = None
        small.hidden_size = small.embedding_size = width
        small.num_hidden_layers = num_hidden_layers or self.num_hidden_layers
        small.num_attention_heads = heads
        if small.attention_last_n_layers is not None:
            small.attention_last_n_layers = min(small.attention_last_n_layers, small.num_hidden_layers)
        small.projection_size = sizes[: small.num_hidden_layers] if isinstance(self.projection_size, list) else sizes[0]
        small.validate()
        return small

    def validate_architecture(self):
        """Check the fields against each other; called at construction and before saving."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "embedding_size")
        check_range(self, *sizes, "attention_every_n_layers", "adaptive_embedding_size", "adaptive_divisor", least=1)
        check_range(self, "attention_last_n_layers", "layer_norm_eps", "weight_c_init", least=0)
        check_range(self, "highway_bias")
        check_rates(self, "dropout", "projection_dropout", "attention_dropout", "input_dropout")
        check_rates(self, "embedding_dropout", "classifier_dropout")
        check_choice(self, "recurrence_activation", ("identity", "tanh"))
        check_token_ids(self, "pad_token_id", "mask_token_id")
        if self.attention_last_n_layers is not None and self.attention_every_n_layers != 1:
            raise ValueError("Give attention_every_n_layers or attention_last_n_layers, or name the attention_layers.")
        if self.bidirectional and (self.hidden_size % 2 or self.is_causal):
            raise ValueError("A bidirectional SRU++ needs an even hidden_size and cannot be causal.")
        self._validate_attention()
        self._validate_adaptive()

    def _validate_attention(self):
        depth = self.num_hidden_layers
        if len(self.projection_sizes) != depth or min(self.projection_sizes) < 0:
            raise ValueError(f"projection_size must be one size, or {depth} of them; got {self.projection_size}.")
        outside = [layer for layer in self.attention_layers or [] if not -depth <= layer < depth]
        if outside:
            raise ValueError(f"attention_layers names layer {outside[0]}, but there are {depth} layers, from 0.")
        places = [layer % depth for layer in self.attention_layers or []]  # -1 is the last layer
        twice = [layer for layer in places if places.count(layer) > 1]
        if twice:
            raise ValueError(f"attention_layers names layer {min(twice)} more than once: {self.attention_layers}.")
        if (self.attention_last_n_layers or 0) > depth:
            raise ValueError(
                f"attention_last_n_layers is {self.attention_last_n_layers}, but there are {depth} layers."
            )
        for layer in self.attention_layer_indices:
            size = self.projection_sizes[layer]
            if size == 0 or size % self.num_attention_heads:
                raise ValueError(
                    f"Layer {layer} attends, so its projection_size ({size}) must be a positive multiple of "
                    f"num_attention_heads ({self.num_attention_heads}). For plain SRU set attention_layers=[]."
                )

    def _validate_adaptive(self):
        cutoffs = self.adaptive_cutoffs
        tied = self.tie_word_embeddings if cutoffs is None else self.tie_adaptive_projections
        if tied and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"Tied embeddings need an embedding_size ({self.embedding_size}) equal to hidden_size "
                f"({self.hidden_size})."
            )
        if cutoffs is None:
            return
        if not cutoffs or sorted({0, *cutoffs, self.vocab_size}) != [0, *cutoffs, self.vocab_size]:
            raise ValueError(
                f"adaptive_cutoffs must rise between 0 and vocab_size ({self.vocab_size}), both excluded; got "
                f"{cutoffs}."
            )
        assert self.adaptive_embedding_size is not None
        if self.adaptive_embedding_size // self.adaptive_divisor ** len(cutoffs) < 1:
            raise ValueError(
                f"adaptive_embedding_size ({self.adaptive_embedding_size}) is too small for {len(cutoffs)} divisions "
                f"by {self.adaptive_divisor}."
            )


__all__ = ["SruppConfig"]
