"""Fields of configs with dense and sparse layers, which the Scaling Transformer and Terraformer have in common."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..utils.cache_naming import CACHE_NAME
from ..utils.carried_code import CarriedCodeMixin
from ..utils.config_checks import (
    LabelChecksMixin,
    check_activations,
    check_choice,
    check_range,
    check_rates,
    check_token_ids,
)
from ..utils.presets import PresetMixin


ATTENTION_TYPES = ("dense", "multiplicative", "multiplicative_conv", "multiplicative_modular")
ATTENTION_OUTPUTS = ("none", "multiplicative", "conv", "multiplicative_conv")
VALUE_INPUTS = ("shared", "by_module", "concatenated")
POSITION_TYPES = ("learned", "low_rank", "fixed_base", "none")
LM_HEAD_TYPES = ("dense", "einsum", "multiplicative", "low_rank")
# Those that give 0 for 0, as a unit that is not chosen must.
SPARSE_ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")

# Of no meaning without a controller.
_CONTROLLER_SETTINGS = (
    "ff_rank",
    "ff_temperature",
    "ff_hard_probability",
    "ff_multiply_by_controller",
    "ff_inner_bias",
    "ff_scaled_init",
)
# Digits of a position in each base, as the layer has them; products of that many are int64.
_DIGITS = 8


@strict
class SparseLayersConfig(PresetMixin, CarriedCodeMixin, LabelChecksMixin, PreTrainedConfig):
    r"""
    Base of the configurations of models whose feed-forward, attention and output layer are each dense or sparse
    (Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021, arXiv 2111.12763).

    Args:
        vocab_size (`int`, defaults to 32000): number of ids. A multiplicative output layer wants a multiple of
            `loss_sparsity`.
        hidden_size (`int`, defaults to 1024): d of the paper.
        intermediate_size (`int`, defaults to 4096): hidden units of the feed-forward layer.
        num_hidden_layers (`int`, defaults to 24), num_attention_heads (`int`, defaults to 16)
        max_position_embeddings (`int`, defaults to 2048): length of the table of positions.
        hidden_act (`str`, defaults to `"relu"`): of the feed-forward layer; a sparse one takes `relu`, `gelu`,
            `gelu_new` or `silu`.
        ff_sparsity (`int`, *optional*): N: one unit in so many is used. `None` for a dense layer.
        ff_rank (`int`, *optional*): inner width of the controller, to be given with `ff_sparsity`: the paper says
            `hidden_size // N`, its code took `intermediate_size // N`. Of a small layer most of what is read is this.
        ff_temperature (`float`, defaults to 0.1): scale of the noise by which training draws units.
        ff_hard_probability (`float`, defaults to 0.3): share of training calls in which the mask is hard.
        ff_multiply_by_controller (`bool`, defaults to `False`): scale a unit by its probability.
        ff_inner_bias (`bool`, defaults to `False`): a bias before the activation of a sparse layer.
        ff_scaled_init (`bool`, defaults to `False`): initialise the second matrix sqrt(N) times larger.
        ff_chunk_size (`int`, defaults to 0): train the feed-forward in pieces of so many tokens, recomputed in
            the backward pass; 0 for one piece.
        ff_sru_layers (`int`, defaults to 0), ff_sru_units (`int`, defaults to 32): recurrences beside the feed-forward
            layer, and their width.
        attention_type (`str`, defaults to `"dense"`): `"dense"`, `"multiplicative"`, `"multiplicative_modular"` or, as
            in the paper's results, `"multiplicative_conv"`.
        attention_sparsity (`int`, *optional*): S: modules of the multiplicative kinds; need not equal the heads.
        attention_window (`int`, defaults to 3): tokens that a convolution sees, the current one and those before it.
        attention_kernel_width (`int`, defaults to 3): modules that it sees, an odd number.
        attention_share_qk (`bool`, defaults to `False`): one convolution for queries and keys.
        attention_output (`str`, defaults to `"none"`): what follows the heads of `"multiplicative_conv"`: `"none"`,
            `"multiplicative"`, `"conv"`, or both as `"multiplicative_conv"`.
        attention_value_input (`str`, defaults to `"shared"`): what values are computed from: the multiplicative layer,
            or that and the layer's input, module by module (`"by_module"`) or one after the other (`"concatenated"`).
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"`, `"low_rank"`, `"fixed_base"` or `"none"`.
        position_rank (`int`, defaults to 64): width of the table of `"low_rank"`.
        position_bases (`list[int]`, defaults to `[11, 13, 14, 15]`): of `"fixed_base"`, with eight digits each;
            from 2 to 234. What the smallest one says must cover `max_position_embeddings`.
        position_max_offset (`int`, defaults to 0), position_zero_probability (`float`, defaults to 1.0): in training a
            batch begins at a position below the first, but with the second probability at 0. Of `"learned"` and
            `"low_rank"`, ignored elsewhere; without both of them only the first positions are learned where training
            texts are shorter than the table.
        position_init_scale (`float`, defaults to 1.0): factor of the sinusoids that a table begins as. At 1, as in the
            original, they are about ten times as large as the embeddings: an Adam-like optimizer then needs long to
            hear the words. 0.1 makes both alike, and suits training from scratch with AdamW.
        lm_head_type (`str`, defaults to `"dense"`): `"dense"`, `"multiplicative"`, `"low_rank"` or `"einsum"`, which is
            dense too and says that the original's checkpoint has its matrix transposed.
        loss_sparsity (`int`, *optional*): modules of the multiplicative output layer.
        lm_head_rank (`int`, *optional*): inner width of `"low_rank"`.
        lm_head_sparse_probability (`float`, *optional*): train a multiplicative and a dense output layer, and use the
            first one with this probability, and always in evaluation.
        lm_head_bias (`bool`, defaults to `True`)
        layer_norm_eps (`float`, defaults to 1e-6)
        layer_norm_center (`bool`, defaults to `True`): `False` for RMSNorm, without bias.
        dropout (`float`, defaults to 0.1): of embeddings, positions, attention's and feed-forward's output.
        attention_dropout (`float`, *optional*): of attention weights; `dropout` by default.
        activation_dropout (`float`, defaults to 0.1): before the activation of a dense feed-forward layer, one mask for
            all tokens of a row.
        share_dropout (`bool`, defaults to `False`): one mask of the feed-forward's output for all tokens of a row, or,
            of a sparse layer, for all tokens.
        classifier_dropout (`float`, *optional*): before the output layer of classification heads.
    """

    keys_to_ignore_at_inference = [CACHE_NAME]

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    hidden_act: str = "relu"
    ff_sparsity: int | None = None
    ff_rank: int | None = None
    ff_temperature: float | int = 0.1
    ff_hard_probability: float | int = 0.3
    ff_multiply_by_controller: bool = False
    ff_inner_bias: bool = False
    ff_scaled_init: bool = False
    ff_chunk_size: int = 0
    ff_sru_layers: int = 0
    ff_sru_units: int = 32
    attention_type: str = "dense"
    attention_sparsity: int | None = None
    attention_window: int = 3
    attention_kernel_width: int = 3
    attention_share_qk: bool = False
    attention_output: str = "none"
    attention_value_input: str = "shared"
    position_embedding_type: str = "learned"
    position_rank: int = 64
    position_bases: list[int] | None = None
    position_max_offset: int = 0
    position_zero_probability: float | int = 1.0
    position_init_scale: float | int = 1.0
    lm_head_type: str = "dense"
    loss_sparsity: int | None = None
    lm_head_rank: int | None = None
    lm_head_sparse_probability: float | int | None = None
    lm_head_bias: bool = True
    layer_norm_eps: float | int = 1e-6
    layer_norm_center: bool = True
    dropout: float | int = 0.1
    attention_dropout: float | int | None = None
    activation_dropout: float | int = 0.1
    share_dropout: bool = False
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.position_bases is None:
            self.position_bases = [11, 13, 14, 15]
        super().__post_init__(**kwargs)

    @property
    def state_size(self) -> int:
        """Numbers that a layer's cache holds of a row besides keys and values: windows of convolutions, recurrences."""
        windows = 0
        if self.attention_type == "multiplicative_conv":
            windows = 1 + (self.attention_value_input != "shared") + ("conv" in self.attention_output)
        return windows * (self.attention_window - 1) * self.hidden_size + self.ff_sru_layers * self.ff_sru_units

    def validate_architecture(self):
        """Check the fields against each other; called at construction and before saving."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_range(self, *sizes, "max_position_embeddings", "ff_sparsity", "ff_rank", "ff_sru_units", least=1)
        check_range(self, "attention_sparsity", "attention_window", "attention_kernel_width", "loss_sparsity", least=1)
        check_range(self, "position_rank", "lm_head_rank", least=1)
        check_range(self, "ff_chunk_size", "ff_sru_layers", "position_max_offset", "layer_norm_eps", least=0)
        check_range(self, "position_init_scale", above=0)
        check_range(self, "ff_temperature", above=0)
        probabilities = ("ff_hard_probability", "position_zero_probability", "lm_head_sparse_probability")
        check_range(self, *probabilities, least=0, most=1)
        check_rates(self, "dropout", "attention_dropout", "activation_dropout", "classifier_dropout")
        check_choice(self, "attention_type", ATTENTION_TYPES)
        check_choice(self, "attention_output", ATTENTION_OUTPUTS)
        check_choice(self, "attention_value_input", VALUE_INPUTS)
        check_choice(self, "position_embedding_type", POSITION_TYPES)
        check_choice(self, "lm_head_type", LM_HEAD_TYPES)
        check_token_ids(self, "pad_token_id")
        self._check_multiple("hidden_size", "num_attention_heads")
        self._validate_feed_forward()
        self._validate_attention()
        self._validate_positions()
        self._validate_head()

    def _check_multiple(self, name: str, divisor: str) -> None:
        value, parts = getattr(self, name), getattr(self, divisor)
        if value % parts:
            raise ValueError(f"{name} ({value}) must be a multiple of {divisor} ({parts}).")

    def _validate_feed_forward(self):
        if self.ff_sparsity is None:
            check_activations(self, "hidden_act")
            given = [name for name in _CONTROLLER_SETTINGS if getattr(self, name) != getattr(type(self), name)]
            if given:
                raise ValueError(
                    "ff_rank and the other settings of a controller want ff_sparsity as well; without it leave out "
                    f"{', '.join(given)}."
                )
            return
        check_choice(self, "hidden_act", SPARSE_ACTIVATIONS)
        self._check_multiple("intermediate_size", "ff_sparsity")
        if self.ff_rank is None:
            raise ValueError(
                f"ff_sparsity={self.ff_sparsity} wants ff_rank, the inner width of the controller: the paper takes "
                f"hidden_size // ff_sparsity ({max(1, self.hidden_size // self.ff_sparsity)}), its code took "
                f"intermediate_size // ff_sparsity ({self.intermediate_size // self.ff_sparsity})."
            )

    @property
    def queries_may_be_keys(self) -> bool:
        """Permission for dense attention to have one map for queries and keys."""
        return False

    def _validate_attention(self):
        shares = self.attention_share_qk and not (self.attention_type == "dense" and self.queries_may_be_keys)
        if self.attention_type != "multiplicative_conv" and (
            self.attention_output != "none" or self.attention_value_input != "shared" or shares
        ):
            raise ValueError(
                "attention_output, attention_value_input and attention_share_qk belong to "
                f"attention_type='multiplicative_conv', not to {self.attention_type!r}."
            )
        if self.attention_type == "dense":
            if self.attention_sparsity is not None:
                kinds = ", ".join(repr(kind) for kind in ATTENTION_TYPES[1:])
                raise ValueError(f"attention_sparsity wants an attention_type that has modules: {kinds}.")
            return
        if self.attention_sparsity is None:
            raise ValueError(f"attention_type={self.attention_type!r} wants attention_sparsity, the number of modules.")
        self._check_multiple("hidden_size", "attention_sparsity")
        if self.attention_kernel_width % 2 == 0:
            raise ValueError(f"attention_kernel_width must be odd, not {self.attention_kernel_width}.")

    def _validate_positions(self):
        bases = self.position_bases
        if not bases or min(bases) < 2:
            raise ValueError(f"position_bases must be numbers from 2; got {bases}.")
        if max(bases) ** _DIGITS >= 2**63:
            raise ValueError(f"position_bases must be at most 234, whose eight digits fit into int64; got {bases}.")
        if self.position_embedding_type == "fixed_base" and self.hidden_size % 8:
            raise ValueError(f"Positions of fixed bases want a hidden_size in multiples of 8, not {self.hidden_size}.")
        reach = min(bases) ** _DIGITS
        if self.position_embedding_type == "fixed_base" and self.max_position_embeddings > reach:
            raise ValueError(
                f"Eight digits of the smallest of position_bases ({min(bases)}) say {reach} positions, fewer than "
                f"max_position_embeddings ({self.max_position_embeddings}): make that smaller, or the base larger."
            )
        if self.position_embedding_type not in ("learned", "low_rank"):
            return  # which have no table to begin in, and read no offset
        if self.position_max_offset >= self.max_position_embeddings:
            raise ValueError(
                f"position_max_offset ({self.position_max_offset}) leaves nothing of max_position_embeddings "
                f"({self.max_position_embeddings})."
            )

    def _validate_head(self):
        if self.lm_head_type == "multiplicative":
            if self.loss_sparsity is None:
                raise ValueError("lm_head_type='multiplicative' wants loss_sparsity, the number of modules.")
            if self.vocab_size % self.loss_sparsity:
                more = -self.vocab_size % self.loss_sparsity
                raise ValueError(
                    f"vocab_size ({self.vocab_size}) must be a multiple of loss_sparsity ({self.loss_sparsity}): make "
                    f"it {self.vocab_size + more}, with {more} ids to spare."
                )
        elif self.loss_sparsity is not None or self.lm_head_sparse_probability is not None:
            raise ValueError("loss_sparsity and lm_head_sparse_probability want lm_head_type='multiplicative'.")
        if (self.lm_head_type == "low_rank") != (self.lm_head_rank is not None):
            raise ValueError("lm_head_type='low_rank' wants lm_head_rank, its inner width, and no other type does.")
        if not self.lm_head_bias and (self.lm_head_type == "low_rank" or self.lm_head_sparse_probability is not None):
            raise ValueError("lm_head_bias=False is not to be had with low rank or lm_head_sparse_probability.")
        if self.tie_word_embeddings and self.lm_head_type not in ("dense", "einsum"):
            raise ValueError(f"tie_word_embeddings wants lm_head_type='dense', not {self.lm_head_type!r}.")


__all__ = ["SPARSE_ACTIVATIONS", "SparseLayersConfig"]
