"""
Conversion of weights of the authors' library (trax) to Terraformer, its encoder-decoder and Reformer, and back.

Its weight files, `NAME.weights.npy.gz`, hold arrays without names, in the order of the model's parts; they are named by
their shapes. Nothing is unpickled: the other file of a checkpoint, a pickle, is not needed. Old checkpoints have their
weights in it; those have to be written out as such a file, in their order. From the command line:

    python -m hf_efficient.models.terraformer.convert_terraformer \\
        --checkpoint model.weights.npy.gz --set num_attention_heads=16 --output_dir terraformer

Back, from a model to a weight file:

    leaves = restore_state_dict(model.state_dict(), model.config)
    write_weight_stream("model.weights.npy.gz", leaves.values())

The original shifts targets, with 0 in front, as the converted model does with `labels`; the language model, Reformer,
does not: give it texts that begin with id 0.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...modules.trax_fields import (
    attention_fields,
    demand,
    feed_forward_fields,
    head_fields,
    load_checked,
    position_fields,
)
from ...modules.trax_layout import (
    Rule,
    attention_rules,
    conv_rules,
    convert_bases,
    dense_rules,
    feed_forward_rules,
    head_rules,
    multiplicative_rules,
    norm_rules,
    position_rules,
)
from ...modules.trax_leaves import (
    CUT_OFF,
    LONGEST_END,
    Leaves,
    head_names,
    named_leaves,
    take_attention,
    take_conv,
    take_feed_forward,
    take_head,
    take_multiplicative,
    take_norm,
    take_positions,
)
from ...utils.conversion import Converter
from ...utils.process import errors_in_one_line
from .configuration_terraformer import TerraformerConfig
from .layers_terraformer import between_layers, encoder_view, width_factors
from .modeling_terraformer import TerraformerForCausalLM, TerraformerForConditionalGeneration


def _below(original: str, ours: str, rules: list[Rule]) -> list[Rule]:
    return [rule._replace(original=original + rule.original, ours=ours + rule.ours) for rule in rules]


def heads_major_rules(letter: str, heads: int) -> list[Rule]:
    """Rules for a map whose weights are of one head each, `(heads, inputs, outputs)`, as older layers of trax have
    them: `letter` is `"q"`, `"k"`, `"v"` or `"o"`."""

    def convert(tensor: Tensor) -> Tensor:
        flat = tensor.flatten(0, 1).T if letter == "o" else tensor.transpose(1, 2).flatten(0, 1)
        return flat.contiguous()

    def restore(weight: Tensor) -> Tensor:
        by_head = (weight.T if letter == "o" else weight).unflatten(0, (heads, -1))
        return by_head.contiguous() if letter == "o" else by_head.transpose(1, 2).contiguous()

    return [Rule(f"attn.w_{letter}", f"attention.{letter}_proj.weight", convert, restore)]


def _attention_rules(config: TerraformerConfig, original: str, ours: str) -> list[Rule]:
    """Rules for an attention of two streams; dense ones without biases are those of the older layers."""
    if config.attention_type != "dense" or config.attention_bias:
        return attention_rules(config, f"{original}attn", f"{ours}attention")
    return _below(original, ours, [rule for x in "qkvo" for rule in heads_major_rules(x, config.num_attention_heads)])


def _cross_rules() -> list[Rule]:
    return [
        *norm_rules("cross_norm", "cross_norm"),
        *multiplicative_rules("cross.q_mult", "cross_attention.q_proj.shared"),
        *conv_rules("cross.q_conv", "cross_attention.q_proj.conv"),
        *(rule for letter in "qkv" for rule in dense_rules(f"cross.{letter}", f"cross_attention.{letter}_proj")),
        *dense_rules("cross.o", "cross_attention.o_proj"),
        *multiplicative_rules("cross.out_mult", "cross_attention.o_proj.shared"),
        *conv_rules("cross.out_conv", "cross_attention.o_proj.conv"),
    ]


def _stack_rules(config: TerraformerConfig, side: str, ours: str, layers: int, of_layer: list[Rule]) -> list[Rule]:
    """Rules for a stack's layers, each with the linear map that may stand behind it."""
    factors = width_factors(config) if side == "decoder." or not side else [1.0] * (layers + 1)
    between = between_layers(config.forget_every, factors, config.hidden_size)
    forgetting = [
        (layer, f"{layer}.{place}")
        for layer in range(layers)
        for place, module in enumerate(between.get(str(layer), []))
        if list(module.parameters())
    ]
    rules = []
    for layer in range(layers):
        rules += _below(f"{side}blocks.{layer}.", f"{ours}.layers.{layer}.", of_layer)
        for number, (behind, ours_there) in enumerate(forgetting):
            if behind == layer:
                rules += dense_rules(f"{side}forget.{number}", f"{ours}.between.{ours_there}.proj")
    return rules


