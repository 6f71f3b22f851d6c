"""Labelled texts for fine-tuning: columns of local tables or of data sets on the Hub, each row with its place."""

import ast
import io
import itertools
import json
import logging
import os
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .document_readers import as_text, read_rows
from .text_files import CorpusError, TextFile, find_files


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Words in names of files and folders that say the split of rows, as `datasets.load_dataset(folder)` reads them.
_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_DELIMITERS = re.compile(r"[-._ 0-9]+")
_FILES_SHOWN = 5
NO_LIST = "where a list is wanted, as JSON [\"a\", \"b\"] or as Python writes it ['a', 'b']"


@dataclass(frozen=True)
class Columns:
    """
    Names of the columns that hold an example.

    Args:
        text (`str`): the text, or the first of two.
        second_text (`str`, *optional*): the second text.
        tokens (`str`, *optional*): lists of words, in place of texts.
        label (`str`): the label, or a list of labels.
    """

    text: str = "text"
    second_text: str | None = None
    tokens: str | None = None
    label: str = "label"

    def inputs(self) -> dict[str, tuple[str, str]]:
        """For each input (`text`, `text_pair`, `tokens`) the name of its column, and the option that says it."""
        if self.tokens is not None:
            return {"tokens": (self.tokens, "--tokens_column")}
        found = {"text": (self.text, "--text_column")}
        if self.second_text is not None:
            found["text_pair"] = (self.second_text, "--second_text_column")
        return found

    def wanted(self, labelled: bool) -> dict[str, tuple[str, str]]:
        """The inputs, and with `labelled` the label."""
        return {**self.inputs(), **({"label": (self.label, "--label_column")} if labelled else {})}


@dataclass
class LabelledTable:
    """
    Examples in the order of their files.

    Args:
        source (`str`): the file, folder, pattern or data set, for messages.
        values (`dict[str, list]`): `text`, and if there is one `text_pair`, or `tokens`; `label` as it was read.
        places (`list[str]`): file and line of each row, for messages.
        label_names (`tuple[str, ...]`): names of the labels that are numbers, where the data set gives them.
        others (`list[dict]`): of each row the other columns by their names, where they are wanted.
    """

    source: str
    values: dict[str, list[Any]]
    places: list[str]
    label_names: tuple[str, ...] = field(default=())
    others: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def inputs(self) -> dict[str, list[Any]]:
        """The columns other than the label."""
        return {name: values for name, values in self.values.items() if name != "label"}

    def take(self, rows: Sequence[int]) -> "LabelledTable":
        """The rows of the given numbers, in their order."""
        values = {name: [column[row] for row in rows] for name, column in self.values.items()}
        others = [self.others[row] for row in rows] if self.others else []
        return LabelledTable(self.source, values, [self.places[row] for row in rows], self.label_names, others)


def load_labelled(
    source: str,
    columns: Columns,
    *,
    config_name: str | None = None,
    split: str = "train",
    labelled: bool = True,
    with_others: bool = False,
) -> LabelledTable:
    """
    Load examples from local files, or from a data set on the Hub.

    Args:
        source (`str`): a path, folder or pattern of csv, tsv, jsonl or parquet files, which may be compressed; else the
            name of a data set on the Hub. Of a folder whose files are of several splits (see [`local_splits`]) those
            of `split` are read, and of another one all files.
        columns (`Columns`): the columns to read.
        config_name (`str`, *optional*), split (`str`, defaults to `"train"`): of a data set on the Hub.
        labelled (`bool`): whether the labels are read.
        with_others (`bool`): whether the other columns are kept; of a data set on the Hub those of texts and numbers.

    Raises:
        FileNotFoundError: if a path or pattern matches nothing, or the Hub has no such data set.
        CorpusError: if a column or a split does not exist, a text is missing or empty, a file is damaged, or there is
            no row; the message names the file, and the row.
    """
    wanted = columns.wanted(labelled)
    splits = local_splits(source)
    if splits is None:
        table = _hub_table(source, config_name, split, wanted, with_others)
    else:
        table = _local_table(source, _files_of(source, splits, split), wanted, with_others)
    if not len(table):
        raise CorpusError(f"{source} holds no row. Give a table with examples.")
    _check_inputs(table, columns)
    return table


