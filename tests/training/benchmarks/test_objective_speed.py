"""The benchmark of the objectives' cost: every objective takes its step, and ratios are to masked LM."""

import pytest
import torch

from training.benchmarks import objective_speed as speed


def test_every_objective_takes_its_step():
    for name in (speed.MASKED_LM, *speed.GOALS):
        case = speed.BenchmarkCase(name, "tupe", 1, 64, 1100, torch.device("cpu"))
        before = [parameter.detach().clone() for parameter in case.objective.parameters()]
        case.train()
        moved = [not torch.equal(a, b) for a, b in zip(before, case.objective.parameters(), strict=True)]
        assert all(moved), name
        if case.notes is not None:
            assert case.notes.updates.sum() > 0
    with pytest.raises(ValueError, match="no objective 'mlm'"):
        speed.build("mlm", "bert", 1, 64, 1100)


def test_ratios_are_to_masked_lm():
    usual = {"masked_lm": [2.0, 2.0], "masked_lm + notes": [2.1], "replaced_token": [2.5], "meta_controller": [4.0]}
    seconds = [usual, {name: [2.0] for name in usual}, {**usual, "masked_lm": [1.0]}]
    peaks = {"masked_lm": 2**21, "meta_controller": 2**22}
    rows = speed.rows_of({"encoder": "tupe", "size": "4x256", "seconds": seconds, "peak_bytes": peaks})
    assert [row["value"] for row in rows] == [1.05, 1.25, 2.0, 2.0]
    assert [row["goal"] for row in rows] == [f"at most {goal}" for goal in ("1.05", "1.35", "1.50", "1.30")]
    assert rows[-1]["unit"] == "times (4 MiB)"