def _encoder_rules(config: TerraformerConfig) -> list[Rule]:
    view, recurrences = encoder_view(config), config.ff_sru_layers
    plain = config.decoder_type == "cross_attention"
    half = "attn_half." if not plain else ""
    attention = attention_rules(view, f"{half}attn", "attention" if plain else "attention.attention")
    norm = norm_rules("attn_norm", "attention_norm") if plain else norm_rules("attn_half.norm", "attention.norm")
    feed_forward = feed_forward_rules(recurrences, "ff" if plain else "ff_half")
    layers = config.num_encoder_layers
    return [
        *_stack_rules(config, "encoder.", "model.encoder", layers, [*norm, *attention, *feed_forward]),
        *dense_rules("encoder.out_proj", "model.encoder.out_proj"),
        *norm_rules("encoder.final_norm", "model.encoder.norm"),
    ]


def layer_rules(config: TerraformerConfig) -> list[Rule]:
    """Rules for a decoder layer of two streams."""
    rules = []
    for place in range(config.attentions_per_layer):
        there, here = f"attn_half.{place}.", f"attentions.{place}"
        rules += norm_rules(f"{there}norm", f"{here}.norm")
        rules += _attention_rules(config, there, f"{here}.")
    return [*rules, *feed_forward_rules(config.ff_sru_layers, "ff_half")]


def _decoder_rules(config: TerraformerConfig, side: str) -> list[Rule]:
    recurrences, layers = config.ff_sru_layers, config.num_decoder_layers
    if config.decoder_type == "cross_attention":
        attention = [*norm_rules("attn_norm", "attention_norm"), *attention_rules(config), *_cross_rules()]
        of_layer = [*attention, *feed_forward_rules(recurrences)]
    else:
        of_layer = layer_rules(config)
    return _stack_rules(config, side, "model.decoder", layers, of_layer)


def weight_rules(config: TerraformerConfig) -> list[Rule]:
    """Rules for all leaves of a model, in the order in which trax keeps them."""
    bases = len(config.position_bases or [])
    end = [*norm_rules("final_norm", "model.decoder.norm"), *head_rules(config)]
    if not config.is_encoder_decoder:
        return [
            Rule("embedding", "model.embed_tokens.weight"),
            *position_rules(bases, "", "model.decoder.positions"),
            *_decoder_rules(config, ""),
            *end,
        ]
    before, behind = (position_rules(bases, f"{side}.", f"model.{side}.positions") for side in ("encoder", "decoder"))
    encoder = _encoder_rules(config)
    return [
        Rule("embedding", "model.encoder.embed_tokens.weight"),
        *([*before, *behind, *encoder] if config.decoder_type == "joined" else [*before, *encoder, *behind]),
        *_decoder_rules(config, "decoder."),
        *end,
    ]


