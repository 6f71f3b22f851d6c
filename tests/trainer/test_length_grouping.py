"""Batches of rows of similar length, in an order that seed and epoch decide."""

import numpy as np
import pytest
from transformers import TrainingArguments

from hf_efficient.trainer.length_grouping import LengthGroupingTrainer, ResumableLengthGroupedSampler
from tests.trainer.toy_trainer import Rows, Toy


def test_length_groups_depend_on_seed_and_epoch():
    lengths = list(np.random.default_rng(0).integers(3, 60, 97))
    sampler = ResumableLengthGroupedSampler(4, lengths, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert sorted(first) == sorted(second) == list(range(97))
    spread = [np.ptp([lengths[i] for i in first[start : start + 4]]) for start in range(0, 96, 4)]
    assert np.mean(spread) < 20
    assert list(ResumableLengthGroupedSampler(4, lengths, seed=6)) not in (first, second)


@pytest.fixture
def order(tmp_path):
    """`order(**arguments)` gives the rows of an epoch of `LengthGroupingTrainer` in the order of training."""

    def train_order(**arguments):
        settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True}
        args = TrainingArguments(**{**settings, "train_sampling_strategy": "group_by_length", **arguments})
        rows = Rows()
        lengths = [7 * i % 22 for i in range(len(rows))]
        trainer = LengthGroupingTrainer(model=Toy(), args=args, train_dataset=rows, lengths=lengths)
        return list(trainer._get_train_sampler(rows))

    return train_order


def test_the_order_of_the_data_follows_the_data_seed_or_else_the_seed(order):
    first = order(seed=1)
    assert sorted(first) == list(range(22))
    assert order(seed=1) == first
    assert order(seed=2) != first
    assert order(seed=2, data_seed=1) == first
    assert order(seed=1, data_seed=0) != first  # 0 is a seed like any other


def test_rows_of_a_step_are_grouped_whatever_its_batches(order):
    """Accumulated batches are one step, and so one group: the order is that of a step in one batch."""
    whole = order(seed=1, per_device_train_batch_size=6)
    assert order(seed=1, gradient_accumulation_steps=2) == whole
    assert order(seed=1) != whole


def test_other_strategies_are_those_of_trainer(order):
    assert order(seed=1, train_sampling_strategy="sequential") == list(range(22))
