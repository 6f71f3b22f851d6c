"""Whole runs of objectives with a generator: what they log, accumulated, resumed, on two processes, sharded."""

import json
import subprocess
import sys
from pathlib import Path

import detector_runs as runs
import pytest
import torch
from detector_models import KINDS


PARTS = {"detector_loss", "share_replaced", "recall_replaced", "accuracy_original", "token_variance_share"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


def make_trainer(folder, kind, **options):
    """The encoder joins at step 3."""
    return runs.make_trainer(folder, runs.make_objective(kind, detector_start_step=3), **options)


@pytest.fixture(scope="module")
def one_process(kind, tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("one"), kind)
    trainer.train()
    return trainer


def compare(trainer, other_history, other_weights):
    for ours, other in zip(runs.history(trainer), other_history, strict=True):
        assert ours.keys() == other.keys()
        for key in ("loss", "grad_norm", "generator_loss"):
            assert other[key] == pytest.approx(ours[key], rel=1e-4), (ours["step"], key)
    for name, value in runs.weights(trainer.model).items():
        torch.testing.assert_close(torch.tensor(other_weights[name]), torch.tensor(value), rtol=1e-3, atol=1e-4)


def test_the_generator_learns_first_and_all_parts_are_logged(kind, one_process):
    log = runs.history(one_process)
    assert [("detector_loss" in entry) for entry in log] == [False] * 3 + [True] * 3
    wanted = PARTS | ({"accuracy_replaced"} if kind == "meta_controller" else set())
    assert all(wanted <= set(entry) for entry in log[3:])
    model, state = one_process.model, one_process.optimizer.state
    assert state[model.dense.weight]["step"] == 3
    assert state[model.vocabulary_bias]["step"] == state[model.small_network.dense.weight]["step"] == 6


def test_accumulated_equals_one_large_batch(kind, one_process, tmp_path):
    large = make_trainer(tmp_path, kind, per_device_train_batch_size=12, gradient_accumulation_steps=1)
    large.train()
    compare(one_process, runs.history(large), runs.weights(large.model))


@pytest.mark.parametrize("cut", [2, 4])  # in the first phase, and after it
def test_resumed_equals_uninterrupted(kind, cut, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = make_trainer(tmp_path / "whole", kind, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert runs.history(resumed) == runs.history(whole)
    assert runs.weights(resumed.model) == runs.weights(whole.model)


@pytest.fixture(scope="module")
def two_processes(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    worker = Path(runs.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run([*command, str(folder), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "two.json").read_text())


def test_two_processes_equal_one(one_process, two_processes):
    """Through both phases, without DDP's search for unused parameters."""
    compare(one_process, two_processes["history"], two_processes["weights"])


def test_fsdp_equals_the_whole_objective(two_processes):
    """With torch's own FSDP: accelerate, and so Trainer, shards on accelerators only."""
    assert len(two_processes["sharded"]) == 8
    for name, values in two_processes["sharded"].items():
        for kind, (whole, sharded) in values.items():
            assert sharded == pytest.approx(whole, rel=1e-5), (name, kind)
