"""
Conversion of checkpoints of the original TUPE code to this package and back.

The original saves a fairseq dictionary whose `model` entry is a state dict with a packed in-projection
(`self_attn.in_proj_weight`); its branch for the large model keeps q, k and v apart. Both layouts are read, and an
encoder alone (no `decoder.sentence_encoder.` in front) as well. From the command line:

    python -m hf_efficient.models.tupe.convert_tupe --checkpoint checkpoint_best.pt --output_dir tupe-base
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...utils.conversion import Converter
from ...utils.process import errors_in_one_line
from .configuration_tupe import TupeConfig
from .modeling_tupe import TupeForMaskedLM, TupeForSequenceClassification, TupeModel


logger = logging.getLogger(__name__)

ENCODER_PREFIX = "decoder.sentence_encoder."
CLASSIFICATION_PREFIX = "classification_heads.sentence_classification_head."
# Arguments of the original's training command that the shapes do not tell -> fields of the config.
_TRAINING_ARGUMENTS = {
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
# Original name -> ours, within the encoder, within one of its layers, and for the heads.
_ENCODER = {
    "embed_tokens": "embed_tokens",
    "pos": "position_bias.position_embeddings",
    "pos_ln": "position_bias.norm",
    "pos_q_linear": "position_bias.query",
    "pos_k_linear": "position_bias.key",
    "relative_attention_bias": "position_bias.relative_attention_bias",
    "emb_layer_norm": "embed_norm",
    "emb_out_layer_norm": "final_norm",
}
_LAYER = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.out_proj",
    "self_attn_layer_norm": "self_attn_norm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "final_layer_norm": "mlp_norm",
}
_HEADS = {
    "decoder.lm_head": "lm_head.decoder",
    "decoder.lm_head.dense": "lm_head.dense",
    "decoder.lm_head.layer_norm": "lm_head.norm",
    f"{CLASSIFICATION_PREFIX}dense": "classifier.dense",
    f"{CLASSIFICATION_PREFIX}out_proj": "classifier.out_proj",
}
_PACKED = "self_attn.in_proj_"
_SPLIT = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
_LAYER_NAME = re.compile(r"(layers\.\d+\.)(.+)")
# Declared in the large branch, but never used.
_UNUSED = ("segment_embeddings.",)


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def config_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields of [`TupeConfig`] that the shapes do not tell, from the arguments of the original's training command."""
    fields = {ours: arguments[name] for name, ours in _TRAINING_ARGUMENTS.items() if arguments.get(name) is not None}
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
    Infer the configuration of a checkpoint from its shapes and from the arguments that it was trained with.

    Args:
        original (`dict[str, Tensor]`): an original state dict.
        num_attention_heads (`int`, *optional*): needed for TUPE-A without arguments; TUPE-R's relative table has a
            column a head.
        arguments (`dict[str, Any]`, *optional*): the arguments of the training command, as
            [`~hf_efficient.utils.conversion.load_original`] gives
            them.
        overrides: fields of [`TupeConfig`] that take precedence over the checkpoint, or that it does not record
            (`untie_cls`, special ids).

    Raises:
        ValueError: if the number of heads cannot be inferred, or the checkpoint is of another model.
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
            raise ValueError("A TUPE-A checkpoint does not tell its number of heads: give num_attention_heads.")
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
    names = [name for name in _TRAINING_ARGUMENTS.values() if name not in told and name != "num_attention_heads"]
    if not config.relative_attention and "relative_attention_max_distance" in names:
        names.remove("relative_attention_max_distance")
    names += ["pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"]
    return [f"{name} {getattr(config, name)}" for name in names]


def _rename(name: str, encoder: dict[str, str], layer: dict[str, str]) -> str | None:
    match = _LAYER_NAME.fullmatch(name)
    prefix, rest = match.groups() if match else ("", name)
    module, _, leaf = rest.rpartition(".")
    renamed = (layer if match else encoder).get(module)
    return f"{prefix}{renamed}.{leaf}" if renamed is not None else None


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {ours: original for original, ours in table.items()}


