"""Documents of local files: whole txt files or their parts, and the text column of JSON, csv and parquet tables."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from .text_files import CorpusError, TextFile


TXT_DOCUMENTS = {"file": "", "blank_line": "\n\n", "line": "\n"}
_CHUNK = 1 << 20  # characters that are split at once


def read_documents(file: TextFile, text_column: str, txt_documents: str) -> Iterator[str]:
    """
    Read the documents of a file, one after the other. Of a table the text column alone is looked at; rows without a
    text are left out.

    Args:
        file (`TextFile`): a file of any kind.
        text_column (`str`): column that holds the text.
        txt_documents (`str`): what a document is in a txt file, a key of `TXT_DOCUMENTS`.

    Raises:
        CorpusError: for a file without that column, or in which it holds no text, and for one that is damaged.
    """
    kind = file.kind
    if kind == "text":
        _check_column(file, text_column, ["text"])
        values: Iterator[tuple[str, Any]] = (("", text) for text in _read_txt(file, TXT_DOCUMENTS[txt_documents]))
    else:
        values = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}[kind](file, text_column)
    for place, text in values:
        if text is None:
            continue
        if not isinstance(text, str):
            raise CorpusError(f"{file.name}{place}: the column {text_column!r} holds {type(text).__name__}, not text.")
        if text.strip():
            # A half of a surrogate pair, which JSON can hold, is no text.
            yield text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_column(file: TextFile, text_column: str, columns: Sequence[Any]) -> None:
    if text_column not in columns:
        raise CorpusError(
            f"{file.name} has no column {text_column!r}; it has {', '.join(map(str, columns)) or 'none'}. Name the one "
            "that holds the text (--text_column)."
        )


def _read_txt(file: TextFile, separator: str) -> Iterator[str]:
    """Texts between separators, or the whole; all line breaks are `\\n`."""
    try:
        with io.TextIOWrapper(file.open_text(), encoding="utf-8") as stream:
            if not separator:
                yield stream.read()
                return
            rest = ""
            while chunk := stream.read(_CHUNK):
                *texts, rest = (rest + chunk).split(separator)
                yield from texts
            yield rest
    except UnicodeDecodeError as error:
        raise file.refuse_encoding() from error


def _read_json(file: TextFile, text_column: str) -> Iterator[tuple[str, Any]]:
    columns: dict[str, None] = {}
    for place, row in json_rows(file):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise CorpusError(f"{file.name}{place} is no object of JSON with the column {text_column!r}.")
        columns |= dict.fromkeys(row)
        yield place, row.get(text_column)
    if columns:
        _check_column(file, text_column, list(columns))


def json_rows(file: TextFile) -> Iterator[tuple[str, Any]]:
    """
    Read JSON lines, or a list of objects or an object that fill a file.

    Returns:
        `Iterator[tuple[str, Any]]`: place in the file, for errors, and value of each.

    Raises:
        CorpusError: for what is not JSON, named with its line.
    """
    with file.open_text() as stream:
        is_first = True
        for number, line in enumerate(stream, 1):
            if not (stripped := line.strip()):
                continue
            try:
                row = _parse(file, line, f", line {number}")
            except CorpusError:
                # An object or a list may go over several lines, if it is the only one.
                if not (is_first and stripped[:1] in (b"[", b"{") and stripped[-1:] in (b"[", b"{", b",")):
                    raise
                row = _parse(file, line + stream.read(), "")
            if isinstance(row, list):
                yield from ((f", row {place}", item) for place, item in enumerate(row, 1))
            else:
                yield f", line {number}", row
            is_first = False


def _parse(file: TextFile, content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise file.refuse_encoding() from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{file.name}{place} is not JSON: {error}.") from error


def _read_csv(file: TextFile, text_column: str) -> Iterator[tuple[str, Any]]:
    delimiter = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # documents are long
    try:
        with io.TextIOWrapper(file.open_text(), encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
            if rows.fieldnames:
                _check_column(file, text_column, rows.fieldnames)
            for row in rows:
                yield f", line {rows.line_num}", row[text_column]
    except UnicodeDecodeError as error:
        raise file.refuse_encoding() from error
    except csv.Error as error:
        raise CorpusError(f"{file.name} is not a table: {error}, after line {rows.line_num}.") from error


def _read_parquet(file: TextFile, text_column: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file.path if file.is_plain else io.BytesIO(file.open().read()))
        _check_column(file, text_column, table.schema_arrow.names)
        kind = table.schema_arrow.field(text_column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(is_text(kind) for is_text in texts):
            raise CorpusError(f"{file.name}: the column {text_column!r} holds {kind}, not text.")
        for batch in table.iter_batches(1000, columns=[text_column]):
            yield from (("", text) for text in batch.column(0).to_pylist())
    except CorpusError:
        raise
    except (OSError, ValueError) as error:  # the base classes of pyarrow's errors
        raise CorpusError(f"{file.name} is damaged or cut off ({error}). Fetch it anew.") from error