def convert_state_dict(original: dict[str, Tensor], config: TerraformerConfig) -> dict[str, Tensor]:
    """
    Convert named leaves of the original to the state dict of a model with an output layer.

    Raises:
        ValueError: for a leaf that a model of this config does not have.
    """
    rules = {rule.original: rule for rule in weight_rules(config)}
    unknown = [name for name in original if name not in rules]
    if unknown:
        raise ValueError(f"A model of this config has no {', '.join(unknown[:3])}: is it of another kind?")
    converted = {
        rules[name].ours: rules[name].convert(tensor)
        for name, tensor in original.items()
        if "position.base." not in name
    }
    for side, ours in (("encoder.", "model.encoder"), ("decoder.", "model.decoder"), ("", "model.decoder")):
        converted |= convert_bases(original, side, f"{ours}.positions")
    return converted


def restore_state_dict(state_dict: dict[str, Tensor], config: TerraformerConfig) -> dict[str, Tensor]:
    """
    Restore the original's leaves; the exact inverse of [`convert_state_dict`].

    Raises:
        ValueError: for a tensor that the original's model does not have.
    """
    rules = weight_rules(config)
    unknown = sorted(set(state_dict) - {rule.ours for rule in rules})
    if unknown:
        raise ValueError(f"trax has no leaf for {', '.join(unknown[:3])}: such a model cannot be converted to trax.")
    return {rule.original: rule.restore(state_dict[rule.ours]) for rule in rules if rule.ours in state_dict}


class _Parts:
    """Parts of a model's stacks, named one after the other."""

    def __init__(self, leaves: Leaves, centers: bool, overrides: dict[str, Any]):
        self.leaves, self.centers, self.overrides = leaves, centers, overrides
        self.norms = 1 + centers

    def width(self) -> int:
        """Width of the part that comes next, by its norm."""
        return (*self.leaves.shape(), 0)[0]

    def attends(self) -> bool:
        """Tell whether a norm with an attention comes next, rather than one with a feed-forward layer."""
        dims = self.leaves.dims(self.norms + 8)[self.norms :]
        if dims[:2] != [2, 1]:
            return dims[:2] != [2, 3]
        if self.leaves.shape(self.norms) != (self.width(), self.width()):
            return False
        # A feed-forward layer has two maps, behind which there may be one that forgets. Three are those of an attention
        # whose queries are keys as well.
        maps = [dims[: 2 * count] == [2, 1] * count for count in (3, 4)]
        return maps[1] or (maps[0] and not self.overrides.get("forget_every"))

    def repeats(self, shapes: list[tuple[int, ...]]) -> bool:
        """Tell whether arrays of these shapes come next."""
        return shapes == [self.leaves.shape(ahead) for ahead in range(len(shapes))]

    def forgets(self, side: str) -> None:
        """Name the maps behind a layer: before and after its streams become one of twice the width, if they do."""
        while self.leaves.dims(1) == [2]:
            past = sum(name.startswith(f"{side}forget.") for name in self.leaves.named) // 2
            width = self.leaves.shape()[0]
            self.leaves.take_dense(f"{side}forget.{past}", width, width)

    def attention(self, name: str, norm: str, width: int) -> None:
        take_norm(self.leaves, norm, width, self.centers)
        take_attention(self.leaves, name, width, self.overrides)

    def encoder_block(self, name: str, joined: bool, width: int) -> None:
        half = f"{name}attn_half." if joined else name
        self.attention(f"{half}attn", f"{half}{'norm' if joined else 'attn_norm'}", width)
        take_feed_forward(self.leaves, f"{name}{'ff_half' if joined else 'ff'}", width, self.centers)

    def encoder(self, joined: bool, width: int) -> None:
        """Name an encoder's layers, which are alike, and what stands behind them."""
        count, first = 0, self.leaves.next
        shapes: list[tuple[int, ...]] = []
        while count == 0 or (self.repeats(shapes) and count != self.overrides.get("num_encoder_layers")):
            self.encoder_block(f"encoder.blocks.{count}.", joined, width)
            count += 1
            shapes = shapes or [tuple(array.shape) for array in self.leaves.arrays[first : self.leaves.next]]
            # A map in front of two norms is the encoder's last.
            if joined and set(self.leaves.dims(2 + 2 * self.norms)[1:]) != {1}:
                self.forgets("encoder.")
        ends = joined and self.leaves.dims(1) == [2]
        if ends:
            self.leaves.take_dense("encoder.out_proj", width, width)
        if ends or not joined:
            take_norm(self.leaves, "encoder.final_norm", width, self.centers)

    def cross_attention(self, name: str, width: int) -> None:
        """Name an attention to the encoder's output, each map of which is dense or sparse, or lacks."""
        leaves, overrides = self.leaves, self.overrides
        take_norm(leaves, f"{name}cross_norm", width, self.centers)
        sparse = leaves.dims(4) == [2, 2, 1, 4]
        if sparse:
            size = leaves.shape(1)[1]
            take_multiplicative(leaves, f"{name}cross.q_mult", width)
            take_conv(leaves, f"{name}cross.q_conv", size)
        dense = 0
        while leaves.dims(2 * dense + 2)[2 * dense :] == [2, 1]:
            dense += 1
        letters = {2: "kv", 3: "kvo" if sparse else "qkv", 4: "qkvo"}.get(dense, "kv")
        if dense == 3 and not sparse and leaves.dims(10)[6:] != [2, 2, 1, 4]:
            why = "Cross attention has three dense maps, of keys, values, and queries or the output"
            kind = demand(overrides, "cross_query_type", why, ("dense", "none"))["cross_query_type"]
            letters = "qkv" if kind == "dense" else "kvo"
        for letter in letters:
            leaves.take_dense(f"{name}cross.{letter}", width, width)
        if leaves.dims(4) == [2, 2, 1, 4]:
            size = leaves.shape(1)[1]
            take_multiplicative(leaves, f"{name}cross.out_mult", width)
            take_conv(leaves, f"{name}cross.out_conv", size)

    def decoder(self, side: str, crosses: bool) -> None:
        """Name a decoder's layers, which end where the output layer is all that may be left."""
        count, attentions = 0, 0
        while self.leaves.left > LONGEST_END or not count:
            name, width = f"{side}blocks.{count}.", self.width()
            if crosses:
                self.attention(f"{name}attn", f"{name}attn_norm", width)
                self.cross_attention(name, width)
            else:
                place = 0
                while self.attends() if not count else place < attentions:
                    half = f"{name}attn_half.{place}."
                    self.attention(f"{half}attn", f"{half}norm", width)
                    place += 1
                attentions = place
            take_feed_forward(self.leaves, f"{name}{'ff' if crosses else 'ff_half'}", width, self.centers)
            count += 1
            if not crosses:
                self.forgets(side)


