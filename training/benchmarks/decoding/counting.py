"""Bytes of weights that a token reads, counted on the modules of a model."""

from torch import nn

from hf_efficient.modules.token_positions import LearnedPositions


# The first one whose words a module's name holds; what is in none are norms.
PARTS = {
    "feed-forward": ("feed_forward", "mlp"),
    "attention": ("attention", "attn", "ln_1"),
    "output layer": ("lm_head",),
    "embeddings": ("embed_tokens", "positions", "wte", "wpe"),
}
# Of a sparse feed-forward layer, `(blocks, block size, ...)`: a token takes one unit in each block.
UNITS = ("up", "down", "units")
# Of embeddings and positions, `(rows, width)`: a token takes one row.
TABLES = ("weight", "table")


def part_of(name: str) -> str:
    """Name the part of a model that a module belongs to."""
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "norms")


def own_bytes(module: nn.Module) -> int:
    """Count the bytes that a token reads of a module's own weights, those of its children left out: of tables one row,
    of units one in each block, of all else everything, in the format that it is stored in."""
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    is_table, is_sparse = isinstance(module, (nn.Embedding, LearnedPositions)), hasattr(module, "controller_up")
    total = 0
    for name, tensor in tensors.items():
        if is_table and name in TABLES:
            total += tensor.nbytes // len(tensor)
        else:
            total += tensor.nbytes // (tensor.shape[1] if is_sparse and name in UNITS else 1)
    return total


def bytes_read(model: nn.Module) -> dict[str, int]:
    """Count the bytes of weights that decoding a token reads, by part of the model."""
    found = dict.fromkeys((*PARTS, "norms"), 0)
    for name, module in model.named_modules():
        found[part_of(name)] += own_bytes(module)
    return found
