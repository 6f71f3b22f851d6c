"""A check of the keyword arguments that a forward pass hands on, among which a mistyped one would be lost."""

import difflib
import inspect
from collections.abc import Iterable

from torch import nn
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs


# What any forward pass takes beyond its own arguments: what the library documents, what its decorators and forms of
# attention look for, and the tokenizers that `generate` needs for stop strings and hands on to the forward pass.
TRANSFORMERS_KEYWORDS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *FlashAttentionKwargs.__annotations__,
        *("return_dict", "use_cache", "kernel_options", "debug_io", "debug_io_dir", "prune_layers"),
        *("tokenizer", "assistant_tokenizer"),
    }
)


def check_keywords(keywords: Iterable[str], accepted: frozenset[str], model: nn.Module) -> None:
    """
    Check the names of keyword arguments.

    Args:
        keywords (`Iterable[str]`): those that the signature does not name.
        accepted (`frozenset[str]`): names that may be among them.
        model (`nn.Module`): the one whose forward pass it is.

    Raises:
        TypeError: for any other name, as Python does; the message gives the argument of this model that is written
            most like it, if there is one.
    """
    for name in keywords:
        if name not in accepted:
            message = f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}."
            own = {*inspect.signature(type(model).forward).parameters, *accepted} - {"self", "kwargs", name}
            close = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
            raise TypeError(f"{message} Did you mean {close[0]!r}?" if close else message)