def _crosses(leaves: Leaves, width: int, centers: bool, overrides: dict[str, Any]) -> bool:
    """
    Tell an encoder whose decoder reads its output by cross attention from the layers of a language model: behind layers
    that are alike, it has a norm.
    """
    if "decoder_type" in overrides or "is_encoder_decoder" in overrides:
        return overrides.get("is_encoder_decoder", True) and overrides.get("decoder_type") == "cross_attention"
    ahead = Leaves(leaves.arrays[leaves.next :])
    parts = _Parts(ahead, centers, overrides)
    if ahead.dims(parts.norms + 2)[parts.norms :] != [2, 1]:
        return False  # an encoder's attention is dense
    parts.attention("attn", "attn_norm", width)
    if parts.attends():
        return False
    take_feed_forward(ahead, "ff", width, centers)
    shapes = [tuple(array.shape) for array in ahead.arrays[: ahead.next]]
    while parts.repeats(shapes):
        ahead.next += len(shapes)
    return ahead.left > LONGEST_END and ahead.shape() == (width,)


def _alike(named: dict[str, Tensor]) -> bool:
    """Tell whether the layers of an encoder are of the same shapes as those of a decoder that follows them."""
    first = {name.removeprefix("decoder.blocks.0."): t.shape for name, t in named.items() if ".blocks.0." in name}
    ours = {name.replace("attn_half.0.", "attn_half."): shape for name, shape in first.items() if "encoder" not in name}
    theirs = {
        name.removeprefix("encoder.blocks.0."): shape for name, shape in first.items() if name.startswith("encoder.")
    }
    return ours == theirs and "encoder.out_proj.kernel" not in named


