"""A corpus as one long row of ids: bytes, characters, words or subwords, and a part of it held out."""

import bz2
import glob
import gzip
import hashlib
import lzma
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from transformers import PreTrainedTokenizerBase

from .tokenizers import character_tokenizer, subword_tokenizer, word_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset

# Tokenised at once, and in one call; texts are cut before white space only.
CHUNK, CHUNKS = 4000, 256
SEPARATOR = b"\n\n"
_CUT = re.compile(r"(?<=\S)(?=\s)")
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
# Files that `datasets` reads; all others are taken as they are.
_TABLES = {".parquet", ".json", ".jsonl"}

Documents: TypeAlias = Union[list[str], list[bytes], "Dataset"]


@dataclass
class Stream:
    """One long text.

    Args:
        tokens (`numpy.ndarray` of shape `(tokens,)`): ids, in the smallest type of integers that holds them.
        size (`int`): its length in bytes or characters, whichever the level counts.
    """

    tokens: np.ndarray
    size: int

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.tokens.tobytes(), digest_size=16).hexdigest()


def _files(pattern: str) -> list[str]:
    """Local files that are read as they are."""
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))

    def kind(path: str) -> str:
        stem, suffix = os.path.splitext(path)
        return os.path.splitext(stem)[1] if suffix in _OPENERS else suffix

    return [] if any(kind(path) in _TABLES for path in found) else found


def _read(path: str) -> bytes:
    with _OPENERS.get(Path(path).suffix, open)(path, "rb") as file:
        return file.read()


def load_documents(settings: Any, corpus: str) -> Documents:
    """
    The documents of a corpus: local files other than tables as they are, one a document (bytes at byte level, else
    text in UTF-8), all else by `datasets`.

    Raises:
        ValueError: for a file that is not text in UTF-8, above byte level.
    """
    by_file = settings.txt_documents == "file"
    if files := _files(corpus) if by_file else []:
        contents = [_read(path) for path in files]
        if settings.level == "byte":
            return contents
        try:
            return [content.decode("utf-8") for content in contents]
        except UnicodeDecodeError as error:
            raise ValueError(f"{corpus} is not text in UTF-8 ({error}). Bytes of any kind: --level byte.") from error
    return replace(settings, corpus=corpus).load()


def split_holdout(documents: Documents, holdout: float) -> tuple[Documents, Documents | None]:
    """
    Hold out the end of files, or of a corpus of one document; of several documents whole ones, chosen by their text.

    Args:
        documents: as [`load_documents`] gives them.
        holdout (`float`): share of the text; from 1 on the number of bytes or characters at the end of files.

    Raises:
        ValueError: if nothing is left on one side, or a number is asked of a corpus of documents.
    """
    from hf_efficient.data.corpus import split_documents

    if holdout == 0:
        return documents, None
    if not isinstance(documents, list) and len(documents) > 1:
        if holdout >= 1:
            raise ValueError(
                "Of a corpus of several documents a share is held out: --holdout below 1; the documents are whole."
            )
        return split_documents(documents, holdout)
    parts: list[Any] = documents if isinstance(documents, list) else list(documents["text"])
    length = sum(len(part) for part in parts)
    count = int(holdout) if holdout >= 1 else round(length * holdout)
    if not 0 < count < length:
        raise ValueError(f"--holdout {holdout} of a text of {length} leaves nothing on one side.")
    train: list[Any] = list(parts)
    heldout: list[Any] = []
    while count >= len(train[-1]):
        heldout.insert(0, train.pop())
        count -= len(heldout[0])
    if count:
        heldout.insert(0, train[-1][-count:])
        train[-1] = train[-1][:-count]
    return train, heldout


def _texts(documents: Documents) -> Iterator[Any]:
    if isinstance(documents, list):
        yield from documents
    else:
        for batch in documents.iter(batch_size=100):
            yield from batch["text"]


def build_tokenizer(settings: Any, train: Documents, heldout: Documents | None) -> PreTrainedTokenizerBase:
    """A tokenizer of the level. It knows the words or characters of the training text alone; bytes, of both parts."""
    if settings.level == "byte":
        from hf_efficient.data.byte_tokenizer import byte_tokenizer

        return byte_tokenizer(None if settings.alphabet == "all" else _alphabet(train, heldout))
    if settings.level == "char":
        return character_tokenizer(_texts(train))
    if settings.level == "word":
        return word_tokenizer(_texts(train), settings.vocab_size)
    return subword_tokenizer(_texts(train), settings.vocab_size or 8192)


def _bytes(document: str | bytes) -> bytes:
    return document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document


def _alphabet(train: Documents, heldout: Documents | None) -> list[int]:
    """The bytes that occur, sorted, as for enwik8."""
    from hf_efficient.data.byte_tokenizer import byte_alphabet

    found = set(SEPARATOR)
    for documents in (train, heldout or []):
        for document in _texts(documents):
            found.update(byte_alphabet(_bytes(document)))
    return sorted(found)


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + CHUNK)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    chunks = list(_chunks(text))
    for first in range(0, len(chunks), CHUNKS):
        yield from tokenizer(
            chunks[first : first + CHUNKS],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def encode(documents: Documents, tokenizer: PreTrainedTokenizerBase, level: str) -> Stream:
    """
    All documents as one row of ids. Between two documents stands an empty line, at subword level the tokenizer's end of
    text.

    Args:
        documents: as [`load_documents`] gives them.
        tokenizer (`PreTrainedTokenizerBase`): of that level.
        level (`str`): byte, char, word or subword.

    Raises:
        ValueError: if there is no text, or a byte that the tokenizer does not know.
    """
    from tqdm.auto import tqdm

    from hf_efficient.data.byte_tokenizer import encode_bytes

    end = tokenizer.eos_token_id if level == "subword" else None
    between = b"" if level == "subword" else SEPARATOR
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    pieces: list[np.ndarray] = []
    size = 0
    for number, document in enumerate(tqdm(_texts(documents), desc="Tokenising", unit=" documents")):
        data = between * (number > 0) + _bytes(document)
        if level == "byte":
            pieces.append(encode_bytes(data, tokenizer))
        else:
            if number and end is not None:
                pieces.append(np.array([end], dtype=dtype))
            text = data.decode("utf-8", "surrogatepass")
            pieces += [np.array(ids, dtype=dtype) for ids in _encode_text(text, tokenizer)]
        size += len(text) if level == "char" else len(data)
    if not size:
        raise ValueError("There is no text.")
    return Stream(np.concatenate(pieces), size)
