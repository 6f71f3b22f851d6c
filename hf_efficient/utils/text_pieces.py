"""Sentences of a text, and pieces of a long document that fit a model."""

import re
from bisect import bisect_left
from typing import Any


_END = re.compile(r"([.!?\u2026][\"'\u201d\u2019)\]]*)\s+(?=[\"'\u201c\u2018(\[]*[^\W_a-z])|\s*\n\s*")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Fig|Eq|No|vs|al|etc|cf|approx)|e\.g|i\.e)\.$")


def _sentence_ends(text: str) -> list[tuple[int, int]]:
    """Find where each sentence but the last ends, and where the next one begins."""
    found = []
    for match in _END.finditer(text):
        end = match.start() if match[1] is None else match.end(1)
        if match[1] is None or not _ABBREVIATION.search(text[max(0, end - 12) : end]):
            found.append((end, match.end()))
    return found


def split_sentences(text: str) -> list[str]:
    """
    Split a text into sentences by rules: one ends at a line break, or at `.`, `!` or `?` before white space and a
    capital, a digit or a letter of a script without capitals, but not behind an initial or a common English
    abbreviation.

    Args:
        text (`str`): any text.

    Returns:
        `list[str]`: without white space at their ends, and none empty.
    """
    starts, ends = [0], []
    for end, start in _sentence_ends(text):
        ends.append(end)
        starts.append(start)
    sentences = (text[start:end].strip() for start, end in zip(starts, [*ends, len(text)], strict=True))
    return [sentence for sentence in sentences if sentence]


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def table_length(config: Any) -> int | None:
    """The length of a model's table of positions, by its config; `None` without one."""
    has_table = getattr(config, "position_embedding_type", "learned") not in ("none", "fixed_base")
    return getattr(config, "max_position_embeddings", None) if has_table else None


def source_limit(config: Any, tokenizer: Any) -> int | None:
    """
    Find how many tokens a model reads at once.

    Args:
        config (`PreTrainedConfig`): of the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.

    Returns:
        `int` or `None`: the shorter of the model's table of positions and the tokenizer's limit; `None` without either.
    """
    limits = [table_length(config), tokenizer.model_max_length]
    known = [int(limit) for limit in limits if limit is not None and limit < 1e9]  # tokenizers say 1e30 for no limit
    return min(known, default=None)


def split_document(tokenizer: Any, text: str, max_length: int | None) -> list[list[int]]:
    """
    Tokenise a document in pieces that a model can read, each with the special tokens of a text of its own.

    Pieces are about equally long. They end at the end of a sentence where there is one in their second half, which a
    tokenizer of Python alone does not tell.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        text (`str`): the document.
        max_length (`int`, *optional*): most tokens of a piece, special ones included; `None` for one piece.

    Returns:
        `list[list[int]]`: ids of each piece; one, of the special tokens alone, for an empty text.

    Raises:
        ValueError: if the special tokens leave no room.
    """
    before, behind = special_ids(tokenizer)
    options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, **options)
    ids = list(encoded["input_ids"])
    room = len(ids) if max_length is None else max_length - len(before) - len(behind)
    if max_length is not None and room < 1:
        raise ValueError(f"Pieces of {max_length} tokens have no room beside the special ones.")
    ends: list[int] = []
    if tokenizer.is_fast and len(ids) > room:
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = [bisect_left(starts, end) for end, _ in _sentence_ends(text)]
    cuts = [0]
    while len(ids) - cuts[-1] > room:
        cuts.append(_next_cut(cuts[-1], len(ids), room, ends))
    bounds = zip(cuts, [*cuts[1:], len(ids)], strict=True)
    return [[*before, *ids[start:end], *behind] for start, end in bounds]


def _next_cut(start: int, length: int, room: int, ends: list[int]) -> int:
    """Find the end of a piece that begins at `start`: that of a sentence which is nearest to an even split."""
    pieces = -(-(length - start) // room)
    even = start - (-(length - start) // pieces)
    candidates = ends[bisect_left(ends, start + max(1, room // 2)) : bisect_left(ends, start + room + 1)]
    return min(candidates, key=lambda end: abs(end - even), default=even)
