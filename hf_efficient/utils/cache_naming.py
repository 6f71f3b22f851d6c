"""The name of a model's key/value cache in the installed release of transformers.

Since transformers 5.24 the cache is called `cache` in `generate`, in the forward passes of models and layers, in their
outputs and in the functions that build masks. Before, it was `past_key_values`, and `cache_params` in models that keep
states alone. This package writes `cache`. This module maps that name for older releases, and accepts the older names
from callers that still use them.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


OLD_CACHE_NAME = "past_key_values"
CACHE_NAMES = ("cache", OLD_CACHE_NAME, "cache_params")
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD_CACHE_NAME


def cache_kwarg(cache: Cache | None) -> dict[str, Cache | None]:
    """Name a cache as a keyword argument for outputs, mask functions and checkpointed layers of transformers.

    Args:
        cache (`Cache`, *optional*): the cache, or `None`.

    Returns:
        `dict[str, Cache | None]`: one entry, named as the installed release names it.
    """
    return {CACHE_NAME: cache}


def rename_cache_kwarg(kwargs: dict[str, Any], name: str = "cache") -> dict[str, Any]:
    """Rename the cache among keyword arguments, if there is one.

    Args:
        kwargs (`dict[str, Any]`): keyword arguments with at most one of `cache`, `past_key_values` and `cache_params`.
        name (`str`, defaults to `"cache"`): the name that the cache is to have.

    Returns:
        `dict[str, Any]`: the same arguments; `kwargs` itself is left as it was.

    Raises:
        ValueError: if a cache is given under two names.
    """
    given = [key for key in CACHE_NAMES if key in kwargs]
    if given in ([], [name]):
        return kwargs
    caches = [kwargs[key] for key in given if kwargs[key] is not None]
    if len(caches) > 1:
        raise ValueError(f"Give one of {', '.join(given)}, which are names of one argument, not several.")
    others = {key: value for key, value in kwargs.items() if key not in given}
    return {**others, name: caches[0] if caches else None}


def accepts_cache_by_either_name(forward: Callable) -> Callable:
    """Decorate a forward pass with an argument `cache` so that it also takes that argument as `past_key_values`.

    Older releases of transformers call it by that name. Under a newer one the call comes from a program that was
    written for an older release; the argument is used, and a `FutureWarning` says its new name.
    """

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        old = [name for name in CACHE_NAMES[1:] if name in kwargs]
        if old:
            if CACHE_NAME == "cache" and not torch.compiler.is_compiling():
                warnings.warn(f"`{old[0]}` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=2)
            kwargs = rename_cache_kwarg(kwargs)
        return forward(*args, **kwargs)

    return wrapper


class CacheOutputMixin:
    """Attribute `cache` of a model's output, under releases whose outputs call that field `past_key_values`."""

    if CACHE_NAME == OLD_CACHE_NAME and not TYPE_CHECKING:

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values


class CacheGenerationMixin:
    """`generate(cache=...)`, under releases that call that argument `past_key_values`.

    Stands before `GenerationMixin` among the bases of a model.
    """

    if CACHE_NAME == OLD_CACHE_NAME:

        def generate(self, *args, **kwargs):
            return super().generate(*args, **rename_cache_kwarg(kwargs, OLD_CACHE_NAME))  # type: ignore[misc]


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "CacheGenerationMixin",
    "CacheOutputMixin",
    "accepts_cache_by_either_name",
    "cache_kwarg",
    "rename_cache_kwarg",
]
