"""
Conversion of checkpoints of the authors' library (trax) to this package and back.

Its weight files, `NAME.weights.npy.gz`, hold arrays without names, in the order of the model's parts; they are named by
their shapes. Nothing is unpickled: the other file of a checkpoint, a pickle, is not needed. From the command line:

    python -m hf_efficient.models.scaling_transformer.convert_scaling_transformer \\
        --checkpoint model.weights.npy.gz --set num_attention_heads=16 --output_dir scaling-transformer

The original shifts its inputs, with 0 in front. The converted model does not: give it texts that begin with id 0.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...utils.conversion import Converter
from .configuration_scaling_transformer import ScalingTransformerConfig
from .modeling_scaling_transformer import ScalingTransformerForCausalLM


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def _reordered(*dims: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A permutation of dimensions, and its inverse."""
    inverse = [dims.index(dim) for dim in range(len(dims))]
    return lambda tensor: tensor.permute(dims).contiguous(), lambda tensor: tensor.permute(inverse).contiguous()


def _gates_reversed(tensor: Tensor) -> Tensor:
    """The original's order is output gate, forget gate, candidate; ours begins with the candidate. Its own inverse."""
    return torch.cat(tensor.chunk(3)[::-1])


class _Rule(NamedTuple):
    """Name of a leaf of a part here, and the layout of its values, there and back."""

    original: str
    ours: str
    convert: Callable[[Tensor], Tensor] = _same
    restore: Callable[[Tensor], Tensor] = _same


def _dense(original: str, ours: str) -> list[_Rule]:
    return [
        _Rule(f"{original}.kernel", f"{ours}.weight", _transposed, _transposed),
        _Rule(f"{original}.bias", f"{ours}.bias"),
    ]


def _multiplicative(original: str, ours: str) -> list[_Rule]:
    rules = [_Rule(f"{original}.{name}", f"{ours}.{name}") for name in ("gating", "projection", "bias")]
    return [*rules, _Rule(f"{original}.module_kernel", f"{ours}.kernel")]


def _conv(original: str, ours: str) -> list[_Rule]:
    return [
        _Rule(f"{original}.kernel", f"{ours}.kernel", *_reordered(3, 2, 0, 1)),
        _Rule(f"{original}.bias", f"{ours}.bias"),
    ]


def _norm(original: str, ours: str) -> list[_Rule]:
    return [_Rule(f"{original}.scale", f"{ours}.weight"), _Rule(f"{original}.bias", f"{ours}.bias")]


def attention_rules(config: ScalingTransformerConfig, original: str = "attn", ours: str = "attention") -> list[_Rule]:
    """Rules for the leaves of an attention, by their names without those of layers."""
    if config.attention_type == "multiplicative_conv":
        projections = f"{ours}.projections"
        queries = "conv_qk" if config.attention_share_qk else "conv_q"
        return [
            *_multiplicative(f"{original}.shared_mult", f"{projections}.shared"),
            *_conv(f"{original}.{queries}", f"{projections}.query_conv"),
            *_conv(f"{original}.conv_k", f"{projections}.key_conv"),
            *_conv(f"{original}.conv_v", f"{projections}.value_conv"),
            *_multiplicative(f"{original}.out_mult", f"{ours}.o_proj"),
            *_conv(f"{original}.out_conv", f"{ours}.output_conv"),
        ]
    part = _dense if config.attention_type == "dense" else _multiplicative
    return [rule for letter in "qkvo" for rule in part(f"{original}.{letter}", f"{ours}.{letter}_proj")]


def feed_forward_rules(layers: int, original: str = "ff", ours: str = "feed_forward") -> list[_Rule]:
    """Rules for the leaves of a feed-forward block with so many recurrences, by their names without those of layers."""
    sparse, branch = f"{original}.sparse_ff", f"{original}.sru_branch"
    rules = [
        *_norm(f"{original}.norm", f"{ours}.norm"),
        *_dense(f"{original}.in", f"{ours}.up_proj"),
        *_dense(f"{original}.out", f"{ours}.down_proj"),
        _Rule(f"{sparse}.controller.m1", f"{ours}.sparse.controller_down", _transposed, _transposed),
        _Rule(f"{sparse}.controller.m2", f"{ours}.sparse.controller_up", *_reordered(1, 2, 0)),
        _Rule(f"{sparse}.controller.bias", f"{ours}.sparse.controller_bias"),
        _Rule(f"{sparse}.w1", f"{ours}.sparse.up", *_reordered(1, 2, 0)),
        _Rule(f"{sparse}.w2", f"{ours}.sparse.down", *_reordered(1, 0, 2)),
        _Rule(f"{sparse}.b2", f"{ours}.sparse.bias"),
        *_norm(f"{branch}.norm", f"{ours}.sru.norm"),
        *_dense(f"{branch}.in_proj", f"{ours}.sru.in_proj"),
        *_dense(f"{branch}.out_proj", f"{ours}.sru.out_proj"),
    ]
    for layer in range(layers):
        there, here = f"{branch}.sru.{layer}", f"{ours}.sru.layers.{layer}"
        rules += [
            _Rule(
                f"{there}.kernel",
                f"{here}.weight",
                lambda kernel: _gates_reversed(kernel.T).contiguous(),
                lambda weight: _gates_reversed(weight).T.contiguous(),
            ),
            _Rule(f"{there}.bias", f"{here}.bias", _gates_reversed, _gates_reversed),
        ]
    return rules


