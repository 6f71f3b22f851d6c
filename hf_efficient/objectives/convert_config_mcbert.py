"""What a checkpoint of the original MC-BERT code holds: of which model it is, and its configuration."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, RobertaConfig

from .configuration_detector import MetaControllerObjectiveConfig, ReplacedTokenObjectiveConfig
from .convert_names_mcbert import BACKBONE, CLASSIFICATION, CONTROLLER, GENERATOR


# Arguments of the original's training command that tensors do not tell, and fields of RobertaConfig.
_ARGUMENTS = {
    "encoder_attention_heads": "num_attention_heads",
    "activation_fn": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pooler_dropout": "classifier_dropout",
}
_ACTIVATIONS = {"gelu_accurate": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
# The same for the objectives.
_OBJECTIVE_ARGUMENTS = {
    CONTROLLER: {"class_num": "num_candidates", "loss_lamda": "loss_weight"},
    GENERATOR: {"loss_lamda": "detector_weight"},
}
# What no transformers model of this network does: argument, the value that it has in RobertaModel, and what it says.
_FIXED = {
    "encoder_normalize_before": (False, "norms before attention and feed-forward, without a last one"),
    "pooler_activation_fn": ("tanh", "another activation in the classifier"),
    "activation_dropout": (0.0, "dropout inside the feed-forward part"),
}


def checkpoint_kind(original: dict[str, Tensor]) -> str:
    """
    `"mc."` or `"generator."` for pretraining, `"classification_heads."` for fine-tuning, `""` for an encoder alone.

    Raises:
        ValueError: if the checkpoint is of another model.
    """
    lacking = [name for name in ("embed_tokens", "embed_positions", "layers.0.fc1") if not _has(original, name)]
    if lacking:
        few = ", ".join(sorted(original)[:3])
        raise ValueError(f"No MC-BERT checkpoint: its encoder lacks {', '.join(lacking)}. Its first tensors: {few}.")
    kinds = [
        kind for kind in (CLASSIFICATION, CONTROLLER, GENERATOR) if any(name.startswith(kind) for name in original)
    ]
    return kinds[0] if kinds else ""


def _has(original: dict[str, Tensor], name: str) -> bool:
    return f"{BACKBONE}{name}.weight" in original


def _encoder_fields(original: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    vocab_size, hidden_size = original[f"{BACKBONE}embed_tokens.weight"].shape
    layers = {name.split(".")[3] for name in original if name.startswith(f"{BACKBONE}layers.")}
    told = {ours: arguments[name] for name, ours in _ARGUMENTS.items() if arguments.get(name) is not None}
    if "hidden_act" in told:
        told["hidden_act"] = _ACTIVATIONS.get(told["hidden_act"], told["hidden_act"])
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": original[f"{BACKBONE}layers.0.fc1.weight"].shape[0],
        "max_position_embeddings": original[f"{BACKBONE}embed_positions.weight"].shape[0],
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "classifier_dropout": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        **told,
    }


def infer_config(
    original: dict[str, Tensor],
    num_attention_heads: int | None = None,
    arguments: dict[str, Any] | None = None,
    **overrides,
) -> PreTrainedConfig:
    """
    The configuration that a checkpoint tells: by its shapes, and by the arguments that it was trained with.

    Args:
        original (`dict[str, Tensor]`): an original state dict.
        num_attention_heads (`int`, *optional*): of the encoder; no shape tells it, so it is needed without arguments.
        arguments (`dict[str, Any]`, *optional*): the arguments of the training command, as
            [`~hf_efficient.utils.conversion.load_original`] gives
            them.
        overrides: fields of the encoder's `RobertaConfig`, in place of what the checkpoint tells or does not.

    Returns:
        `PreTrainedConfig`: [`MetaControllerObjectiveConfig`] or [`ReplacedTokenObjectiveConfig`] for a checkpoint of
        pretraining, else the `RobertaConfig` of a classifier or an encoder.

    Raises:
        ValueError: if the number of heads is unknown, the checkpoint is of another model, or no model of transformers
            is the network that it was trained as.
    """
    kind, arguments = checkpoint_kind(original), arguments or {}
    for name, (value, meaning) in _FIXED.items():
        if arguments.get(name) not in (None, value):
            raise ValueError(f"{name} is {arguments[name]!r} ({meaning}): RobertaModel has no such network.")
    if not _has(original, "emb_layer_norm"):
        raise ValueError("The checkpoint has no norm of its embeddings (emb_layer_norm); RobertaModel always has one.")
    fields = _encoder_fields(original, arguments)
    if kind == CLASSIFICATION:
        fields["num_labels"] = next(
            tensor.shape[0] for name, tensor in original.items() if name.endswith(".out_proj.weight") and kind in name
        )
    heads = num_attention_heads or fields.get("num_attention_heads")
    if heads is None:
        raise ValueError("The checkpoint does not tell its number of heads: give --num_attention_heads.")
    encoder = RobertaConfig(**{**fields, "num_attention_heads": heads, **overrides})
    if kind not in _OBJECTIVE_ARGUMENTS:
        return encoder
    width = original[f"{kind}sentence_encoder.embed_linear.weight"].shape[0]
    told = {
        ours: arguments[name] for name, ours in _OBJECTIVE_ARGUMENTS[kind].items() if arguments.get(name) is not None
    }
    divider = encoder.hidden_size // width
    told |= {
        "encoder_config": encoder.to_dict(),
        "generator_divider": divider,
        "generator_num_attention_heads": max(1, heads // divider),  # the original divides them, whatever their size
    }
    if kind == GENERATOR:
        return ReplacedTokenObjectiveConfig.preset("mcbert_baseline", **told)
    return MetaControllerObjectiveConfig(nota_token_id=encoder.vocab_size - 1, **told)


def unknown_fields(config: PreTrainedConfig, arguments: dict[str, Any]) -> list[str]:
    """Fields that neither tensors nor arguments tell, with the values that they have."""
    told = {ours for name, ours in _ARGUMENTS.items() if arguments.get(name) is not None}
    encoder = getattr(config, "encoder_config", None) or config.to_dict()
    names = [name for name in _ARGUMENTS.values() if name not in told and name != "num_attention_heads"]
    names += ["layer_norm_eps", "bos_token_id", "pad_token_id", "eos_token_id"]
    unknown = [f"{name} {encoder[name]}" for name in names]
    if "encoder_normalize_before" not in arguments:
        unknown.append("that norms stand after attention and feed-forward")
    return unknown
