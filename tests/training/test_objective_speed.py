"""The benchmark of the objectives' cost: every objective takes its step, and ratios are to masked LM."""

import importlib

import pytest
import torch

from tests.training import pretraining_runs


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(pretraining_runs.TRAINING / "benchmarks")
    return importlib.import_module("objective_speed")


def test_every_objective_takes_its_step(speed):
    for name in (speed.MASKED_LM, *speed.GOALS):
        subject = speed.Subject(name, "tupe", 1, 64, 1100, torch.device("cpu"))
        before = [parameter.detach().clone() for parameter in subject.objective.parameters()]
        subject.train()
        moved = [not torch.equal(a, b) for a, b in zip(before, subject.objective.parameters(), strict=True)]
        assert all(moved), name
        if subject.notes is not None:
            assert subject.notes.updates.sum() > 0
    with pytest.raises(ValueError, match="no objective 'mlm'"):
        speed.build("mlm", "bert", 1, 64, 1100)


def test_ratios_are_to_masked_lm(speed):
    usual = {"masked_lm": [2.0, 2.0], "masked_lm + notes": [2.1], "replaced_token": [2.5], "meta_controller": [4.0]}
    seconds = [usual, {name: [2.0] for name in usual}, {**usual, "masked_lm": [1.0]}]
    peaks = {"masked_lm": 2**21, "meta_controller": 2**22}
    rows = speed.rows_of({"encoder": "tupe", "size": "4x256", "seconds": seconds, "peak_bytes": peaks})
    assert [row["value"] for row in rows] == [1.05, 1.25, 2.0, 2.0]
    assert [row["goal"] for row in rows] == [f"at most {goal}" for goal in ("1.05", "1.35", "1.50", "1.30")]
    assert rows[-1]["unit"] == "times (4 MiB)"
