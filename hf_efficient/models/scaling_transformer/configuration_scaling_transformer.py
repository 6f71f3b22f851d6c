"""Configuration of the Scaling Transformer."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ...modules.sparse_config import SparseLayersConfig


_SPARSE_FF = {"ff_sparsity": 64}
_SPARSE_QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 16}
_SPARSE_LOSS = {"lm_head_type": "multiplicative", "loss_sparsity": 4}
_WIDE = {"hidden_size": 9216, "num_attention_heads": 96}

# Widths, sparsities and ranks of arXiv 2111.12763 and its code, as decoder-only models.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "24x1024-dense": {},
    "24x1024-ff": {**_SPARSE_FF, "ff_rank": 64},
    "24x1024-qkv": {**_SPARSE_QKV, "intermediate_size": 6144},
    "24x1024-ff-qkv": {**_SPARSE_FF, "ff_rank": 96, **_SPARSE_QKV, "intermediate_size": 6144},
    "24x1024-all": {**_SPARSE_FF, "ff_rank": 96, **_SPARSE_QKV, "intermediate_size": 6144, **_SPARSE_LOSS},
    "15x9216-dense": {**_WIDE, "num_hidden_layers": 15, "intermediate_size": 40960},
    "14x9216-all": {
        **_WIDE,
        "num_hidden_layers": 14,
        "intermediate_size": 65536,
        "ff_sparsity": 256,
        "ff_rank": 32,
        "attention_type": "multiplicative_conv",
        "attention_sparsity": 64,
        **_SPARSE_LOSS,
    },
}


@strict
class ScalingTransformerConfig(SparseLayersConfig):
    r"""
    Configuration of the Scaling Transformer (Jaszczur et al., "Sparse is Enough in Scaling Transformers", NeurIPS 2021,
    arXiv 2111.12763), as a causal language model.

    Feed-forward, attention and output layer are each dense or sparse, so that the dense twin of a model is one more
    config. The defaults are the dense model of 24 layers of width 1024; [`ScalingTransformerConfig.preset`] gives its
    sparse kinds and those of width 9216, named by their shape.

    Args:
        is_causal (`bool`, defaults to `True`): there is no other kind; for transformers' functions, which ask.

    The other fields are those of [`~hf_efficient.modules.sparse_config.SparseLayersConfig`].

    Example:

    ```python
    >>> from hf_efficient import ScalingTransformerConfig, ScalingTransformerForCausalLM

    >>> config = ScalingTransformerConfig.preset("24x1024-all", num_hidden_layers=2)
    >>> model = ScalingTransformerForCausalLM(config)
    ```
    """

    model_type = "scaling_transformer"
    published_settings: ClassVar[dict[str, dict[str, Any]]] = _PUBLISHED
    attribute_map = {"d_model": "hidden_size", "d_ff": "intermediate_size", "n_layers": "num_hidden_layers"}

    is_causal: bool = True

    @property
    def layer_types(self) -> list[str]:
        """Kinds of cache that the layers want: keys, values and a state (`hybrid`), or no state."""
        return ["hybrid" if self.state_size else "full_attention"] * self.num_hidden_layers

    def validate_architecture(self):
        """Check the fields against each other; called at construction and before saving."""
        super().validate_architecture()
        if not self.is_causal:
            raise ValueError("is_causal must be True: the Scaling Transformer is a causal language model.")


__all__ = ["ScalingTransformerConfig"]
