"""The share of a text that a tokenizer does not know, and what to do about it."""

import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Texts that are looked at, characters in all of them, and in each piece.
TEXTS, CHARACTERS, PIECE = 1000, 400_000, 4000
# Shares of the text from which on it is worth a warning, and no use to train on.
WARN_FROM, REFUSE_FROM = 0.001, 0.9


def sample_texts(texts: Sequence[str] | Sequence[bytes]) -> Iterator[str]:
    """Pieces of texts, evenly spread over all of them, and over each if there are few."""
    count = min(len(texts), TEXTS)
    length = min(PIECE, CHARACTERS // max(count, 1))
    for number in range(count):
        given = texts[number * len(texts) // count]
        text = given.decode("utf-8", "replace") if isinstance(given, bytes) else given
        pieces = math.ceil(min(len(text), CHARACTERS // count) / length)
        for piece in range(pieces):
            start = piece * length if len(text) <= pieces * length else piece * len(text) // pieces
            yield _whole_words(text, start, start + length)


def _whole_words(text: str, start: int, end: int) -> str:
    """A piece of a text without the words that its ends cut, unless they are very long."""
    piece = text[start:end]
    words = piece.split(None, 1)
    if start and len(words) == 2 and len(words[0]) < 100 and not text[start - 1].isspace():
        piece = words[1]
    words = piece.rsplit(None, 1)
    if end < len(text) and len(words) == 2 and len(words[1]) < 100 and not text[end].isspace():
        piece = words[0]
    return piece


def _dropped(tokenizer: Any, text: str) -> Iterator[str]:
    """Characters of a text that the normalisation drops, accents aside."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    for character in set(text) if normalizer is not None else ():
        is_visible = not character.isspace() and unicodedata.category(character)[0] != "M"
        if is_visible and not normalizer.normalize_str(character):
            yield character


def unknown_share(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> tuple[float, float]:
    """
    Measure how much of a text a tokenizer does not know.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer.
        texts (`Iterable[str]`): the text.

    Returns:
        `tuple[float, float]`: share of the tokens that are the unknown one, and of the characters, but for white space,
        that no other token stands for. A slow tokenizer does not tell the second, which is then the first.
    """
    tokens = unknown = characters = lost = 0
    for text in texts:
        options: dict[str, Any] = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, **options)
        is_unknown = [token == tokenizer.unk_token_id for token in encoded["input_ids"]]
        tokens += len(is_unknown)
        unknown += sum(is_unknown)
        if tokenizer.is_fast:
            known = bytearray(len(text))
            for (start, end), skip in zip(encoded["offset_mapping"], is_unknown, strict=True):
                if not skip:
                    known[start:end] = b"\1" * (end - start)
            for character in _dropped(tokenizer, text):  # within a word its offsets cover them
                for match in re.finditer(re.escape(character), text):
                    known[match.start()] = 0
            visible = [known[place] for place, character in enumerate(text) if not character.isspace()]
            characters += len(visible)
            lost += visible.count(0)
    share = unknown / max(tokens, 1)
    return share, lost / max(characters, 1) if tokenizer.is_fast else share


def report_unknown(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str] | Sequence[bytes], advice: str) -> None:
    """
    Log the share of unknown tokens in a sample of texts, as a warning if it matters.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer.
        texts (`Sequence[str]`): texts that a model will learn from.
        advice (`str`): what to do if much is unknown.

    Raises:
        ValueError: if hardly anything else is left to learn from.
    """
    tokens, characters = unknown_share(tokenizer, sample_texts(texts))
    name = "unknown" if tokenizer.unk_token is None else f"unknown ({tokenizer.unk_token})"
    message = f"{tokens:.2%} of the tokens of the text are {name}, and {characters:.2%} of its characters are lost."
    worst = max(tokens, characters)
    if worst >= REFUSE_FROM:
        raise ValueError(f"{message} There is nothing to learn from it. {advice}")
    if worst >= WARN_FROM:
        logger.warning("%s %s", message, advice)
    else:
        logger.info("%s", message)
