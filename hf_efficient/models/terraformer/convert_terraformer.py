"""Conversion of weights of the authors' library (trax) to Terraformer, its encoder-decoder and Reformer, and back."""

from torch import Tensor

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
    view, recurrences, bases = encoder_view(config), config.ff_sru_layers, len(config.position_bases or [])
    plain = config.decoder_type == "cross_attention"
    half = "attn_half." if not plain else ""
    attention = attention_rules(view, f"{half}attn", "attention" if plain else "attention.attention")
    norm = norm_rules("attn_norm", "attention_norm") if plain else norm_rules("attn_half.norm", "attention.norm")
    feed_forward = feed_forward_rules(recurrences, "ff" if plain else "ff_half")
    layers = config.num_encoder_layers
    return [
        *position_rules(bases, "encoder.", "model.encoder.positions"),
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
    """Rules for all leaves of a model."""
    bases = len(config.position_bases or [])
    final = norm_rules("final_norm", "model.decoder.norm")
    if not config.is_encoder_decoder:
        return [
            Rule("embedding", "model.embed_tokens.weight"),
            *position_rules(bases, "", "model.decoder.positions"),
            *_decoder_rules(config, ""),
            *final,
            *head_rules(config),
        ]
    return [
        Rule("embedding", "model.encoder.embed_tokens.weight"),
        *_encoder_rules(config),
        *position_rules(bases, "decoder.", "model.decoder.positions"),
        *_decoder_rules(config, "decoder."),
        *final,
        *head_rules(config),
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


def build_model(
    original: dict[str, Tensor], config: TerraformerConfig
) -> TerraformerForConditionalGeneration | TerraformerForCausalLM:
    """
    Build the model of a checkpoint.

    Raises:
        ValueError: if the checkpoint does not fit the config.
    """
    model = (TerraformerForConditionalGeneration if config.is_encoder_decoder else TerraformerForCausalLM)(config)
    state_dict = {name: tensor.float() for name, tensor in convert_state_dict(original, config).items()}
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    if missing or unexpected:
        raise ValueError(f"The checkpoint does not fit the config: missing {missing[:4]}, unexpected {unexpected[:4]}.")
    return model.eval()
