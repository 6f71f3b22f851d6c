"""Weighted means of the parts of a loss, over batches where a part may not be defined."""

import pytest
import torch

from hf_efficient.utils.loss_averages import Means, part_counts, scalar_parts


def tensors(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize("weighted", [False, True], ids=["numbers", "tensors"])
def test_batches_without_a_part_do_not_count_for_it(weighted):
    means = Means()
    batches = [(2.0, 4, 10.0), (float("nan"), 3, 20.0), (5.0, 2, float("inf")), (float("-inf"), 0, 40.0)]
    for recall, count, loss in batches:
        weight = torch.tensor(count) if weighted else count
        means.add(tensors(recall=recall, loss=loss), weight, {"loss": torch.tensor(1.0)})
    found = means.take(lambda totals: totals)
    assert found == pytest.approx({"recall": (2.0 * 4 + 5.0 * 2) / 6, "loss": (10.0 + 20.0 + 40.0) / 3})
    assert means.take(lambda totals: totals) == {}


def test_a_part_that_was_never_defined_has_no_mean():
    means = Means()
    means.add(tensors(recall=float("nan"), loss=1.5), 7, {})
    assert means.take(lambda totals: totals) == {"loss": 1.5}


def test_sums_are_those_of_all_processes():
    means = Means()
    means.add(tensors(loss=1.0, recall=2.0), 3, {"recall": torch.tensor(5)})
    found = means.take(lambda totals: totals + torch.tensor([[9.0, 1.0], [0.0, 5.0]]))
    assert found == pytest.approx({"loss": (1.0 * 3 + 9.0) / 4, "recall": 1.0})


def test_parts_are_scalars_besides_the_loss_and_weigh_as_many_as_there_are_targets():
    outputs = {**tensors(loss=1.0, recall=2.0, logits=[1.0, 2.0]), "name": "x", "none": None}
    assert scalar_parts(outputs) == {"recall": torch.tensor(2.0)}
    batch = {"labels": torch.tensor([[1, -100, 2], [-100, -100, 0]])}
    assert part_counts(torch.nn.Linear(1, 1), outputs, batch) == (3, {})
    assert part_counts(torch.nn.Linear(1, 1), outputs, {}) == (1.0, {})
