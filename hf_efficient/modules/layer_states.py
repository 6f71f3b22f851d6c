"""States that a layer carries from token to token, in the layer of a cache that holds keys and values as well."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def read_state(cache: Cache | None, layer_idx: int) -> Tensor | None:
    """The state `(batch, size)` that a cache's layer holds after earlier calls, if it does."""
    if cache is None or layer_idx >= len(cache.layers) or not cache.has_previous_state(layer_idx):
        return None
    # `[..., -1]`: after assisted decoding recorded several, the last is the current one. Read from the cache's layer:
    # `Cache.get_conv_state` is not in transformers 5.17.
    held: Any = cache.layers[layer_idx]
    states = held.conv_states[0]
    if states.shape[-1] == 0:  # all tokens were taken back
        return None
    state = states[..., -1]
    # The cache is updated in place, and a backward pass reads what it held.
    return state.clone() if torch.is_grad_enabled() else state


def keep_states(cache: Cache | None, layer_idx: int, states: Sequence[Tensor]) -> None:
    """
    Let a cache's layer hold the states of a call.

    Args:
        cache (`Cache`, *optional*): nothing is kept without one.
        layer_idx (`int`): of the cache's layer.
        states (`Sequence[Tensor]`): one beside the other, `(batch, steps, size)` each: the last step's, or all of them
            where [`records_all`] says so.
    """
    if cache is None or not states:
        return
    # One state for all, in float32 or better, since transformers 5.17 knows one: a kernel of size 1 keeps the last
    # step's, and all of them while a rollback may be asked for.
    state = torch.cat([one.to(torch.promote_types(one.dtype, torch.float32)) for one in states], dim=-1)
    cache.update_conv_state(state.transpose(1, 2), layer_idx, conv_kernel_size=1)


def records_all(cache: Cache | None, layer_idx: int) -> bool:
    """Return whether a cache's layer keeps the state of every step, to be rolled back."""
    # A cache without a config grows layer by layer, as keys come.
    if cache is None or layer_idx >= len(cache.layers):
        return False
    return getattr(cache.layers[layer_idx], "record_past", False)