def local_splits(source: str, verbose: bool = False) -> dict[str, list[TextFile]] | None:
    """
    Find local files by their splits.

    The split of a file in a folder, or in a zip archive, is what a word of its name says, or else one of the folders
    between, the nearest first: `reviews_test.csv` and `test/a.csv` are of the test split.

    Args:
        source (`str`): a path, folder or pattern, or the name of a data set on the Hub.
        verbose (`bool`, *optional*, defaults to `False`): log the files of each split, and warn of those of none.

    Returns:
        `dict[str, list[TextFile]]` or `None`: files under `"train"`, `"validation"` and `"test"`. Files that are called
        after none of them are left out, or are for training where no others are. Under `""` all files, where they are
        not of different splits; `None` if `source` looks like the name of a data set on the Hub.
    """
    files = find_files(source)
    if not files:
        return None
    root = os.path.expanduser(source)
    found: dict[str, list[TextFile]] = {}
    for file in files if os.path.lexists(root) else ():  # of a pattern all files are meant
        found.setdefault(_split_of(file, root), []).append(file)
    if len(found) < 2:
        return {"": files}
    others = found.pop("", [])
    if "train" not in found and others:
        found["train"], others = others, []
    if verbose:
        for split, some in found.items():
            logger.info("The %s split of %s: %s.", split, source, _some_names(some, root))
        if others:
            logger.warning(
                "Files in %s that belong to no split are left out (%d, as %s). Name them after one, such as "
                "train_2.csv, or give a pattern of all files.",
                *(source, len(others), _below(others[0], root)),
            )
    return found


def _split_of(file: TextFile, root: str) -> str:
    """The split that the names below the folder, or in the archive, say; empty if there is none."""
    for part in reversed(_below(file, root).parts):
        words = _DELIMITERS.split(part.lower())
        named = [_KEYWORDS[word] for word in words if word in _KEYWORDS]
        if named:
            return named[-1]
    return ""


def _below(file: TextFile, root: str) -> PurePath:
    return PurePath("" if file.path == root else os.path.relpath(file.path, root), file.member or "")


