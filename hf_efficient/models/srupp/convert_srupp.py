"""
Conversion of checkpoints of the original SRU and SRU++ code to this package and back.

It reads the state dicts of the language models of its experiments, of `SRU` (2 and 3) and `SRUpp` alone, of one cell,
and of one attention module. From the command line:

    python -m hf_efficient.models.srupp.convert_srupp --checkpoint base.pt --preset enwik8-base --output_dir enwik8-base

The original keeps the pre-activations of a unit beside each other: rows of a layer's last map go by direction, unit,
sub-matrix. Here they are planar: direction, sub-matrix, unit. Its one matrix for keys and values is two here. It shares
the tables of an adaptive embedding and softmax by storing them once, and keeps the rows for the logits of the rarer
clusters after the words of the first one.
"""

import argparse
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...modules.adaptive_softmax import cluster_sizes
from ...utils.conversion import Converter
from ...utils.process import errors_in_one_line
from .configuration_srupp import SruppConfig
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
# Transform modules: original name -> ours.
_NORM = {"layer_norm.weight": "norm.weight", "layer_norm.bias": "norm.bias"}
_TRANSFORMS = {
    "attention": {
        "linear1.weight": "down_proj.weight",
        "linear3.weight": "out_proj.weight",
        "alpha": "attention.alpha",
        **_NORM,
    },
    "projection": {"linear1.weight": "down_proj.weight", "linear2.weight": "out_proj.weight", **_NORM},
    "two linear maps": {"0.weight": "down_proj.weight", "1.weight": "out_proj.weight"},
    "one linear map": {"weight": "out_proj.weight"},
}
_KEYS_AND_VALUES = "linear2.weight"
_PREFIX, _OUR_PREFIX = "transform_module.", "projection."
ADAPTIVE = re.compile(r"(?:output_layer|embedding_layer)\.(out_layers|out_projs|emb_projs)\.(\d+)(?:\.(weight|bias))?")
_OUR_ADAPTIVE = re.compile(r"(model\.embed_tokens|lm_head)\.(tables|projections|biases)\.(\d+)(?:\.weight)?")
_CLUSTERS = {"weight": "lm_head.cluster_weight", "bias": "lm_head.cluster_bias"}
LAYER = re.compile(r"(rnn\.)?rnn_lst\.(\d+)\.(.+)")


def highway_scale(config: SruppConfig) -> float:
    """The original's buffer `scale_x`, which it has even where it is not used."""
    return math.sqrt(1.0 + 2.0 * math.exp(config.highway_bias)) if config.rescale and config.has_skip_term else 1.0


