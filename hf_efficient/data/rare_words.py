"""
Rare words of a corpus: counting them, choosing a band of frequencies, and their file.

A word is what the tokenizer's own pre-tokenisation keeps together, after its normalisation, and is named by its token
ids. A word that a byte-level BPE spells differently at the start of a text and after a space counts as two words.

Source: Wu et al., "Taking Notes on the Fly Helps Language Pre-training", ICLR 2021, arXiv 2008.01466, which keeps notes
on words that a large corpus holds 100 to 500 times; see [`~hf_efficient.objectives.notes`].
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.word_spans import word_spans


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Word = tuple[int, ...]

_VERSION = 1


def count_words(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", column: str = "text") -> Counter[Word]:
    """
    Count how often the corpus holds each word.

    Args:
        dataset (`datasets.Dataset`):
            Documents in `column`.
        tokenizer (`PreTrainedTokenizerBase`):
            A fast one. Words that it does not know in full, and special tokens, are not counted.
        column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.

    Returns:
        `Counter[tuple[int, ...]]`: by the word's token ids.

    Raises:
        ValueError: if the tokenizer does not know words.
    """
    from tqdm.auto import tqdm

    if not tokenizer.is_fast:
        raise ValueError("Words need a fast tokenizer (one with a tokenizer.json).")
    special = set(tokenizer.all_special_ids)
    counts: Counter[Word] = Counter()
    with tqdm(total=len(dataset), desc="Counting words", unit=" documents") as progress:
        for batch in dataset.select_columns([column]).iter(batch_size=100):
            encoded = tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False, verbose=False)
            for i, ids in enumerate(encoded["input_ids"]):
                counts.update(tuple(ids[start:end]) for start, end in word_spans(encoded.word_ids(i)))
            progress.update(len(batch[column]))
    for word in [word for word in counts if not special.isdisjoint(word)]:
        del counts[word]
    return counts


@dataclass(frozen=True)
class RareWords:
    """
    Words to keep notes on.

    Args:
        keys (`tuple`):
            Token ids of each word.
        tokens (`tuple`):
            The same as the tokenizer writes them, by which a file made with another tokenizer is found out.
        counts (`tuple`):
            How often the corpus holds each.
        report (`dict`, *optional*):
            Measures of the band; see [`describe_band`].
    """

    keys: tuple[Word, ...]
    tokens: tuple[tuple[str, ...], ...]
    counts: tuple[int, ...]
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file."""
        words = [
            {"tokens": tokens, "ids": key, "count": count}
            for key, tokens, count in zip(self.keys, self.tokens, self.counts, strict=True)
        ]
        lines = ",\n".join(json.dumps(word, ensure_ascii=False) for word in words)
        head = json.dumps({"version": _VERSION, "report": self.report}, indent=1)[:-2]
        Path(path).write_text(f'{head},\n "words": [\n{lines}\n]}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "RareWords":
        """
        Read a file that [`~RareWords.save`] wrote.

        Raises:
            ValueError: if the file is of another kind, or was made with another tokenizer than the one given.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            words = content["words"]
            found = cls(
                tuple(tuple(word["ids"]) for word in words),
                tuple(tuple(word["tokens"]) for word in words),
                tuple(word["count"] for word in words),
                content["report"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a file of rare words: make one with training/count_rare_words.py."
            ) from error
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{path} is of version {content.get('version')}, but only {_VERSION} is known: make it anew."
            )
        if tokenizer is not None:
            for key, tokens in zip(found.keys, found.tokens, strict=True):
                if tokenizer.convert_ids_to_tokens(list(key)) != list(tokens):
                    raise ValueError(
                        f"{path} was made with another tokenizer: its {' '.join(tokens)} has ids that mean something "
                        "else here. Count the words again with this tokenizer (training/count_rare_words.py)."
                    )
        return found


def choose_band(
    counts: Mapping[Word, int],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    min_count: int = 100,
    max_count: int = 500,
    min_tokens: int = 2,
    max_keys: int | None = None,
) -> RareWords:
    """
    Choose the words of a band of frequencies, the most frequent first.

    Args:
        counts (`Mapping`):
            Of [`count_words`].
        tokenizer (`PreTrainedTokenizerBase`):
            With which they were counted.
        min_count, max_count (`int`, *optional*, default to 100 and 500):
            The band, both ends included.
        min_tokens (`int`, *optional*, defaults to 2):
            Leave words of fewer tokens out: a single token, once replaced by another rare one, spells a key.
        max_keys (`int`, *optional*):
            Keep the most frequent only.

    Raises:
        ValueError: if the band is empty.
    """
    if not 1 <= min_count <= max_count:
        raise ValueError(f"The band must be 1 <= min_count <= max_count, not {min_count} to {max_count}.")
    long_enough = {word: count for word, count in counts.items() if len(word) >= min_tokens}
    band = [word for word, count in long_enough.items() if min_count <= count <= max_count]
    if not band:
        raise ValueError(
            f"No word of {min_tokens} tokens or more occurs {min_count} to {max_count} times: choose another band. The "
            f"most frequent such word occurs {max(long_enough.values(), default=0):,} times."
        )
    keys = sorted(band, key=lambda word: (-counts[word], word))[:max_keys]
    tokens = [tuple(tokenizer.convert_ids_to_tokens(list(word))) for word in keys]
    return RareWords(tuple(keys), tuple(tokens), tuple(counts[word] for word in keys))


def describe_band(counts: Mapping[Word, int], words: RareWords) -> dict[str, float]:
    """
    Measure how much of the corpus the keys cover.

    Returns:
        `dict`: number of `keys` and of their `occurrences`; their share of all words and all tokens; the lowest, middle
        and highest count of a key, which are its updates in one pass, or more than those where a key stands in one
        batch several times.
    """
    ordered = sorted(words.counts)
    all_words = sum(counts.values())
    all_tokens = sum(len(word) * count for word, count in counts.items())
    tokens = sum(len(key) * count for key, count in zip(words.keys, words.counts, strict=True))
    return {
        "keys": len(ordered),
        "occurrences": sum(ordered),
        "words_fraction": sum(ordered) / all_words,
        "tokens_fraction": tokens / all_tokens,
        "lowest_count": ordered[0],
        "middle_count": ordered[len(ordered) // 2],
        "highest_count": ordered[-1],
    }
