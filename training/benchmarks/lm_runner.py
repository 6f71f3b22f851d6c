"""A runner of the language-model race: text in contiguous columns with memory, or in random segments without."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from race_track import Recipe, Runner
from torch import nn
from torch.utils.data import Dataset, default_collate

from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments
from hf_efficient.models.srupp.masking_srupp import SegmentMemory
from hf_efficient.trainer.segment_memory import takes_memory


IGNORED = -100


def evaluation_batches(tokens: np.ndarray, length: int, columns: int, with_memory: bool) -> list[dict]:
    """
    The same tokens for every model: contiguous columns, read one segment after the other with memory, or, as is better
    for a model without, by windows that share half of their length.
    """
    if with_memory:
        rows: Dataset = ColumnSegments(tokens, length, columns)
        batch_size = columns
    else:
        column = (len(tokens) - 1) // columns // length * length
        parts = [OverlappingWindows(tokens[i * column : (i + 1) * column + 1], length) for i in range(columns)]
        rows, batch_size = torch.utils.data.ConcatDataset(parts), 2 * columns
    indices = range(len(rows))  # type: ignore[arg-type]
    starts = indices[::batch_size]
    return [default_collate([rows[i] for i in indices[start : start + batch_size]]) for start in starts]


class LanguageModelRunner(Runner):
    """
    Args:
        model (`nn.Module`): a causal LM; one that takes `memory` carries it from segment to segment in `columns` order.
        order (`str`): `"columns"`, contiguous, or `"random"`.
        tokens, held_out (`numpy.ndarray`): ids of the training text and of the text that the curve is measured on.
        evaluation_columns (`int`): columns that the held-out text is cut into.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        order: str,
        tokens: np.ndarray,
        held_out: np.ndarray,
        length: int,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        evaluation_columns: int = 16,
    ):
        super().__init__(name, model, recipe, seed, device)
        self.has_memory = takes_memory(model)
        self.carries = self.has_memory and order == "columns"
        self.rows: ColumnSegments | RandomSegments = (
            ColumnSegments(tokens, length, recipe.batch_size)
            if order == "columns"
            else RandomSegments(tokens, length, seed)
        )
        self.held_out = evaluation_batches(held_out, length, evaluation_columns, self.has_memory)

    def _chosen(self, epoch: int) -> list[int]:
        if isinstance(self.rows, ColumnSegments):
            return list(range(len(self.rows)))
        self.rows.set_epoch(epoch)
        generator = torch.Generator().manual_seed(self.seed + 7919 * epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.recipe.batch_size
        per_epoch = len(self.rows) // size
        while True:
            epoch, start = divmod(self.progress.steps, per_epoch)
            chosen = self._chosen(epoch)
            for index in range(start, per_epoch):
                if index == 0:
                    self.carried = {}
                yield default_collate([self.rows[i] for i in chosen[index * size : (index + 1) * size]])

    def _forward(self, batch: dict[str, torch.Tensor], memory: SegmentMemory | None, carry: bool):
        inputs = {"input_ids": batch["input_ids"].to(self.device), "use_cache": False}
        labels = batch["labels"].to(self.device)
        if self.has_memory:
            inputs |= {"memory": memory, "return_memory": carry}
        return self.model(labels=labels, shift_labels=labels, **inputs)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        memory = SegmentMemory(**self.carried) if self.carried else None
        output = self._forward(batch, memory, self.carries)
        if self.carries:
            # Plain containers: what is carried is saved with the rest.
            self.carried = output.memory.detach()._asdict()
        return output.loss

    def score(self, batches: list[dict]) -> float:
        """Mean loss of the targets of `batches`, in nats."""
        total, count, memory = 0.0, 0, None
        for batch in batches:
            targets = int((batch["labels"] != IGNORED).sum())
            with self.autocast():
                output = self._forward(batch, memory, self.has_memory)
            memory = output.memory if self.has_memory else None
            total += output.loss.item() * targets
            count += targets
        return total / count

    def evaluate(self) -> float:
        return self.score(self.held_out)


def bits(nats: float) -> float:
    return nats / math.log(2)
