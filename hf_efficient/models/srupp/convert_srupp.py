"""
Checkpoints of the original SRU and SRU++ code, to this package and back.

Read are the state dicts of the language models of its experiments, of `SRU` (2 and 3) and `SRUpp` alone, of one cell,
and of one attention module. From the command line:

    python -m hf_efficient.models.srupp.convert_srupp --checkpoint base.pt --preset enwik8-base --output_dir enwik8-base
"""

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...utils.conversion import load_original
from .configuration_srupp import PRESETS, SruppConfig
from .convert_adaptive_srupp import convert_adaptive, restore_adaptive
from .convert_config_srupp import LAYER, check_config, infer_config, is_language_model, unknown_fields
from .convert_layers_srupp import convert_layer, convert_transform, restore_layer, restore_transform
from .modeling_srupp import SruppForCausalLM, SruppModel


# Original name -> ours, at both ends of the character LM and of a stack.
_ENDS = {
    "embedding_layer.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "output_layer.bias": "lm_head.bias",
    "rnn.input_to_hidden.weight": "model.input_proj.weight",
    "input_to_hidden.weight": "input_proj.weight",
}
_OUR_LAYER = re.compile(r"(model\.)?layers\.(\d+)\.(.+)")


def _by_layer(state_dict: dict[str, Tensor], pattern: re.Pattern, config: SruppConfig):
    """Tensors of the layers, by what stands in front and by index, and all others."""
    layers: dict[tuple[bool, int], dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        match = pattern.fullmatch(name)
        if match is None:
            others[name] = tensor
            continue
        if int(match[2]) >= config.num_hidden_layers:
            raise ValueError(f"There is a tensor {name}, but num_hidden_layers is {config.num_hidden_layers}.")
        layers.setdefault((match[1] is not None, int(match[2])), {})[match[3]] = tensor
    return layers, others


def convert_state_dict(original: dict[str, Tensor], config: SruppConfig) -> dict[str, Tensor]:
    """
    Rename and reorder the tensors of an original checkpoint.

    Args:
        original (`dict[str, Tensor]`): state dict of a language model, of `SRU` (2 and 3) or `SRUpp`, of one cell, or
            of one attention module.
        config ([`SruppConfig`]): of the model; for a cell or a module that of a model whose layer 0 it is.

    Returns:
        `dict[str, Tensor]`: names of [`SruppForCausalLM`], of [`SruppModel`] without an embedding (a stack is fed by
        `inputs_embeds`), of `SruppLayer`, or of `SruppProjection`. The buffers `scale_x` are left out: they follow from
        `rescale` and `highway_bias`, and are compared with them.

    Raises:
        ValueError: a name that no such checkpoint has, or a tensor that does not fit the config.
    """
    if "linear1.weight" in original:
        return convert_transform(original, config, 0)
    if "weight_c" in original:
        return convert_layer(original, config, 0)
    layers, others = _by_layer(original, LAYER, config)
    converted = {_ENDS[name]: others.pop(name) for name in _ENDS if name in others}
    for (inside, index), tensors in layers.items():
        prefix = f"{'model.' if inside else ''}layers.{index}."
        converted |= {prefix + name: tensor for name, tensor in convert_layer(tensors, config, index).items()}
    return converted | convert_adaptive(others, config)


def restore_state_dict(state_dict: dict[str, Tensor], config: SruppConfig, sru_2: bool = False) -> dict[str, Tensor]:
    """
    The inverse of [`convert_state_dict`], to the bit; of gradients by name as well.

    Args:
        state_dict (`dict[str, Tensor]`): names of one of this package's SRU++ models, layers or projections.
        config ([`SruppConfig`]): its configuration. A layer of two linear maps gets SRU's names, not those of an SRU++
            without attention, if no layer attends, there is no `attention_layer_norm` and `projection_dropout` is 0.
        sru_2 (`bool`, defaults to `False`): write layers as SRU 2 has them, with transposed matrices.

    Raises:
        ValueError: a name that the original has no place for (a classifier; the embedding of a bare stack).
    """
    if "down_proj.weight" in state_dict:
        return restore_transform(state_dict, config, 0)
    if any(name.startswith("projection.") for name in state_dict):
        return restore_layer(state_dict, config, 0, sru_2)
    layers, others = _by_layer(state_dict, _OUR_LAYER, config)
    restored = {original: others.pop(ours) for original, ours in _ENDS.items() if ours in others}
    for (inside, index), tensors in layers.items():
        prefix = f"{'rnn.' if inside else ''}rnn_lst.{index}."
        layer = restore_layer(tensors, config, index, sru_2)
        restored |= {prefix + name: tensor for name, tensor in layer.items()}
    return restored | restore_adaptive(others, config)


def build_model(original: dict[str, Tensor], config: SruppConfig) -> PreTrainedModel:
    """
    The model that a checkpoint was saved from, with its weights, in float32: [`SruppForCausalLM`] or, for a stack or a
    cell, [`SruppModel`], whose embedding is new then: feed `inputs_embeds`.

    Raises:
        ValueError: if the checkpoint does not fit the config.
    """
    check_config(original, config)
    state_dict = convert_state_dict(original, config)
    if "weight_c" in original:
        state_dict = {f"layers.0.{name}": tensor for name, tensor in state_dict.items()}
    model = SruppForCausalLM(config) if is_language_model(original) else SruppModel(config)
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    if isinstance(model, SruppModel):
        missing = [name for name in missing if not name.startswith("embed_tokens.")]
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}."
        )
    return model.eval()


