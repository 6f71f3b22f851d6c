"""
Conversion of checkpoints of the original MC-BERT code to this package and back.

It reads checkpoints of pretraining, with the meta-controller or with that code's ELECTRA baseline, and of fine-tuning.
Their encoder is the network of transformers' `RobertaModel`; for its token types, which the original does not have, one
row of zeros is added.
From the command line:

    python -m hf_efficient.objectives.convert_mcbert --checkpoint checkpoint_best.pt --output_dir mcbert-base
"""

import argparse
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from ..utils.conversion import Converter
from ..utils.process import errors_in_one_line
from .meta_controller import MetaControllerObjective, MetaControllerObjectiveConfig
from .replaced_token import ReplacedTokenObjective, ReplacedTokenObjectiveConfig


BACKBONE = "decoder.sentence_encoder."
CONTROLLER, GENERATOR = "mc.", "generator."
CLASSIFICATION = "classification_heads."
# Original name -> ours, outside of the encoders.
HEADS = {
    f"{CONTROLLER}sentence_encoder.embed_linear": "controller.projection",
    f"{CONTROLLER}lm_head.dense": "controller.dense",
    f"{CONTROLLER}lm_head.layer_norm": "controller.norm",
    f"{GENERATOR}sentence_encoder.embed_linear": "generator.projection",
    f"{GENERATOR}lm_head.dense": "generator.dense",
    f"{GENERATOR}lm_head.layer_norm": "generator.norm",
    f"{GENERATOR}lm_head": "generator",
    "decoder.lm_head.layer_norm": "norm",
}
HEAD = "decoder.lm_head.dense"  # the transform of the K-way scores, or with one row the whole ELECTRA head
BIAS = "decoder.lm_head.bias.weight"  # (vocabulary, 1)
TABLE = f"{BACKBONE}embed_tokens.weight"
# Original name -> ours, within an encoder and within one of its layers.
_ENCODER = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "emb_layer_norm": "embeddings.LayerNorm",
}
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_PACKED = "self_attn.in_proj_"
_SPLIT = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
TOKEN_TYPES, POSITIONS = "embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)\.(\w+)")
_OUR_LAYER_NAME = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(\w+)")
_SMALL = {
    f"{CONTROLLER}sentence_encoder.": "controller.network.",
    f"{GENERATOR}sentence_encoder.": "generator.network.",
}
# The stage that training is in, and notes on rare words, which the original does not have.
_OURS_ALONE = ("discriminator_on", "discriminator_steps", "notes.")
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
    GENERATOR: {"loss_lamda": "discriminator_weight"},
}
# Arguments of networks that no transformers model has: by name, RobertaModel's value and the meaning of others.
_FIXED = {
    "encoder_normalize_before": (False, "norms before attention and feed-forward, without a last one"),
    "pooler_activation_fn": ("tanh", "another activation in the classifier"),
    "activation_dropout": (0.0, "dropout inside the feed-forward part"),
}


def inverse(table: dict[str, str]) -> dict[str, str]:
    """Swap the two sides of a table of names."""
    return {ours: original for original, ours in table.items()}


