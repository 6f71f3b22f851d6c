"""Two processes with half of the batch each do what one process does."""

import json

import pytest

from tests.helpers.processes import run_by_torchrun
from tests.training import pretraining_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    pretraining_runs.write_corpus(folder / "corpus.txt")
    changes = {
        "config_overrides": pretraining_runs.OVERRIDES + pretraining_runs.NO_DROPOUT,
        "max_steps": 12,
        "logging_steps": 1,
        "per_device_eval_batch_size": 2,
    }
    one = pretraining_runs.arguments(folder, folder / "one", **changes, per_device_train_batch_size=6)
    large = {**changes, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    two = pretraining_runs.arguments(folder, folder / "two", **changes, per_device_train_batch_size=3)
    pretraining_runs.run_here(one)
    pretraining_runs.run_here(pretraining_runs.arguments(folder, folder / "large", **large))
    run_by_torchrun("tests.training.distributed_worker", folder / "fsdp.json", *two)
    return folder


@pytest.mark.parametrize("other", ["two", "large"])
def test_losses_are_those_of_one_process(runs, other):
    """Half of the batch on each of two processes; and one large batch instead of two accumulated ones."""
    expected, found = pretraining_runs.history(runs / "one"), pretraining_runs.history(runs / other)
    if other == "large":  # the rows that an epoch drops depend on the batch size
        expected, found = ([entry for entry in log if entry["epoch"] < 1] for log in (expected, found))
    assert len(expected) == len(found) > 7
    for a, b in zip(expected, found, strict=other == "two"):
        assert a["step"] == b["step"]
        for key in ("loss", "grad_norm", "accuracy", "eval_loss", "eval_accuracy"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)


def test_fsdp_equals_the_whole_objective(runs):
    """With torch's own FSDP: accelerate, and so Trainer, shards on accelerators only."""
    found = json.loads((runs / "fsdp.json").read_text())
    assert len(found) == 6
    for name, values in found.items():
        for kind, (whole, sharded) in values.items():
            assert sharded == pytest.approx(whole, rel=1e-5), (name, kind)
