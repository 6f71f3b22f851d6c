"""
Conversion of checkpoints of the authors' library (trax) to this package and back.

Its weight files, `NAME.weights.npy.gz`, hold arrays without names, in the order of the model's parts; they are named by
their shapes. Nothing is unpickled: the other file of a checkpoint, a pickle, is not needed. From the command line:

    python -m hf_efficient.models.scaling_transformer.convert_scaling_transformer \\
        --checkpoint model.weights.npy.gz --set num_attention_heads=16 --output_dir scaling-transformer

Back, from a model to a weight file:

    leaves = restore_state_dict(model.state_dict(), model.config)
    write_weight_stream("model.weights.npy.gz", leaves.values())

The original shifts its inputs, with 0 in front. The converted model does not: give it texts that begin with id 0.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...modules.trax_layout import (
    BASE,
    DEFAULT_BASES,
    DIGITS,
    START,
    Rule,
    attention_rules,
    convert_bases,
    feed_forward_rules,
    head_rules,
    norm_rules,
    position_rules,
)
from ...utils.conversion import Converter
from ...utils.process import errors_in_one_line
from .configuration_scaling_transformer import ScalingTransformerConfig
from .modeling_scaling_transformer import ScalingTransformerForCausalLM


def _rules(config: ScalingTransformerConfig) -> list[Rule]:
    """Rules for all leaves, in the order in which trax keeps them."""
    rules = [
        Rule("embedding", "model.embed_tokens.weight"),
        *position_rules(len(config.position_bases or [])),
    ]
    of_layer = [
        *norm_rules("attn_norm", "attention_norm"),
        *attention_rules(config),
        *feed_forward_rules(config.ff_sru_layers),
    ]
    for layer in range(config.num_hidden_layers):
        there, here = f"blocks.{layer}.", f"model.layers.{layer}."
        rules += [rule._replace(original=there + rule.original, ours=here + rule.ours) for rule in of_layer]
    return [*rules, *norm_rules("final_norm", "model.norm"), *head_rules(config)]


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
        if name not in rules:
            unknown.append(name)
        elif not name.startswith("position.base."):
            converted[rules[name].ours] = rules[name].convert(tensor)
    if unknown:
        raise ValueError(f"A model of this config has no {', '.join(unknown[:3])}: is it of another kind?")
    return {**converted, **convert_bases(original)}


def restore_state_dict(state_dict: dict[str, Tensor], config: ScalingTransformerConfig) -> dict[str, Tensor]:
    """
    Restore the original's leaves, in its order; the exact inverse of [`convert_state_dict`].

    The values, one after the other, are what [`~hf_efficient.utils.weight_stream.write_weight_stream`] takes.

    Args:
        state_dict (`dict[str, Tensor]`): of [`ScalingTransformerForCausalLM`].
        config (`ScalingTransformerConfig`): of the model.

    Raises:
        ValueError: for a tensor that the original's model does not have, such as `ff_inner_bias` adds.
    """
    rules = _rules(config)
    unknown = sorted(set(state_dict) - {rule.ours for rule in rules})
    if unknown:
        raise ValueError(
            f"trax has no leaf for {', '.join(unknown[:3])}"
            f"{', which ff_inner_bias=True adds' if unknown[0].endswith('inner_bias') else ''}: "
            "such a model cannot be converted to trax."
        )
    return {rule.original: rule.restore(state_dict[rule.ours]) for rule in rules if rule.ours in state_dict}


_Shape = tuple[int, ...]
# Leaves of a norm with a bias, and of the output layer that has most.
_LONGEST_END = 7
_CUT_OFF = "they are cut off, or of another kind of model"


class _Leaves:
    """Arrays without names, taken one after the other; each part is told by the shapes that come next."""

    def __init__(self, arrays: list[Tensor]):
        self.arrays, self.next, self.named = arrays, 0, dict[str, Tensor]()

    @property
    def left(self) -> int:
        return len(self.arrays) - self.next

    def shape(self, ahead: int = 0) -> _Shape:
        return tuple(self.arrays[self.next + ahead].shape) if ahead < self.left else ()

    def dims(self, count: int) -> list[int]:
        """Numbers of dimensions of the next arrays."""
        return [len(self.shape(ahead)) for ahead in range(count)]

    def take(self, name: str, *expected: int) -> None:
        """Name the next array, which must have the expected shape."""
        if not self.left:
            raise ValueError(f"The weights end before {name}: {_CUT_OFF}.")
        if self.shape() != expected:
            raise ValueError(
                f"Array {self.next} has shape {self.shape()}, but {name} would have {expected}: an array is missing or "
                "one too many before it, or it is another kind of model."
            )
        self.named[name] = self.arrays[self.next]
        self.next += 1

    def take_dense(self, name: str, inputs: int, outputs: int) -> None:
        self.take(f"{name}.kernel", inputs, outputs)
        self.take(f"{name}.bias", outputs)


def _take_positions(leaves: _Leaves, width: int) -> None:
    shape = leaves.shape()
    if len(shape) == 3 and shape[0] == 1 and shape[2] == width:  # as older checkpoints have it
        leaves.arrays[leaves.next] = leaves.arrays[leaves.next].squeeze(0)
        shape = leaves.shape()
    if len(shape) != 2:
        return
    if leaves.dims(2) == [2, 1]:  # a norm follows
        leaves.take("position_table", shape[0], width)
    elif shape[0] == 1 and leaves.shape(1)[:1] == (1,):
        digits = 0
        while len(leaves.shape()) == 2:
            leaves.take(BASE.format(*divmod(digits, DIGITS)), 1, width // DIGITS)
            digits += 1
        if digits % DIGITS:
            raise ValueError(f"Positions in fixed bases have {DIGITS} digits each; found {digits}: one is missing.")
        leaves.take(START, 1, 1, width)
    else:
        leaves.take("position_table", *shape)
        leaves.take("position_projection", shape[1], width)


def _take_multiplicative(leaves: _Leaves, name: str, width: int) -> None:
    modules = leaves.shape()[0] if leaves.shape() else 1
    size = width // max(1, modules)
    leaves.take(f"{name}.gating", modules, width)
    leaves.take(f"{name}.projection", width, size)
    if len(leaves.shape()) == 3:
        leaves.take(f"{name}.module_kernel", modules, size, size)
    leaves.take(f"{name}.bias", width)


def _shares_queries(leaves: _Leaves, size: int, overrides: dict[str, Any]) -> bool:
    """Tell one convolution for queries and keys and one for values, which come next, from one for each of the three."""
    convs = 0
    while len(leaves.shape(2 * convs)) == 4:
        convs += 1
    kernels = [leaves.shape(2 * conv) for conv in range(convs)]
    # Values see one module. Where others do too, inputs twice as wide tell values; otherwise the number of
    # convolutions does, unless the third may be the output's.
    values = [conv for conv, kernel in enumerate(kernels) if kernel[2] == 2 * size]
    if not values and kernels[0][1] != 1:
        values = [conv for conv, kernel in enumerate(kernels) if kernel[1] == 1]
    if values:
        return values[0] == 1
    if convs == 3 and leaves.dims(9)[6:] != [2, 2, 1]:
        if "attention_share_qk" in overrides:
            return bool(overrides["attention_share_qk"])
        if "attention_output" in overrides:
            return overrides["attention_output"] == "conv"
        raise ValueError(
            "Three convolutions that see one module each: whether queries and keys share the first, and the last is "
            "that of the output, is not told by the checkpoint. Say so with --set attention_share_qk=true, or false."
        )
    return convs == 2


def _take_conv(leaves: _Leaves, name: str, size: int) -> None:
    kernel = leaves.shape()
    fits = len(kernel) == 4 and kernel[2] in ((size, 2 * size) if name.endswith("conv_v") else (size,))
    leaves.take(f"{name}.kernel", *((*kernel[:3], size) if fits else (1, 1, size, size)))
    leaves.take(f"{name}.bias", size)


def _take_attention(leaves: _Leaves, name: str, width: int, overrides: dict[str, Any]) -> None:
    if leaves.dims(2) == [2, 1]:
        for letter in "qkvo":
            leaves.take_dense(f"{name}.{letter}", width, width)
        return
    if leaves.dims(4) != [2, 2, 1, 4]:
        for letter in "qkvo":
            _take_multiplicative(leaves, f"{name}.{letter}", width)
        return
    size = leaves.shape(1)[1]
    _take_multiplicative(leaves, f"{name}.shared_mult", width)
    queries = ["conv_qk"] if _shares_queries(leaves, size, overrides) else ["conv_q", "conv_k"]
    for conv in [*queries, "conv_v"]:
        _take_conv(leaves, f"{name}.{conv}", size)
    if leaves.dims(3) == [2, 2, 1]:
        _take_multiplicative(leaves, f"{name}.out_mult", width)
    if len(leaves.shape()) == 4:
        _take_conv(leaves, f"{name}.out_conv", size)


def _take_norm(leaves: _Leaves, name: str, width: int, centers: bool) -> None:
    leaves.take(f"{name}.scale", width)
    if centers:
        leaves.take(f"{name}.bias", width)


def _take_feed_forward(leaves: _Leaves, name: str, width: int, centers: bool) -> None:
    _take_norm(leaves, f"{name}.norm", width, centers)
    if 3 in leaves.dims(2):
        (rank, blocks, size), sparse = (*leaves.shape(1), 1, 1, 1)[:3], f"{name}.sparse_ff"
        leaves.take(f"{sparse}.controller.m1", width, rank)
        leaves.take(f"{sparse}.controller.m2", rank, blocks, size)
        leaves.take(f"{sparse}.controller.bias", blocks, size)
        leaves.take(f"{sparse}.w1", width, blocks, size)
        leaves.take(f"{sparse}.w2", size, blocks, width)
        leaves.take(f"{sparse}.b2", width)
    else:
        units = (*leaves.shape(), 1, 1)[1]
        leaves.take_dense(f"{name}.in", width, units)
        leaves.take_dense(f"{name}.out", units, width)
    # A norm follows in any case: of a branch of recurrences, of the next block, or of the end.
    norms, branch = 1 + centers, f"{name}.sru_branch"
    units = leaves.shape(norms)[1] if len(leaves.shape(norms)) == 2 else 0
    # Two more are the least that a model ends with; without them it is an output layer of low rank that looks alike.
    if units and leaves.shape(norms + 2) == (units, 3 * units) and leaves.left >= norms + 8:
        _take_norm(leaves, f"{branch}.norm", width, centers)
        leaves.take_dense(f"{branch}.in_proj", width, units)
        layer = 0
        while leaves.shape() == (units, 3 * units):
            leaves.take_dense(f"{branch}.sru.{layer}", units, 3 * units)
            layer += 1
        leaves.take_dense(f"{branch}.out_proj", units, width)


def _head_names(shapes: list[_Shape], width: int, vocab_size: int) -> list[str]:
    """Names of the output layer's leaves, of which the shapes come first; none if they are no output layer."""
    first, second, third, fourth = shapes
    bias = (vocab_size,)
    if len(first) != 2:
        return []
    if len(second) == 2 and first[1] == second[0] == width and first[0] * second[1] == vocab_size:
        if third != bias:
            return ["lm_head.gating", "lm_head.projection"]
        if fourth != (width, vocab_size):
            return [f"lm_head.{leaf}" for leaf in ("gating", "projection", "bias")]
        sparse = [f"lm_head.sparse.{leaf}" for leaf in ("gating", "projection", "bias")]
        return [*sparse, "lm_head.dense.kernel", "lm_head.dense.bias"]
    is_square = first == (width, vocab_size) == (vocab_size, width)  # no low rank, but dense queries look like it
    if (
        first[0] == width
        and not is_square
        and second == first[1:]
        and third == (first[1], vocab_size)
        and fourth == bias
    ):
        return [f"lm_head.{side}.{leaf}" for side in ("in", "out") for leaf in ("kernel", "bias")]
    if first in ((width, vocab_size), (vocab_size, width)):
        return ["lm_head.kernel", "lm_head.bias"] if second == bias else ["lm_head.kernel"]
    return []


