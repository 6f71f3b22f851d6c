"""Whole runs of the meta-controller: its first phase, accumulated, resumed, on two processes, sharded."""

import json
import subprocess
import sys
from pathlib import Path

import meta_controller_runs as runs
import pytest
import torch
from detector_runs import history, weights


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    trainer = runs.make_trainer(tmp_path_factory.mktemp("one"))
    trainer.train()
    return trainer


def compare(trainer, other_history, other_weights):
    for ours, other in zip(history(trainer), other_history, strict=True):
        assert ours.keys() == other.keys()
        for key in ("loss", "grad_norm", "generator_loss"):
            assert other[key] == pytest.approx(ours[key], rel=1e-4), (ours["step"], key)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(torch.tensor(other_weights[name]), torch.tensor(value), rtol=1e-3, atol=1e-4)


def test_the_controller_learns_first_and_all_parts_are_logged(one_process):
    log = history(one_process)
    assert [("detector_loss" in entry) for entry in log] == [False] * 3 + [True] * 3
    parts = {"detector_loss", "share_replaced", "recall_replaced", "accuracy_replaced", "accuracy_original"}
    assert all(parts | {"token_variance_share"} <= set(entry) for entry in log[3:])
    model, state = one_process.model, one_process.optimizer.state
    assert state[model.dense.weight]["step"] == 3
    assert state[model.bias]["step"] == state[model.controller.dense.weight]["step"] == 6


def test_accumulated_equals_one_large_batch(one_process, tmp_path):
    large = runs.make_trainer(tmp_path, per_device_train_batch_size=12, gradient_accumulation_steps=1)
    large.train()
    compare(one_process, history(large), weights(large.model))


@pytest.mark.parametrize("cut", [2, 4])  # in the first phase, and after it
def test_resumed_equals_uninterrupted(cut, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = runs.make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = runs.make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert history(resumed) == history(whole)
    assert weights(resumed.model) == weights(whole.model)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    worker = Path(runs.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "two.json").read_text())


def test_two_processes_equal_one(one_process, two_processes):
    """Through both phases, without DDP's search for unused parameters."""
    compare(one_process, two_processes["history"], two_processes["weights"])


def test_fsdp_equals_the_whole_objective(two_processes):
    assert len(two_processes["sharded"]) == 8
    for name, values in two_processes["sharded"].items():
        for kind, (whole, sharded) in values.items():
            assert sharded == pytest.approx(whole, rel=1e-5), (name, kind)