def name_leaves(arrays: Iterable[Tensor], **overrides: Any) -> dict[str, Tensor]:
    """
    Name the arrays of a weight file by their order and shapes.

    Args:
        arrays (`Iterable[Tensor]`): as [`~hf_efficient.utils.weight_stream.read_weight_stream`] gives them.
        overrides: fields of the config. Those that shapes do not tell are wanted: `num_encoder_layers` of a joined
            model whose layers of both sides are alike, or that has no positions; `cross_query_type` of cross attention
            with three dense maps; `lm_head_bias=False` for an output layer without a bias.

    Raises:
        ValueError: if arrays are lacking or left over, or it is another kind of model.
    """
    leaves = Leaves(arrays)
    vocab_size, width = leaves.take_embedding()
    first = leaves.next
    take_positions(leaves, width, twice=True)
    has_two_sides = len(leaves.shape()) > 1
    joined = has_two_sides or (first == leaves.next and bool(overrides.get("num_encoder_layers")))
    joined = joined and overrides.get("decoder_type", "joined") == "joined"
    centers = leaves.shape(1) == (width,)
    if has_two_sides or joined:
        leaves.named = {(name if name == "embedding" else f"encoder.{name}"): t for name, t in leaves.named.items()}
        take_positions(leaves, width, "decoder.")
        centers = leaves.shape(1) == (width,)
    parts = _Parts(leaves, centers, overrides)
    crosses = not joined and _crosses(leaves, width, centers, overrides)
    if crosses:
        leaves.named = {(name if name == "embedding" else f"encoder.{name}"): t for name, t in leaves.named.items()}
    if joined or crosses:
        parts.encoder(joined, width)
    if crosses:
        take_positions(leaves, width, "decoder.")
    whole = "num_encoder_layers" in overrides or not joined
    if not whole and leaves.left <= LONGEST_END:
        demand(overrides, "num_encoder_layers", "All layers are alike, those of the encoder and the decoder's", ("N",))
    parts.decoder("decoder." if joined or crosses else "", crosses)
    if not whole and _alike(leaves.named):
        demand(overrides, "num_encoder_layers", "Layers of the encoder and the decoder are alike", ("N",))
    last = parts.width()
    head = head_names([leaves.shape(parts.norms + ahead) for ahead in range(4)], last, vocab_size)
    if not head:
        shapes = [leaves.shape(ahead) for ahead in range(leaves.left)]
        raise ValueError(
            f"The weights end with arrays of the shapes {shapes}, which are no norm and output layer: {CUT_OFF}."
        )
    take_norm(leaves, "final_norm", last, centers)
    take_head(leaves, head, vocab_size, overrides)
    return leaves.named


def _count(original: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in original if (match := re.match(pattern, name))})


def _cross_fields(original: dict[str, Tensor]) -> dict[str, Any]:
    fields: dict[str, Any] = {"decoder_type": "cross_attention", "attentions_per_layer": 1, "share_dropout": False}
    for part, sparse, dense in (("query", "q_mult", "q"), ("output", "out_mult", "o")):
        name = f"decoder.blocks.0.cross.{sparse}.gating"
        if name in original:
            fields |= {f"cross_{part}_type": "multiplicative_conv", f"cross_{part}_sparsity": len(original[name])}
        elif f"decoder.blocks.0.cross.{dense}.kernel" not in original:
            fields[f"cross_{part}_type"] = "none"
    return fields


