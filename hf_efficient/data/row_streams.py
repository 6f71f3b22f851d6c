"""
Rows to train on, made from a stream of documents while it is read: packed blocks, and segments of text.

All of them are `IterableDataset`s whose `state_dict()` says where they are after the last row that they gave, and hold
as much of the text as they need at a time, however long it is. Their rows are those that `packing` and `segments` make
of the same text in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset

from .document_stream import DocumentStream
from .packing import pack_batch, packing_settings
from .segments import segment_row
from .text_files import CorpusError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents that are tokenised at once: at most so many, and characters from which on it is enough.
_GROUP, _GROUP_CHARACTERS = 1000, 1 << 20

# A row as it is kept: arrays by name.
Row = dict[str, np.ndarray]


def _flat(name: str, rows: list[Row]) -> dict[str, Any]:
    """Rows of any lengths as two arrays for each of their names."""
    flat: dict[str, Any] = {}
    for key in rows[0] if rows else ():
        arrays = [row[key] for row in rows]
        flat[f"{name}.{key}"] = np.concatenate(arrays)
        flat[f"{name}.{key}.lengths"] = np.array([len(array) for array in arrays], dtype=np.int32)
    return flat


def _unflat(name: str, state: dict[str, Any]) -> list[Row]:
    """The rows that `_flat` was given."""
    columns: dict[str, list[np.ndarray]] = {}
    for key in state:
        if key.startswith(f"{name}.") and not key.endswith(".lengths"):
            ends = np.cumsum(state[f"{key}.lengths"])
            columns[key.removeprefix(f"{name}.")] = np.split(state[key], ends[:-1])
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class _ShuffleBuffer:
    """Gives rows in another order: each that comes in takes the place of a random one, which goes out."""

    def __init__(self, size: int, seed: list[int]):
        if size < 0:
            raise ValueError(f"`shuffle_buffer_size` must be at least 0, got {size}.")
        self.size, self.seed = size, seed
        self.rewind()

    def rewind(self) -> None:
        self.rows: list[Row] = []
        self._bits = np.random.PCG64(self.seed)
        self._numbers = np.random.Generator(self._bits)

    def state_dict(self) -> dict[str, Any]:
        return {"shuffling": self._bits.state["state"], **_flat("buffer", self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = _unflat("buffer", state)
        # Of an integer of 32 bits that was drawn and not used nothing is kept: none is drawn.
        self._bits.state = {**self._bits.state, "state": state["shuffling"]}

    def _draw(self) -> int:
        return int(self._numbers.random() * len(self.rows))

    def shuffle(self, rows: Iterator[Row]) -> Iterator[Row]:
        if self.size < 2:
            yield from rows
            return
        for row in rows:
            if len(self.rows) < self.size:
                self.rows.append(row)
                continue
            place = self._draw()
            chosen, self.rows[place] = self.rows[place], row
            yield chosen
        while self.rows:
            place = self._draw()
            self.rows[place], self.rows[-1] = self.rows[-1], self.rows[place]
            yield self.rows.pop()


class RowStream(IterableDataset):
    """
    Rows of a stream of documents, through a buffer that shuffles them.

    Args:
        documents (`DocumentStream`): the text.
        shuffle_buffer_size (`int`, *optional*, defaults to 0): rows in the buffer; below 2 they keep their order.
        seed (`int`, *optional*, defaults to 0): of the shuffling, which differs between processes.
    """

    def __init__(self, documents: DocumentStream, shuffle_buffer_size: int = 0, seed: int = 0):
        self.documents = documents
        self._buffer = _ShuffleBuffer(shuffle_buffer_size, [seed, documents.process])

    @property
    def epoch(self) -> int:
        """Number of complete passes through the corpus, up to the text of the last row that was made."""
        return self.documents.epoch

    def rewind(self) -> None:
        """Begin anew."""
        self.documents.rewind()
        self._buffer.rewind()

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last row: arrays of NumPy, and values that JSON holds."""
        return {"documents": self.documents.state_dict(), **self._buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the row where another stream with the same arguments was."""
        self.documents.load_state_dict(state["documents"])
        self._buffer.load_state_dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._buffer.shuffle(self._rows()):
            yield self._finished(row)

    def _rows(self) -> Iterator[Row]:
        raise NotImplementedError

    def _check_that_text_is_read(self, epoch: int) -> None:
        """Refuse a corpus of which nothing was made since pass `epoch`, though a whole one lies behind."""
        if self.documents.epoch > epoch + 1:
            raise CorpusError(
                f"The corpus {self.documents.settings.corpus!r} has documents, but none of them makes a row: the "
                "tokenizer finds no token in them, or too few. Train a tokenizer on this text."
            )

    def _finished(self, row: Row) -> dict[str, Any]:
        return dict(row)


class BlockStream(RowStream):
    """
    Rows of at most `block_size` tokens, framed by the tokenizer's special tokens, as
    [`~hf_efficient.data.packing.pack_blocks`] makes them.

    Args:
        documents (`DocumentStream`): the text.
        tokenizer (`PreTrainedTokenizerBase`): its special tokens frame each row.
        block_size, cross_documents, word_ids, min_tail: see there; documents are joined in groups that end after a
            million characters too.
        kwargs: see [`RowStream`].

    Raises:
        ValueError: if `block_size` leaves no room for text, or `word_ids` are asked of a tokenizer that has none.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: "PreTrainedTokenizerBase",
        block_size: int,
        *,
        cross_documents: bool = False,
        word_ids: bool = False,
        min_tail: int = 8,
        **kwargs: Any,
    ):
        super().__init__(documents, **kwargs)
        self.tokenizer = tokenizer
        self._packing = packing_settings(tokenizer, block_size, cross_documents, word_ids, min_tail)
        self._pending: deque[Row] = deque()
        self._epoch = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    def rewind(self) -> None:
        super().rewind()
        self._pending.clear()
        self._epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch": self._epoch, **_flat("pending", list(self._pending))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._epoch, self._pending = state["epoch"], deque(_unflat("pending", state))

    def _rows(self) -> Iterator[Row]:
        yield from self._take_pending()
        made_in = self.documents.epoch
        while not self.documents.is_over:
            self._check_that_text_is_read(made_in)
            for texts in self._groups():
                columns = pack_batch({"text": texts}, self.tokenizer, **self._packing)
                for values in zip(*columns.values(), strict=True):
                    row = {name: np.array(ids, np.int32) for name, ids in zip(columns, values, strict=True)}
                    self._pending.append(row)
                if self._pending:
                    made_in = self._epoch
                yield from self._take_pending()

    def _take_pending(self) -> Iterator[Row]:
        while self._pending:
            yield self._pending.popleft()

    def _groups(self) -> Iterator[list[str]]:
        """Texts that are tokenised at once; of one pass, since their rows get the masks of one."""
        self._epoch = self.documents.epoch
        texts: list[str] = []
        characters = 0
        for document in self.documents.rest_of_pass():
            texts.append(document.text)
            characters += len(document.text)
            if len(texts) == _GROUP or characters >= _GROUP_CHARACTERS:
                yield texts
                texts, characters = [], 0
        if texts:
            yield texts


