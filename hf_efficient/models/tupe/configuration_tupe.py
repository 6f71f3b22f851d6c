"""Configuration of TUPE-BERT."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...utils.config_checks import LabelChecksMixin, check_activations, check_range, check_rates, check_token_ids
from ...utils.presets import PresetMixin


@strict
class TupeConfig(PresetMixin, LabelChecksMixin, PreTrainedConfig):
    r"""
    Configuration of a TUPE encoder: BERT with untied positional encoding (Ke, He, Liu, ICLR 2021, arXiv 2006.15595).

    The defaults are the paper's base model, TUPE-R with untied [CLS]; `TupeConfig.preset("large")` is the large one.
    Fields that BERT has too mean the same here. The paper's variants are

    | variant | `relative_attention` | `untie_cls` |
    | --- | --- | --- |
    | TUPE-R | `True` | `True` |
    | TUPE-A | `False` | `True` |
    | tied [CLS] (ablation) | either | `False` |

    Args:
        vocab_size (`int`, defaults to 32769): 32,768 units and the mask token, which the original appends.
        max_position_embeddings (`int`, defaults to 512): longest input. The position table holds one row more, since
            its first two rows stand for [CLS] (section 3.2 of the paper).
        relative_attention (`bool`, defaults to `True`): add T5's bucketed relative bias (TUPE-R).
        relative_attention_num_buckets (`int`, defaults to 32): a multiple of 4, at least 8; one bucket more holds
            "any token to [CLS]".
        relative_attention_max_distance (`int`, defaults to 128): distances from here on share a bucket.
        untie_cls (`bool`, defaults to `True`): give [CLS] its own positional logits, the same for all positions.
        embedding_norm (`bool`, defaults to `True`): LayerNorm after the token embeddings.
        normalize_before (`bool`, defaults to `False`): pre-norm layers and one final LayerNorm, in place of post-norm.
        attention_scale_factor (`int` or `float`, defaults to 2): both parts of a logit are scaled by
            `1 / sqrt(attention_scale_factor * head_dim)`.
        activation_dropout (`float`, defaults to 0.0): dropout inside the feed-forward block.
        classifier_dropout (`float`, *optional*, defaults to 0.1): dropout before the output layer of the classification
            heads.
        pooler_activation (`str`, defaults to `"tanh"`): activation of the sequence-classification head.
        cls_token_id (`int`, *optional*, defaults to 0): id that must stand at index 0 of every row, because position
            0 is [CLS]'s in TUPE. `None` switches the check of the input's layout off.

    Example:

    ```python
    >>> from hf_efficient import TupeConfig, TupeModel

    >>> base = TupeConfig()
    >>> large_without_relative_bias = TupeConfig.preset("large", relative_attention=False)
    >>> model = TupeModel(base)
    ```
    """

    model_type = "tupe"
    # Sizes of the paper's section 4.1.
    published_settings: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    }
    attribute_map = {
        "rel_pos": "relative_attention",
        "rel_pos_bins": "relative_attention_num_buckets",
        "max_rel_pos": "relative_attention_max_distance",
        "max_positions": "max_position_embeddings",
        "embedding_normalize": "embedding_norm",
        "attn_scale_factor": "attention_scale_factor",
    }

    vocab_size: int = 32769
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    activation_dropout: float | int = 0.0
    classifier_dropout: float | int | None = 0.1
    pooler_activation: str = "tanh"
    max_position_embeddings: int = 512
    relative_attention: bool = True
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    untie_cls: bool = True
    embedding_norm: bool = True
    normalize_before: bool = False
    attention_scale_factor: float | int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-5
    pad_token_id: int | None = 1
    cls_token_id: int | None = 0
    sep_token_id: int | None = 2
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self):
        """Check the fields against each other; called at construction and before saving."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        check_range(self, *sizes, "max_position_embeddings", least=1)
        check_range(self, "attention_scale_factor", above=0)
        check_range(self, "layer_norm_eps", "initializer_range", least=0)
        check_rates(self, "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout")
        check_rates(self, "classifier_dropout")
        check_activations(self, "hidden_act", "pooler_activation")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        buckets = self.relative_attention_num_buckets
        if buckets < 8 or buckets % 4 != 0:
            raise ValueError(
                f"relative_attention_num_buckets must be a multiple of 4 and at least 8, not {buckets}: a half "
                "serves each direction, and half of that the distances that have a bucket of their own."
            )
        if self.relative_attention_max_distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance ({self.relative_attention_max_distance}) must exceed the "
                f"{buckets // 4} distances that have a bucket of their own."
            )
        check_token_ids(self, "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


__all__ = ["TupeConfig"]
