"""
Documents of a corpus of any size, read as they are needed, again and again, from a place that can be kept.

Local files are read by this package and not by `datasets`, whose streams find their place again by reading all that
stands before it: here a file is opened at its place, and only one that is compressed is read up to there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .corpus import is_for_validation, load_corpus, load_from_hub
from .document_readers import START, TXT_DOCUMENTS, Document, Position, cut_place, read_documents, with_plain_breaks
from .text_files import CorpusError, TextFile, find_files, modification


# Characters that a tokenizer is trained on, and texts and characters that tell whether it knows them.
TOKENIZER_CHARACTERS = 50_000_000
_SAMPLE, _SAMPLE_CHARACTERS = 1000, 4_000_000
# Characters, or bytes of a txt file, from which on a document is cut; parts are at most twice as long.
LONGEST = 1 << 19


class _FileSource:
    """Documents of local files in their order, one pass; `state` is where it is."""

    def __init__(self, files: list[TextFile], text_column: str, txt_documents: str, decode: Callable, longest: int):
        self.files = files
        self._options: dict[str, Any] = {"decode": decode, "longest": longest}
        self._columns = (text_column, txt_documents)
        self.rewind()

    def rewind(self) -> None:
        self._file, self._position = 0, START

    def state_dict(self) -> dict[str, Any]:
        return {"file": self._file, "position": list(self._position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._file, self._position = state["file"], Position(*state["position"])

    def shard(self, process: int, processes: int) -> bool:
        if processes > 1 and len(self.files) % processes == 0:
            self.files = self.files[process::processes]
            return True
        return processes == 1

    def __iter__(self) -> Iterator[Document]:
        while self._file < len(self.files):
            for document in read_documents(
                self.files[self._file], *self._columns, start=self._position, **self._options
            ):
                self._position = document.end
                yield document
            self._file, self._position = self._file + 1, START


class _RowSource:
    """Documents of a stream of `datasets`, one pass, which keeps its place by itself."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._first = dataset.state_dict()

    def rewind(self) -> None:
        self.dataset.load_state_dict(self._first)

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state)

    def shard(self, process: int, processes: int) -> bool:
        from datasets.distributed import split_dataset_by_node

        self.dataset = split_dataset_by_node(self.dataset, process, processes)
        self._first = self.dataset.state_dict()
        return True

    def __iter__(self) -> Iterator[Document]:
        for row in self.dataset:
            text = row["text"]
            if not (text is None or isinstance(text, str)):
                raise CorpusError(f"The corpus holds {type(text).__name__} in place of text.")
            if text and text.strip():
                yield Document(text, START)


@dataclass(kw_only=True)
class DocumentSettings:
    """
    Choice of the documents that a [`DocumentStream`] reads.

    Args:
        corpus (`str`): as [`~hf_efficient.data.corpus.load_corpus`] takes it, and so the next four.
        text_column, config_name, split, txt_documents (`str`, *optional*): see there.
        decode (`Callable`, *optional*): makes the text from the bytes of a txt file.
        validation_size (`float`, *optional*, defaults to 0.0): the fraction of the documents that are for validation,
            chosen as [`~hf_efficient.data.corpus.split_documents`] does.
        longest (`int`, *optional*): characters, or bytes of a txt file, from which on a document is cut.
    """

    corpus: str
    text_column: str = "text"
    config_name: str | None = None
    split: str = "train"
    txt_documents: str = "file"
    decode: Callable[[bytes], Any] = with_plain_breaks
    validation_size: float = 0.0
    longest: int = LONGEST

    def __post_init__(self):
        if self.txt_documents not in TXT_DOCUMENTS:
            names = ", ".join(TXT_DOCUMENTS)
            raise ValueError(f"`txt_documents` must be one of {names}, not {self.txt_documents!r}.")
        if not 0.0 <= self.validation_size < 1.0:
            raise ValueError(f"`validation_size` of a stream must lie in [0, 1), got {self.validation_size}.")

    def open(self) -> Any:
        """Find the corpus, whose files are opened as they are read."""
        if self.corpus == "builtin":
            return _RowSource(load_corpus(self.corpus).to_iterable_dataset())
        if files := find_files(self.corpus):
            return _FileSource(files, self.text_column, self.txt_documents, self.decode, self.longest)
        return _RowSource(load_from_hub(self.corpus, self.config_name, self.split, self.text_column, streaming=True))