def swap_parts(weight: Tensor, config: SruppConfig, planar: bool) -> Tensor:
    """
    The rows of a last map, from the original's order to ours (`planar=True`) or back.

    Raises:
        ValueError: if they do not fit `config.hidden_size`.
    """
    directions, size = config.num_directions, config.hidden_size
    parts, left = divmod(weight.shape[0], size)
    if left or parts not in (3, 4):
        raise ValueError(
            f"A layer's last map has {weight.shape[0]} rows; hidden_size {size} (both directions together) needs 3 or "
            "4 times as many."
        )
    shape = (directions, size // directions, parts) if planar else (directions, parts, size // directions)
    return weight.unflatten(0, shape).transpose(1, 2).flatten(0, 2).contiguous()


def transform_kind(names: Iterable[str]) -> str:
    """Infer the kind of a transform module from the original names of its tensors."""
    names = set(names)
    if names & {"alpha", "linear3.weight"}:
        return "attention"
    if "linear1.weight" in names:
        return "projection"
    return "two linear maps" if "0.weight" in names else "one linear map"


def transform_ends(layer: dict[str, Tensor]) -> tuple[str, Tensor, Tensor]:
    """
    The kind of a cell's transform module, and its first and last matrix, which may be one.

    Raises:
        ValueError: if it has none.
    """
    transform = {name.removeprefix(_PREFIX): tensor for name, tensor in layer.items() if name.startswith(_PREFIX)}
    kind = transform_kind(transform)
    names = {ours: original for original, ours in _TRANSFORMS[kind].items()}
    last = names["out_proj.weight"]
    first = names.get("down_proj.weight", last)
    if first not in transform or last not in transform:
        raise ValueError(f"A layer lacks {_PREFIX}{first} or {last}; it has {', '.join(sorted(layer))}.")
    return kind, transform[first], transform[last]


def _expected_kind(config: SruppConfig, layer: int) -> str:
    if layer in config.attention_layer_indices:
        return "attention"
    if not config.projection_sizes[layer]:
        return "one linear map"
    # Only dropout tells SRU's two maps from an SRU++ without any attention or norm.
    plain = not config.attention_layer_indices and not config.attention_layer_norm and config.projection_dropout == 0.0
    return "two linear maps" if plain else "projection"


def _halves(config: SruppConfig) -> tuple[str, str]:
    """Places of the keys' and the values' half of the original's matrix. With one head the queries get the keys' half,
    transposed: see `SruppAttention`."""
    return f"attention.{'q' if config.num_attention_heads == 1 else 'k'}_proj.weight", "attention.v_proj.weight"


def _split_keys_and_values(weight: Tensor, config: SruppConfig, layer: int) -> dict[str, Tensor]:
    size = config.projection_sizes[layer]
    if weight.shape != (2 * size, size):
        raise ValueError(
            f"{_KEYS_AND_VALUES} of layer {layer} has shape {tuple(weight.shape)}; projection_size {size} needs "
            f"{(2 * size, size)}."
        )
    keys, values = weight.chunk(2)
    keys = keys.t() if config.num_attention_heads == 1 else keys
    return dict(zip(_halves(config), (keys.clone(memory_format=torch.contiguous_format), values.clone()), strict=True))


def convert_transform(tensors: dict[str, Tensor], config: SruppConfig, layer: int) -> dict[str, Tensor]:
    """
    A transform module of the original -> names of `SruppProjection`.

    Raises:
        ValueError: a layer of another kind than the config's, or a name that none has.
    """
    kind, expected = transform_kind(tensors), _expected_kind(config, layer)
    if kind != expected and {kind, expected} != {"two linear maps", "projection"}:
        raise ValueError(
            f"Layer {layer} of the checkpoint has {kind}, that of the config {expected}. Set attention_layers (now "
            f"{config.attention_layer_indices}) and projection_size (now {config.projection_size}) as in training."
        )
    names = _TRANSFORMS[kind]
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "attention" and name == _KEYS_AND_VALUES:
            converted |= _split_keys_and_values(tensor, config, layer)
        elif name not in names:
            raise ValueError(f"{name} of layer {layer} is no tensor of an SRU or SRU++ layer.")
        else:
            converted[names[name]] = swap_parts(tensor, config, True) if names[name] == "out_proj.weight" else tensor
    return converted


def restore_transform(tensors: dict[str, Tensor], config: SruppConfig, layer: int) -> dict[str, Tensor]:
    """
    The inverse of [`convert_transform`].

    Raises:
        ValueError: a name that the original has no place for.
    """
    names = {ours: original for original, ours in _TRANSFORMS[_expected_kind(config, layer)].items()}
    restored = {}
    if layer in config.attention_layer_indices:
        keys, values = (tensors[name] for name in _halves(config))
        keys = keys.t() if config.num_attention_heads == 1 else keys
        restored[_KEYS_AND_VALUES] = torch.cat([keys, values])
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _halves(config)}
    for name, tensor in tensors.items():
        if name not in names:
            raise ValueError(f"{_OUR_PREFIX}{name} of layer {layer} has no place in an original checkpoint.")
        restored[names[name]] = swap_parts(tensor, config, False) if name == "out_proj.weight" else tensor
    return restored


