"""
Checkpoints of the original TUPE code, to this package and back.

The original saves a fairseq dictionary whose `model` entry is a state dict with a packed in-projection
(`self_attn.in_proj_weight`); its branch for the large model keeps q, k and v apart. Both layouts are read, and an
encoder alone (no `decoder.sentence_encoder.` in front) as well. From the command line:

    python -m hf_efficient.models.tupe.convert_tupe --checkpoint checkpoint_best.pt --output_dir tupe-base
"""

import argparse
import logging
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...utils.conversion import load_original
from .configuration_tupe import TupeConfig
from .convert_config_tupe import (
    CLASSIFICATION_PREFIX,
    ENCODER_PREFIX,
    config_fields,
    infer_config,
    unknown_fields,
)
from .modeling_tupe import TupeForMaskedLM, TupeForSequenceClassification, TupeModel


logger = logging.getLogger(__name__)

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
# Declared in the large branch, and fed nothing.
_UNUSED = ("segment_embeddings.",)


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
    """The model that a checkpoint was saved from, with its weights: classifier, masked LM, or encoder alone."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of the original TUPE code into a folder for from_pretrained."
    )
    parser.add_argument("--checkpoint", required=True, help="original checkpoint: fairseq .pt, or .safetensors")
    parser.add_argument("--output_dir", required=True, help="folder to write config.json and model.safetensors to")
    parser.add_argument(
        "--num_attention_heads", type=int, help="needed for TUPE-A if the checkpoint does not hold its arguments"
    )
    parser.add_argument(
        "--relative_attention_max_distance", type=int, help="distances from here on share a bucket (TUPE-R)"
    )
    parser.add_argument("--tie_cls", action="store_true", help="the checkpoint is of the ablation with tied [CLS]")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to save beside the model; the original has none")
    arguments = parser.parse_args()
    original, training_arguments = load_original(arguments.checkpoint)
    overrides: dict[str, Any] = {"untie_cls": not arguments.tie_cls}
    if arguments.relative_attention_max_distance is not None:
        overrides["relative_attention_max_distance"] = arguments.relative_attention_max_distance
    config = infer_config(original, arguments.num_attention_heads, training_arguments, **overrides)
    model = build_model(original, config)
    model.save_pretrained(arguments.output_dir)
    print(f"Wrote {type(model).__name__} with {model.num_parameters():,} parameters to {arguments.output_dir}.")
    unknown = unknown_fields(config, {**config_fields(training_arguments), **overrides})
    print(f"The checkpoint does not tell these, set to the paper's values: {', '.join(unknown)}.")
    if not arguments.tie_cls:
        print("Nor does it tell whether [CLS] is untied, as in the paper; if it is not, give --tie_cls.")
    if arguments.tokenizer is None:
        print("No tokenizer was saved; the original's is fastBPE on Moses tokens. Give one with --tokenizer.")
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
