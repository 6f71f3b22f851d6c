"""
The adaptive embedding and softmax of the original SRU++ word models, to this package and back.

The original shares tables between the two by storing them once, and keeps the rows for the logits of the rarer clusters
after the words of the first one.
"""

import re

import torch
from torch import Tensor

from .configuration_srupp import SruppConfig


ADAPTIVE = re.compile(r"(?:output_layer|embedding_layer)\.(out_layers|out_projs|emb_projs)\.(\d+)(?:\.(weight|bias))?")
_OUR_ADAPTIVE = re.compile(r"(model\.embed_tokens|lm_head)\.(tables|projections|biases)\.(\d+)(?:\.weight)?")
_CLUSTERS = {"weight": "lm_head.cluster_weight", "bias": "lm_head.cluster_bias"}


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