def modern_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A cell of SRU 2, whose matrices are transposed, with the names of SRU 3; others as they are."""
    if "weight" not in tensors:
        return tensors
    maps = {"weight_proj": "0.weight", "weight": "1.weight"} if "weight_proj" in tensors else {"weight": "weight"}
    return {
        (_PREFIX + maps[name] if name in maps else name): (tensor.t().contiguous() if name in maps else tensor)
        for name, tensor in tensors.items()
    }


def _old_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    maps = {f"{_PREFIX}0.weight": "weight_proj", f"{_PREFIX}1.weight": "weight", f"{_PREFIX}weight": "weight"}
    return {
        maps.get(name, name): tensor.t().contiguous() if name in maps else tensor for name, tensor in tensors.items()
    }


def _check_scale(scale: Tensor, config: SruppConfig) -> None:
    expected = highway_scale(config)
    if (scale.double() - expected).abs().max() > torch.finfo(scale.dtype).eps * expected:
        raise ValueError(
            f"The checkpoint scales the highway by {scale.flatten()[0].item():.7g}, but rescale={config.rescale} with "
            f"highway_bias={config.highway_bias} gives {expected:.7g}. Set both as they were in training."
        )


def convert_layer(tensors: dict[str, Tensor], config: SruppConfig, layer: int) -> dict[str, Tensor]:
    """
    A cell of the original, of SRU 2 too -> names of `SruppLayer`.

    Raises:
        ValueError: if it does not fit the config, or is none.
    """
    tensors = modern_layer(tensors)
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("weight_c", "bias"):
            if tensor.shape != (2 * config.hidden_size,):
                raise ValueError(
                    f"{name} of layer {layer} has shape {tuple(tensor.shape)}; hidden_size {config.hidden_size} (both "
                    f"directions together) needs {(2 * config.hidden_size,)}."
                )
            converted[name] = tensor.view(2, -1)
        elif name == "scale_x":
            _check_scale(tensor, config)
        elif name.startswith("layer_norm."):
            converted[name.removeprefix("layer_")] = tensor
        elif not name.startswith(_PREFIX):
            raise ValueError(f"{name} of layer {layer} is no tensor of an SRU or SRU++ layer.")
    if not config.use_peephole and "weight_c" in tensors and tensors["weight_c"].any():
        raise ValueError(f"use_peephole is False, but weight_c of layer {layer} is not zero: set use_peephole=True.")
    transform = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    transform = convert_transform(transform, config, layer)
    return converted | {_OUR_PREFIX + name: tensor for name, tensor in transform.items()}


def restore_layer(tensors: dict[str, Tensor], config: SruppConfig, layer: int, sru_2: bool) -> dict[str, Tensor]:
    """
    The inverse of [`convert_layer`]; `sru_2` writes the layout of SRU 2.

    Raises:
        ValueError: a name that the original has no place for.
    """
    restored: dict[str, Tensor] = {}
    transform: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ("weight_c", "bias"):
            restored[name] = tensor.reshape(-1)
            restored["scale_x"] = tensor.new_full((1,), highway_scale(config))
        elif name.startswith("norm."):
            restored[f"layer_{name}"] = tensor
        elif name.startswith(_OUR_PREFIX):
            transform[name.removeprefix(_OUR_PREFIX)] = tensor
        else:
            raise ValueError(f"{name} of layer {layer} has no place in an original checkpoint.")
    transform = restore_transform(transform, config, layer)
    restored |= {_PREFIX + name: tensor for name, tensor in transform.items()}
    return _old_layer(restored) if sru_2 else restored


def convert_adaptive(original: dict[str, Tensor], config: SruppConfig) -> dict[str, Tensor]:
    """
    An adaptive embedding and softmax of the original -> names of [`SruppForCausalLM`]; tied tables under both names.

    Raises:
        ValueError: a name that the config has no place for, or a tensor that does not fit it.
    """
    converted: dict[str, Tensor] = {}
    edges = [0, *(config.adaptive_cutoffs or []), config.vocab_size]
    for name, tensor in original.items():
        match = ADAPTIVE.fullmatch(name)
        if match is None or config.adaptive_cutoffs is None or int(match[2]) + 1 >= len(edges):
            raise ValueError(f"{name} has no place in an SRU++ with adaptive_cutoffs {config.adaptive_cutoffs}.")
        part, cluster, leaf = match[1], int(match[2]), match[3]
        if part != "out_layers":
            module = "lm_head" if part == "out_projs" else "model.embed_tokens"
            converted[f"{module}.projections.{cluster}.weight"] = tensor
            continue
        words = edges[cluster + 1] - edges[cluster]
        extra = len(config.adaptive_cutoffs) if cluster == 0 else 0
        if tensor.shape[0] != words + extra:
            raise ValueError(
                f"{name} has {tensor.shape[0]} rows; adaptive_cutoffs {config.adaptive_cutoffs} and vocab_size "
                f"{config.vocab_size} need {words + extra}."
            )
        tensor, rest = tensor.split([words, extra])
        if cluster == 0:
            converted[_CLUSTERS[leaf]] = rest.clone()
        if leaf == "bias":
            converted[f"lm_head.biases.{cluster}"] = tensor.clone()
        else:
            converted[f"model.embed_tokens.tables.{cluster}.weight"] = tensor.clone()
            converted[f"lm_head.tables.{cluster}.weight"] = tensor.clone()
    if config.tie_adaptive_projections:
        for name, tensor in converted.items():
            tied = converted.get(name.replace("lm_head.projections.", "model.embed_tokens.projections."))
            if tied is not None and not torch.equal(tensor, tied):
                raise ValueError(f"{name} differs from the embedding's: set tie_adaptive_projections=False.")
    return converted


def restore_adaptive(state_dict: dict[str, Tensor], config: SruppConfig) -> dict[str, Tensor]:
    """
    The inverse of [`convert_adaptive`]; of two tied tensors, one is enough.

    Raises:
        ValueError: a name that the original has no place for.
    """
    restored: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        match = _OUR_ADAPTIVE.fullmatch(name)
        if match is None:
            if name in _CLUSTERS.values():
                continue
            raise ValueError(f"{name} has no place in an original SRU or SRU++ checkpoint.")
        module, part, cluster = match[1], match[2], match[3]
        if part == "projections":
            projections = [f"output_layer.out_projs.{cluster}", f"embedding_layer.emb_projs.{cluster}"]
            for index, original in enumerate(projections):
                if config.tie_adaptive_projections or index == (module != "lm_head"):
                    restored[original] = tensor
            continue
        leaf = "weight" if part == "tables" else "bias"
        parts = [tensor, state_dict[_CLUSTERS[leaf]]] if cluster == "0" else [tensor]
        restored[f"output_layer.out_layers.{cluster}.{leaf}"] = torch.cat(parts)
    return restored


def original_layers(original: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """
    The cells of a state dict, in their order and with the names of SRU 3.

    Raises:
        ValueError: if it has none.
    """
    if "weight_c" in original:
        return [modern_layer(original)]
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in original.items():
        match = LAYER.fullmatch(name)
        if match is not None:
            layers.setdefault(int(match[2]), {})[match[3]] = tensor
    if not layers:
        few = ", ".join(sorted(original)[:3])
        raise ValueError(f"No SRU or SRU++ checkpoint: it has no layers (rnn_lst.0.…). Its first tensors: {few}.")
    return [modern_layer(layers[index]) for index in sorted(layers)]


def _layer_fields(layers: list[dict[str, Tensor]], normalize_after: bool) -> dict[str, Any]:
    hidden = layers[0]["bias"].numel() // 2
    kinds, firsts, lasts = zip(*map(transform_ends, layers), strict=True)
    sizes = [0 if kind == "one linear map" else first.shape[0] for kind, first in zip(kinds, firsts, strict=True)]
    inputs, rows = firsts[0].shape[1], lasts[0].shape[0]
    is_sru = not {"attention", "projection"} & set(kinds)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "embedding_size": inputs,
        "num_hidden_layers": len(layers),
        "projection_size": sizes[0] if len(set(sizes)) == 1 else sizes,
        "attention_layers": [index for index, kind in enumerate(kinds) if kind == "attention"],
        "attention_layer_norm": any("transform_module.layer_norm.weight" in layer for layer in layers),
        "projection_dropout": 0.0 if is_sru else None,
        "layer_norm": "layer_norm.weight" in layers[0],
        "normalize_after": normalize_after,
        "use_peephole": any(bool(layer["weight_c"].any()) for layer in layers if "weight_c" in layer),
        "has_skip_term": inputs == hidden or rows == 4 * hidden,
        "highway_bias": 0.0 if is_sru else -2.0,
    }
    norm = layers[0].get("layer_norm.weight")
    if norm is not None and inputs != hidden:
        fields["normalize_after"] = norm.numel() == hidden
    scale = layers[0]["scale_x"].double().item() if "scale_x" in layers[0] else 1.0
    if scale != 1.0:
        bias = math.log((scale * scale - 1.0) / 2.0)
        short = round(bias, 5)  # the number that people write, if float32 stores the same value for it
        fields |= {"rescale": True, "highway_bias": short if abs(short - bias) < 2e-6 else bias}
    return fields


def _adaptive_fields(original: dict[str, Tensor]) -> dict[str, Any]:
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in original.items():
        match = ADAPTIVE.fullmatch(name)
        if match is not None and match[3] != "bias":
            parts.setdefault(match[1], {})[int(match[2])] = tensor
    tables = [parts["out_layers"][cluster] for cluster in sorted(parts["out_layers"])]
    counts = [table.shape[0] for table in tables]
    counts[0] -= len(tables) - 1
    edges = [sum(counts[: cluster + 1]) for cluster in range(len(counts))]
    widths = [table.shape[1] for table in tables]
    divisor = widths[0] // widths[1] if len(widths) > 1 else 0
    if not divisor or widths != [widths[0] // divisor**cluster for cluster in range(len(widths))]:
        raise ValueError(f"No SRU++ word model: its clusters have vectors of {widths}, not divided by one number.")
    head, embedding = parts.get("out_projs", {}), parts.get("emb_projs", {})
    return {
        "vocab_size": edges[-1],
        "adaptive_cutoffs": edges[:-1],
        "adaptive_embedding_size": widths[0],
        "adaptive_divisor": divisor,
        "tie_word_embeddings": True,
        "tie_adaptive_projections": all(torch.equal(head[i], embedding[i]) for i in head.keys() & embedding.keys()),
    }


def is_language_model(original: dict[str, Tensor]) -> bool:
    """Return whether a state dict is that of a language model of the original's experiments."""
    return any(name.startswith("output_layer.") for name in original)