def head_rules(config: ScalingTransformerConfig) -> list[_Rule]:
    """Rules for the leaves of the output layer."""
    kind, name = config.lm_head_type, "lm_head"
    if kind == "einsum":
        return [_Rule("lm_head.kernel", "lm_head.weight"), _Rule("lm_head.bias", "lm_head.bias")]
    if kind == "low_rank":
        return [*_dense("lm_head.in", "lm_head.in_proj"), *_dense("lm_head.out", "lm_head.out_proj")]
    if kind == "multiplicative" and config.lm_head_sparse_probability is not None:
        return [*_multiplicative("lm_head.sparse", "lm_head.sparse"), *_dense("lm_head.dense", "lm_head.dense")]
    return _multiplicative(name, name) if kind == "multiplicative" else _dense(name, name)


def _rules(config: ScalingTransformerConfig) -> list[_Rule]:
    """Rules for all leaves, but those of positions in fixed bases."""
    rules = [
        _Rule("embedding", "model.embed_tokens.weight"),
        _Rule("position_table", "model.positions.table"),
        _Rule("position_projection", "model.positions.projection"),
        *_norm("final_norm", "model.norm"),
        *head_rules(config),
    ]
    of_layer = [
        *_norm("attn_norm", "attention_norm"),
        *attention_rules(config),
        *feed_forward_rules(config.ff_sru_layers),
    ]
    for layer in range(config.num_hidden_layers):
        there, here = f"blocks.{layer}.", f"model.layers.{layer}."
        rules += [rule._replace(original=there + rule.original, ours=here + rule.ours) for rule in of_layer]
    return rules


_BASE = "position.base.{}.{}"


def _convert_bases(original: dict[str, Tensor], config: ScalingTransformerConfig) -> dict[str, Tensor]:
    bases, digits = range(len(config.position_bases or [])), range(8)
    vectors = [torch.stack([original[_BASE.format(base, digit)].squeeze(0) for digit in digits]) for base in bases]
    start = original["position.start_vec"].flatten()
    return {"model.positions.vectors": torch.stack(vectors), "model.positions.start": start}


