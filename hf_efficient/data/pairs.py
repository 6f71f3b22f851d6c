"""Documents with their summaries: read from anywhere, tokenised for an encoder-decoder, and the lead as a baseline."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..utils.labels import IGNORE_INDEX
from ..utils.text_pieces import special_ids, split_document, split_sentences
from .document_readers import as_text, read_rows
from .text_files import CorpusError, find_files


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def load_pairs(
    source: str | Sequence[str],
    *,
    document_column: str = "document",
    summary_column: str = "summary",
    references_column: str | None = None,
    config_name: str | None = None,
    split: str = "train",
) -> "Dataset":
    """
    Load documents with their summaries. Rows that lack one of them are left out, and counted in the log.

    Args:
        source (`str` or `Sequence[str]`): a path, folder or pattern, or several, of parquet, jsonl, csv or tsv files,
            which may be compressed; else the name of a dataset on the Hub.
        document_column, summary_column (`str`, default to `"document"` and `"summary"`): columns of text.
        references_column (`str`, *optional*): column of further texts to compare a summary with, a list in each row.
        config_name (`str`, *optional*), split (`str`, defaults to `"train"`): of a dataset on the Hub.

    Returns:
        `datasets.Dataset`: with the columns `document`, `summary`, and `references`, a list that holds the summary
            alone where there are no others.

    Raises:
        FileNotFoundError: if a path or pattern matches nothing, or the Hub has no such dataset.
        CorpusError: if a column does not exist or holds no text, a file is damaged, or there is no row.
    """
    from datasets import Dataset

    options = {document_column: "--document_column", summary_column: "--summary_column"}
    if references_column is not None:
        options[references_column] = "--references_column"
    if files := find_files(source):
        rows = _local_rows(files, options, references_column)
    else:
        rows = _hub_rows(str(source), config_name, split, options)
    columns: dict[str, list[Any]] = {"document": [], "summary": [], "references": []}
    left_out = 0
    for values in rows:
        document, summary = values[document_column], values[summary_column]
        for name, text in ((document_column, document), (summary_column, summary)):
            if not isinstance(text, (str, type(None))):
                raise CorpusError(f"Column {name!r} of {source!r} holds a {type(text).__name__}, not text.")
        if not (document or "").strip() or not (summary or "").strip():
            left_out += 1
            continue
        given = values[references_column] if references_column is not None else None
        references = [given] if isinstance(given, str) else list(given or [])
        columns["document"].append(document)
        columns["summary"].append(summary)
        columns["references"].append([text for text in references if (text or "").strip()] or [summary])
    if left_out:
        logger.warning(
            "%d of %d rows lack a document or a summary, and are left out.",
            left_out,
            left_out + len(columns["summary"]),
        )
    if not columns["summary"]:
        raise CorpusError(f"{source!r} holds no document with a summary.")
    return Dataset.from_dict(columns)


def _local_rows(
    files: Sequence[Any], options: dict[str, str], references_column: str | None
) -> Iterator[dict[str, Any]]:
    lists = () if references_column is None else (references_column,)
    for file in files:
        for place, values in read_rows(file, options, lists):
            row: dict[str, Any] = {}
            for name, value in zip(options, values, strict=True):
                if name in lists and isinstance(value, list):
                    row[name] = [as_text(file, place, name, text) for text in value if text is not None]
                else:
                    row[name] = None if value is None else as_text(file, place, name, value)
            yield row


def _hub_rows(source: str, config_name: str | None, split: str, options: dict[str, str]) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        dataset: Any = load_dataset(source, config_name, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source!r}, and no dataset of that name could be had from the Hub: {error}"
        ) from error
    for name, option in options.items():
        if name not in dataset.column_names:
            known = ", ".join(map(repr, dataset.column_names))
            raise CorpusError(
                f"The dataset {source!r} has no column {name!r}; it has {known}. Name the one that holds the text "
                f"({option})."
            )
    yield from dataset.select_columns(list(options))


def pairs_digest(pairs: "Dataset") -> str:
    """Digest of all texts of pairs in order, equal for equal rows, whatever their source."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in pairs.iter(batch_size=1000):
        digest.update(json.dumps([batch[name] for name in ("document", "summary", "references")]).encode())
    return digest.hexdigest()


def lead(document: str, sentences: int) -> str:
    """
    Take the first sentences of a document for its summary, the baseline that summaries of news seldom beat by much.

    Args:
        document (`str`): the text.
        sentences (`int`): how many.

    Returns:
        `str`: a line for each.
    """
    return "\n".join(split_sentences(document)[:sentences])


class PairEncoder:
    """
    Tokens of documents and summaries, for `datasets.map` in batches.

    A document has the special tokens that its tokenizer gives any text. A summary has them too, and an end of text in
    any case.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        max_source_length, max_target_length (`int`): most tokens of a document that is read at once, and of a summary.

    Raises:
        ValueError: if the tokenizer has no end of text, or the special tokens leave no room.
    """

    def __init__(self, tokenizer: Any, max_source_length: int, max_target_length: int):
        self.tokenizer = tokenizer
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.before, self.behind = special_ids(tokenizer)
        if not self.behind and tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end of text (eos_token), by which summaries end.")
        self.end = self.behind or [tokenizer.eos_token_id]
        if min(max_source_length, max_target_length) <= len(self.before) + len(self.end):
            raise ValueError(
                f"{max_source_length} tokens of a document and {max_target_length} of a summary leave no room beside "
                "the special ones."
            )

    def _cut(self, text: str, length: int, end: list[int]) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*self.before, *ids[: length - len(self.before) - len(end)], *end]

    def targets(self, summaries: Sequence[str]) -> list[list[int]]:
        """Ids of summaries, cut to their longest."""
        return [self._cut(text, self.max_target_length, self.end) for text in summaries]

    def encode(self, rows: dict[str, list]) -> dict[str, list]:
        """Pairs for training: `input_ids` of documents, cut to their longest, `labels`, and `length`, that of the
        input."""
        inputs = [self._cut(text, self.max_source_length, self.behind) for text in rows["document"]]
        return {"input_ids": inputs, "labels": self.targets(rows["summary"]), "length": [len(ids) for ids in inputs]}

    def encode_in_pieces(self, rows: dict[str, list], indices: Sequence[int]) -> dict[str, list]:
        """
        Pairs for evaluation: a document that is too long becomes several rows, of which the first has the labels, and
        the others none that count.

        Args:
            rows (`dict[str, list]`): `document` and `summary`.
            indices (`Sequence[int]`): numbers of the rows, which the rows of pieces keep as `document`.
        """
        found: dict[str, list] = {"input_ids": [], "labels": [], "document": []}
        targets = self.targets(rows["summary"])
        for text, labels, index in zip(rows["document"], targets, indices, strict=True):
            pieces = split_document(self.tokenizer, text, self.max_source_length)
            found["input_ids"] += pieces
            found["labels"] += [labels, *[[IGNORE_INDEX]] * (len(pieces) - 1)]
            found["document"] += [index] * len(pieces)
        return found

    def decode(self, ids: Any) -> list[str]:
        """Texts of rows of ids, of which those below 0 are padding."""
        rows = [[token for token in row if token >= 0] for row in ids.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def join_pieces(summaries: Sequence[str], documents: Sequence[int]) -> list[str]:
    """Join the summaries of a document's pieces, given the document of each, in ascending order."""
    joined: dict[int, list[str]] = {}
    for text, document in zip(summaries, documents, strict=True):
        joined.setdefault(document, []).append(text)
    return [" ".join(filter(None, texts)) for texts in joined.values()]
