"""Documents of local files: whole txt files or their parts, and the text column of JSON, csv and parquet tables."""

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    columns = {text_column: "--text_column"}
    if file.kind == "text":
        _check_columns(file, columns, ["text"])
        for text in _read_txt(file, TXT_DOCUMENTS[txt_documents]):
            if text.strip():
                yield as_text(file, "", text_column, text)
        return
    for place, (value,) in _READERS[file.kind](file, columns, (), False):
        if value is not None and (text := as_text(file, place, text_column, value)).strip():
            yield text


def read_rows(
    file: TextFile, columns: Mapping[str, str], lists: Collection[str] = (), *, exact: bool = False
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """
    Read several columns of a table.

    Args:
        file (`TextFile`): a JSON, csv or parquet file.
        columns (`Mapping[str, str]`): their names, each with the option of the command line that says it.
        lists (`Collection[str]`): columns that may hold lists of texts.
        exact (`bool`, *optional*, defaults to `False`): take values of any type; in a csv file refuse a row of more or
            fewer cells than the header; in a tsv file take quotes for text, as tables of GLUE and their like mean them.

    Returns:
        `Iterator[tuple[str, tuple]]`: place in the file, for errors, and the values of each row, unchecked.

    Raises:
        CorpusError: for a file that is no table or has no such column, and for one that is damaged.
    """
    if file.kind == "text":
        raise CorpusError(f"{file.name} is text without columns: give a parquet, jsonl, csv or tsv file.")
    yield from _READERS[file.kind](file, columns, lists, exact)


def as_text(file: TextFile, place: str, column: str, value: Any) -> str:
    """
    Make sure that a value of a table is text. A half of a surrogate pair, which JSON can hold, is none, and replaced.

    Raises:
        CorpusError: for a value of another type.
    """
    if not isinstance(value, str):
        raise CorpusError(f"{file.name}{place}: the column {column!r} holds {type(value).__name__}, not text.")
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_columns(file: TextFile, wanted: Mapping[str, str], columns: Sequence[Any]) -> None:
    for name, option in wanted.items():
        if name not in columns:
            raise CorpusError(
                f"{file.name} has no column {name!r}; it has {', '.join(map(str, columns)) or 'none'}. Name the right "
                f"one ({option})."
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


def _read_json(
    file: TextFile, wanted: Mapping[str, str], lists: Collection[str], exact: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    columns: dict[str, None] = {}
    for place, row in json_rows(file):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            names = " and ".join(map(repr, wanted))
            raise CorpusError(f"{file.name}{place} is no object of JSON with the column {names}.")
        columns |= dict.fromkeys(row)
        yield place, tuple(row.get(name) for name in wanted)
    if columns:
        _check_columns(file, wanted, list(columns))


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


def _read_csv(
    file: TextFile, wanted: Mapping[str, str], lists: Collection[str], exact: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    delimiter = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # documents are long
    try:
        with io.TextIOWrapper(file.open_text(), encoding="utf-8", newline="") as stream:
            options: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if exact and delimiter == "\t" else {}
            rows = csv.DictReader(stream, delimiter=delimiter, strict=True, **options)
            if rows.fieldnames:
                _check_columns(file, wanted, rows.fieldnames)
            for row in rows:
                if exact and (None in row or None in row.values()):
                    raise CorpusError(
                        f"{file.name}, line {rows.line_num}, has {'more' if None in row else 'fewer'} cells than the "
                        f"{len(rows.fieldnames or ())} of the header. Put a text with commas or line breaks into "
                        "double quotes, and in a tsv file leave tabs out of it."
                    )
                yield f", line {rows.line_num}", tuple(row[name] for name in wanted)
    except UnicodeDecodeError as error:
        raise file.refuse_encoding() from error
    except csv.Error as error:
        raise CorpusError(f"{file.name} is not a table: {error}, after line {rows.line_num}.") from error


def _read_parquet(
    file: TextFile, wanted: Mapping[str, str], lists: Collection[str], exact: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file.path if file.is_plain else io.BytesIO(file.open().read()))
        _check_columns(file, wanted, table.schema_arrow.names)
        for name in wanted:
            kind = table.schema_arrow.field(name).type
            if not (exact or _holds_text(kind, name in lists)):
                raise CorpusError(f"{file.name}: the column {name!r} holds {kind}, not text.")
        place = 0
        for batch in table.iter_batches(1000, columns=list(wanted)):
            values = [batch.column(name).to_pylist() for name in wanted]
            for row in zip(*values, strict=True):
                place += 1
                yield f", row {place}", row
    except CorpusError:
        raise
    except (OSError, ValueError) as error:  # the base classes of pyarrow's errors
        raise CorpusError(f"{file.name} is damaged or cut off ({error}). Fetch it anew.") from error


def _holds_text(kind: Any, may_be_list: bool) -> bool:
    from pyarrow import types

    if may_be_list and (types.is_list(kind) or types.is_large_list(kind)):
        return _holds_text(kind.value_type, False)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(is_text(kind) for is_text in texts)


_READERS: dict[str, Callable] = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