def _restore_bases(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    restored = {
        _BASE.format(base, digit): vector.unsqueeze(0)
        for base, vectors in enumerate(state_dict["model.positions.vectors"])
        for digit, vector in enumerate(vectors)
    }
    return {**restored, "position.start_vec": state_dict["model.positions.start"].view(1, 1, -1)}


def convert_state_dict(original: dict[str, Tensor], config: ScalingTransformerConfig) -> dict[str, Tensor]:
    """
    Convert named leaves of the original to the state dict of [`ScalingTransformerForCausalLM`].

    Args:
        original (`dict[str, Tensor]`): leaves by the names of [`name_leaves`].
        config (`ScalingTransformerConfig`): of the model.

    Raises:
        ValueError: for a leaf that a model of this config does not have.
    """
    rules = {rule.original: rule for rule in _rules(config)}
    converted, unknown = {}, []
    for name, tensor in original.items():
        if name.startswith("position."):
            continue
        if name not in rules:
            unknown.append(name)
            continue
        converted[rules[name].ours] = rules[name].convert(tensor)
    if "position.start_vec" in original:
        converted.update(_convert_bases(original, config))
    if unknown:
        raise ValueError(f"A model of this config has no {', '.join(unknown[:3])}: is it of another kind?")
    return converted


def restore_state_dict(state_dict: dict[str, Tensor], config: ScalingTransformerConfig) -> dict[str, Tensor]:
    """Restore the original's leaves; the exact inverse of [`convert_state_dict`]."""
    rules = {rule.ours: rule for rule in _rules(config)}
    of_bases = ("model.positions.vectors", "model.positions.start")
    restored = {
        rules[name].original: rules[name].restore(tensor) for name, tensor in state_dict.items() if name not in of_bases
    }
    return {**restored, **_restore_bases(state_dict)} if of_bases[0] in state_dict else restored


class _Leaves:
    """Arrays without names, taken one after the other; each part is told by the shapes that come next."""

    def __init__(self, arrays: list[Tensor]):
        self.arrays, self.next, self.named = arrays, 0, dict[str, Tensor]()

    def shape(self, ahead: int = 0) -> tuple[int, ...]:
        place = self.next + ahead
        return tuple(self.arrays[place].shape) if place < len(self.arrays) else ()

    def dims(self, count: int) -> list[int]:
        """Numbers of dimensions of the next arrays."""
        return [len(self.shape(ahead)) for ahead in range(count)]

    def take(self, *names: str) -> None:
        for name in names:
            if self.next >= len(self.arrays):
                raise ValueError(f"The weights end before {name}: they are cut off, or of another kind of model.")
            self.named[name] = self.arrays[self.next]
            self.next += 1


def _take_positions(leaves: _Leaves, width: int) -> None:
    shape = leaves.shape()
    if len(shape) == 3 and shape[0] == 1 and shape[2] == width:  # as older checkpoints have it
        leaves.arrays[leaves.next] = leaves.arrays[leaves.next].squeeze(0)
        shape = leaves.shape()
    if len(shape) != 2:
        return
    if shape[0] == 1:  # digits of bases: four by default
        count = next((index for index in range(len(leaves.arrays)) if len(leaves.shape(index)) == 3), 0)
        for index in range(count):
            leaves.take(_BASE.format(*divmod(index, 8)))
        leaves.take("position.start_vec")
    elif shape[1] == width:
        leaves.take("position_table")
    else:
        leaves.take("position_table", "position_projection")


def _take_multiplicative(leaves: _Leaves, name: str) -> None:
    leaves.take(f"{name}.gating", f"{name}.projection")
    if len(leaves.shape()) == 3:
        leaves.take(f"{name}.module_kernel")
    leaves.take(f"{name}.bias")


def _take_attention(leaves: _Leaves, name: str) -> None:
    if leaves.dims(2) == [2, 1]:
        leaves.take(*(f"{name}.{letter}.{leaf}" for letter in "qkvo" for leaf in ("kernel", "bias")))
        return
    if leaves.dims(4) != [2, 2, 1, 4]:
        for letter in "qkvo":
            _take_multiplicative(leaves, f"{name}.{letter}")
        return
    _take_multiplicative(leaves, f"{name}.shared_mult")
    convs = 0
    while len(leaves.shape(2 * convs)) == 4:
        convs += 1
    # The last convolution may be the output's, with a multiplicative layer before it or not; values see one module.
    inner = next(index for index in range(convs) if leaves.shape(2 * index)[1] == 1) + 1 if convs else 0
    queries = ["conv_qk"] if inner == 2 else ["conv_q", "conv_k"]
    for conv in [*queries, "conv_v"]:
        leaves.take(f"{name}.{conv}.kernel", f"{name}.{conv}.bias")
    if leaves.dims(3) == [2, 2, 1]:
        _take_multiplicative(leaves, f"{name}.out_mult")
    if len(leaves.shape()) == 4:
        leaves.take(f"{name}.out_conv.kernel", f"{name}.out_conv.bias")


def _take_norm(leaves: _Leaves, name: str) -> None:
    leaves.take(f"{name}.scale")
    if len(leaves.shape()) == 1:
        leaves.take(f"{name}.bias")


def _take_feed_forward(leaves: _Leaves, name: str) -> None:
    _take_norm(leaves, f"{name}.norm")
    if len(leaves.shape(1)) == 3:
        controller = [f"controller.{leaf}" for leaf in ("m1", "m2", "bias")]
        leaves.take(*(f"{name}.sparse_ff.{leaf}" for leaf in (*controller, "w1", "w2", "b2")))
    else:
        leaves.take(*(f"{name}.{side}.{leaf}" for side in ("in", "out") for leaf in ("kernel", "bias")))
    # A norm follows in any case: of a branch of recurrences, of the next block, or of the end.
    norms = 2 if len(leaves.shape(1)) == 1 else 1
    units = leaves.shape(norms)[1:]
    if len(units) == 1 and leaves.shape(norms + 2) == (units[0], 3 * units[0]):
        _take_norm(leaves, f"{name}.sru_branch.norm")
        leaves.take(f"{name}.sru_branch.in_proj.kernel", f"{name}.sru_branch.in_proj.bias")
        layer = 0
        while leaves.shape() == (units[0], 3 * units[0]):
            leaves.take(*(f"{name}.sru_branch.sru.{layer}.{leaf}" for leaf in ("kernel", "bias")))
            layer += 1
        leaves.take(f"{name}.sru_branch.out_proj.kernel", f"{name}.sru_branch.out_proj.bias")


def _take_head(leaves: _Leaves, width: int, vocab_size: int) -> None:
    left = len(leaves.arrays) - leaves.next
    if leaves.dims(2) == [2, 2]:
        name = "lm_head.sparse" if left > 3 else "lm_head"
        leaves.take(f"{name}.gating", f"{name}.projection")
        if left > 2:
            leaves.take(f"{name}.bias")
        if left > 3:
            leaves.take("lm_head.dense.kernel", "lm_head.dense.bias")
    elif left >= 4:
        leaves.take(*(f"lm_head.{side}.{leaf}" for side in ("in", "out") for leaf in ("kernel", "bias")))
    else:
        leaves.take("lm_head.kernel", *(["lm_head.bias"] if left > 1 else []))


def name_leaves(arrays: Iterable[Tensor]) -> dict[str, Tensor]:
    """
    Name the arrays of a weight file by their order and shapes.

    Args:
        arrays (`Iterable[Tensor]`): as [`~hf_efficient.utils.weight_stream.read_weight_stream`] gives them.

    Raises:
        ValueError: if arrays are lacking or left over, or it is another kind of model.
    """
    leaves = _Leaves(list(arrays))
    if leaves.dims(1) != [2]:
        raise ValueError(f"The first array has shape {leaves.shape()}, but must be the embedding, (vocab_size, width).")
    vocab_size, width = leaves.shape()
    leaves.take("embedding")
    _take_positions(leaves, width)
    block = 0
    # The norm at the end is followed by the output layer; no feed-forward comes behind that.
    while len(leaves.arrays) - leaves.next > 7:
        _take_norm(leaves, f"blocks.{block}.attn_norm")
        _take_attention(leaves, f"blocks.{block}.attn")
        _take_feed_forward(leaves, f"blocks.{block}.ff")
        block += 1
    _take_norm(leaves, "final_norm")
    _take_head(leaves, width, vocab_size)
    if leaves.next < len(leaves.arrays):
        more = len(leaves.arrays) - leaves.next
        raise ValueError(f"{more} arrays are left over behind the output layer: it is another kind of model.")
    return leaves.named


def _attention_fields(original: dict[str, Tensor]) -> dict[str, Any]:
    names = {name.removeprefix("blocks.0.attn."): tensor for name, tensor in original.items()}
    if "q.kernel" in names:
        return {"attention_type": "dense"}
    if "shared_mult.gating" not in names:
        kind = "multiplicative_modular" if "q.module_kernel" in names else "multiplicative"
        return {"attention_type": kind, "attention_sparsity": len(names["q.gating"])}
    shares = "conv_qk.kernel" in names
    window, width, size, _ = names["conv_qk.kernel" if shares else "conv_q.kernel"].shape
    outputs = [
        part for part, leaf in (("multiplicative", "out_mult.gating"), ("conv", "out_conv.kernel")) if leaf in names
    ]
    return {
        "attention_type": "multiplicative_conv",
        "attention_sparsity": len(names["shared_mult.gating"]),
        "attention_window": window,
        "attention_kernel_width": width,
        "attention_share_qk": shares,
        "attention_output": "_".join(outputs) or "none",
        "attention_value_input": "shared" if names["conv_v.kernel"].shape[2] == size else "by_module",
    }


def _head_fields(original: dict[str, Tensor], vocab_size: int) -> dict[str, Any]:
    if "lm_head.in.kernel" in original:
        return {"lm_head_type": "low_rank", "lm_head_rank": original["lm_head.in.kernel"].shape[1]}
    if "lm_head.sparse.gating" in original:
        modules = len(original["lm_head.sparse.gating"])
        return {"lm_head_type": "multiplicative", "loss_sparsity": modules, "lm_head_sparse_probability": 0.5}
    if "lm_head.gating" in original:
        fields = {"lm_head_type": "multiplicative", "loss_sparsity": len(original["lm_head.gating"])}
        return {**fields, "lm_head_bias": "lm_head.bias" in original}
    kind = "dense" if original["lm_head.kernel"].shape[1] == vocab_size else "einsum"
    return {"lm_head_type": kind, "lm_head_bias": "lm_head.bias" in original}


def _position_fields(original: dict[str, Tensor]) -> dict[str, Any]:
    if "position.start_vec" in original:
        return {"position_embedding_type": "fixed_base"}
    if "position_table" not in original:
        return {"position_embedding_type": "none"}
    length, rank = original["position_table"].shape
    if "position_projection" in original:
        return {"position_embedding_type": "low_rank", "position_rank": rank, "max_position_embeddings": length}
    return {"position_embedding_type": "learned", "max_position_embeddings": length}


def _feed_forward_fields(original: dict[str, Tensor]) -> dict[str, Any]:
    branch = "blocks.0.ff.sru_branch."
    recurrences = sum(name.startswith(f"{branch}sru.") and name.endswith(".kernel") for name in original)
    fields: dict[str, Any] = {"ff_sru_layers": recurrences}
    if recurrences:
        fields["ff_sru_units"] = original[f"{branch}in_proj.kernel"].shape[1]
    if "blocks.0.ff.in.kernel" in original:
        return {**fields, "intermediate_size": original["blocks.0.ff.in.kernel"].shape[1]}
    rank, blocks, size = original["blocks.0.ff.sparse_ff.controller.m2"].shape
    return {**fields, "intermediate_size": blocks * size, "ff_sparsity": size, "ff_rank": rank}


def infer_config(original: dict[str, Tensor], **overrides: Any) -> ScalingTransformerConfig:
    """
    Infer the configuration of a checkpoint from its leaves.

    Args:
        original (`dict[str, Tensor]`): leaves by the names of [`name_leaves`].
        overrides: fields that take precedence over the checkpoint, or that it does not record: the number of heads
            above all.

    Raises:
        ValueError: if it is a checkpoint of another model.
    """
    lacking = [name for name in ("embedding", "blocks.0.ff.norm.scale", "final_norm.scale") if name not in original]
    if lacking:
        raise ValueError(f"No Scaling Transformer: it lacks {', '.join(lacking)}.")
    vocab_size, width = original["embedding"].shape
    layers = {match[1] for name in original if (match := re.match(r"blocks\.(\d+)\.", name))}
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "layer_norm_center": "final_norm.bias" in original,
        **_attention_fields(original),
        **_feed_forward_fields(original),
        **_position_fields(original),
        **_head_fields(original, vocab_size),
        **overrides,
    }
    return ScalingTransformerConfig(**fields)


