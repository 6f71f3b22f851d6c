"""Words in rows of tokens."""

from collections.abc import Iterator, Sequence


def word_spans(word_ids: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """
    Find the words of a row, from left to right.

    Args:
        word_ids (`Sequence`):
            Number of the word that each token belongs to; -1 or None for none.

    Yields:
        `tuple[int, int]`: start and end of a word, half-open.
    """
    start = 0
    for i in range(1, len(word_ids) + 1):
        if i < len(word_ids) and word_ids[i] == word_ids[start]:
            continue
        first = word_ids[start]
        if first is not None and first >= 0:
            yield start, i
        start = i
