"""The configuration that a checkpoint of the original SRU and SRU++ code tells, and what it leaves open."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from ...modules.adaptive_softmax import cluster_sizes
from .configuration_srupp import SruppConfig
from .convert_adaptive_srupp import ADAPTIVE
from .convert_layers_srupp import modern_layer, transform_ends


LAYER = re.compile(r"(rnn\.)?rnn_lst\.(\d+)\.(.+)")


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
        short = round(bias, 5)  # what people write, as long as float32 does not tell it from what was stored
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
    """Whether a state dict is that of a language model of the original's experiments."""
    return any(name.startswith("output_layer.") for name in original)


def infer_config(original: dict[str, Tensor], **overrides) -> SruppConfig:
    """
    The configuration that a checkpoint tells: by its shapes, its names and the values that are constants.

    Args:
        original (`dict[str, Tensor]`): state dict of a language model, a stack or a cell of the original.
        overrides: fields of [`SruppConfig`], in place of what the checkpoint tells or does not: see
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
    """What a config says of the tensors of a checkpoint."""
    names = ["hidden_size", "num_hidden_layers", "embedding_size", "projection_sizes", "attending", "layer_norm"]
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
    names = ["num_attention_heads"] if config.attending else []
    if not is_language_model(original):
        names += ["bidirectional", "is_causal"]
    if config.input_sizes[0] == config.hidden_size:
        names += ["has_skip_term"] + (["normalize_after"] if config.layer_norm else [])
    if not config.rescale:
        names.append("highway_bias")
    names += ["recurrence_activation", "dropout", "projection_dropout", "attention_dropout", "embedding_dropout"]
    return [f"{name} {getattr(config, name)}" for name in names]