def build_model(original: dict[str, Tensor], config: ScalingTransformerConfig) -> ScalingTransformerForCausalLM:
    """
    Build the model of a checkpoint.

    Raises:
        ValueError: if the checkpoint does not fit the config.
    """
    model = ScalingTransformerForCausalLM(config)
    state_dict = {name: tensor.float() for name, tensor in convert_state_dict(original, config).items()}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    if missing or unexpected:
        raise ValueError(f"The checkpoint does not fit the config: missing {missing}, unexpected {unexpected}.")
    return model.eval()


def _named(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves by name: of a weight file, which has numbers, or of a recorded case, whose weights stand among others."""
    if all(name.isdigit() for name in original):
        return name_leaves(original[str(index)] for index in range(len(original)))
    weights = {name.removeprefix("weights."): t for name, t in original.items() if name.startswith("weights.")}
    return weights or original


def _build(original: dict[str, Tensor], training_arguments, overrides: dict[str, Any], options) -> PreTrainedModel:
    named = _named(original)
    return build_model(named, infer_config(named, **overrides))


def _remarks(model: PreTrainedModel, original: dict[str, Tensor], training_arguments, overrides, options):
    unknown = ["num_attention_heads", "hidden_act", "dropout", "ff_temperature", "ff_hard_probability"]
    told = [f"{name} {getattr(model.config, name)}" for name in unknown if name not in overrides]
    yield f"The checkpoint does not tell these, set as by default; change them with --set: {', '.join(told)}."
    yield "The original puts id 0 before each text; so do texts for this model have to begin with it."
    if options.tokenizer is None:
        yield "No tokenizer was saved, and no checkpoint holds one; generating text needs one: see --tokenizer."


CONVERTER = Converter(
    description="Convert a checkpoint of trax's ConfigurableTransformerLM into a folder for from_pretrained.",
    fields=ScalingTransformerConfig.__dataclass_fields__,
    build=_build,
    remarks=_remarks,
    formats=".weights.npy.gz, or .safetensors with named leaves",
)


if __name__ == "__main__":
    CONVERTER.run()
