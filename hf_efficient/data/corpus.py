"""Text for pretraining: load it from anywhere, keep documents for validation, and pack it into blocks of tokens."""

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".txt": "text", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_COMPRESSED = {".gz", ".xz", ".bz2", ".zst"}
_TXT_DOCUMENTS = {"file": "document", "blank_line": "paragraph", "line": "line"}

__all__ = ["load_corpus", "split_documents"]


def _local_files(source: str | Sequence[str]) -> list[str]:
    """Files meant by paths, folders and patterns; empty if `source` does not look like any of these."""
    patterns = [source] if isinstance(source, str) else list(source)
    files: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = [str(path) for path in sorted(Path(pattern).rglob("*")) if _suffix(str(path)) in _BUILDERS]
        else:
            found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        looks_local = os.path.isdir(pattern) or _suffix(pattern) in _BUILDERS or glob.has_magic(pattern)
        if not found and (looks_local or len(patterns) > 1):
            raise FileNotFoundError(f"No text files match {pattern!r}. Known kinds: {', '.join(_BUILDERS)}.")
        files += found
    return files


def _suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix


def _load_files(files: Sequence[str], txt_documents: str) -> "Dataset":
    from datasets import load_dataset

    kinds = {_BUILDERS.get(_suffix(path)) for path in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"The files of a corpus must be of one kind of {', '.join(_BUILDERS)}, optionally compressed; got "
            f"{', '.join(files[:5])}{' ...' if len(files) > 5 else ''}."
        )
    builder = kinds.pop()
    options = {"sample_by": _TXT_DOCUMENTS[txt_documents]} if builder == "text" else {}
    return load_dataset(builder, data_files={"train": list(files)}, split="train", **options)


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
            such as `"texts/**/*.txt"`, or several, of txt, parquet or jsonl files; else the name of a dataset on the
            Hub.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.
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
        ValueError: if kinds of files are mixed, the column does not exist, or there is no text.
    """
    from datasets import load_dataset

    if txt_documents not in _TXT_DOCUMENTS:
        raise ValueError(f"`txt_documents` must be one of {', '.join(_TXT_DOCUMENTS)}, not {txt_documents!r}.")
    if source == "builtin":
        from .python_docs import builtin_corpus

        dataset, text_column = builtin_corpus(), "text"
    elif files := _local_files(source):
        dataset = _load_files(files, txt_documents)
    else:
        dataset = load_dataset(source, config_name, split=split)
    if text_column not in dataset.column_names:
        raise ValueError(
            f"The corpus {source!r} has no column {text_column!r}; it has {', '.join(dataset.column_names)}. Name the "
            "one that holds the text (--text_column)."
        )
    dataset = dataset.select_columns([text_column])
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    dataset = dataset.filter(_is_not_empty, input_columns=["text"], desc="Leaving out empty documents")
    if len(dataset) == 0:
        raise ValueError(f"The corpus {source!r} holds no text.")
    return dataset


def _is_not_empty(text: str | None) -> bool:
    return bool(text and text.strip())


def _is_for_validation(text: str, validation_size: float, seed: int) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
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
        _is_for_validation(text, validation_size, seed)
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
