"""Configs of smaller encoders."""

import copy

from transformers import PreTrainedConfig


def _number_of_heads(width: int, head_size: int) -> int:
    """The number of heads that keeps their size best, even if it can be, as rotary positions want it."""
    fitting = [heads for heads in range(1, width + 1) if width % heads == 0]
    even = [heads for heads in fitting if (width // heads) % 2 == 0]
    return min(even or fitting, key=lambda heads: (abs(width // heads - head_size), heads))


def shrink_config(
    config: PreTrainedConfig,
    divider: int = 3,
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
) -> PreTrainedConfig:
    """
    The config of a smaller encoder of the same architecture.

    Width and feed-forward width are divided, with heads of the same size if the new width allows it; the depth stays,
    as in ELECTRA-Base (Clark et al. 2020, table 6) and MC-BERT.

    Args:
        config (`PreTrainedConfig`):
            Of the large encoder; left unchanged.
        divider (`int`, *optional*, defaults to 3):
            The new width is `config.hidden_size // divider`, less 1 if it must be even.
        hidden_size (`int`, *optional*):
            The new width itself, in place of `divider`.
        num_hidden_layers (`int`, *optional*):
            The new depth; the first layers' settings are kept where layers differ.
        num_attention_heads (`int`, *optional*):
            The new number of heads, in place of one that keeps their size.

    Raises:
        ValueError: for a width or depth that is not positive, or heads that do not divide the width.
        StrictDataclassError: if the architecture refuses the sizes.
    """
    small, large = copy.deepcopy(config), config.hidden_size
    width = large // divider if hidden_size is None else hidden_size
    if getattr(config, "bidirectional", False) and hidden_size is None:
        width -= width % 2
    depth = config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
    if width < 1 or depth < 1:
        raise ValueError(f"A generator needs a positive width and depth, not {width} and {depth} (divider {divider}).")
    changes: dict = {"hidden_size": width, "num_hidden_layers": depth, "architectures": None}
    for name in ("intermediate_size", "num_key_value_heads"):
        if getattr(config, name, None) is not None:
            changes[name] = max(1, getattr(config, name) * width // large)
    if hidden_size is None and "intermediate_size" in changes:
        changes["intermediate_size"] = max(1, config.intermediate_size // divider)
    if hasattr(config, "embedding_size"):
        changes["embedding_size"] = width
    heads = num_attention_heads
    if hasattr(config, "projection_size"):  # SRU++, where heads share the projection
        heads = heads or max(1, config.num_attention_heads * width // large)
        sizes = config.projection_size if isinstance(config.projection_size, list) else [config.projection_size]
        sizes = [size and max(1, size * width // (large * heads)) * heads for size in sizes]
        changes["projection_size"] = sizes if isinstance(config.projection_size, list) else sizes[0]
    elif heads is None:
        heads = _number_of_heads(width, large // config.num_attention_heads)
    elif heads < 1 or width % heads:
        raise ValueError(f"A width of {width} can't be divided among {heads} heads (generator_num_attention_heads).")
    changes["num_attention_heads"] = heads
    for name in ("layer_types", "projection_size"):
        value = changes.get(name, getattr(config, name, None))
        if isinstance(value, list) and not isinstance(getattr(type(config), name, None), property):
            changes[name] = value[:depth]
    for name, value in changes.items():
        setattr(small, name, value)
    small.validate()
    return small