def _take_head(leaves: _Leaves, names: list[str], vocab_size: int, overrides: dict[str, Any]) -> None:
    for name in names:
        expected = (vocab_size,) if name == "lm_head.dense.bias" else leaves.shape()
        leaves.take(name, *expected)
    if names[-1].endswith(".bias"):
        if overrides.get("lm_head_sparse_probability") is not None and "lm_head.dense.bias" not in names:
            raise ValueError(f"The weights end before lm_head.dense.kernel: {_CUT_OFF}.")
    elif overrides.get("lm_head_bias", True):
        raise ValueError(
            "The weights end before lm_head.bias: they are cut off, or of another kind of model. If the model has an "
            "output layer without a bias, say so with --set lm_head_bias=false."
            if not leaves.left
            else f"Array {leaves.next} has shape {leaves.shape()}, but lm_head.bias would have {(vocab_size,)}: it is "
            "missing. If the model has an output layer without a bias, arrays are left over behind it."
        )


def name_leaves(arrays: Iterable[Tensor], **overrides: Any) -> dict[str, Tensor]:
    """
    Name the arrays of a weight file by their order and shapes.

    Args:
        arrays (`Iterable[Tensor]`): as [`~hf_efficient.utils.weight_stream.read_weight_stream`] gives them.
        overrides: fields of the config. `lm_head_bias=False` allows an output layer without a bias, which a file that
            lacks its end looks like; `attention_share_qk` is wanted where shapes do not tell it.

    Raises:
        ValueError: if arrays are lacking or left over, or it is another kind of model.
    """
    leaves = _Leaves(list(arrays))
    if leaves.dims(1) != [2]:
        raise ValueError(f"The first array has shape {leaves.shape()}, but must be the embedding, (vocab_size, width).")
    vocab_size, width = leaves.shape()
    leaves.take("embedding", vocab_size, width)
    _take_positions(leaves, width)
    centers = leaves.shape(1) == (width,)
    block, first, of_block = 0, leaves.next, list[tuple[str, _Shape]]()
    while True:
        shapes = [leaves.shape(1 + centers + ahead) for ahead in range(4)]
        head = _head_names(shapes, width, vocab_size)
        # With as many ids as units a dense attention looks like an output layer, but it is not so near the end.
        if head and block and (vocab_size != width or leaves.left <= _LONGEST_END):
            break
        if block and leaves.left <= _LONGEST_END:
            shapes = [leaves.shape(ahead) for ahead in range(leaves.left)]
            raise ValueError(
                f"The weights end behind block {block - 1} with arrays of the shapes {shapes}, which are no norm and "
                f"output layer: {_CUT_OFF}."
            )
        if block:  # all blocks are alike
            for name, shape in of_block:
                leaves.take(name.replace("blocks.0.", f"blocks.{block}.", 1), *shape)
        else:
            _take_norm(leaves, "blocks.0.attn_norm", width, centers)
            _take_attention(leaves, "blocks.0.attn", width, overrides)
            _take_feed_forward(leaves, "blocks.0.ff", width, centers)
            of_block = [(name, tuple(t.shape)) for name, t in list(leaves.named.items())[first:]]
        block += 1
    _take_norm(leaves, "final_norm", width, centers)
    _take_head(leaves, head, vocab_size, overrides)
    if leaves.left:
        raise ValueError(f"{leaves.left} arrays are left over behind the output layer: it is another kind of model.")
    return leaves.named


