"""What losses are means over, and their means over batches."""

import math

import pytest
import torch

from hf_efficient.utils.loss_averages import Means, count_targets, part_counts, scalar_parts


IDS = torch.zeros(2, 5, dtype=torch.long)
LABELS = torch.tensor([[7, 1, -100, 2, 3], [-100, -100, -100, -100, 4]])
COUNTS = {
    "labels": ({"labels": LABELS}, False, 5),
    "labels-of-a-causal-model": ({"labels": LABELS}, True, 4),
    "shifted-labels": ({"labels": LABELS, "shift_labels": LABELS[:, 2:]}, True, 3),
    "numbers": ({"labels": torch.tensor([0.5, -100.0])}, False, 1),
    "answers": ({"start_positions": torch.tensor([0, 4]), "end_positions": torch.tensor([4, 5])}, False, 1.5),
    "no-answer": ({"start_positions": torch.tensor([-100, 9]), "end_positions": torch.tensor([-100, 9])}, False, 0),
    "nothing": ({}, False, 1),
}


@pytest.mark.parametrize(("targets", "shifts_labels", "expected"), COUNTS.values(), ids=COUNTS)
def test_number_of_targets(targets, shifts_labels, expected):
    assert count_targets({"input_ids": IDS, **targets}, shifts_labels) == expected
    assert count_targets({"inputs_embeds": torch.zeros(2, 5, 3), **targets}, shifts_labels) == expected


def test_a_loss_is_left_out_without_targets_and_seen_when_it_is_not_finite():
    means = Means()
    for loss, targets in ((2.0, 3), (math.nan, 0), (5.0, 1)):
        means.add({"loss": torch.tensor(loss)}, torch.tensor(targets), {})
    assert means.take(lambda sums: sums) == {"loss": 11 / 4}
    means.add({"loss": torch.tensor(math.nan), "part": torch.tensor(math.nan)}, torch.tensor(2), {})
    means.add({"loss": torch.tensor(1.0), "part": torch.tensor(1.0)}, 2.0, {})
    taken = means.take(lambda sums: sums)
    assert math.isnan(taken["loss"])
    assert taken["part"] == 1.0


def tensors(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize("weighted", [False, True], ids=["numbers", "tensors"])
def test_batches_without_a_part_do_not_count_for_it(weighted):
    means = Means()
    batches = [(2.0, 4, 10.0), (float("nan"), 3, 20.0), (5.0, 2, float("inf")), (float("-inf"), 0, 40.0)]
    for recall, count, accuracy in batches:
        weight = torch.tensor(count) if weighted else count
        means.add(tensors(recall=recall, accuracy=accuracy), weight, {"accuracy": torch.tensor(1.0)})
    found = means.take(lambda totals: totals)
    assert found == pytest.approx({"recall": (2.0 * 4 + 5.0 * 2) / 6, "accuracy": (10.0 + 20.0 + 40.0) / 3})
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