class SegmentStream(RowStream):
    """
    Consecutive segments of the text, as rows of `input_ids` and `labels` that are moved already (see
    `hf_efficient.data.segments`), for models without memory.

    Args:
        documents (`DocumentStream`): the text.
        encode (`Callable`): makes the ids of a document, pieces of them, given its text and whether to begin with what
            stands between two documents.
        length (`int`): tokens in a segment.
        kwargs: see [`RowStream`].
    """

    _columns = 1

    def __init__(
        self,
        documents: DocumentStream,
        encode: Callable[[Any, bool], list[np.ndarray]],
        length: int,
        **kwargs: Any,
    ):
        super().__init__(documents, **kwargs)
        self.encode, self.length = encode, length
        self._begin()

    def _begin(self) -> None:
        # For each column the tokens at hand and how many of them are used; the columns that the next row and the last
        # document belong to.
        self._tokens = [np.empty(0, np.uint8) for _ in range(self._columns)]
        self._used = [0] * self._columns
        self._next, self._last = 0, -1

    def rewind(self) -> None:
        super().rewind()
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        left = [{"ids": ids[used:]} for ids, used in zip(self._tokens, self._used, strict=True)]
        return {**super().state_dict(), "columns": [self._next, self._last], **_flat("left", left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._tokens = [row["ids"] for row in _unflat("left", state)]
        self._used = [0] * self._columns
        self._next, self._last = state["columns"]

    def _rows(self) -> Iterator[Row]:
        documents, made_in = iter(self.documents), self.documents.epoch
        while True:
            column = self._next
            while len(self._tokens[column]) - self._used[column] <= self.length:
                document = next(documents, None)
                if document is None:
                    return
                # A column that has no token yet begins with its first document.
                follows = len(self._tokens[column]) > 0
                continues = not document.begins and self._last == column
                pieces = self.encode(document.text, follows and not continues)
                made_in = self.documents.epoch if any(map(len, pieces)) else made_in
                self._check_that_text_is_read(made_in)
                self._tokens[column] = np.concatenate([self._tokens[column][self._used[column] :], *pieces])
                self._used[column], self._last = 0, column
            place = self._used[column]
            self._used[column] = place + self.length
            self._next = (column + 1) % self._columns
            # A copy, since the buffer would keep all tokens around it.
            yield {"ids": self._tokens[column][place : place + self.length + 1].copy()}

    def _finished(self, row: Row) -> dict[str, Any]:
        return segment_row(row["ids"], self.length)


class ColumnStream(SegmentStream):
    """
    A text dealt out to columns, and each column cut into consecutive segments, for models that carry a memory from
    segment to segment: row `segment * columns + column` of the columns of this process.

    A document goes to the column that runs out of text first. With one column the rows are those of
    [`~hf_efficient.data.segments.ColumnSegments`]; several are other parts of the text there, where its length is
    known.

    Args:
        documents, encode, length: see [`SegmentStream`].
        columns (`int`): rows of a step in this process. The attribute `columns` counts those of all processes.

    Raises:
        ValueError: if there is no column.
    """

    def __init__(self, documents: DocumentStream, encode: Callable, length: int, columns: int):
        if columns < 1:
            raise ValueError(f"There must be at least 1 column, not {columns}.")
        self._columns = columns
        self.columns = columns * documents.processes
        super().__init__(documents, encode, length)
