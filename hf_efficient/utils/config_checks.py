"""Checks of a config's fields, with errors that name the field, its value and what it may be."""

import difflib
import math
from collections.abc import Collection
from typing import Any


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def check_range(
    config: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """
    Check that numbers are finite and lie in a range. Fields that are `None` are left out.

    Args:
        config (`PreTrainedConfig`): has the fields.
        names (`str`): the fields.
        least, above (`float`, *optional*): lower bound, which may be reached or not.
        most, below (`float`, *optional*): upper bound, which may be reached or not.

    Raises:
        ValueError: for the first field that is outside, infinite or NaN.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        fits = (least is None or value >= least) and (above is None or value > above)
        fits = fits and (most is None or value <= most) and (below is None or value < below)
        if not (fits and math.isfinite(value)):
            bounds = {"at least": least, "above": above, "at most": most, "below": below}
            wanted = [] if math.isfinite(value) else ["finite"]
            wanted += [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
            raise ValueError(f"{name} must be {' and '.join(wanted).replace('above 0', 'positive')}, not {value}.")


def check_rates(config: Any, *names: str) -> None:
    """
    Check rates of dropout: at least 0 and below 1, since at 1 nothing would be left.

    Raises:
        ValueError: for the first that is not.
    """
    check_range(config, *names, least=0, below=1)


def check_choice(config: Any, name: str, choices: Collection[str]) -> None:
    """
    Raises:
        ValueError: if a field is none of the `choices`; the message lists them, the one that is written most like it
            first.
    """
    value = getattr(config, name)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        *others, last = map(repr, sorted(choices))
        raise ValueError(f"{name} is {value!r}, but must be {', '.join(others)} or {last}.{hint}")


def check_activations(config: Any, *names: str) -> None:
    """
    Raises:
        ValueError: if a field names no activation of transformers.
    """
    from transformers.activations import ACT2FN  # imports torch

    for name in names:
        check_choice(config, name, ACT2FN)


def check_token_ids(config: Any, *names: str) -> None:
    """
    Raises:
        ValueError: if a field holds an id outside the vocabulary.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < config.vocab_size:
            raise ValueError(f"{name} is {value}, outside the vocabulary of {config.vocab_size} ids.")


class LabelChecksMixin:
    """Checks of the fields on labels that every config inherits. Stands before `PreTrainedConfig` among the bases."""

    num_labels: Any
    problem_type: Any

    def __post_init__(self, **kwargs: Any) -> None:
        number = kwargs.get("num_labels")
        if number is not None and number < 1:  # names are made of it, and it is lost
            raise ValueError(f"num_labels must be at least 1, not {number}.")
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def validate_problem(self) -> None:
        """Check the number of labels and the kind of problem; called at construction and before saving."""
        check_range(self, "num_labels", least=1)
        if self.problem_type is not None:
            check_choice(self, "problem_type", PROBLEM_TYPES)
