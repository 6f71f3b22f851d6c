"""Batches of examples of similar length, in an order that survives resuming."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from .trainer import EfficientTrainer


if TYPE_CHECKING:
    from datasets import Dataset


class ResumableLengthGroupedSampler(LengthGroupedSampler):
    """`LengthGroupedSampler` whose order depends on seed and epoch alone, so that a resumed epoch has the same one."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        mixed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(mixed)
        return super().__iter__()


class LengthGroupingTrainer(EfficientTrainer):
    """
    Trainer that groups by length in an order that survives resuming.

    Args:
        lengths (`list[int]`):
            Length in tokens of every training example.
        kwargs:
            See [`EfficientTrainer`].
    """

    def __init__(self, *, lengths: list[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.lengths = lengths

    # Private, but Trainer's one place to choose the sampler, and the same from transformers 5.17 to 5.24.
    def _get_train_sampler(self, train_dataset: "Dataset | None" = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ResumableLengthGroupedSampler(batch_size, self.lengths, seed)
