"""
Checkpoints of the original MC-BERT code, to this package and back.

Read are checkpoints of pretraining, with the meta-controller or with that code's ELECTRA baseline, and of fine-tuning.
Their encoder is the network of transformers' `RobertaModel` (with no token types, so one row of zeros stands for them).
From the command line:

    python -m hf_efficient.objectives.convert_mcbert --checkpoint checkpoint_best.pt --output_dir mcbert-base
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from ..utils.conversion import load_original
from .convert_config_mcbert import checkpoint_kind, infer_config, unknown_fields
from .convert_names_mcbert import (
    BACKBONE,
    BIAS,
    CLASSIFICATION,
    CONTROLLER,
    GENERATOR,
    HEAD,
    HEADS,
    TOKEN_TYPES,
    convert_encoder,
    inverse,
    restore_encoder,
    with_aliases,
    without_aliases,
)
from .meta_controller import MetaControllerObjective
from .replaced_token import ReplacedTokenObjective


_SMALL = {
    f"{CONTROLLER}sentence_encoder.": "controller.network.",
    f"{GENERATOR}sentence_encoder.": "generator.network.",
}
# The phase that training is in, and notes on rare words: the original has neither.
_OURS_ALONE = ("detector_on", "detector_steps", "notes.")


def _stacks(config: PreTrainedConfig) -> dict[str, str]:
    """The original's prefixes of encoders -> those of the objective or the classifier."""
    return {BACKBONE: "encoder." if hasattr(config, "encoder_config") else "roberta.", **_SMALL}


def _split(state_dict: dict[str, Tensor], prefixes: dict[str, str]):
    """Tensors of each encoder, by the prefix and the name inside it, and all others."""
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
    The inverse of [`convert_state_dict`], to the bit for what it gives. A row of token types that was trained since is
    added to those of the positions, which gives the same network.

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
    The model that a checkpoint was saved from, with its weights, in float32.

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


def _save(model: PreTrainedModel, tokenizer_folder: str | None, folder: Path) -> None:
    """The folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        ready = Path(staging) / "model"
        model.save_pretrained(ready)
        if tokenizer_folder is not None:
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(ready)
        ready.replace(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of the original MC-BERT code (or its ELECTRA) into a folder for "
        "from_pretrained: of pretraining the encoder, of fine-tuning the classifier."
    )
    parser.add_argument("--checkpoint", required=True, help="original checkpoint: fairseq .pt, or .safetensors")
    parser.add_argument("--output_dir", required=True, help="new folder for config.json and model.safetensors")
    parser.add_argument(
        "--num_attention_heads", type=int, help="of the encoder; needed if the file does not hold its arguments"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="of pretraining, write the whole objective with controller or generator and heads, to train on; without "
        "it the encoder alone, which AutoModel and AutoModelForSequenceClassification load",
    )
    parser.add_argument("--tokenizer", help="folder of a tokenizer to save beside the model; the original has none")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--output_dir {folder} exists and is not empty; name a new folder.")
    try:
        original, training_arguments = load_original(arguments.checkpoint)
        config = infer_config(original, arguments.num_attention_heads, training_arguments)
        model = build_model(original, config, arguments.whole)
        _save(model, arguments.tokenizer, folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Wrote {type(model).__name__} with {model.num_parameters():,} parameters to {folder}.")
    unknown = unknown_fields(config, training_arguments)
    print(f"The checkpoint does not tell these, set as the original's defaults have them: {', '.join(unknown)}.")
    if model.config.num_labels == 1 and isinstance(model, RobertaForSequenceClassification):
        print("It has one output, so it is a regression; the original divides STS-B's scores by 5.")
    if arguments.tokenizer is None:
        print("No tokenizer was saved; the original's is fastBPE on Moses tokens. Give one with --tokenizer.")


if __name__ == "__main__":
    main()
