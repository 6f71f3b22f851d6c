"""Examples of a fine-tuning task as a model reads them: texts, pairs, and words with a label each."""

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.task_labels import REGRESSION, TOKEN_CLASSIFICATION
from ..utils.labels import IGNORE_INDEX


if TYPE_CHECKING:
    from datasets import Dataset

    from .finetuning import FinetuningTask


def input_limit(
    network: PreTrainedModel, processor: PreTrainedTokenizerBase, max_length: int, task: "FinetuningTask"
) -> int:
    """
    The longest input in tokens that the user, the tokenizer and the model allow.

    Raises:
        ValueError: if it leaves no room for a token of each text beside those that the tokenizer adds.
    """
    positions = getattr(network.config, "max_position_embeddings", None) or max_length
    limit = min(max_length, processor.model_max_length, positions)
    texts = len(task.input_columns)
    added = processor.num_special_tokens_to_add(pair=texts > 1)
    if limit < added + texts:
        raise ValueError(
            f"--max_length {limit} leaves no room for words beside the {added} special tokens of the tokenizer: give "
            f"at least {added + texts}, and better as many as a text has."
        )
    return limit


def sample_inputs(rows: "Dataset", task: "FinetuningTask") -> list[str]:
    """Some texts of a task, evenly spread over its rows."""
    some = rows.select(range(0, len(rows), 1 + len(rows) // 500))
    texts = [text for name in task.input_columns for text in some[name]]
    return [" ".join(words) for words in texts] if task.kind == TOKEN_CLASSIFICATION else texts


def encode(
    rows: dict[str, list],
    task: "FinetuningTask",
    processor: PreTrainedTokenizerBase,
    limit: int,
    scale: tuple[float, float] | None = None,
) -> dict[str, list]:
    """
    Tokenise rows of a task; the longer text of a pair is cut first.

    Args:
        rows (`dict[str, list]`): columns of a batch, with or without `label`.
        task ([`~hf_efficient.trainer.finetuning.FinetuningTask`]): the task.
        processor (`PreTrainedTokenizerBase`): the tokenizer.
        limit (`int`): most tokens of an input.
        scale (`tuple[float, float]`, *optional*): offset and unit of a regression, those of the task by default.

    Returns:
        `dict[str, list]`: what the tokenizer gives, `length` in tokens, and `labels`, if there are any. For tokens
        also `words`: at the first token of a word its number, elsewhere -1; all others have no label.
    """
    if task.kind == TOKEN_CLASSIFICATION:
        return _encode_words(rows, task, processor, limit)
    texts = [rows[column] for column in task.input_columns]
    encoded = processor(*texts, truncation="longest_first", max_length=limit)
    found = {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}
    if "label" in rows:
        labels = rows["label"]
        if task.kind == REGRESSION:
            offset, unit = scale or task.scale or (0.0, 1.0)
            labels = [(label - offset) / unit for label in labels]
        found["labels"] = labels
    return found


def _encode_words(
    rows: dict[str, list], task: "FinetuningTask", processor: PreTrainedTokenizerBase, limit: int
) -> dict[str, list]:
    """
    Tokenise lists of words.

    The words are joined by spaces and read as one text, as a pipeline will read it: with `is_split_into_words` many
    tokenizers of bytes would take a word for the continuation of the one before. Offsets say where each word begins.
    """
    if not processor.is_fast:
        raise ValueError(
            f"The tokenizer {type(processor).__name__} does not say where its tokens stand in the text, which labels "
            "of tokens need: give a model with a fast tokenizer (--tokenizer)."
        )
    (column,) = task.input_columns
    texts = [" ".join(words) for words in rows[column]]
    encoded = processor(texts, truncation=True, max_length=limit, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    numbers = [
        _first_tokens(text, words, places) for text, words, places in zip(texts, rows[column], offsets, strict=True)
    ]
    found = {**encoded, "length": [len(ids) for ids in encoded["input_ids"]], "words": numbers}
    if "label" in rows:
        found["labels"] = [
            [labels[word] if word >= 0 else IGNORE_INDEX for word in row]
            for row, labels in zip(numbers, rows["label"], strict=True)
        ]
    return found


def _first_tokens(text: str, words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the number of the word that begins with it, or -1."""
    starts = [0]
    for text_of_word in words[:-1]:
        starts.append(starts[-1] + len(text_of_word) + 1)
    found: list[int] = []
    seen: set[Any] = {-1}
    for start, end in offsets:
        while start < end and text[start].isspace():  # which some tokenizers count to the word behind it
            start += 1
        word = bisect.bisect_right(starts, start) - 1 if start < end else -1
        found.append(word if word not in seen else -1)
        seen.add(word)
    return found
