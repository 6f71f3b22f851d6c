"""Rows of a stream as Trainer's loops take them, and the stream's place in checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import TrainingArguments

from ..data.row_streams import RowStream


_FILE_NAME = "stream_state-{:05d}-of-{:05d}.safetensors"


class NumberedRows(Dataset):
    """
    The rows of a stream under numbers, which can be taken in their order only.

    Trainer passes over the rows of a checkpoint by their numbers, which takes no time, where a stream without them
    would be read up to there. Row 0 begins the stream anew.

    Args:
        stream (`RowStream`): rows of this process.
        args (`TrainingArguments`): says how many steps there are.
        batch_size (`int`): rows of a batch in this process.

    Raises:
        ValueError: if the stream would be read by workers, whose place no checkpoint knows.
    """

    def __init__(self, stream: RowStream, args: TrainingArguments, batch_size: int):
        if args.dataloader_num_workers:
            raise ValueError("A stream is read by the process that trains: leave out --dataloader_num_workers.")
        self.stream, self.args, self.batch_size = stream, args, batch_size
        self.file_name = _FILE_NAME.format(args.process_index, args.world_size)
        self._place = 0
        self._rows = iter(stream)
        if hasattr(stream, "columns"):
            self.columns = stream.columns

    def __len__(self) -> int:
        return self.args.max_steps * self.args.gradient_accumulation_steps * self.batch_size

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 0:
            self.stream.rewind()
            self._place, self._rows = 0, iter(self.stream)
        if index != self._place:
            raise IndexError(f"The stream is at row {self._place}, and row {index} is asked for.")
        row = next(self._rows, None)
        if row is None:
            raise ValueError(f"The stream ends after {index} rows, before max_steps.")
        self._place += 1
        return row

    def loader(self, collator: Callable) -> DataLoader:
        """Make the loader of all batches; a collator with `set_epoch` is told how often the corpus was read."""

        def collate(rows: list[dict[str, Any]]) -> Any:
            if hasattr(collator, "set_epoch"):
                collator.set_epoch(self.stream.epoch)
            return collator(rows)

        pin = self.args.dataloader_pin_memory
        loader: Any = DataLoader(
            self, self.batch_size, sampler=SequentialSampler(self), collate_fn=collate, pin_memory=pin
        )
        loader.total_batch_size = self.batch_size * self.args.world_size  # as accelerate's loaders say it
        return loader

    def save(self, folder: str) -> None:
        """Write the place of this process's stream to a file of its own in `folder`."""
        from safetensors.numpy import save_file

        state = self.stream.state_dict()
        arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in state.items() if name not in arrays}
        metadata = {"state": json.dumps({**rest, "place": self._place})}
        save_file(arrays, Path(folder, self.file_name), metadata)

    def load(self, folder: str) -> None:
        """
        Go on from the place that `save` wrote.

        Raises:
            ValueError: if another number of processes wrote it.
        """
        from safetensors import safe_open

        path = Path(folder, self.file_name)
        if not path.is_file():
            number = len(list(Path(folder).glob("stream_state-*.safetensors")))
            raise ValueError(
                f"{folder} holds the places of {number} streams, one of each process, but there are "
                f"{self.args.world_size} processes: resume with as many as before."
            )
        with safe_open(path, "numpy") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
            state |= json.loads(file.metadata()["state"])
        self._place = state.pop("place")
        self.stream.load_state_dict(state)
        self._rows = iter(self.stream)
