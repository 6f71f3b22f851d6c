"""Calls of models, and what they mean in canonical form."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .subjects import Subject


LOWEST = -1e30  # added to the scores of pairs that may not attend


@dataclass
class Meaning:
    """A call in canonical form; rows are those of the encoder (of multiple choice, all choices of all rows).

    Args:
        inputs: ids `(rows, length)`, int64, or embeddings `(rows, length, width)`, float64.
        real: `(rows, length)`, `False` at padding.
        bias: `(rows, heads or 1, length, length)`, float64, added to the scores in place of the causal mask.
        documents: `(rows, length)`, the number of each token's document.
        past: ids `(rows, past)` that an earlier call has read, and which of them were not padding.
        keep: positions of the wanted logits: a number of last ones (0: all), or a tensor.
        targets: labels by name, as int64 or float64.
        shifted: whether causal targets stand where they are predicted already.
        count: number of targets to divide the loss by.
        window: how far back a token sees.
    """

    inputs: Tensor
    real: Tensor
    bias: Tensor | None = None
    documents: Tensor | None = None
    past: tuple[Tensor, Tensor] | None = None
    keep: Any = 0
    targets: dict[str, Tensor] = field(default_factory=dict)
    shifted: bool = False
    count: Any = None
    window: int | None = None


@dataclass
class Case:
    """A call, what it means, and what has to come of it.

    Args:
        expects: `value` (the right one), `refusal` (an error or a warning), or `either`.
        changes: names of what makes the call other than the plainest one.
        fault: name of the change that has to be refused.
    """

    seed: int
    rng: random.Random
    generator: torch.Generator
    subject: Subject
    batch: int
    choices: int | None
    length: int
    mode: str
    meaning: Meaning
    call: dict[str, Any] = field(default_factory=dict)
    expects: str = "value"
    changes: list[str] = field(default_factory=list)
    fault: str = ""

    @property
    def rows(self) -> int:
        return self.batch * (self.choices or 1)

    @property
    def task(self) -> str | None:
        return self.subject.key.task

    @property
    def causal(self) -> bool:
        """Whether the model reads from left to right alone, so that it can have a past."""
        if self.subject.key.family == "terraformer":
            return self.task != "sequence"
        return bool(getattr(self.subject.config, "is_causal", False))

    @property
    def recurrent(self) -> bool:
        """Whether padding may stand anywhere, rows may hold documents, and a causal model keeps states in its cache."""
        return self.subject.key.family in ("srupp", "scaling_transformer", "terraformer")

    @property
    def packs(self) -> bool:
        """Whether the model takes positions, documents that share a row, and masks of which key a query sees."""
        return self.subject.key.family != "terraformer" or self.task == "causal"

    @property
    def has_source(self) -> bool:
        """Whether rows are sources, whose padding stands before or behind all tokens."""
        return self.subject.key.family == "terraformer" and self.task == "sequence"

    @property
    def has_memory(self) -> bool:
        """Whether the model takes memory of earlier segments, and a window of attention."""
        return self.subject.key.family == "srupp"

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def outside(self, rows: Tensor) -> Tensor:
        """A tensor of rows in the shape in which the head takes it."""
        return rows if self.choices is None else rows.unflatten(0, (self.batch, self.choices))

    def changed(self, name: str) -> None:
        self.changes.append(name)
