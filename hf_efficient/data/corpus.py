"""Text for pretraining: load it from anywhere, keep documents for validation, and pack it into blocks of tokens."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .document_readers import TXT_DOCUMENTS, read_documents
from .text_files import CorpusError, TextFile, check_arrow_file, find_files, modification


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["is_for_validation", "load_corpus", "load_from_hub", "split_documents"]

# Part of the cache's key: raise it when the reading of equal files changes.
_READING_VERSION = 1
# Documents that are written at once: at most so many, and characters from which on it is enough.
_BATCH, _BATCH_CHARACTERS = 1000, 1 << 24


def _load_files(files: Sequence[TextFile], text_column: str, txt_documents: str) -> "Dataset":
    """Read files into an Arrow file of the cache, which is taken again as long as they are unchanged."""
    import datasets

    kinds = {file.kind: file for file in files}
    if len(kinds) > 1:
        raise CorpusError(
            "The files of a corpus must be of one kind; got "
            f"{' and '.join(f'{kind} ({file.name})' for kind, file in kinds.items())}. Name them by a pattern."
        )
    settings = [_READING_VERSION, text_column, txt_documents, [modification(file) for file in files]]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE, "hf_efficient_corpora", f"{key}.arrow")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        try:
            _write_documents(staging, _documents(files, text_column, txt_documents))
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
    check_arrow_file(path)
    return datasets.Dataset.from_file(str(path))


def _documents(files: Sequence[TextFile], text_column: str, txt_documents: str) -> Iterator[str]:
    from tqdm.auto import tqdm

    for file in tqdm(files, desc="Reading the corpus", unit=" files", disable=len(files) < 2):
        for document in read_documents(file, text_column, txt_documents):
            yield document.text


def _write_documents(path: Path, documents: Iterator[str]) -> None:
    import pyarrow

    schema = pyarrow.schema({"text": pyarrow.string()})
    batch: list[str] = []
    characters = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.RecordBatchStreamWriter(file, schema) as writer:

        def write() -> None:
            writer.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.string())], schema=schema))

        for document in documents:
            batch.append(document)
            characters += len(document)
            if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
                write()
                batch, characters = [], 0
        write()


def load_corpus(
    source: str | Sequence[str],
    *,
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "train",
    txt_documents: str = "file",
) -> "Dataset":
    """
    Load documents.

    Args:
        source (`str` or `Sequence[str]`):
            `"builtin"` for the corpus made from Python's own documentation (no download); a path, folder, pattern
            such as `"texts/**/*.txt"`, or several, of txt, parquet, jsonl or csv files, which may be compressed (gzip,
            bzip2, xz, zstd, lz4, zip); else the name of a dataset on the Hub.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text; others may differ from file to file.
        config_name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset on the Hub.
        txt_documents (`str`, *optional*, defaults to `"file"`):
            What one document is in txt files: a whole `"file"`, what stands between two blank lines
            (`"blank_line"`), or a `"line"`.

    Returns:
        `datasets.Dataset`: one row per document that is not empty, with the one column `text`.

    Raises:
        FileNotFoundError: if a path or pattern matches nothing.
        CorpusError: if kinds of files are mixed, the column does not exist or holds no text, a file is damaged or no
            text, or there is none.
    """
    if txt_documents not in TXT_DOCUMENTS:
        raise ValueError(f"`txt_documents` must be one of {', '.join(TXT_DOCUMENTS)}, not {txt_documents!r}.")
    if source == "builtin":
        from .python_docs import builtin_corpus

        dataset = builtin_corpus().select_columns(["text"])
    elif files := find_files(source):
        dataset = _load_files(files, text_column, txt_documents)
    else:
        dataset = load_from_hub(str(source), config_name, split, text_column)
        dataset = dataset.filter(_is_not_empty, input_columns=["text"], desc="Leaving out empty documents")
    if len(dataset) == 0:
        raise CorpusError(f"The corpus {source!r} holds no text.")
    return dataset


def load_from_hub(source: str, config_name: str | None, split: str, text_column: str, streaming: bool = False) -> Any:
    """
    Load the texts of a dataset on the Hub.

    Args:
        source, config_name, split, text_column: as [`load_corpus`] takes them.
        streaming (`bool`, *optional*, defaults to `False`): read it over the network as it is needed.

    Returns:
        `datasets.Dataset`, or with `streaming` `datasets.IterableDataset`: rows with the one column `text`.

    Raises:
        FileNotFoundError: if there is no such dataset.
        CorpusError: if it has no such column, or one that holds no text.
    """
    from datasets import Value, load_dataset

    try:
        dataset: Any = load_dataset(source, config_name, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source!r}, and no dataset of that name could be had from the Hub: {error}"
        ) from error
    # A stream may not know them before its first row.
    columns = dataset.column_names or list(next(iter(dataset), {text_column: ""}))
    if text_column not in columns:
        raise CorpusError(
            f"The corpus {source!r} has no column {text_column!r}; it has {', '.join(map(repr, columns))}. Name the "
            "one that holds the text (--text_column)."
        )
    kind = dataset.features[text_column] if dataset.features else Value("string")
    if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string", "null")):
        raise CorpusError(f"The column {text_column!r} of the corpus {source!r} holds {kind}, not text.")
    dataset = dataset.select_columns([text_column])
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def _is_not_empty(text: str | None) -> bool:
    return bool(text and text.strip())


def is_for_validation(text: str | bytes, validation_size: float, seed: int = 0) -> bool:
    """Tell whether a document is among those that [`split_documents`] keeps for validation."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digest = hashlib.blake2b(data, digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") < validation_size * 2**64


def split_documents(dataset: "Dataset", validation_size: float = 0.02, seed: int = 0) -> tuple["Dataset", "Dataset"]:
    """
    Keep whole documents for validation.

    A hash of its text decides about a document, so neither the order nor the other documents matter, and copies of
    one document are never on both sides.

    Args:
        dataset (`datasets.Dataset`):
            Documents in a column `text`.
        validation_size (`float`, *optional*, defaults to 0.02):
            Expected fraction of the documents that are for validation, in [0, 1).
        seed (`int`, *optional*, defaults to 0):
            Another seed chooses other documents. Leave it, so that runs are measured on the same ones.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: documents to train on, and those for validation (none if
        `validation_size` is 0).

    Raises:
        ValueError: if the fraction is out of range or leaves one side empty.
    """
    if not 0.0 <= validation_size < 1.0:
        raise ValueError(f"`validation_size` must lie in [0, 1), got {validation_size}.")
    chosen = [
        is_for_validation(text, validation_size, seed)
        for batch in dataset.iter(batch_size=1000)
        for text in batch["text"]
    ]
    validation = dataset.select([i for i, is_chosen in enumerate(chosen) if is_chosen])
    train = dataset.select([i for i, is_chosen in enumerate(chosen) if not is_chosen])
    if len(train) == 0 or (validation_size > 0 and len(validation) == 0):
        raise ValueError(
            f"Taking {validation_size:.2%} of {len(dataset)} documents for validation leaves {len(train)} to train on "
            f"and {len(validation)} to validate on. Choose another fraction (--validation_size), or, for txt files, "
            "smaller documents (--txt_documents blank_line)."
        )
    return train, validation