def infer_config(original: dict[str, Tensor], **overrides) -> SruppConfig:
    """
    Infer the configuration of a checkpoint from its shapes, its names and the values that are constants.

    Args:
        original (`dict[str, Tensor]`): state dict of a language model, a stack or a cell of the original.
        overrides: fields of [`SruppConfig`] that take precedence over the checkpoint, or that it does not record; see
            [`unknown_fields`].

    Raises:
        ValueError: if the checkpoint is of another model.
    """
    layers = original_layers(original)
    fields = _layer_fields(layers, normalize_after="weight_c" in original)
    bare = {name.removeprefix("rnn."): tensor for name, tensor in original.items()}
    if "input_to_hidden.weight" in bare:
        fields |= {"project_input": True, "embedding_size": bare["input_to_hidden.weight"].shape[1]}
    if "output_layer.weight" in original:
        fields["vocab_size"] = original["output_layer.weight"].shape[0]
    elif is_language_model(original):
        fields |= _adaptive_fields(original)
    return SruppConfig(**{**fields, **overrides})


def _facts(config: SruppConfig, language_model: bool) -> dict[str, Any]:
    """Properties of a checkpoint's tensors that follow from a config."""
    names = [
        "hidden_size",
        "num_hidden_layers",
        "embedding_size",
        "projection_sizes",
        "attention_layer_indices",
        "layer_norm",
    ]
    facts = {name: getattr(config, name) for name in names}
    facts["attention_layer_norm"] = config.attention_layer_norm and any(config.projection_sizes)
    facts["project_input"] = config.project_input and config.embedding_size != config.hidden_size
    if language_model:
        facts["vocab_size"] = config.vocab_size
        facts["adaptive_cutoffs"] = config.adaptive_cutoffs
    if language_model and config.adaptive_cutoffs is not None:
        facts["clusters (words, vector size)"] = cluster_sizes(config)
        facts["tie_adaptive_projections"] = config.tie_adaptive_projections
    return facts