def _width_fields(original: dict[str, Tensor], side: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    Fields that say where the decoder's streams are put beside each other, which doubles the width: behind the last
    layer, for the output; before it once, or twice, where what comes before has half the width.
    """
    widths = [len(original[f"{side}blocks.{layer}.ff_half.norm.scale"]) for layer in range(layers)]
    widths = [*widths, len(original["final_norm.scale"])]
    growths = [layer + 1 for layer in range(layers) if widths[layer + 1] == 2 * widths[layer]]
    fields: dict[str, Any] = {"hidden_size": widths[0]}
    if growths[-1:] == [layers]:
        fields["stream_output"] = "concatenate"
        growths = growths[:-1]
    if len(growths) == 2 or (growths and overrides.get("half_width_layers")):
        fields |= {"hidden_size": 2 * widths[0], "half_width_layers": growths.pop(0)}
    return {**fields, "double_width_after": growths[0] - 1} if growths else fields


def _stream_fields(original: dict[str, Tensor], side: str, overrides: dict[str, Any]) -> dict[str, Any]:
    layers = _count(original, rf"{re.escape(side)}blocks\.(\d+)\.")
    fields = {
        **_width_fields(original, side, layers, overrides),
        "attentions_per_layer": _count(original, rf"{re.escape(side)}blocks\.0\.attn_half\.(\d+)\."),
        "share_dropout": True,
    }
    if side:
        fields["encoder_keeps_streams"] = "encoder.out_proj.kernel" not in original
    maps = [_count(original, rf"{stack}forget\.(\d+)\.") for stack in ("encoder\\.", re.escape(side))]
    if not any(maps):
        return fields
    half = fields.get("half_width_layers", 0), fields.get("double_width_after")
    view = TerraformerConfig(num_encoder_layers=1, num_decoder_layers=layers, half_width_layers=half[0])
    view.double_width_after = half[1]
    stacks = [([1.0] * (_count(original, r"encoder\.blocks\.(\d+)\.") + 1)), width_factors(view)]
    found = [
        every
        for every in range(1, max(len(stack) for stack in stacks))
        if maps == [sum(bool(list(b.parameters())) for b in between_layers(every, s, 1).values()) for s in stacks]
    ]
    if len(found) == 1:
        return {**fields, "forget_every": found[0]}
    why = f"There are {maps[0]} maps between the encoder's layers and {maps[1]} between the decoder's"
    return {**fields, **demand(overrides, "forget_every", why, tuple(map(str, found)) or ("N",))}


def _form_fields(original: dict[str, Tensor], block: str, joined: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of the decoder's attention, dense ones by their heads where the weights are of one head each."""
    part = f"{block}attn_half.0.attn." if joined else f"{block}attn."
    if f"{part}w_q" not in original:
        fields = attention_fields(original, overrides, part)
        shares = f"{part}q.kernel" in original and f"{part}k.kernel" not in original
        return {**fields, "attention_share_qk": True} if shares else fields
    heads, _, size = original[f"{part}w_q"].shape
    fields = {"attention_type": "dense", "attention_bias": False, "num_attention_heads": heads, "head_dim": size}
    return {**fields, "attention_share_qk": f"{part}w_k" not in original}


def infer_config(original: dict[str, Tensor], **overrides: Any) -> TerraformerConfig:
    """
    Infer the configuration of a checkpoint from its leaves.

    Args:
        original (`dict[str, Tensor]`): leaves by the names of [`name_leaves`].
        overrides: fields that take precedence over the checkpoint, or that it does not record: the number of heads and
            the settings of attention by hashing above all.

    Raises:
        ValueError: if it is a checkpoint of another model, or does not tell a field without which it would be misread.
    """
    side = "decoder." if any(name.startswith("encoder.") for name in original) else ""
    block = f"{side}blocks.0."
    joined = f"{block}ff_half.norm.scale" in original
    wanted = ("embedding", f"{block}{'ff_half' if joined else 'ff'}.norm.scale", "final_norm.scale")
    lacking = [name for name in wanted if name not in original]
    if lacking or (not side and not joined):
        raise ValueError(f"No model of this family: it lacks {', '.join(lacking) or f'{block}ff_half.norm.scale'}.")
    vocab_size, width = original["embedding"].shape
    encoder_layers = _count(original, r"encoder\.blocks\.(\d+)\.")
    of_kind = _stream_fields(original, side, overrides) if joined else {"hidden_size": width, **_cross_fields(original)}
    feed_forward = feed_forward_fields(original, f"{block}{'ff_half' if joined else 'ff'}")
    if of_kind.get("half_width_layers"):
        feed_forward["intermediate_size"] *= 2
    fields = {
        "vocab_size": vocab_size,
        "is_encoder_decoder": bool(side),
        "num_encoder_layers": encoder_layers,
        "num_decoder_layers": _count(original, rf"{re.escape(side)}blocks\.(\d+)\."),
        "layer_norm_center": "final_norm.bias" in original,
        **of_kind,
        **_form_fields(original, block, joined, overrides),
        **feed_forward,
        **position_fields(original, overrides, "encoder." if side else ""),
        **head_fields(original, overrides),
        **overrides,
    }
    if fields.get("attention_share_qk") and fields["attention_type"] == "dense":
        why = "Queries are keys, as attention by hashing has them"
        demand(overrides, "decoder_long_attention", why, ("lsh", "mixed"))
    return TerraformerConfig(**fields)


def build_model(
    original: dict[str, Tensor], config: TerraformerConfig
) -> TerraformerForConditionalGeneration | TerraformerForCausalLM:
    """
    Build the model of a checkpoint.

    Raises:
        ValueError: if the checkpoint does not fit the config.
    """
    model = (TerraformerForConditionalGeneration if config.is_encoder_decoder else TerraformerForCausalLM)(config)
    load_checked(model, convert_state_dict(original, config))
    return model.eval()


def _build(original: dict[str, Tensor], training_arguments, overrides: dict[str, Any], options) -> PreTrainedModel:
    named = named_leaves(original, overrides, name_leaves)
    config = infer_config(named, **overrides)
    model = build_model(named, config)
    if all(name.isdigit() for name in original) and list(restore_state_dict(model.state_dict(), config)) != list(named):
        raise ValueError(
            "The arrays come in another order than those of a model of this config: what --set says does not fit them."
        )
    return model


def _remarks(model: PreTrainedModel, original: dict[str, Tensor], training_arguments, overrides, options):
    config = model.config
    unknown = ["num_attention_heads", "hidden_act", "dropout"]
    if not config.attention_bias:  # such weights are of one head each
        unknown.remove("num_attention_heads")
    if config.is_encoder_decoder and config.decoder_type == "joined":
        unknown.append("encoder_swaps")
    if config.decoder_type == "joined":
        unknown.append("decoder_long_attention")
    if config.is_encoder_decoder:
        unknown.append("encoder_long_attention")
    if "none" not in (config.encoder_long_attention, config.decoder_long_attention):
        unknown += ["lsh_chunk_length", "lsh_rounds", "lsh_buckets"]
    if config.ff_sparsity is not None:
        unknown += ["ff_temperature", "ff_hard_probability", "ff_multiply_by_controller"]
    if config.position_embedding_type == "fixed_base":
        unknown.append("position_bases")
    told = [f"{name} {getattr(config, name)}" for name in unknown if name not in overrides]
    yield f"The checkpoint does not tell these, set as by default; change them with --set: {', '.join(told)}."
    if not config.is_encoder_decoder:
        yield "The original puts id 0 before each text; so do texts for this model have to begin with it."
    if options.tokenizer is None:
        yield "No tokenizer was saved, and no checkpoint holds one; generating text needs one: see --tokenizer."


CONVERTER = Converter(
    description="Convert a checkpoint of trax's Terraformer, encoder-decoder or ReformerLM into a folder for "
    "from_pretrained.",
    fields=TerraformerConfig.__dataclass_fields__,
    build=_build,
    remarks=_remarks,
    formats=".weights.npy.gz, or .safetensors with named leaves",
)


if __name__ == "__main__":
    with errors_in_one_line():
        CONVERTER.run()
