"""Documents of local files: whole txt files or their parts, and the text column of JSON, csv and parquet tables."""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .text_files import CorpusError, TextFile


# What separates the documents of a txt file.
TXT_DOCUMENTS = {
    "file": None,
    "blank_line": re.compile(rb"(?>\r\n|\r|\n){2}"),
    "line": re.compile(rb"\r\n|\r|\n"),
}
_LONGEST_SEPARATOR = len(b"\r\n\r\n")
_CHUNK = 1 << 20  # bytes that are split at once
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SPACE, _BYTES_SPACE = re.compile(r"(?<=\S)(?=\s)"), re.compile(rb"(?<=\S)(?=\s)")


class Position(NamedTuple):
    """
    A place in a file between two documents, or two parts of one.

    Args:
        offset (`int`): bytes of the text before it.
        line (`int`): lines before it, where a table counts them.
        row (`int`): rows before it in a parquet file, or in a list of JSON that begins at `offset`.
        is_inside (`bool`): whether it is inside a document.
    """

    offset: int = 0
    line: int = 0
    row: int = 0
    is_inside: bool = False


START = Position()


class _Wanted(NamedTuple):
    """Choice of what is read of each row of a table, as [`read_rows`] says."""

    columns: Mapping[str, str]
    lists: Collection[str] = ()
    exact: bool = False
    with_others: bool = False

    def pick(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        values = tuple(row.get(name) for name in self.columns)
        if not self.with_others:
            return values
        return (*values, {name: value for name, value in row.items() if name not in self.columns})


_Rows = Iterator[tuple[str, tuple[Any, ...], Position]]


class Document(NamedTuple):
    """
    A document, or a part of a long one.

    Args:
        text (`str`): its text.
        end (`Position`): where the next one is read from.
        begins (`bool`): False for a part that goes on with the one before.
    """

    text: Any
    end: Position
    begins: bool = True


def with_plain_breaks(data: bytes) -> str:
    """Decode UTF-8, with all line breaks as `\\n`."""
    text = data.decode()
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_documents(
    file: TextFile,
    text_column: str,
    txt_documents: str,
    *,
    start: Position = START,
    longest: int | None = None,
    decode: Callable[[bytes], Any] = with_plain_breaks,
) -> Iterator[Document]:
    """
    Read the documents of a file, one after the other. Of a table the text column alone is looked at; rows without a
    text are left out.

    Args:
        file (`TextFile`): a file of any kind.
        text_column (`str`): column that holds the text.
        txt_documents (`str`): what a document is in a txt file, a key of `TXT_DOCUMENTS`.
        start (`Position`, *optional*): where to begin, the `end` of a document.
        longest (`int`, *optional*): bytes from which on a document of a txt file is cut, see [`cut_place`]; none is by
            default.
        decode (`Callable`, *optional*): makes the text from the bytes of a txt file; UTF-8 with `\\n` at the end of
            lines by default.

    Raises:
        CorpusError: for a file without that column, or in which it holds no text, and for one that is damaged.
    """
    columns = {text_column: "--text_column"}
    if file.kind == "text":
        _check_columns(file, columns, ["text"])
        try:
            for begins, data, end in _read_txt(file, TXT_DOCUMENTS[txt_documents], start, longest):
                if (text := decode(data)).strip():
                    yield Document(as_text(file, "", text_column, text) if isinstance(text, str) else text, end, begins)
        except UnicodeDecodeError as error:
            raise file.refuse_encoding() from error
        return
    for place, (value,), end in _READERS[file.kind](file, _Wanted(columns), start):
        if value is not None and (text := as_text(file, place, text_column, value)).strip():
            yield Document(text, end)


def read_rows(
    file: TextFile,
    columns: Mapping[str, str],
    lists: Collection[str] = (),
    *,
    exact: bool = False,
    with_others: bool = False,
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """
    Read several columns of a table.

    Args:
        file (`TextFile`): a JSON, csv or parquet file.
        columns (`Mapping[str, str]`): their names, each with the option of the command line that says it.
        lists (`Collection[str]`): columns that may hold lists of texts.
        exact (`bool`, *optional*, defaults to `False`): take values of any type; in a csv file refuse a row of more or
            fewer cells than the header; in a tsv file take quotes for text, as tables of GLUE and their like mean them.
        with_others (`bool`, *optional*, defaults to `False`): give the row's other columns too.

    Returns:
        `Iterator[tuple[str, tuple]]`: place in the file, for errors, and the values of each row, unchecked; behind them
        a `dict` of those of the other columns, if they are wanted.

    Raises:
        CorpusError: for a file that is no table or has no such column, and for one that is damaged.
    """
    if file.kind == "text":
        raise CorpusError(f"{file.name} is text without columns: give a parquet, jsonl, csv or tsv file.")
    for place, values, _ in _READERS[file.kind](file, _Wanted(columns, lists, exact, with_others), START):
        yield place, values


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
                f"{file.name} has no column {name!r}; it has {', '.join(map(repr, columns)) or 'none'}. Name the right "
                f"one ({option})."
            )


def cut_place(data: Any, longest: int) -> int | None:
    """
    Find where to cut a text that is more than twice `longest`: at the first white space from there on, else at twice as
    much. None for one that is not as long, which stays whole.

    Args:
        data (`str` or `bytes`): the text, or its beginning, in UTF-8.
        longest (`int`): characters, or bytes.
    """
    if len(data) <= 2 * longest:
        return None
    space = (_BYTES_SPACE if isinstance(data, bytes) else _SPACE).search(data, longest, 2 * longest)
    if space:
        return space.start()
    place = 2 * longest
    while isinstance(data, bytes) and place > longest and data[place] & 0xC0 == 0x80:  # inside a character
        place -= 1
    return place


def _read_txt(
    file: TextFile, separator: re.Pattern | None, start: Position, longest: int | None
) -> Iterator[tuple[bool, bytes, Position]]:
    """Texts between separators, or the whole, cut where they are too long: whether a document begins, its bytes, and
    where it ends."""
    pending, offset, begins, is_last = bytearray(), start.offset, not start.is_inside, False
    with file.open_text(offset) as stream:
        while not is_last:
            chunk = stream.read(_CHUNK)
            chunk += stream.read(1) if chunk.endswith(b"\r") else b""  # a line break of two bytes stays whole
            # What was searched holds no separator, but maybe the beginning of one.
            is_last, searched, place = not chunk, max(0, len(pending) + 1 - _LONGEST_SEPARATOR), 0
            pending += chunk
            while True:
                found = separator.search(pending, max(place, searched)) if separator is not None else None
                length = (found.start() if found else len(pending)) - place
                cut = None
                if longest is not None and length > 2 * longest:
                    cut = cut_place(bytes(pending[place : place + 2 * longest + 1]), longest)
                if cut is not None:
                    end = after = place + cut
                elif found is not None:
                    end, after = found.span()
                else:
                    break
                yield begins, bytes(pending[place:end]), Position(offset + after, is_inside=cut is not None)
                begins, place = cut is None, after
            del pending[:place]
            offset += place
        yield begins, bytes(pending), Position(offset + len(pending))


def _read_json(file: TextFile, wanted: _Wanted, start: Position) -> _Rows:
    columns: dict[str, None] = {}
    for place, row, end in _json_items(file, start):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            names = " and ".join(map(repr, wanted.columns))
            raise CorpusError(f"{file.name}{place} is no object of JSON with the column {names}.")
        columns |= dict.fromkeys(row)
        yield place, wanted.pick(row), end
    if columns and start == START:
        _check_columns(file, wanted.columns, list(columns))


def json_rows(file: TextFile) -> Iterator[tuple[str, Any]]:
    """
    Read JSON lines, or a list of objects or an object that fill a file.

    Returns:
        `Iterator[tuple[str, Any]]`: place in the file, for errors, and value of each.

    Raises:
        CorpusError: for what is not JSON, named with its line.
    """
    for place, value, _ in _json_items(file, START):
        yield place, value


def _json_items(file: TextFile, start: Position) -> Iterator[tuple[str, Any, Position]]:
    offset = start.offset
    with file.open_text(offset) as stream:
        is_first = offset == 0 or start.row > 0
        for number, line in enumerate(stream, start.line + 1):
            before = Position(offset, number - 1)
            offset += len(line)
            if not (stripped := line.strip()):
                continue
            try:
                row = _parse(file, line, f", line {number}")
            except CorpusError:
                # An object or a list may go over several lines, if it is the only one.
                if not (is_first and stripped[:1] in (b"[", b"{") and stripped[-1:] in (b"[", b"{", b",")):
                    raise
                rest = stream.read()
                row, offset = _parse(file, line + rest, ""), offset + len(rest)
            after = Position(offset, number)
            if isinstance(row, list):
                skipped = start.row if before[:2] == start[:2] else 0
                for place, item in enumerate(row[skipped:], skipped + 1):
                    yield f", row {place}", item, before._replace(row=place) if place < len(row) else after
            else:
                yield f", line {number}", row, after
            is_first = False


def _parse(file: TextFile, content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise file.refuse_encoding() from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{file.name}{place} is not JSON: {error}.") from error


class _Lines:
    """Lines of a file as text, with their ends as they are, and the number of bytes up to the end of the last one."""

    def __init__(self, file: TextFile, offset: int):
        self.offset = offset
        self._lines = self._read(file, offset)

    @staticmethod
    def _read(file: TextFile, offset: int) -> Iterator[bytes]:
        with file.open_text(offset) as stream:
            for line in stream:
                if b"\r" in line[:-2]:  # which ends a line by itself
                    yield from _LINE.findall(line)
                else:
                    yield line

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += len(line)
        return line.decode()


def _read_csv(file: TextFile, wanted: _Wanted, start: Position) -> _Rows:
    delimiter = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # documents are long
    options: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    if wanted.exact and delimiter == "\t":
        options["quoting"] = csv.QUOTE_NONE
    lines = _Lines(file, 0)
    rows = csv.DictReader(lines, **options)
    line = 0
    try:
        if rows.fieldnames:
            _check_columns(file, wanted.columns, rows.fieldnames)
        if start != START:
            line, lines = start.line, _Lines(file, start.offset)
            rows = csv.DictReader(lines, rows.fieldnames, **options)
        for row in rows:
            line = rows.line_num + start.line
            if wanted.exact and (None in row or None in row.values()):
                raise CorpusError(
                    f"{file.name}, line {line}, has {'more' if None in row else 'fewer'} cells than the "
                    f"{len(rows.fieldnames or ())} of the header. Put a text with commas or line breaks into "
                    "double quotes, and in a tsv file leave tabs out of it."
                )
            yield f", line {line}", wanted.pick(row), Position(lines.offset, line)
    except UnicodeDecodeError as error:
        raise file.refuse_encoding() from error
    except csv.Error as error:
        line = rows.line_num + start.line
        raise CorpusError(f"{file.name} is not a table: {error}, after line {line}.") from error


def _read_parquet(file: TextFile, wanted: _Wanted, start: Position) -> _Rows:
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file.path if file.is_plain else io.BytesIO(file.open().read()))
        _check_columns(file, wanted.columns, table.schema_arrow.names)
        for name in wanted.columns:
            kind = table.schema_arrow.field(name).type
            if not (wanted.exact or _holds_text(kind, name in wanted.lists)):
                raise CorpusError(f"{file.name}: the column {name!r} holds {kind}, not text.")
        place, group = 0, 0
        while group < table.num_row_groups and place + table.metadata.row_group(group).num_rows <= start.row:
            place += table.metadata.row_group(group).num_rows
            group += 1
        names = list(dict.fromkeys([*wanted.columns, *(table.schema_arrow.names if wanted.with_others else ())]))
        for batch in table.iter_batches(1000, range(group, table.num_row_groups), columns=names):
            values = [batch.column(name).to_pylist() for name in names]
            for row in zip(*values, strict=True):
                place += 1
                if place > start.row:
                    picked = wanted.pick(dict(zip(names, row, strict=True))) if wanted.with_others else row
                    yield f", row {place}", picked, Position(row=place)
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
