"""Tiny models of each family, of odd sizes, and inputs for them; what tests over families take as a parameter."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hf_efficient import auto


@dataclass(frozen=True)
class TinyFamily:
    """
    Config fields of a family's tiny models.

    Args:
        name (`str`): the family's `model_type`, or what tells one of its two kinds of model.
        sizes (`dict`): fields of all its models, without dropout.
        variants (`dict`): fields of each kind of model, by name.
        first_id (`int`, defaults to 0): the smallest token id that inputs hold.
        cls_token_id (`int`, *optional*): the id that every row begins with.
        dtype (`torch.dtype`, defaults to `torch.float64`): of its models, where a test asks for no other.
        spread (`float`, defaults to 0.35): standard deviation of the weights.
        trunk (`str`, defaults to `"Model"`): how the class without a head ends.
        model_type (`str`, defaults to `name`): of its configs.
    """

    name: str
    sizes: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    first_id: int = 0
    cls_token_id: int | None = None
    dtype: torch.dtype = torch.float64
    spread: float = 0.35
    trunk: str = "Model"
    model_type: str = ""

    @property
    def family(self) -> auto.Family:
        return auto.FAMILIES[self.model_type or self.name]

    def head(self, kind: str) -> type:
        """The model class whose name ends in `kind`: `"Model"`, `"ForCausalLM"` and so on."""
        return self.family.load(self.family.config.removesuffix("Config") + kind)

    @property
    def causal_lm(self) -> type:
        return self.head("ForCausalLM")

    def make_config(self, **fields: Any):
        return self.family.load(self.family.config)(**{**self.sizes, **fields})

    def make_model(self, cls: type | None = None, attention: str | None = None, dtype=None, **fields: Any):
        """A model in evaluation mode, without a head by default. All weights are drawn anew and large, so that no part
        of the model is too small to be seen in its output."""
        torch.manual_seed(0)
        cls = cls or self.head(self.trunk)
        model = cls._from_config(self.make_config(**fields), attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm.weight" in name or "alpha" in name else 0.0, self.spread)
        return model.to(dtype or self.dtype)

    def make_ids(self, batch: int, length: int, vocab_size: int | None = None) -> torch.Tensor:
        """The same ids for the same sizes, `(batch, length)`."""
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        sizes = (batch, length)
        ids = torch.randint(self.first_id, vocab_size or self.sizes["vocab_size"], sizes, generator=generator)
        if self.cls_token_id is not None:
            ids[:, 0] = self.cls_token_id
        return ids


SRUPP = TinyFamily(
    "srupp",
    sizes={
        "vocab_size": 41,
        "hidden_size": 18,
        "projection_size": 10,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
    variants={
        "all-attend": {},
        "one-head": {"num_attention_heads": 1},
        "last-attends": {"attention_layers": [-1]},
        "first-attends": {"attention_layers": [0]},
        "sru": {"projection_size": 0, "attention_layers": []},
        "sru-projected": {"attention_layers": [], "attention_layer_norm": False, "has_skip_term": False},
        "post-norm": {"layer_norm": True, "normalize_after": True, "rescale": True},
        "inner-pre-norm": {"attention_normalize_after": False, "embedding_size": 14, "recurrence_activation": "tanh"},
        "tied-no-peephole": {"tie_word_embeddings": True, "use_peephole": False, "project_input": True},
    },
    first_id=3,
)

FF = {"ff_sparsity": 5, "ff_rank": 3}
QKV = {"attention_type": "multiplicative_conv", "attention_sparsity": 6}
SPARSE_LOSS = {"lm_head_type": "multiplicative", "loss_sparsity": 3}
ALL_SPARSE = {**FF, **QKV, "ff_sru_layers": 1, **SPARSE_LOSS}
SCALING_TRANSFORMER = TinyFamily(
    "scaling_transformer",
    sizes={
        "vocab_size": 42,
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 70,
        "dropout": 0.0,
        "activation_dropout": 0.0,
    },
    variants={
        "dense": {},
        "ff": FF,
        "ff-options": {**FF, "ff_multiply_by_controller": True, "ff_inner_bias": True, "hidden_act": "gelu"},
        "qkv": {**QKV, "layer_norm_center": False},
        "all-sru": {**FF, **QKV, "ff_sru_layers": 2, "ff_sru_units": 5, **SPARSE_LOSS},
        "by-module-conv-fixed-base": {
            **FF,
            **QKV,
            "attention_value_input": "by_module",
            "attention_output": "conv",
            "position_embedding_type": "fixed_base",
            "lm_head_type": "multiplicative",
            "loss_sparsity": 7,
            "lm_head_sparse_probability": 0.5,
        },
        "concatenated-shared-qk": {
            **QKV,
            "attention_value_input": "concatenated",
            "attention_share_qk": True,
            "attention_output": "multiplicative_conv",
            "attention_window": 4,
            "attention_kernel_width": 5,
            "position_embedding_type": "low_rank",
            "position_rank": 7,
        },
        "multiplicative-low-rank": {
            "attention_type": "multiplicative",
            "attention_sparsity": 8,
            "position_embedding_type": "none",
            "lm_head_type": "low_rank",
            "lm_head_rank": 5,
        },
        "modular-sru": {
            "attention_type": "multiplicative_modular",
            "attention_sparsity": 3,
            "ff_sru_layers": 1,
            "ff_sru_units": 7,
            "tie_word_embeddings": True,
        },
        "window-1": {**QKV, "attention_window": 1, "attention_output": "conv", "num_attention_heads": 1},
    },
)

TUPE = TinyFamily(
    "tupe",
    sizes={
        "vocab_size": 40,
        "hidden_size": 15,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 21,
        "max_position_embeddings": 70,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
    },
    variants={
        "tupe-r": {},
        "tupe-a-prenorm": {"relative_attention": False, "normalize_before": True},
        "tied-cls-no-embedding-norm": {"untie_cls": False, "embedding_norm": False},
    },
    first_id=3,
    cls_token_id=0,
    dtype=torch.float32,
    spread=0.3,
)

CROSS = {"decoder_type": "cross_attention", "attentions_per_layer": 1}
FIXED_BASE = {"position_embedding_type": "fixed_base"}
TERRAFORMER = TinyFamily(
    "terraformer",
    sizes={
        "vocab_size": 42,
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 70,
        "dropout": 0.0,
        "activation_dropout": 0.0,
    },
    variants={
        "dense": {},
        "all-sru": {**FF, **QKV, "ff_sru_layers": 2, "ff_sru_units": 5, **SPARSE_LOSS},
        "average-one-swap": {**QKV, "encoder_keeps_streams": False, "encoder_swaps": 1, "attentions_per_layer": 1},
        "half-width": {**QKV, "half_width_layers": 1, "num_decoder_layers": 3, "position_embedding_type": "low_rank"},
        "double-width": {"double_width_after": 0, "stream_output": "concatenate", **SPARSE_LOSS},
        "forgetting": {**FF, "forget_every": 1, "num_encoder_layers": 3, "num_decoder_layers": 4, "ff_sru_layers": 1},
        "cross": {**CROSS, "tie_word_embeddings": True},
        "cross-sparse": {
            **CROSS,
            **FF,
            **QKV,
            "cross_query_type": "multiplicative_conv",
            "cross_query_sparsity": 6,
            "cross_output_type": "multiplicative_conv",
            "cross_output_sparsity": 3,
            **SPARSE_LOSS,
        },
        "cross-none-sru": {**CROSS, "cross_query_type": "none", "cross_output_type": "none", "ff_sru_layers": 1},
    },
)
TERRAFORMER_LM = TinyFamily(
    "terraformer_lm",
    sizes={**TERRAFORMER.sizes, "is_encoder_decoder": False, "num_encoder_layers": 0, "eos_token_id": None},
    variants={
        "reformer": {"attentions_per_layer": 1, "stream_output": "concatenate"},
        "all-sru": {**FF, **QKV, "ff_sru_layers": 2, "ff_sru_units": 5, **SPARSE_LOSS},
        "forgetting-double": {**QKV, "forget_every": 1, "num_decoder_layers": 4, "double_width_after": 1, **FIXED_BASE},
    },
    trunk="CausalModel",
    model_type="terraformer",
)

CAUSAL = (SRUPP, SCALING_TRANSFORMER, TERRAFORMER_LM)
FAMILIES = {family.name: family for family in (*CAUSAL, TUPE, TERRAFORMER)}


def subjects(kinds: dict[str, dict[str, Any]]) -> list:
    """Parameters of a test over families, `(family, what stands in kinds)` each: `{"srupp": {"label": ...}, ...}`."""
    return [
        pytest.param(FAMILIES[name], kind, id="-".join(filter(None, (name, label))))
        for name, by_label in kinds.items()
        for label, kind in by_label.items()
    ]


CAUSAL_VARIANTS = subjects({family.name: family.variants for family in CAUSAL})
# A test with this runs for each kind of model of each causal family.
every_causal_variant = pytest.mark.parametrize(("family", "variant"), CAUSAL_VARIANTS)


def in_chunks(model, ids, lengths, cache, **inputs):
    """Logits of calls that each see one chunk and the cache."""
    logits = []
    for part in ids.split(lengths, 1):
        output = model(part, cache=cache, use_cache=True, **inputs)
        assert output.cache is cache
        logits.append(output.logits)
    return torch.cat(logits, 1)


PADS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "inside": [[1, 0, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}


def assert_rows(model, output, ids, mask):
    """Real positions of each row are those of the row alone, without padding."""
    for row in range(len(ids)):
        alone = model(ids[row : row + 1, mask[row]]).last_hidden_state[0]
        torch.testing.assert_close(output[row, mask[row]], alone, atol=1e-10, rtol=1e-10)