def check_config(original: dict[str, Tensor], config: SruppConfig) -> None:
    """
    Raises:
        ValueError: if the tensors of a checkpoint tell something else than the config says, with all that differs.
    """
    language_model = is_language_model(original)
    told = _facts(infer_config(original), language_model)
    said = _facts(config, language_model)
    wrong = [f"{name} {value} (config: {said.get(name)})" for name, value in told.items() if value != said.get(name)]
    if wrong:
        raise ValueError(f"The checkpoint does not fit the config. It has {'; '.join(wrong)}.")


def unknown_fields(original: dict[str, Tensor], config: SruppConfig) -> list[str]:
    """Fields that a checkpoint's tensors do not tell, with the values that they have."""
    names = ["num_attention_heads"] if config.attention_layer_indices else []
    if not is_language_model(original):
        names += ["bidirectional", "is_causal"]
    if config.input_sizes[0] == config.hidden_size:
        names += ["has_skip_term"] + (["normalize_after"] if config.layer_norm else [])
    if not config.rescale:
        names.append("highway_bias")
    names += ["recurrence_activation", "dropout", "projection_dropout", "attention_dropout", "embedding_dropout"]
    return [f"{name} {getattr(config, name)}" for name in names]


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
    Build the model that a checkpoint was saved from, with its weights in float32: [`SruppForCausalLM`] or, for a stack
    or a cell, [`SruppModel`]. The latter's embedding is newly initialised, so pass `inputs_embeds`.

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