def convert_state_dict(original: dict[str, Tensor], config: TupeConfig) -> dict[str, Tensor]:
    """
    Rename and split the tensors of an original checkpoint.

    Args:
        original (`dict[str, Tensor]`): names of a full original model (`decoder.sentence_encoder.…`), or of its
            encoder alone.
        config ([`TupeConfig`]): the sizes that the tensors must have.

    Returns:
        `dict[str, Tensor]`: names of [`TupeForMaskedLM`] and [`TupeForSequenceClassification`] (`model.…`) or, for an
        encoder alone, of [`TupeModel`].

    Raises:
        ValueError: a name that no TUPE checkpoint has, or a packed projection that does not fit `config.hidden_size`.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in original.items():
        bare = name.removeprefix(ENCODER_PREFIX)
        prefix = "model." if bare != name else ""
        module, _, leaf = name.rpartition(".")
        if bare.startswith(_UNUSED):
            logger.info("%s is left out: the original declares it and feeds it nothing.", name)
        elif module in _HEADS:
            converted[f"{_HEADS[module]}.{leaf}"] = tensor
        elif _PACKED in bare:
            if tensor.shape[0] != 3 * config.hidden_size:
                raise ValueError(
                    f"{name} has {tensor.shape[0]} rows; hidden_size {config.hidden_size} needs 3 times as many."
                )
            for part, chunk in zip(_SPLIT, tensor.chunk(3), strict=True):
                converted[prefix + bare.replace(_PACKED, part)] = chunk.contiguous()
        else:
            renamed = _rename(bare, _ENCODER, _LAYER)
            if renamed is None:
                raise ValueError(f"{name} is no tensor of a TUPE checkpoint. Is this a checkpoint of another model?")
            converted[prefix + renamed] = tensor
    return converted


def restore_state_dict(
    state_dict: dict[str, Tensor], config: TupeConfig, separate_qkv: bool = False
) -> dict[str, Tensor]:
    """
    The inverse of [`convert_state_dict`].

    Args:
        state_dict (`dict[str, Tensor]`): names of one of this package's TUPE models.
        config ([`TupeConfig`]): its configuration.
        separate_qkv (`bool`, defaults to `False`): write q, k and v apart, as the large branch does, not packed.

    Raises:
        ValueError: a name that the original has no place for (a head that it does not have, say).
    """
    encoder, layer, heads = _inverse(_ENCODER), _inverse(_LAYER), _inverse(_HEADS)
    restored: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        bare = name.removeprefix("model.")
        prefix = ENCODER_PREFIX if bare != name else ""
        module, _, leaf = name.rpartition(".")
        if module in heads:
            restored[f"{heads[module]}.{leaf}"] = tensor
        elif not separate_qkv and any(part in bare for part in _SPLIT):
            if _SPLIT[0] in bare:
                parts = [state_dict[name.replace(_SPLIT[0], part)] for part in _SPLIT]
                restored[prefix + bare.replace(_SPLIT[0], _PACKED)] = torch.cat(parts)
        else:
            renamed = _rename(bare, encoder, layer)
            if renamed is None:
                raise ValueError(f"{name} has no place in an original TUPE checkpoint.")
            restored[prefix + renamed] = tensor
    return restored


def build_model(original: dict[str, Tensor], config: TupeConfig) -> PreTrainedModel:
    """Build the model that a checkpoint was saved from, with its weights: classifier, masked LM, or encoder alone."""
    model_class: type[PreTrainedModel]
    if any(name.startswith(CLASSIFICATION_PREFIX) for name in original):
        model_class, other_head = TupeForSequenceClassification, "lm_head."
    elif any(name.startswith("decoder.lm_head.") for name in original):
        model_class, other_head = TupeForMaskedLM, "classifier."
    else:
        model_class, other_head = TupeModel, "lm_head."
    state_dict = {
        name: tensor for name, tensor in convert_state_dict(original, config).items() if not name.startswith(other_head)
    }
    if model_class is TupeModel:
        state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    model = model_class(config)
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    missing = [name for name in missing if name not in model.all_tied_weights_keys]
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit {model_class.__name__}: missing {missing}, unexpected {unexpected}."
        )
    model.tie_weights()
    return model.eval()


def _build(original: dict[str, Tensor], training_arguments: dict[str, Any], overrides: dict[str, Any], options):
    return build_model(original, infer_config(original, arguments=training_arguments, **overrides))


def _remarks(model: PreTrainedModel, original, training_arguments: dict[str, Any], overrides: dict[str, Any], options):
    config: Any = model.config
    unknown = unknown_fields(config, {**config_fields(training_arguments), **overrides})
    yield f"The checkpoint does not tell these, set to the paper's values: {', '.join(unknown)}."
    if "untie_cls" not in overrides:
        yield "Nor does it tell whether [CLS] is untied, as in the paper; if it is not: --set untie_cls=false."
    if options.tokenizer is None:
        yield "No tokenizer was saved; the original's is fastBPE on Moses tokens. Give one with --tokenizer."


CONVERTER = Converter(
    description="Convert a checkpoint of the original TUPE code into a folder for from_pretrained. A TUPE-A checkpoint "
    "that does not hold the arguments of its training needs --set num_attention_heads=N.",
    fields=TupeConfig.__dataclass_fields__,
    build=_build,
    remarks=_remarks,
)


if __name__ == "__main__":
    with errors_in_one_line():
        CONVERTER.run()
