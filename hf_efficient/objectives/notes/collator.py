"""Collation of batches with the places of rare words."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...utils.word_spans import word_spans


class SpanFinder:
    """
    Finds rare words in a row of tokens.

    A word at a row's border may be cut, and is left out, unless its number says that it begins the document.

    Args:
        keys (`Sequence[Sequence[int]]`):
            Token ids of each rare word. The index of a word among them is its key.
    """

    def __init__(self, keys: Sequence[Sequence[int]]):
        self._numbers = {tuple(key): number for number, key in enumerate(keys)}

    def __call__(self, input_ids: Sequence[int], word_ids: Sequence[int]) -> list[tuple[int, int, int]]:
        """Find (start, end, key) of each occurrence, half-open; `word_ids` are -1 for special tokens."""
        input_ids, word_ids = list(input_ids), list(word_ids)
        words = list(word_spans(word_ids))
        if words and word_ids[words[0][0]] != 0:
            words = words[1:]
        spans = []
        for start, end in words[:-1]:
            number = self._numbers.get(tuple(input_ids[start:end]))
            if number is not None:
                spans.append((start, end, number))
        return spans


class RareWordCollator:
    """
    Adds to the batches of another collator where rare words occur in the rows before masking.

    The batch gets `note_spans` `(batch, most, 3)`: (start, end, key) of each occurrence in a row, filled up with -1.
    There is one row for each row of the batch, so that `note_spans` can be split as the other tensors can.

    Args:
        collator (`Callable`):
            A collator that pads on the right, such as a [`~hf_efficient.objectives.masking.MaskingCollator`]. Calls of
            `set_epoch` and `with_seed` are passed on to it.
        keys (`Sequence[Sequence[int]]`):
            See [`SpanFinder`].
    """

    def __init__(self, collator: Callable[..., dict[str, Any]], keys: Sequence[Sequence[int]]):
        self.collator: Any = collator
        self.find = SpanFinder(keys)

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the other collator, which Trainer saves in checkpoints."""
        return getattr(self.collator, "tokenizer", None)

    def set_epoch(self, epoch: int) -> None:
        """See [`~hf_efficient.objectives.masking.MaskingCollator.set_epoch`]."""
        self.collator.set_epoch(epoch)

    def with_seed(self, seed: int) -> "RareWordCollator":
        """Return a collator of the same settings with another seed, say for evaluation."""
        other = copy.copy(self)
        other.collator = self.collator.with_seed(seed)
        return other

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: if a row has no `word_ids`.
        """
        if any("word_ids" not in feature for feature in features):
            raise ValueError(
                "Notes on rare words need `word_ids` in every row: make the rows with `pack_blocks(..., "
                "word_ids=True)` and pass `remove_unused_columns=False` to TrainingArguments."
            )
        found = [self.find(feature["input_ids"], feature["word_ids"]) for feature in features]
        note_spans = torch.full((len(found), max(len(spans) for spans in found), 3), -1)
        for row, spans in enumerate(found):
            if spans:
                note_spans[row, : len(spans)] = torch.tensor(spans)
        return {**self.collator(features), "note_spans": note_spans}