def _build(original: dict[str, Tensor], training_arguments, overrides: dict[str, Any], options) -> PreTrainedModel:
    if options.preset is not None:
        return build_model(original, SruppConfig.preset(options.preset, **overrides))
    return build_model(original, infer_config(original, **overrides))


def _remarks(model: PreTrainedModel, original: dict[str, Tensor], training_arguments, overrides, options):
    source = f"as in the preset {options.preset}" if options.preset else "as by default"
    unknown = [text for text in unknown_fields(original, model.config) if text.split()[0] not in overrides]
    yield f"The checkpoint does not tell these, set {source}; change them with --set: {', '.join(unknown)}."
    if options.tokenizer is None and is_language_model(original):
        yield "No tokenizer was saved, and no checkpoint holds one; generating text needs one: see --tokenizer."


def _load_tokenizer(folder: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of exactly the checkpoint's text: its ids are ranks among that text's bytes or words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"The tokenizer in {folder} has {len(tokenizer)} ids, the checkpoint {vocab_size}: it is of another text. "
            "The original's ids are ranks among all bytes of the text, training and held-out parts together."
        )
    return tokenizer


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=SruppConfig.presets(),
        help="published model that the checkpoint is of; without it, tensors tell the config",
    )


CONVERTER = Converter(
    description="Convert a checkpoint of the original SRU or SRU++ code into a folder for from_pretrained.",
    fields=SruppConfig.__dataclass_fields__,
    build=_build,
    remarks=_remarks,
    add_options=_add_preset,
    load_tokenizer=_load_tokenizer,
    tokenizer_help="for the character models make it from their text: python -m hf_efficient.data.byte_tokenizer "
    "--text enwik8 --output_dir enwik8-tokenizer",
)


if __name__ == "__main__":
    with errors_in_one_line():
        CONVERTER.run()
