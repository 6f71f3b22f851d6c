"""Texts as token ids: tokenised piece by piece, and cut into windows that are spread over all of a text."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


# Characters tokenised at once, and pieces in one call; texts are cut before white space only.
CHUNK, CHUNKS = 4000, 256
_CUT = re.compile(r"(?<=\S)(?=\s)")
_WINDOW = 512  # tokens of a window at most, where none is asked for


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + CHUNK)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of a text of any length in pieces, without special tokens."""
    chunks = list(_chunks(text))
    for first in range(0, len(chunks), CHUNKS):
        yield from tokenizer(
            chunks[first : first + CHUNKS],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _ids_of(text: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The ids of texts as one row, with an end of text between two."""
    if tokenizer is None:
        raise ValueError("A text needs a tokenizer to read it: give `tokenizer`, or token ids in place of the text.")
    pieces = [torch.empty(0, dtype=torch.int32)]
    for number, document in enumerate([text] if isinstance(text, str) else text):
        if number and tokenizer.eos_token_id is not None:
            pieces.append(torch.tensor([tokenizer.eos_token_id], dtype=torch.int32))
        pieces += [torch.tensor(ids, dtype=torch.int32) for ids in encode_text(document, tokenizer)]
    return torch.cat(pieces)


def _windows(ids: Tensor, length: int, max_tokens: int, batch_size: int) -> Iterable[dict[str, Tensor]]:
    """Windows spread evenly over a long row of ids, batch by batch."""
    if len(ids) < length:
        raise ValueError(
            f"The text has {len(ids)} tokens, fewer than one window of {length}: give more text, or a smaller `length`."
        )
    count = max(1, min(max_tokens // length, len(ids) // length))
    starts = torch.linspace(0, len(ids) - length, count, dtype=torch.float64).long()
    for some in starts.split(batch_size):
        yield {"input_ids": torch.stack([ids[start : start + length] for start in some.tolist()]).long()}


def read_batches(
    text: Any,
    longest: int,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | None,
    max_tokens: int,
    batch_size: int,
) -> Iterable[Mapping[str, Tensor]]:
    """
    Make batches of inputs from a text in any of its forms.

    Strings are tokenised whole, as the training scripts tokenise theirs, and windows are spread over all of them, or of
    a row of ids, whatever its length. Rows and batches are taken as they come.

    Args:
        text: a string or a list of them; a tensor or array of token ids, `(tokens,)` or `(rows, length)`; or an
            iterable of batches, each a tensor `(rows, length)` or a mapping with `input_ids`.
        longest (`int`): tokens that the model takes.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): reads strings.
        length (`int`, *optional*): tokens of a window; by default as many as the model takes, up to 512.
        max_tokens (`int`): tokens of all windows at most.
        batch_size (`int`): rows of a batch.

    Raises:
        ValueError: for what is no text, one that is shorter than a window, or a window that the model does not take.
    """
    length = min(longest, _WINDOW) if length is None else length
    if not 1 <= length <= longest:
        raise ValueError(f"`length` must be from 1 to {longest} (max_position_embeddings), not {length}.")
    if isinstance(text, str) or (isinstance(text, Sequence) and text and all(isinstance(one, str) for one in text)):
        return _windows(_ids_of(text, tokenizer), length, max_tokens, batch_size)
    if hasattr(text, "ndim") and text.ndim == 1:
        return _windows(torch.as_tensor(text), length, max_tokens, batch_size)
    if hasattr(text, "ndim"):
        if text.ndim != 2:
            raise ValueError(f"Token ids must be one long row, or rows of a batch; got shape {tuple(text.shape)}.")
        return ({"input_ids": rows} for rows in torch.as_tensor(text).long().split(batch_size))
    if isinstance(text, Mapping) or not isinstance(text, Iterable):
        raise ValueError(
            f"A text is a string, several, token ids, or batches of token ids; got a {type(text).__name__}."
        )
    return (batch if isinstance(batch, Mapping) else {"input_ids": torch.as_tensor(batch)} for batch in text)
