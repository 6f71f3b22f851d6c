"""What losses are means over, and their means over batches."""

import math

import pytest
import torch

from hf_efficient.utils.loss_averages import Means, count_targets


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