def _overrides(assignments: list[str]) -> dict[str, Any]:
    """`["dropout=0.1", "rescale=true"]` as fields of a config; values are JSON, or else text."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name not in SruppConfig.__dataclass_fields__:
            raise ValueError(f"--set {assignment}: write NAME=VALUE with a field of SruppConfig.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _load_tokenizer(folder: str, config: SruppConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} ids, the checkpoint {config.vocab_size}: it is of another "
            "text. The original's ids are ranks among all bytes of the text, training and held-out parts together."
        )
    return tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """The folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        whole = Path(staging) / "model"
        model.save_pretrained(whole)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        whole.replace(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of the original SRU or SRU++ code into a folder for from_pretrained."
    )
    parser.add_argument("--checkpoint", required=True, help="original checkpoint: state dict as .pt or .safetensors")
    parser.add_argument("--output_dir", required=True, help="new folder for config.json, model.safetensors, tokenizer")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="published model that the checkpoint is of; without it, tensors tell the config",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="fields of SruppConfig that tensors do not tell, as num_attention_heads=2 dropout=0.1",
    )
    parser.add_argument(
        "--tokenizer",
        help="folder of a tokenizer to save beside the model; for the character models make it from their text: "
        "python -m hf_efficient.data.byte_tokenizer --text enwik8 --output_dir enwik8-tokenizer",
    )
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--output_dir {folder} exists and is not empty; name a new folder.")
    try:
        overrides = _overrides(arguments.set)
        original, _ = load_original(arguments.checkpoint)
        config = (
            SruppConfig.preset(arguments.preset, **overrides)
            if arguments.preset
            else infer_config(original, **overrides)
        )
        model = build_model(original, config)
        tokenizer = None if arguments.tokenizer is None else _load_tokenizer(arguments.tokenizer, config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    _save(model, tokenizer, folder)
    print(f"Wrote {type(model).__name__} with {model.num_parameters():,} parameters to {folder}.")
    source = f"as in the preset {arguments.preset}" if arguments.preset else "as by default"
    unknown = [text for text in unknown_fields(original, config) if text.split()[0] not in overrides]
    print(f"The checkpoint does not tell these, set {source}; change them with --set: {', '.join(unknown)}.")
    if tokenizer is None and is_language_model(original):
        print("No tokenizer was saved, and no checkpoint holds one; generating text needs one: see --tokenizer.")


if __name__ == "__main__":
    main()
