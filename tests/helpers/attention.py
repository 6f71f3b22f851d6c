"""Attention functions of transformers, replaced while a test runs."""

from collections.abc import Callable

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def replace_attention(monkeypatch, name: str, function: Callable) -> None:
    """
    Let models call `function` for an attention's name until the test ends.

    Assigned to `ALL_ATTENTION_FUNCTIONS[name]` itself it would not be undone: the old function would stay behind as an
    override, which hides what a later test registers.
    """
    mapping = {**ALL_ATTENTION_FUNCTIONS._local_mapping, name: function}
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", mapping)
