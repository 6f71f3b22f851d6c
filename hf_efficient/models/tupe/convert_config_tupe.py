"""The configuration that a checkpoint of the original TUPE code tells, and what it leaves open."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .configuration_tupe import TupeConfig


ENCODER_PREFIX = "decoder.sentence_encoder."
CLASSIFICATION_PREFIX = "classification_heads.sentence_classification_head."
# Arguments of the original's training command that shapes do not tell, and our fields.
_ARGUMENTS = {
    "encoder_attention_heads": "num_attention_heads",
    "max_rel_pos": "relative_attention_max_distance",
    "attn_scale_factor": "attention_scale_factor",
    "activation_fn": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation_dropout": "activation_dropout",
    "pooler_dropout": "classifier_dropout",
    "pooler_activation_fn": "pooler_activation",
}
_ACTIVATIONS = {"gelu_accurate": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def config_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of the original's training command that tell what shapes do not, as fields of [`TupeConfig`]."""
    fields = {ours: arguments[name] for name, ours in _ARGUMENTS.items() if arguments.get(name) is not None}
    for name in {"hidden_act", "pooler_activation"} & fields.keys():
        fields[name] = _ACTIVATIONS.get(fields[name], fields[name])
    return fields


def infer_config(
    original: dict[str, Tensor],
    num_attention_heads: int | None = None,
    arguments: dict[str, Any] | None = None,
    **overrides,
) -> TupeConfig:
    """
    The configuration that a checkpoint tells: by its shapes, and by the arguments that it was trained with.

    Args:
        original (`dict[str, Tensor]`): an original state dict.
        num_attention_heads (`int`, *optional*): needed for TUPE-A without arguments; TUPE-R's relative table has a
            column a head.
        arguments (`dict[str, Any]`, *optional*): the arguments of the training command, as
            [`~hf_efficient.utils.conversion.load_original`] gives
            them.
        overrides: fields of [`TupeConfig`], in place of what the checkpoint tells or does not (`untie_cls`, special
            ids).

    Raises:
        ValueError: if the number of heads cannot be known, or the checkpoint is of another model.
    """
    encoder = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in original.items()}
    lacking = [name for name in ("embed_tokens.weight", "pos.weight", "layers.0.fc1.weight") if name not in encoder]
    if lacking:
        raise ValueError(f"No TUPE checkpoint: it lacks {', '.join(lacking)}. Its tensors: {_few(original)}.")
    relative = encoder.get("relative_attention_bias.weight")
    told = config_fields(arguments or {})
    heads_told = told.pop("num_attention_heads", None)
    num_attention_heads = num_attention_heads or heads_told
    if num_attention_heads is None:
        if relative is None:
            raise ValueError("A TUPE-A checkpoint does not tell its number of heads: give --num_attention_heads.")
        num_attention_heads = relative.shape[1]
    vocab_size, hidden_size = encoder["embed_tokens.weight"].shape
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in encoder if name.startswith("layers.")),
        "num_attention_heads": num_attention_heads,
        "intermediate_size": encoder["layers.0.fc1.weight"].shape[0],
        "max_position_embeddings": encoder["pos.weight"].shape[0] - 1,
        "relative_attention": relative is not None,
        "embedding_norm": "emb_layer_norm.weight" in encoder,
        "normalize_before": "emb_out_layer_norm.weight" in encoder,
        "mask_token_id": vocab_size - 1,
    }
    if relative is not None:
        fields["relative_attention_num_buckets"] = relative.shape[0] - 1
    out_proj = original.get(f"{CLASSIFICATION_PREFIX}out_proj.weight")
    if out_proj is not None:
        fields["num_labels"] = out_proj.shape[0]
    return TupeConfig(**{**fields, **told, **overrides})


def unknown_fields(config: TupeConfig, told: dict[str, Any]) -> list[str]:
    """Fields that neither shapes nor arguments nor the command line told, with the values that they got."""
    names = [name for name in _ARGUMENTS.values() if name not in told and name != "num_attention_heads"]
    if not config.relative_attention and "relative_attention_max_distance" in names:
        names.remove("relative_attention_max_distance")
    names += ["pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"]
    return [f"{name} {getattr(config, name)}" for name in names]
