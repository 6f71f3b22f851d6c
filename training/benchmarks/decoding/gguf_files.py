"""Files of llama.cpp with random weights in GPT-2's shape, and what a token reads of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


# Numbers of a block and its bytes, by the names of GGML.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
# Of which a token reads one row.
TABLES = ("token_embd.weight", "position_embd.weight")
POOL = 1 << 22  # random numbers that are drawn; matrices repeat them from somewhere on


@dataclass(frozen=True)
class Shape:
    """
    Sizes of a GPT-2.

    Args:
        layers, width, hidden, heads, vocabulary (`int`): of the model; `hidden` is that of the feed-forward layer.
        positions (`int`, defaults to 4096): rows of the table.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    positions: int = 4096

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}x{self.hidden}-{self.vocabulary}"


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a GPT-2 as llama.cpp does, with their shapes in the order of torch; the output layer is one
    of its own."""
    width = shape.width
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocabulary, width),
        "position_embd.weight": (shape.positions, width),
        "output_norm.weight": (width,),
        "output_norm.bias": (width,),
        "output.weight": (shape.vocabulary, width),
    }
    maps = {
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_up": (shape.hidden, width),
        "ffn_down": (width, shape.hidden),
    }
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            found |= {f"blk.{layer}.{norm}.{what}": (width,) for what in ("weight", "bias")}
        for name, size in maps.items():
            found |= {f"blk.{layer}.{name}.weight": size, f"blk.{layer}.{name}.bias": size[:1]}
    return found


def bytes_of(size: tuple[int, ...], kind: str) -> int:
    """
    Count the bytes of a tensor in a format of GGML.

    Raises:
        ValueError: for a format that is not known here, or rows that are no whole blocks of it.
    """
    if kind not in BLOCKS:
        raise ValueError(f"The format {kind!r} is none of {', '.join(BLOCKS)}.")
    numbers, taken = BLOCKS[kind]
    if size[-1] % numbers:
        raise ValueError(f"Rows of {size[-1]} numbers are no whole blocks of {kind}, which have {numbers}.")
    return int(np.prod(size)) // numbers * taken


def bytes_read(kinds: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """
    Count the bytes of weights that decoding a token reads.

    Args:
        kinds (`Mapping[str, tuple]`): by name of a tensor its shape in the order of torch, and its format.
    """
    return sum(bytes_of(size[1:] if name in TABLES else size, kind) for name, (size, kind) in kinds.items())


def planned(shape: Shape, kind: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and formats of a file with all matrices in one format and all else, positions too, in float32."""
    return {
        name: (size, "F32" if len(size) == 1 or name == "position_embd.weight" else kind)
        for name, size in tensors_of(shape).items()
    }


def kinds_in(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read shapes and formats of the tensors of a file."""
    from gguf import GGUFReader

    tensors: Any = GGUFReader(path).tensors
    return {t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name) for t in tensors}


def random_values(sizes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Draw the tensors one by one: matrices in float16 of deviation 0.02, norms 1 and biases 0 in float32."""
    generator = np.random.default_rng(seed)
    pool = (0.02 * generator.standard_normal(POOL, dtype=np.float32)).astype(np.float16)
    for name, size in sizes.items():
        if len(size) == 1:
            yield name, np.full(size, float(name.endswith("norm.weight")), dtype=np.float32)
            continue
        values = np.resize(pool[generator.integers(POOL // 2) :], size)
        yield name, values.astype(np.float32) if name == "position_embd.weight" else values


def write(path: Path, shape: Shape) -> None:
    """Write a GPT-2 with random weights in float16, and a vocabulary of made-up words, without which llama.cpp's
    servers end."""
    import gguf

    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "gpt2")
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    special, words = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*special, *words, *(f"w{index}" for index in range(shape.vocabulary))][: shape.vocabulary]
    kind = gguf.TokenType
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, *[kind.NORMAL] * shape.vocabulary]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types(kinds[: shape.vocabulary])
    for name, values in random_values(tensors_of(shape)):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)
