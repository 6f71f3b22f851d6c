"""
One layer of the original SRU and SRU++ code, to this package and back.

The original keeps the pre-activations of a unit beside each other: rows of a layer's last map go by direction, unit,
sub-matrix. Here they are planar: direction, sub-matrix, unit. Its one matrix for keys and values is two here.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .configuration_srupp import SruppConfig


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
    """What kind of transform module has tensors of these original names."""
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
    if layer in config.attending:
        return "attention"
    if not config.projection_sizes[layer]:
        return "one linear map"
    # Only dropout tells SRU's two maps from an SRU++ without any attention or norm.
    plain = not config.attending and not config.attention_layer_norm and config.projection_dropout == 0.0
    return "two linear maps" if plain else "projection"


def _halves(config: SruppConfig) -> tuple[str, str]:
    """Where the keys' and the values' half of the original's matrix go. With one head the queries get the keys' half,
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
            f"{config.attending}) and projection_size (now {config.projection_size}) as they were in training."
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
    if layer in config.attending:
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
