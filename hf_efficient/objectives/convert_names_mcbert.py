"""
The names that the original MC-BERT code gives its tensors: those that are saved twice, and those of its encoder, whose
tensors are converted here to `RobertaModel`'s and back.
"""

import re

import torch
from torch import Tensor


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


def inverse(table: dict[str, str]) -> dict[str, str]:
    """A table of names, read from right to left."""
    return {ours: original for original, ours in table.items()}


def convert_encoder(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of one encoder, by their names inside it -> those of a `RobertaModel`; `where` for messages."""
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
    """The name under which a tensor is read that the original saves under several."""
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
    """An original state dict with what the original's modules save under a second name."""
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
    The inverse of [`with_aliases`].

    Raises:
        ValueError: if the tensors under two such names are not the same.
    """
    unique = {name: tensor for name, tensor in original.items() if _alias_of(name) == name}
    for name, tensor in original.items():
        source = _alias_of(name)
        if not torch.equal(unique.setdefault(source, tensor), tensor):
            raise ValueError(f"{name} differs from {source}; in the original both are one tensor.")
    return unique
