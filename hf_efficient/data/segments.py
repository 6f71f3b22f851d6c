"""A long text cut into segments for language models: contiguous columns, random segments, overlapping windows.

All of them yield rows of `input_ids` and `labels`, both `(length,)`, int64. Labels are already shifted: `labels[i]` is
the token after `input_ids[i]`, so the last position of a segment predicts the first token of the next one. Models of
transformers take such labels as `shift_labels`.
"""

import logging
import math
import random
from typing import Any

import torch
from torch.utils.data import Dataset

from ..utils.labels import IGNORE_INDEX


logger = logging.getLogger(__name__)


def _as_text(tokens: Any, length: int) -> Any:
    if len(tokens.shape) != 1:
        raise ValueError(f"Tokens must be one long row of ids; got shape {tuple(tokens.shape)}.")
    if length < 1:
        raise ValueError(f"Segments must be at least 1 token long, not {length}.")
    if len(tokens) < 2:
        raise ValueError(f"A text of {len(tokens)} tokens has nothing to predict; give at least 2.")
    return tokens


def _row(tokens: Any, start: int, stop: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs from `start` to `stop` and what follows each; filled up to `length` where there is nothing to learn."""
    return segment_row(tokens[start : max(start, stop) + 1], length)


def segment_row(piece: Any, length: int) -> dict[str, torch.Tensor]:
    """
    Make a row from the tokens of a segment and the one that follows it.

    Args:
        piece (`Tensor` or `numpy.ndarray` of shape `(tokens,)`): at most `length + 1` ids.
        length (`int`): tokens in a segment; where there are fewer, nothing is to be learned.
    """
    piece = piece.long() if isinstance(piece, torch.Tensor) else torch.from_numpy(piece.astype("int64"))
    row = {"input_ids": torch.zeros(length, dtype=torch.long), "labels": torch.full((length,), IGNORE_INDEX)}
    count = max(len(piece) - 1, 0)
    row["input_ids"][:count] = piece[:count]
    row["labels"][:count] = piece[1:]
    return row


class ColumnSegments(Dataset):
    """
    A text cut into contiguous columns, and each column into consecutive segments, for the training and evaluation of
    models that carry a memory from segment to segment.

    Row `segment * columns + column`, so batches of `columns` rows in their order are consecutive segments of the same
    columns. With several processes batches go round, so process p gets the columns from `p * batch size` on, if
    `columns` is batch size times number of processes.

    Source: Lei, arXiv 2102.12459, its training code (the same layout as Transformer-XL's). There the tail of each
    column is left over; here it is the tail of the whole text.

    Args:
        tokens (`Tensor` or `numpy.ndarray` of shape `(tokens,)`): ids; an array mapped from a file is read as needed.
        length (`int`): tokens in a segment.
        columns (`int`, defaults to 1): rows of a step, over all processes.
        drop_tail (`bool`, defaults to `True`): leave out the tail that fills no segment of all columns, for training.
            Otherwise every token but the first is a target once, and last segments are filled up with targets of -100.

    Raises:
        ValueError: if the text is too short.
    """

    def __init__(self, tokens: Any, length: int, columns: int = 1, drop_tail: bool = True):
        self.tokens, self.length, self.columns = _as_text(tokens, length), length, columns
        self.targets = len(tokens) - 1
        if columns < 1:
            raise ValueError(f"There must be at least 1 column, not {columns}.")
        if drop_tail:
            self.segments = self.targets // (columns * length)
            self.column_length = self.segments * length
            if self.segments == 0:
                raise ValueError(
                    f"A text of {len(tokens)} tokens is too short for {columns} columns of segments of {length}: it "
                    f"takes {columns * length + 1}. Use fewer rows a step or shorter segments."
                )
            dropped = self.targets - columns * self.column_length
            if dropped:
                logger.info(
                    "%d columns of %d segments of %d tokens; the last %d tokens of the text (%.2f %%) fill none.",
                    columns,
                    self.segments,
                    length,
                    dropped,
                    100 * dropped / len(tokens),
                )
        else:
            self.column_length = math.ceil(self.targets / columns)
            self.segments = math.ceil(self.column_length / length)

    def __len__(self) -> int:
        return self.segments * self.columns

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        segment, column = divmod(index, self.columns)
        if not 0 <= segment < self.segments:
            raise IndexError(f"Row {index} of {len(self)}.")
        start = column * self.column_length + segment * self.length
        stop = min(start + self.length, (column + 1) * self.column_length, self.targets)
        return _row(self.tokens, start, stop, self.length)


class RandomSegments(Dataset):
    """
    The segments of a text, to be drawn in random order, for models without memory. Each epoch cuts at other places.

    Args:
        tokens (`Tensor` or `numpy.ndarray` of shape `(tokens,)`): ids.
        length (`int`): tokens in a segment.
        seed (`int`, defaults to 0): where to cut.

    Raises:
        ValueError: if the text is shorter than a segment.
    """

    def __init__(self, tokens: Any, length: int, seed: int = 0):
        self.tokens, self.length, self.seed = _as_text(tokens, length), length, seed
        targets = len(tokens) - 1
        if targets < length:
            raise ValueError(f"A text of {len(tokens)} tokens is too short for segments of {length}.")
        self.segments = max(1, (targets - length + 1) // length)
        self._offsets = min(length, targets - self.segments * length + 1)
        # In shared memory: workers of a DataLoader that outlive an epoch see what is set afterwards.
        self._offset = torch.zeros((), dtype=torch.long).share_memory_()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The place of the first cut follows from the epoch, so that a run that is resumed sees the same segments."""
        self._offset.fill_(random.Random(f"{self.seed} {epoch}").randrange(self._offsets))

    def __len__(self) -> int:
        return self.segments

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.segments:
            raise IndexError(f"Row {index} of {self.segments}.")
        start = int(self._offset) + index * self.length
        return _row(self.tokens, start, start + self.length, self.length)


class OverlappingWindows(Dataset):
    """
    Windows of a text that share `overlap` tokens with the window before, which are context only: every token but the
    first is a target once. This gives models without memory their better number.

    Args:
        tokens (`Tensor` or `numpy.ndarray` of shape `(tokens,)`): ids.
        length (`int`): tokens in a window.
        overlap (`int`, *optional*): tokens shared; half a window by default.

    Raises:
        ValueError: if the windows do not advance.
    """

    def __init__(self, tokens: Any, length: int, overlap: int | None = None):
        self.tokens, self.length = _as_text(tokens, length), length
        self.overlap = length // 2 if overlap is None else overlap
        if not 0 <= self.overlap < length:
            raise ValueError(f"`overlap` ({self.overlap}) must be at least 0 and less than `length` ({length}).")
        self.targets = len(tokens) - 1
        self.windows = 1 + math.ceil(max(0, self.targets - length) / (length - self.overlap))

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.windows:
            raise IndexError(f"Row {index} of {self.windows}.")
        start = index * (self.length - self.overlap)
        row = _row(self.tokens, start, min(start + self.length, self.targets), self.length)
        if index:
            row["labels"][: self.overlap] = IGNORE_INDEX
        return row
