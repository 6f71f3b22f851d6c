"""Races: engines that are measured beside each other, and their sizes. A name says what an engine is, as `int8 all`."""

from dataclasses import dataclass, replace
from typing import Any

from hf_efficient import ScalingTransformerConfig


KINDS = ("dense", "ff", "qkv", "ff-qkv", "all", "all-r16")
FORMATS = ("fp32", "bf16", "int8", "int4")
ANCHOR = "llama Q4_0"
IN_TORCH = "-in-torch"  # ends the name of an engine that is another one's model without compiled code


@dataclass(frozen=True)
class Size:
    """
    Sizes that all engines of a race have.

    Args:
        layers, width, heads, vocabulary (`int`): of the model.
        preset (`str`): what presets of this size begin with.
        dense (`str`, *optional*): the preset of the dense twin, if it begins otherwise.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int = 32_000
    preset: str = "24x1024"
    dense: str | None = None

    def settings(self, kind: str) -> tuple[str, dict[str, Any]]:
        """Name the preset of a kind, and the fields in which it differs at this size; hidden units and rank keep their
        ratio to the width."""
        preset = f"{self.preset}-{kind.removesuffix('-r16')}"
        if kind == "dense" and self.dense is not None:
            preset = self.dense
        config: Any = ScalingTransformerConfig.preset(preset)
        found = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": config.intermediate_size * self.width // config.hidden_size,
            "vocab_size": self.vocabulary,
        }
        if config.ff_rank is not None:
            rank = 16 if kind.endswith("-r16") else config.ff_rank
            found["ff_rank"] = max(1, rank * self.width // config.hidden_size)
        return preset, found

    def gpt2(self) -> dict[str, Any]:
        """Fields of transformers' GPT-2 of the dense twin's sizes."""
        return {
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.settings("dense")[1]["intermediate_size"],
            "vocab_size": self.vocabulary,
        }

    def gguf(self) -> dict[str, int]:
        """Sizes of llama.cpp's GPT-2 of the dense twin's sizes."""
        return {
            "layers": self.layers,
            "width": self.width,
            "hidden": self.settings("dense")[1]["intermediate_size"],
            "heads": self.heads,
            "vocabulary": self.vocabulary,
        }


FULL = Size(24, 1024, 16)
# Layers that cost nothing but the calls.
NARROW = Size(24, 64, 1, vocabulary=512)
WIDE = Size(2, 9216, 96, preset="14x9216", dense="15x9216-dense")
TINY = {
    "full": Size(2, 32, 2, 320),
    "narrow": Size(3, 32, 1, 320),
    "wide": replace(WIDE, width=1152, heads=12, vocabulary=320),
}


@dataclass(frozen=True)
class Race:
    """
    Engines that are measured in turn.

    Args:
        engines (`tuple[str, ...]`): their names. One that ends in `/1` is the model of the same name without, cut to
            one layer.
        size (`str`, defaults to `"full"`): `"full"`, `"narrow"` or `"wide"`.
        contexts (`tuple[int, ...]`, defaults to 16, 512 and 2,048): tokens before those that are measured.
        prompt (`int`, *optional*): measure how long a prompt of so many tokens takes, and no decoding.
    """

    engines: tuple[str, ...]
    size: str = "full"
    contexts: tuple[int, ...] = (16, 512, 2048)
    prompt: int | None = None


def _of(form: str, *kinds: str) -> tuple[str, ...]:
    return tuple(f"{form} {kind}" for kind in kinds)


def _wide(*engines: str) -> Race:
    return Race(tuple(name for one in engines for name in (one, f"{one}/1")), "wide", contexts=(16,))


RACES = {
    "formats": Race((*(f"{form} all" for form in FORMATS), ANCHOR, "llama Q4_K_M", "llama Q8_0")),
    "fp32": Race((*_of("fp32", "dense", "ff", "qkv"), ANCHOR)),
    "fp32-sparse": Race((*_of("fp32", "dense", "ff-qkv", "all", "all-r16"), ANCHOR)),
    "bf16": Race((*_of("bf16", *KINDS), ANCHOR)),
    "int8": Race((*_of("int8", *KINDS), ANCHOR)),
    "int4": Race((*_of("int4", *KINDS), ANCHOR)),
    "peers": Race(("fp32 dense", "bf16 dense", "fp32 gpt2", "bf16 gpt2", ANCHOR, "llama F16", "llama BF16")),
    "overhead": Race(
        (*_of("fp32", "dense", "all", "gpt2"), "bf16 all", "int8 all", "int4 all", "llama F16", ANCHOR),
        size="narrow",
        contexts=(16,),
    ),
    "prompt": Race(
        (*(f"{form} all" for form in FORMATS), *_of("fp32", "dense", "gpt2"), "int8 dense", ANCHOR, "llama Q8_0"),
        contexts=(0,),
        prompt=512,
    ),
    "wide-bf16": _wide("bf16 dense", f"bf16 dense{IN_TORCH}", "bf16 all", ANCHOR),
    # Quantised first: its floats are gone before the dense model needs room.
    "wide-int8": _wide("int8 all", "bf16 dense", f"bf16 dense{IN_TORCH}", ANCHOR),
    "wide-int4": _wide("int4 all", "bf16 dense", f"bf16 dense{IN_TORCH}", ANCHOR),
}