def _some_names(files: Sequence[TextFile], root: str) -> str:
    names = [str(_below(file, root)) for file in files]
    more = len(names) - _FILES_SHOWN
    return ", ".join(names[:_FILES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _files_of(source: str, splits: dict[str, list[TextFile]], split: str) -> list[TextFile]:
    if "" in splits:
        return splits[""]
    if split not in splits:
        raise CorpusError(
            f"The folder {source} has no files of a split {split!r}; it has those of {', '.join(splits)}."
        )
    return splits[split]


def hub_splits(source: str, config_name: str | None) -> list[str]:
    """
    Names of the splits of a data set on the Hub.

    Raises:
        FileNotFoundError: if the Hub has no such data set, or can't be reached.
        CorpusError: if there is no such configuration, or one has to be named.
    """
    from datasets import get_dataset_split_names

    try:
        return get_dataset_split_names(source, config_name)
    except (ConnectionError, FileNotFoundError) as error:
        raise _not_found(source, error) from error
    except ValueError as error:
        raise _wrong_name(source, error) from error


def _not_found(source: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"There is no file or folder {source!r}, and no data set of that name could be had from the Hub: {error}"
    )


def _wrong_name(source: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"The data set {source!r} has no such configuration or split (--train_config, --train_split): {error}"
    )


def _local_table(
    source: str, files: Sequence[TextFile], wanted: dict[str, tuple[str, str]], with_others: bool
) -> LabelledTable:
    options = dict(wanted.values())
    table = LabelledTable(source, {name: [] for name in wanted}, [])
    for file in files:
        # To the end before any value is looked at: that a column is missing is said first.
        for place, row in list(read_rows(file, options, exact=True, with_others=with_others)):
            table.others += row[len(options) :]
            values = dict(zip(options, row, strict=False))
            for name, (column, _) in wanted.items():
                value = values[column]
                if name == "tokens":
                    value = _words(f"{file.name}{place}", column, value)
                elif name != "label" and value is not None:
                    value = as_text(file, place, column, value)
                table.values[name].append(value)
            table.places.append(f"{file.name}{place}")
    return table


def _words(place: str, column: str, value: Any) -> Any:
    try:
        return split_list(value)
    except ValueError as error:
        raise CorpusError(f"{place}: the column {column!r} holds {shortened(value)}, {error}.") from error


def _hub_table(
    source: str, config_name: str | None, split: str, wanted: dict[str, tuple[str, str]], with_others: bool
) -> LabelledTable:
    from datasets import ClassLabel, Value, load_dataset

    try:
        dataset: Dataset = load_dataset(source, config_name, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise _not_found(source, error) from error
    except ValueError as error:
        raise _wrong_name(source, error) from error
    for column, option in wanted.values():
        if column not in dataset.column_names:
            known = ", ".join(map(repr, dataset.column_names))
            raise CorpusError(
                f"The data set {source!r} has no column {column!r}; it has {known}. Name the right one ({option})."
            )
    values = {name: dataset[column][:] for name, (column, _) in wanted.items()}
    for name in ("text", "text_pair"):
        wrong = next((value for value in values.get(name, ()) if not isinstance(value, str | None)), None)
        if wrong is not None:
            raise CorpusError(
                f"The column {wanted[name][0]!r} of the data set {source!r} holds {type(wrong).__name__}, not text."
            )
    names: tuple[str, ...] = ()
    if "label" in wanted:
        kind: Any = dataset.features[wanted["label"][0]]
        names = tuple(getattr(getattr(kind, "feature", kind), "names", None) or ())
    places = [f"{source}, {split}, row {number}" for number in range(1, len(dataset) + 1)]
    others: list[dict[str, Any]] = []
    if with_others:
        chosen = [
            name
            for name, kind in dataset.features.items()
            if isinstance(kind, Value | ClassLabel) and name not in dict(wanted.values())
        ]
        others = dataset.select_columns(chosen).to_list()
    return LabelledTable(source, values, places, names, others)


def looks_like_list(value: Any) -> bool:
    """Tell a text that is written as a list, `[...]`, or one that begins so with a quote and was cut off."""
    text = value.strip() if isinstance(value, str) else ""
    return text.startswith("[") and (text.endswith("]") or text[1:].lstrip().startswith(("'", '"')))


def split_list(value: Any) -> Any:
    """
    Make a list of a cell that holds one: as JSON (`["a", "b"]`), as Python and pandas write it (`['a', 'b']`), or as
    words with spaces between them. Other values are returned as they are.

    Raises:
        ValueError: for a text in brackets that is no list.
    """
    if not isinstance(value, str):
        return value
    if not looks_like_list(value):
        return value.split()
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        found = None
    # Strings without a comma between them, as NumPy writes them, are one string to Python.
    if not isinstance(found, list) or not all(isinstance(item, str | int | float) for item in found):
        raise ValueError(NO_LIST)
    if _has_joined_strings(value):
        raise ValueError(NO_LIST)
    return found


def _has_joined_strings(text: str) -> bool:
    """Tell whether two strings of a list of Python have no comma between them."""
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
    kinds = [kind for kind in kinds if kind not in skipped]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)


def _empty(table: LabelledTable, name: str) -> Iterator[int]:
    for row, value in enumerate(table.values[name]):
        if value is None or len(value) == 0 or (isinstance(value, str) and not value.strip()):
            yield row


def _check_inputs(table: LabelledTable, columns: Columns) -> None:
    for name, (column, _) in columns.inputs().items():
        if name == "tokens":
            _check_tokens(table, column)
        empty = list(_empty(table, name))
        if empty:
            raise CorpusError(
                f"{table.places[empty[0]]}: the column {column!r} is empty{and_others(empty)}. Give the row a text, or "
                "remove it."
            )


def _check_tokens(table: LabelledTable, column: str) -> None:
    for place, words in zip(table.places, table.values["tokens"], strict=True):
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise CorpusError(f"{place}: the column {column!r} holds no list of words: {shortened(words)}.")
        if words and not all(word.strip() for word in words):
            raise CorpusError(f"{place}: the column {column!r} holds an empty word. Remove it, and its label.")


def and_others(rows: Sequence[int]) -> str:
    """Words that say how many rows besides the first have the same fault."""
    return f", as in {len(rows) - 1} more rows" if len(rows) > 1 else ""


def shortened(value: Any) -> str:
    """A value as Python writes it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