class DocumentStream:
    """
    Documents of a corpus, one after another; after the last one the first again.

    Each of several processes sees documents of its own: files of its own if their number is a multiple of that of
    the processes (of a dataset on the Hub its shards), else every n-th document. A document that is longer than
    `settings.longest` is read in parts, which count as documents when they are dealt out or held out.

    Args:
        settings (`DocumentSettings`): which documents.
        part (`str`, *optional*, defaults to `"train"`): those to train on, or those for `"validation"`.
        process, processes (`int`, *optional*): which process this is, of how many.
        passes (`int`, *optional*): read the corpus so often; without end by default.

    Raises:
        FileNotFoundError: if a path or pattern matches nothing.
        CorpusError: for what is no text, while it is read, and if a whole pass has nothing for this process.
    """

    def __init__(
        self,
        settings: DocumentSettings,
        part: str = "train",
        *,
        process: int = 0,
        processes: int = 1,
        passes: int | None = None,
    ):
        self.settings, self.process, self.processes, self.passes = settings, process, processes, passes
        self._is_validation = part == "validation"
        self._source = settings.open()
        # Else every n-th document is taken.
        self._has_own_shard = self._source.shard(process, processes)
        self.rewind()

    @property
    def digest(self) -> str:
        """Changes with the names and sizes of local files."""
        files = [] if self.settings.corpus == "builtin" else find_files(self.settings.corpus)
        named = [(file.name, modification(file)[2]) for file in files] or self.settings.corpus
        return hashlib.blake2b(json.dumps(named).encode(), digest_size=16).hexdigest()

    def rewind(self) -> None:
        """Begin anew."""
        self._source.rewind()
        self.epoch, self._rest = 0, ""
        self._begin_pass()

    def _begin_pass(self) -> None:
        # Parts that were read, those among them that are not held out, and the number of the last one of this process.
        self._read, self._dealt, self._last = 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return its place, as values that JSON holds."""
        counts = [self._read, self._dealt, self._last]
        return {"epoch": self.epoch, "counts": counts, "rest": self._rest, "source": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another stream of the same settings was."""
        self._source.load_state_dict(state["source"])
        self.epoch, self._rest = state["epoch"], state["rest"]
        self._read, self._dealt, self._last = state["counts"]

    def __iter__(self) -> Iterator[Document]:
        while not self.is_over:
            yield from self.rest_of_pass()

    @property
    def is_over(self) -> bool:
        """True after the last pass."""
        return self.passes is not None and self.epoch >= self.passes

    def rest_of_pass(self) -> Iterator[Document]:
        """Documents up to the end of the corpus, after which `epoch` is one more."""
        for document in self._parts():
            self._read += 1
            if self._is_mine(document):
                follows, self._last = self._last == self._read - 1, self._read
                yield document._replace(begins=document.begins or not follows)
        if not self._last:
            raise CorpusError(self._nothing())
        self._source.rewind()
        self.epoch += 1
        self._begin_pass()

    def _is_mine(self, document: Document) -> bool:
        size = self.settings.validation_size
        if (size or self._is_validation) and is_for_validation(document.text, size) != self._is_validation:
            return False
        self._dealt += 1
        return self._has_own_shard or (self._dealt - 1) % self.processes == self.process

    def _parts(self) -> Iterator[Document]:
        """Documents, of which those that are too long are cut."""
        if self._rest:
            yield from self._cut(Document(self._rest, START, begins=False))
        for document in self._source:
            yield from self._cut(document)

    def _cut(self, document: Document) -> Iterator[Document]:
        while (place := cut_place(document.text, self.settings.longest)) is not None:
            self._rest = document.text[place:]
            yield document._replace(text=document.text[:place])
            document = Document(self._rest, document.end, begins=False)
        self._rest = ""
        yield document

    def _nothing(self) -> str:
        corpus = self.settings.corpus
        if self._is_validation:
            size = f"{self.settings.validation_size:.2%}"
            return f"The corpus {corpus!r} has no document to validate on among {size}: raise --validation_size."
        if self._dealt:
            return (
                f"The corpus {corpus!r} has {self._dealt} documents to train on, fewer than processes "
                f"({self.processes}): use fewer, or smaller documents (--txt_documents blank_line)."
            )
        to_train_on = " to train on" if self.settings.validation_size else ""
        if self._has_own_shard and self.processes > 1:
            return (
                f"The part of the corpus {corpus!r} that process {self.process + 1} of {self.processes} reads, one "
                f"in {self.processes} of its files or shards, holds no text{to_train_on}: leave out empty ones, or use "
                "fewer processes."
            )
        return f"The corpus {corpus!r} holds no text{to_train_on}."


class FirstTexts:
    """
    The first texts of a stream to train on, read anew each time.

    Args:
        settings (`DocumentSettings`): which documents.
        characters (`int`): end after so many.
    """

    def __init__(self, settings: DocumentSettings, characters: int):
        self.settings, self.characters = settings, characters

    @classmethod
    def sample(cls, settings: DocumentSettings) -> list[Any]:
        """The first thousand, as a list."""
        return list(islice(cls(settings, _SAMPLE_CHARACTERS), _SAMPLE))

    def __iter__(self) -> Iterator[Any]:
        left = self.characters
        for document in DocumentStream(self.settings, passes=1):
            yield document.text
            left -= len(document.text)
            if left <= 0:
                return
