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

from ...modules.trax_fields import (
    attention_fields,
    feed_forward_fields,
    head_fields,
    load_checked,
    position_fields,
)
from ...modules.trax_layout import (
    Rule,
    attention_rules,
    convert_bases,
    feed_forward_rules,
    head_rules,
    norm_rules,
    position_rules,
)
from ...modules.trax_leaves import (
    CUT_OFF,
    LONGEST_END,
    Leaves,
    Shape,
    head_names,
    named_leaves,
    take_attention,
    take_feed_forward,
    take_head,
    take_norm,
    take_positions,
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
    leaves = Leaves(arrays)
    vocab_size, width = leaves.take_embedding()
    take_positions(leaves, width)
    centers = leaves.shape(1) == (width,)
    block, first, of_block = 0, leaves.next, list[tuple[str, Shape]]()
    while True:
        shapes = [leaves.shape(1 + centers + ahead) for ahead in range(4)]
        head = head_names(shapes, width, vocab_size)
        # With as many ids as units a dense attention looks like an output layer, but it is not so near the end.
        if head and block and (vocab_size != width or leaves.left <= LONGEST_END):
            break
        if block and leaves.left <= LONGEST_END:
            shapes = [leaves.shape(ahead) for ahead in range(leaves.left)]
            raise ValueError(
                f"The weights end behind block {block - 1} with arrays of the shapes {shapes}, which are no norm and "
                f"output layer: {CUT_OFF}."
            )
        if block:  # all blocks are alike
            for name, shape in of_block:
                leaves.take(name.replace("blocks.0.", f"blocks.{block}.", 1), *shape)
        else:
            take_norm(leaves, "blocks.0.attn_norm", width, centers)
            take_attention(leaves, "blocks.0.attn", width, overrides)
            take_feed_forward(leaves, "blocks.0.ff", width, centers)
            of_block = [(name, tuple(t.shape)) for name, t in list(leaves.named.items())[first:]]
        block += 1
    take_norm(leaves, "final_norm", width, centers)
    take_head(leaves, head, vocab_size, overrides)
    return leaves.named


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
        **attention_fields(original, overrides),
        **feed_forward_fields(original),
        **position_fields(original, overrides),
        **head_fields(original, overrides),
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
    load_checked(model, convert_state_dict(original, config))
    return model.eval()


def _build(original: dict[str, Tensor], training_arguments, overrides: dict[str, Any], options) -> PreTrainedModel:
    named = named_leaves(original, overrides, name_leaves)
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
