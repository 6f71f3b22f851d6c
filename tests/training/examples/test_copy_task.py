"""The example in which a small Terraformer learns to copy, for a few steps."""

import pytest
import torch

from training.examples import copy_task
from training.examples.copy_task import CopySettings, draw_rows, exact_matches, teach


@pytest.mark.parametrize("task", copy_task.ORDERS)
def test_rows(task):
    rows = draw_rows(task, 200, 9, torch.Generator().manual_seed(0), shortest=2)
    lengths = rows["attention_mask"].sum(1)
    assert set(lengths.tolist()) == set(range(2, 10))
    assert set(rows["input_ids"].unique().tolist()) == set(range(12))  # 11 symbols, and padding
    orders = {"copy": list, "reverse": lambda row: row[::-1], "sort": sorted}
    for ids, labels, length in zip(rows["input_ids"], rows["labels"], lengths, strict=True):
        assert labels[:length].tolist() == orders[task](ids[:length].tolist())
        assert set(ids[length:].tolist()) <= {0}
        assert set(labels[length:].tolist()) <= {-100}


def test_a_few_steps_from_the_command_line(capsys):
    copy_task.main(["--steps", "4", "--batch_size", "3", "--length", "5", "--rows", "4"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["exact", "exact_twice_as_long"]


def test_short_rows_are_learned():
    """Of one symbol, which needs no attention to more than one token."""
    settings = CopySettings(length=1, steps=60, batch_size=16, rows=50, config_overrides="max_position_embeddings=1")
    model, found = teach(settings)
    assert found == {"exact": 1.0}
    rows = draw_rows("copy", 8, 1, torch.Generator().manual_seed(1))
    rows["labels"][3] = rows["labels"][3] % copy_task.SYMBOLS + 1  # another one than it writes
    assert exact_matches(model, rows) == pytest.approx(7 / 8)


def test_errors():
    with pytest.raises(ValueError, match="one of copy, reverse, sort"):
        teach(CopySettings(task="add"))
