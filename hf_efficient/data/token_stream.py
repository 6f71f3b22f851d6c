"""A corpus as one long row of ids, of bytes, characters, words or subwords, with a part of it for validation."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.text_batches import encode_text
from .byte_tokenizer import byte_alphabet, byte_tokenizer, encode_bytes
from .corpus import load_corpus, split_documents
from .document_readers import with_plain_breaks
from .text_files import CorpusError, find_files
from .tokenizers import END, PAD, character_tokenizer, subword_tokenizer, word_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset

LEVELS = ("byte", "char", "word", "subword")
SEPARATOR = b"\n\n"

Documents: TypeAlias = Union[list[str], list[bytes], "Dataset"]


@dataclass
class Stream:
    """
    One long text.

    Args:
        tokens (`numpy.ndarray` of shape `(tokens,)`): ids, in the smallest type of integers that holds them.
        size (`int`): its length in bytes or characters, whichever the level counts.
    """

    tokens: np.ndarray
    size: int

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.tokens.tobytes(), digest_size=16).hexdigest()


def load_documents(corpus: str, level: str = "byte", *, txt_documents: str = "file", **options: Any) -> Documents:
    """
    Load the documents of a corpus: local files other than tables as they are, one a document (bytes at byte level, else
    text in UTF-8), all else by `datasets`.

    Args:
        corpus (`str`): as [`~hf_efficient.data.corpus.load_corpus`] takes it.
        level (`str`, defaults to `"byte"`): byte, char, word or subword.
        txt_documents (`str`, defaults to `"file"`): what one document is in txt files; only whole files are read as
            they are.
        options: further arguments of `load_corpus`.

    Raises:
        FileNotFoundError: for a path or pattern that means no file.
        ValueError: for a file that is damaged or no text, at all levels but that of bytes text in UTF-8.
    """
    is_folder = os.path.isdir(os.path.expanduser(corpus))  # whose documents stay whole
    files = [] if corpus == "builtin" or is_folder or txt_documents != "file" else find_files(corpus)
    if not files or any(file.kind != "text" for file in files):
        return load_corpus(corpus, txt_documents=txt_documents, **options)
    contents: list[Any] = []
    try:
        for file in files:
            if level == "byte":
                with file.open_text() as stream:
                    contents.append(stream.read())
            else:  # line breaks of Windows are no characters of their own
                contents.append(file.read_text().replace("\r\n", "\n"))
    except CorpusError as error:
        if level == "byte":
            raise
        raise CorpusError(f"{error} (Bytes of any encoding: --level byte.)") from error
    if not any(content.strip() for content in contents):
        raise CorpusError(f"The corpus {corpus!r} holds no text.")
    return contents


def txt_decoder(corpus: str, level: str, txt_documents: str) -> Callable[[bytes], Any]:
    """The function that makes the text of a stream from the bytes of txt files, as [`load_documents`] reads them."""
    if os.path.isdir(os.path.expanduser(corpus)) or txt_documents != "file":
        return with_plain_breaks
    return bytes if level == "byte" else _without_carriage_returns


def _without_carriage_returns(data: bytes) -> str:
    return data.decode().replace("\r\n", "\n")


def split_validation(documents: Documents, validation_size: float) -> tuple[Documents, Documents | None]:
    """
    Keep the end of files, or of a corpus of one document, for validation; of several documents whole ones, chosen by
    their text.

    Args:
        documents: as [`load_documents`] gives them.
        validation_size (`float`): below 1 the fraction of the text, from 1 on the number of bytes or characters at the
            end of files; 0 for none.

    Returns:
        `tuple`: documents to train on, and those for validation, or `None`.

    Raises:
        ValueError: if nothing is left on one side, or a number is asked of a corpus of documents.
    """
    if validation_size == 0:
        return documents, None
    if not isinstance(documents, list) and len(documents) > 1:
        if validation_size >= 1:
            raise ValueError(
                "Of a corpus of several documents a fraction is kept for validation (--validation_size below 1), since "
                "documents stay whole."
            )
        return split_documents(documents, validation_size)
    parts: list[Any] = documents if isinstance(documents, list) else list(documents["text"])
    length = sum(len(part) for part in parts)
    count = int(validation_size) if validation_size >= 1 else round(length * validation_size)
    if not 0 < count < length:
        raise ValueError(f"--validation_size {validation_size} of a text of {length} leaves nothing on one side.")
    train: list[Any] = list(parts)
    validation: list[Any] = []
    while count >= len(train[-1]):
        validation.insert(0, train.pop())
        count -= len(validation[0])
    if count:
        validation.insert(0, train[-1][-count:])
        train[-1] = train[-1][:-count]
    return train, validation


def _texts(documents: Any) -> Iterator[Any]:
    if hasattr(documents, "iter"):  # a `datasets.Dataset`
        for batch in documents.iter(batch_size=100):
            yield from batch["text"]
    else:
        yield from documents


def build_tokenizer(
    level: str,
    train: Documents,
    validation: Documents | None = None,
    *,
    alphabet: str = "all",
    vocab_size: int | None = None,
) -> PreTrainedTokenizerBase:
    """
    Make a tokenizer from a text. It knows the words or characters of the training text alone; bytes, of both parts.

    Each has an end of text and pads batches. Bytes and characters get an id for either, after their own: no text holds
    them, and a model soon learns never to expect them, so that its bits per byte or character compare with those of
    models without. Words and subwords have an end already, of a line or a document, which pads too: their vocabularies
    are as large as asked for.

    Args:
        level (`str`): byte, char, word or subword.
        train, validation: documents, as [`load_documents`] gives them.
        alphabet (`str`, defaults to `"all"`): which bytes have an id, all 256 or those of the `"corpus"`.
        vocab_size (`int`, *optional*): ids of a vocabulary of words (all by default) or subwords (8192).
    """
    if level == "byte":
        bytes_with_ids = None if alphabet == "all" else _alphabet(train, validation)
        return byte_tokenizer(bytes_with_ids, eos_token=END, pad_token=PAD)
    if level == "char":
        return character_tokenizer(_texts(train))
    if level == "word":
        return word_tokenizer(_texts(train), vocab_size)
    return subword_tokenizer(_texts(train), vocab_size or 8192)


def _bytes(document: str | bytes) -> bytes:
    return document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document


def _alphabet(train: Documents, validation: Documents | None) -> list[int]:
    """The bytes that occur, sorted, as for enwik8."""
    found = set(SEPARATOR)
    for documents in (train, validation or []):
        for document in _texts(documents):
            found.update(byte_alphabet(_bytes(document)))
    return sorted(found)


def encode_document(
    document: str | bytes, tokenizer: PreTrainedTokenizerBase, level: str, is_next: bool
) -> tuple[list[np.ndarray], int]:
    """
    Tokenise a document, or a part of one.

    Args:
        document (`str` or `bytes`): its text.
        tokenizer (`PreTrainedTokenizerBase`): of that level.
        level (`str`): byte, char, word or subword.
        is_next (`bool`): begin with what stands between two documents.

    Returns:
        `tuple[list[numpy.ndarray], int]`: ids in pieces, in the smallest type of integers that holds them; and the
        length in bytes or characters, whichever the level counts.
    """
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    data = (b"" if level == "subword" else SEPARATOR) * is_next + _bytes(document)
    if level == "byte":
        return [encode_bytes(data, tokenizer)], len(data)
    text = data.decode("utf-8", "surrogatepass")
    pieces = [np.array(ids, dtype=dtype) for ids in encode_text(text, tokenizer)]
    if is_next and level == "subword" and tokenizer.eos_token_id is not None:
        pieces.insert(0, np.array([tokenizer.eos_token_id], dtype=dtype))
    return pieces, len(text) if level == "char" else len(data)


def encode(
    documents: Documents | Iterable[str | bytes],
    tokenizer: PreTrainedTokenizerBase,
    level: str,
    max_tokens: int | None = None,
) -> Stream:
    """
    Tokenise all documents into one row of ids. Between two documents stands an empty line, at subword level the
    tokenizer's end of text.

    Args:
        documents: as [`load_documents`] gives them, or any texts.
        tokenizer (`PreTrainedTokenizerBase`): of that level.
        level (`str`): byte, char, word or subword.
        max_tokens (`int`, *optional*): end after the document that reaches so many.

    Raises:
        ValueError: if there is no text, or a byte that the tokenizer does not know.
    """
    from tqdm.auto import tqdm

    pieces: list[np.ndarray] = []
    size = tokens = 0
    for number, document in enumerate(tqdm(_texts(documents), desc="Tokenising", unit=" documents")):
        ids, length = encode_document(document, tokenizer, level, number > 0)
        pieces += ids
        size, tokens = size + length, tokens + sum(map(len, ids))
        if max_tokens is not None and tokens >= max_tokens:
            break
    if not size:
        raise ValueError("There is no text.")
    return Stream(np.concatenate(pieces), size)
