"""The name of a model's key/value cache in the installed release of transformers.

Since transformers 5.24 the cache is called `cache` in `generate`, in the forward passes of models and layers, in their
outputs and in the functions that build masks; before, it was `past_key_values`. This package writes `cache`. This
module maps that name for older releases, and accepts the older name from callers that still use it.
"""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging


logger = logging.get_logger(__name__)

OLD_CACHE_NAME = "past_key_values"
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
        kwargs (`dict[str, Any]`): keyword arguments with at most one of `cache` and `past_key_values`.
        name (`str`, defaults to `"cache"`): the name that the cache is to have.

    Returns:
        `dict[str, Any]`: the same arguments; `kwargs` itself is left as it was.

    Raises:
        ValueError: if both names are given.
    """
    other = OLD_CACHE_NAME if name == "cache" else "cache"
    if other not in kwargs:
        return kwargs
    if kwargs.get(name) is not None and kwargs[other] is not None:
        raise ValueError("Give `cache` or `past_key_values`, which are two names of one argument, not both.")
    renamed = {key: value for key, value in kwargs.items() if key not in ("cache", OLD_CACHE_NAME)}
    return {**renamed, name: kwargs[other] if kwargs.get(name) is None else kwargs[name]}


def accepts_cache_by_either_name(forward: Callable) -> Callable:
    """Decorate a forward pass with an argument `cache` so that it also takes that argument as `past_key_values`.

    Older releases of transformers call it by that name. Under a newer one the call comes from a program that was
    written for an older release; the argument is used, and a warning says its new name once.
    """

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        if OLD_CACHE_NAME in kwargs:
            if CACHE_NAME != OLD_CACHE_NAME and not torch.compiler.is_compiling():
                logger.warning_once("`past_key_values` is deprecated. Use `cache` instead.")
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
    "CacheGenerationMixin",
    "CacheOutputMixin",
    "accepts_cache_by_either_name",
    "cache_kwarg",
    "rename_cache_kwarg",
]