def _demand(overrides: dict[str, Any], field: str, why: str, choices: tuple[str, ...]) -> dict[str, Any]:
    """The override of a field that the checkpoint does not tell."""
    if field not in overrides:
        said = " or ".join(f"--set {field}={choice}" for choice in choices)
        raise ValueError(f"{why}; the checkpoint does not tell {field}: say {said}.")
    return {field: overrides[field]}


def _attention_fields(original: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
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
    values: dict[str, Any] = {"attention_value_input": "shared"}
    if names["conv_v.kernel"].shape[2] != size:
        why = "Values are computed from the multiplicative layer and the layer's input"
        values = _demand(overrides, "attention_value_input", why, ("concatenated", "by_module"))
    return {
        "attention_type": "multiplicative_conv",
        "attention_sparsity": len(names["shared_mult.gating"]),
        "attention_window": window,
        "attention_kernel_width": width,
        "attention_share_qk": shares,
        "attention_output": "_".join(outputs) or "none",
        **values,
    }


def _head_fields(original: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    if "lm_head.in.kernel" in original:
        return {"lm_head_type": "low_rank", "lm_head_rank": original["lm_head.in.kernel"].shape[1]}
    if "lm_head.sparse.gating" in original:
        modules = len(original["lm_head.sparse.gating"])
        return {"lm_head_type": "multiplicative", "loss_sparsity": modules, "lm_head_sparse_probability": 0.5}
    if "lm_head.gating" in original:
        fields = {"lm_head_type": "multiplicative", "loss_sparsity": len(original["lm_head.gating"])}
        return {**fields, "lm_head_bias": "lm_head.bias" in original}
    inputs, outputs = original["lm_head.kernel"].shape
    kind = {"lm_head_type": "dense" if outputs == len(original["embedding"]) else "einsum"}
    if inputs == outputs:
        why = f"The output layer's matrix is square, {inputs} x {outputs}, and may be transposed"
        kind = _demand(overrides, "lm_head_type", why, ("dense", "einsum"))
    return {**kind, "lm_head_bias": "lm_head.bias" in original}


def _position_fields(original: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    if START in original:
        fields = {"position_embedding_type": "fixed_base"}
        bases = sum(name.startswith("position.base.") for name in original) // DIGITS
        if bases == DEFAULT_BASES:
            return fields
        why = f"There are positions in {bases} bases, not in the usual {DEFAULT_BASES}"
        return {**fields, **_demand(overrides, "position_bases", why, ("[11,13,...]",))}
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
            above all. `attention_value_input` and `lm_head_type` are wanted where shapes do not tell them.

    Raises:
        ValueError: if it is a checkpoint of another model, or does not tell a field without which it would be misread.
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
        **_attention_fields(original, overrides),
        **_feed_forward_fields(original),
        **_position_fields(original, overrides),
        **_head_fields(original, overrides),
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
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in state_dict]
    faults += [f"{name} is unexpected" for name in state_dict if name not in own]
    faults += [
        f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
        for name, tensor in state_dict.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if faults:
        raise ValueError(f"The checkpoint does not fit the config: {', '.join(faults[:6])}.")
    model.load_state_dict(state_dict)
    return model.eval()


def _named(original: dict[str, Tensor], overrides: dict[str, Any]) -> dict[str, Tensor]:
    """Leaves by name: of a weight file, which has numbers, or of a recorded case, whose weights stand among others."""
    if all(name.isdigit() for name in original):
        return name_leaves((original[str(index)] for index in range(len(original))), **overrides)
    weights = {name.removeprefix("weights."): t for name, t in original.items() if name.startswith("weights.")}
    return weights or original


def _build(original: dict[str, Tensor], training_arguments, overrides: dict[str, Any], options) -> PreTrainedModel:
    named = _named(original, overrides)
    return build_model(named, infer_config(named, **overrides))


def _remarks(model: PreTrainedModel, original: dict[str, Tensor], training_arguments, overrides, options):
    config = model.config
    unknown = ["num_attention_heads", "hidden_act", "dropout"]
    if config.ff_sparsity is not None:
        unknown += ["ff_temperature", "ff_hard_probability", "ff_multiply_by_controller"]
    if config.lm_head_sparse_probability is not None:
        unknown.append("lm_head_sparse_probability")
    if config.position_embedding_type == "fixed_base":
        unknown.append("position_bases")
    told = [f"{name} {getattr(config, name)}" for name in unknown if name not in overrides]
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
    with errors_in_one_line():
        CONVERTER.run()
