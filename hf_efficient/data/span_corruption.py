"""
Span corruption: a model reads a text with spans left out, and writes what they were.

    text    the old dog sees a red bird
    source  the <0> sees a <1> <eos>
    target  <0> old dog <1> red bird <eos>

As the original's code does it for the Scaling Transformer and Terraformer (arXiv 2111.12763), after T5 (arXiv
1910.10683): sentinels are the last ids of the vocabulary, the highest first, which are no ids of their own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def count_spans(length: int, noise_density: float = 0.15, mean_span_length: float = 3.0) -> tuple[int, int]:
    """
    Count what is left out of a text.

    Args:
        length (`int`): tokens of the text, at least 2.
        noise_density (`float`, defaults to 0.15): share of the tokens to leave out.
        mean_span_length (`float`, defaults to 3.0): of the spans.

    Returns:
        `tuple[int, int]`: tokens that are left out, at least 1 and not all, and spans.
    """
    noise = min(max(round(length * noise_density), 1), length - 1)
    return noise, min(max(round(noise / mean_span_length), 1), noise, length - noise)


def draw_spans(
    length: int,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    generator: np.random.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """
    Draw the spans of a text; every way to divide what is kept, and what is not, is equally likely.

    Args:
        length, noise_density, mean_span_length: see [`count_spans`].
        generator (`np.random.Generator`, *optional*): of the draws.

    Returns:
        `tuple[list[int], list[int]]`: lengths of spans that are kept, and of those that follow each and are left out.
    """
    generator = np.random.default_rng() if generator is None else generator
    noise, spans = count_spans(length, noise_density, mean_span_length)

    def divide(total: int) -> list[int]:
        cuts = np.sort(generator.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff([0, *cuts, total]).tolist()

    return divide(length - noise), divide(noise)


def corrupt_spans(
    ids: Sequence[int], kept: Sequence[int], left_out: Sequence[int], vocab_size: int, eos_token_id: int
) -> tuple[list[int], list[int]]:
    """
    Leave spans out of a text.

    Args:
        ids (`Sequence[int]`): tokens of the text.
        kept, left_out (`Sequence[int]`): lengths of spans, as [`draw_spans`] gives them; their sum is that of the text.
        vocab_size (`int`): ids that the model knows.
        eos_token_id (`int`): ends source and target.

    Returns:
        `tuple[list[int], list[int]]`: source and target.

    Raises:
        ValueError: if the spans are not those of the text, or more than there are ids.
    """
    if len(kept) != len(left_out) or sum(kept) + sum(left_out) != len(ids):
        raise ValueError(f"Spans of {sum(kept)} and {sum(left_out)} tokens do not divide a text of {len(ids)}.")
    if len(kept) >= vocab_size:
        raise ValueError(f"A vocabulary of {vocab_size} ids has no sentinels for {len(kept)} spans.")
    source, target, place = [], [], 0
    for number, (stay, leave) in enumerate(zip(kept, left_out, strict=True)):
        sentinel = vocab_size - 1 - number
        source += [*ids[place : place + stay], sentinel]
        target += [sentinel, *ids[place + stay : place + stay + leave]]
        place += stay + leave
    return [*source, eos_token_id], [*target, eos_token_id]


def text_length(
    max_source_length: int, max_target_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> int:
    """
    Find the longest text whose source and target are not longer than the given numbers of tokens.

    Raises:
        ValueError: if not even two tokens fit.
    """
    longest = 1
    for length in range(2, 2 * (max_source_length + max_target_length)):
        noise, spans = count_spans(length, noise_density, mean_span_length)
        if length - noise + spans + 1 > max_source_length or noise + spans + 1 > max_target_length:
            break
        longest = length
    if longest < 2:
        raise ValueError(
            f"Sources of {max_source_length} tokens and targets of {max_target_length} have no room for a text of two "
            "tokens with one left out."
        )
    return longest


class TextWindows:
    """
    Pieces of equal length of one long row of tokens, for [`SpanCorruptionCollator`]; the last may be shorter.

    Args:
        tokens (`np.ndarray`): the row.
        length (`int`): tokens of a piece, at least 2.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) + self.length - 2) // self.length  # a last one of one token has nothing to leave out

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"tokens": self.tokens[index * self.length : (index + 1) * self.length], "index": index}


class SpanCorruptionCollator:
    """
    Collator that leaves spans out of texts. What it draws for a text depends on its number, the epoch and the seed
    alone, so that a run that is resumed, or has other batches, sees the same.

    Args:
        pad (`Callable`): collator of rows with `input_ids` and `labels`, such as `DataCollatorForSeq2Seq`.
        vocab_size (`int`), eos_token_id (`int`): see [`corrupt_spans`].
        noise_density, mean_span_length (`float`): see [`count_spans`].
        seed (`int`, defaults to 0): of the draws.
    """

    def __init__(
        self,
        pad: Any,
        vocab_size: int,
        eos_token_id: int,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        seed: int = 0,
    ):
        self.pad, self.vocab_size, self.eos_token_id = pad, vocab_size, eos_token_id
        self.noise_density, self.mean_span_length, self.seed = noise_density, mean_span_length, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        pairs = []
        for row in rows:
            ids = row["tokens"].tolist()
            generator = np.random.default_rng([self.seed, self.epoch, row["index"]])
            spans = draw_spans(len(ids), self.noise_density, self.mean_span_length, generator)
            source, target = corrupt_spans(ids, *spans, self.vocab_size, self.eos_token_id)
            pairs.append({"input_ids": source, "labels": target})
        return self.pad(pairs)