def convert_encoder(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename the tensors of one encoder to those of a `RobertaModel`; `where` is its prefix, for messages."""
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _LAYER_NAME.fullmatch(name)
        module, _, leaf = name.rpartition(".")
        if _PACKED in name:
            if tensor.shape[0] % 3:
                raise ValueError(f"{where}{name} has {tensor.shape[0]} rows, which are not those of three projections.")
            parts = {name.replace(_PACKED, part): chunk for part, chunk in zip(_SPLIT, tensor.chunk(3), strict=True)}
            converted |= convert_encoder({part: chunk.clone() for part, chunk in parts.items()}, where)
        elif layer is not None and layer[2] in _LAYER:
            converted[f"encoder.layer.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}"] = tensor
        elif module in _ENCODER:
            converted[f"{_ENCODER[module]}.{leaf}"] = tensor
        else:
            raise ValueError(f"{where}{name} is no tensor of an MC-BERT checkpoint. Is this one of another model?")
    return converted


def restore_encoder(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse of [`convert_encoder`]."""
    ends, layers = inverse(_ENCODER), inverse(_LAYER)
    tensors, restored = dict(tensors), {}
    types = tensors.pop(TOKEN_TYPES, None)
    if types is not None and types.any():
        if types.shape[0] != 1:
            raise ValueError(f"{where}{TOKEN_TYPES} has {types.shape[0]} token types; the original knows none.")
        # Every token has the one type, so its row may as well stand in the rows of the positions.
        tensors[POSITIONS] = tensors[POSITIONS] + types
    for name, tensor in tensors.items():
        layer = _OUR_LAYER_NAME.fullmatch(name)
        module, _, leaf = name.rpartition(".")
        if layer is not None and layer[2] in layers:
            restored[f"layers.{layer[1]}.{layers[layer[2]]}.{layer[3]}"] = tensor
        elif module in ends:
            restored[f"{ends[module]}.{leaf}"] = tensor
        else:
            raise ValueError(f"{where}{name} has no place in an original MC-BERT checkpoint.")
    for query in [name for name in restored if _SPLIT[0] in name]:
        parts = [restored.pop(query.replace(_SPLIT[0], part)) for part in _SPLIT]
        restored[query.replace(_SPLIT[0], _PACKED)] = torch.cat(parts)
    return restored


def _alias_of(name: str) -> str:
    """Return the one name under which a tensor is read that the original saves under several."""
    name = name.replace("discriminator.", "decoder.", 1) if name.startswith("discriminator.") else name
    if name == f"{CONTROLLER}lm_head.bias":
        return BIAS
    if name == "decoder.lm_head.embed_tokens.weight":
        return TABLE
    for small in (CONTROLLER, GENERATOR):
        if name in (f"{small}sentence_encoder.embed_tokens.weight", f"{small}lm_head.weight"):
            return TABLE
        name = name.replace(f"{small}lm_head.share_emb_pro.", f"{small}sentence_encoder.embed_linear.")
    return name


def with_aliases(restored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add to an original state dict the tensors that the original's modules save under a second name."""
    names: dict[str, str] = {}
    for small in (CONTROLLER, GENERATOR):
        linear = f"{small}sentence_encoder.embed_linear."
        if f"{linear}weight" in restored:
            names |= {f"{small}{name}": TABLE for name in ("sentence_encoder.embed_tokens.weight", "lm_head.weight")}
            names |= {f"{small}lm_head.share_emb_pro.{leaf}": linear + leaf for leaf in ("weight", "bias")}
    if BIAS in restored:
        names["decoder.lm_head.embed_tokens.weight"] = TABLE
    if f"{CONTROLLER}lm_head.dense.weight" in restored:
        names[f"{CONTROLLER}lm_head.bias"] = BIAS
    if f"{HEAD}.weight" in restored and restored[f"{HEAD}.weight"].shape[0] == 1:
        names |= {
            name.replace("decoder.", "discriminator.", 1): name for name in restored if name.startswith("decoder.")
        }
    return {**restored, **{name: restored[source] for name, source in names.items()}}


def without_aliases(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Remove the tensors that are saved under a second name; the inverse of [`with_aliases`].

    Raises:
        ValueError: if the tensors under two such names are not the same.
    """
    unique = {name: tensor for name, tensor in original.items() if _alias_of(name) == name}
    for name, tensor in original.items():
        source = _alias_of(name)
        if not torch.equal(unique.setdefault(source, tensor), tensor):
            raise ValueError(f"{name} differs from {source}; in the original both are one tensor.")
    return unique


def checkpoint_kind(original: dict[str, Tensor]) -> str:
    """
    Tell what a checkpoint is of, by the prefix of its tensors.

    Returns:
        `str`: `"mc."` or `"generator."` for pretraining, `"classification_heads."` for fine-tuning, `""` for an encoder
        alone.

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
    Infer the configuration of a checkpoint from its shapes and from the arguments that it was trained with.

    Args:
        original (`dict[str, Tensor]`): an original state dict.
        num_attention_heads (`int`, *optional*): of the encoder; no shape tells it, so it is needed without arguments.
        arguments (`dict[str, Any]`, *optional*): the arguments of the training command, as
            [`~hf_efficient.utils.conversion.load_original`] gives them.
        overrides: fields of the encoder's `RobertaConfig`, in place of those that are inferred.

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
        raise ValueError("The checkpoint does not tell its number of heads: give --set num_attention_heads=N.")
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


def unknown_fields(config: PreTrainedConfig, arguments: dict[str, Any], overrides: Collection[str] = ()) -> list[str]:
    """List the fields that neither tensors, arguments nor `overrides` tell, with the values that they have."""
    told = {ours for name, ours in _ARGUMENTS.items() if arguments.get(name) is not None}
    encoder = getattr(config, "encoder_config", None) or config.to_dict()
    names = [name for name in _ARGUMENTS.values() if name not in told and name != "num_attention_heads"]
    names += ["layer_norm_eps", "bos_token_id", "pad_token_id", "eos_token_id"]
    unknown = [f"{name} {encoder[name]}" for name in names if name not in overrides]
    if "encoder_normalize_before" not in arguments:
        unknown.append("that norms stand after attention and feed-forward")
    return unknown


def _stacks(config: PreTrainedConfig) -> dict[str, str]:
    """Map the original's prefixes of encoders to those of the objective or the classifier."""
    return {BACKBONE: "encoder." if hasattr(config, "encoder_config") else "roberta.", **_SMALL}


def _split(state_dict: dict[str, Tensor], prefixes: dict[str, str]):
    """Split a state dict into the tensors of each encoder, by prefix and name inside it, and all others."""
    encoders: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None or name.rpartition(".")[0] in HEADS:
            others[name] = tensor
        else:
            encoders.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    return encoders, others


def convert_state_dict(original: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """
    Rename and split the tensors of an original checkpoint.

    Args:
        original (`dict[str, Tensor]`): of pretraining with the meta-controller (`mc.…`) or as ELECTRA (`generator.…`),
            or of fine-tuning (`classification_heads.…`). A tensor may be there under one of its names or under all.
        config (`PreTrainedConfig`): [`MetaControllerObjectiveConfig`], [`ReplacedTokenObjectiveConfig`], or a
            `RobertaConfig`; see [`infer_config`].

    Returns:
        `dict[str, Tensor]`: names of the objective or of `RobertaForSequenceClassification`. The latter has no place
        for the head of pretraining, which the original keeps and does not use: it stays under the objective's names.

    Raises:
        ValueError: a name that no such checkpoint has, or a tensor that does not fit.
    """
    stacks = _stacks(config)
    encoders, others = _split(without_aliases(original), stacks)
    hidden = (getattr(config, "encoder_config", None) or config.to_dict())["hidden_size"]
    converted: dict[str, Tensor] = {}
    for prefix, tensors in encoders.items():
        positions = tensors.get("embed_positions.weight")
        if prefix == BACKBONE and positions is not None and positions.shape[1] != hidden:
            raise ValueError(f"The checkpoint's encoder is {positions.shape[1]} wide; the config says {hidden}.")
        renamed = convert_encoder(tensors, prefix)
        if positions is not None:
            renamed[TOKEN_TYPES] = positions.new_zeros(1, positions.shape[1])
        converted |= {stacks[prefix] + name: tensor for name, tensor in renamed.items()}
    heads = {name.split(".")[1] for name in others if name.startswith(CLASSIFICATION)}
    if len(heads) > 1:
        raise ValueError(f"The checkpoint has several classifiers ({', '.join(sorted(heads))}): keep one of them.")
    for name, tensor in others.items():
        module, _, leaf = name.rpartition(".")
        if name == BIAS:
            converted["bias"] = tensor.squeeze(-1)
        elif module == HEAD:
            is_electra = tensor.shape[0] == 1 and "decoder.lm_head.layer_norm.weight" not in others
            converted[f"{'discriminator' if is_electra else 'dense'}.{leaf}"] = tensor
        elif module in HEADS:
            converted[f"{HEADS[module]}.{leaf}"] = tensor
        elif name.startswith(CLASSIFICATION):
            converted[f"classifier.{name.split('.', 2)[2]}"] = tensor
        else:
            raise ValueError(f"{name} is no tensor of an MC-BERT checkpoint. Is this a checkpoint of another model?")
    return converted


def restore_state_dict(
    state_dict: dict[str, Tensor],
    config: PreTrainedConfig,
    aliases: bool = False,
    head_name: str = "sentence_classification_head",
) -> dict[str, Tensor]:
    """
    Invert [`convert_state_dict`], to the bit.

    A row of token types that was trained since is added to those of the positions, which gives the same network.

    Args:
        state_dict (`dict[str, Tensor]`): of an objective on a `RobertaModel` of one token type, or of a
            `RobertaForSequenceClassification`.
        config (`PreTrainedConfig`): its configuration.
        aliases (`bool`, defaults to `False`): write shared tensors under all of their names, as the original's own
            files have them (safetensors files can't).
        head_name (`str`): the original's name of the classifier.

    Raises:
        ValueError: a name that the original has no place for (a discriminator's hidden layer, say).
    """
    heads = {**inverse(HEADS), "dense": HEAD, "discriminator": HEAD}
    originals = inverse(_stacks(config))
    encoders, others = _split(state_dict, originals)
    restored: dict[str, Tensor] = {}
    for prefix, tensors in encoders.items():
        names = restore_encoder(tensors, prefix)
        restored |= {originals[prefix] + name: tensor for name, tensor in names.items()}
    for name, tensor in others.items():
        module, _, leaf = name.rpartition(".")
        if name.startswith(_OURS_ALONE):
            continue
        if name == "bias":
            restored[BIAS] = tensor.unsqueeze(-1)
        elif name.startswith("classifier."):
            restored[name.replace("classifier.", f"{CLASSIFICATION}{head_name}.", 1)] = tensor
        elif module not in heads or (module == "dense" and "discriminator.weight" in others):
            raise ValueError(f"{name} has no place in an original MC-BERT checkpoint.")
        else:
            restored[f"{heads[module]}.{leaf}"] = tensor
    return with_aliases(restored) if aliases else restored


def build_model(original: dict[str, Tensor], config: PreTrainedConfig, whole: bool = False) -> PreTrainedModel:
    """
    Build the model that a checkpoint was saved from, with its weights, in float32.

    Args:
        original (`dict[str, Tensor]`): an original state dict.
        config (`PreTrainedConfig`): see [`infer_config`].
        whole (`bool`, defaults to `False`): of pretraining, the whole objective, to train on; else its encoder alone,
            which is what fine-tuning takes.

    Returns:
        `PreTrainedModel`: `RobertaForSequenceClassification`, `RobertaModel`, or the objective.

    Raises:
        ValueError: if the checkpoint does not fit the config.
    """
    kind, prefix = checkpoint_kind(original), "encoder." if hasattr(config, "encoder_config") else "roberta."
    state_dict = convert_state_dict(original, config)
    model: PreTrainedModel
    roberta: Any = getattr(config, "encoder_config", None)
    roberta = config if roberta is None else RobertaConfig(**roberta)
    if kind == CLASSIFICATION:
        model = RobertaForSequenceClassification(roberta)
        state_dict = {name: state_dict[name] for name in state_dict if name.startswith((prefix, "classifier."))}
    elif whole and kind:
        objective: Any = MetaControllerObjective if kind == CONTROLLER else ReplacedTokenObjective
        model = objective(config)
    else:
        model = RobertaModel(roberta, add_pooling_layer=False)
        encoder = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in encoder.items()}
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    theirs = {name: tensor.shape for name, tensor in state_dict.items()}
    wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if wrong:
        few = [f"{name} {list(theirs.get(name, []))} for {list(own.get(name, []))}" for name in wrong[:4]]
        raise ValueError(
            f"The checkpoint does not fit {type(model).__name__}, in {len(wrong)} tensors: {'; '.join(few)}."
        )
    model.load_state_dict(state_dict, strict=False)
    return model.eval()


def _build(original: dict[str, Tensor], training_arguments: dict[str, Any], overrides: dict[str, Any], options):
    return build_model(original, infer_config(original, arguments=training_arguments, **overrides), options.whole)


def _remarks(model: PreTrainedModel, original, training_arguments: dict[str, Any], overrides: dict[str, Any], options):
    unknown = unknown_fields(model.config, training_arguments, overrides)
    yield f"The checkpoint does not tell these, set as the original's defaults have them: {', '.join(unknown)}."
    if model.config.num_labels == 1 and isinstance(model, RobertaForSequenceClassification):
        yield "It has one output, so it is a regression; the original divides STS-B's scores by 5."
    if options.tokenizer is None:
        yield "No tokenizer was saved; the original's is fastBPE on Moses tokens. Give one with --tokenizer."


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--whole",
        action="store_true",
        help="of pretraining, write the whole objective with controller or generator and heads, to train on; without "
        "it the encoder alone, which AutoModel and AutoModelForSequenceClassification load",
    )


CONVERTER = Converter(
    description="Convert a checkpoint of the original MC-BERT code (or its ELECTRA) into a folder for from_pretrained: "
    "of pretraining the encoder, of fine-tuning the classifier. A file without the arguments of its training "
    "needs --set num_attention_heads=N.",
    fields=RobertaConfig().to_dict(),
    build=_build,
    remarks=_remarks,
    add_options=_add_options,
)


if __name__ == "__main__":
    with errors_in_one_line():
        CONVERTER.run()
