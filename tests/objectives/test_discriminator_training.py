"""Whole runs of objectives with a generator: what they log, accumulated, resumed, on two processes, sharded."""

import json

import pytest
import torch

from tests.helpers.processes import run_distributed
from tests.objectives import discriminator_runs as runs
from tests.objectives.discriminator_models import KINDS


PARTS = {"discriminator_loss", "replaced_fraction", "recall_replaced", "accuracy_original", "token_variance_fraction"}


RUNS = [(kind, phase) for kind in KINDS for phase in runs.PHASES]


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def run(request):
    """An objective, and what learns before its discriminator joins at step 3."""
    return request.param


def make_trainer(folder, run, **options):
    kind, phase = run
    return runs.make_trainer(folder, runs.make_objective(kind, **runs.PHASES[phase]), **options)


@pytest.fixture(scope="module")
def one_process(run, tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("one"), run)
    trainer.train()
    return trainer


def compare(trainer, other_history, other_weights):
    for ours, other in zip(runs.history(trainer), other_history, strict=True):
        assert ours.keys() == other.keys()
        for key in ours.keys() - {"token_variance_fraction"}:  # of the states of one batch
            assert other[key] == pytest.approx(ours[key], rel=1e-4), (ours["step"], key)
    for name, value in runs.weights(trainer.model).items():
        torch.testing.assert_close(torch.tensor(other_weights[name]), torch.tensor(value), rtol=1e-3, atol=1e-4)


def test_the_generator_learns_first_and_all_parts_are_logged(run, one_process):
    kind, phase = run
    log = runs.history(one_process)
    assert [("discriminator_loss" in entry) for entry in log] == [False] * 3 + [True] * 3
    wanted = PARTS | ({"accuracy_replaced"} if kind == "meta_controller" else set())
    assert all(wanted <= set(entry) for entry in log[3:])
    model, state = one_process.model, one_process.optimizer.state
    assert state[model.dense.weight]["step"] == (6 if phase == "masked_lm" else 3)
    assert all(("masked_lm_loss" in entry) == (phase == "masked_lm") for entry in log[:3])
    assert state[model.vocabulary_bias]["step"] == state[model.generator.dense.weight]["step"] == 6


def test_accumulated_equals_one_large_batch(run, one_process, tmp_path):
    large = make_trainer(tmp_path, run, per_device_train_batch_size=12, gradient_accumulation_steps=1)
    large.train()
    compare(one_process, runs.history(large), runs.weights(large.model))


@pytest.mark.parametrize("cut", [2, 4])  # in the first stage, and after it
def test_resumed_equals_uninterrupted(run, cut, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = make_trainer(tmp_path / "whole", run, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", run, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert runs.history(resumed) == runs.history(whole)
    assert runs.weights(resumed.model) == runs.weights(whole.model)


@pytest.fixture(scope="module")
def two_processes(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_distributed(runs, folder, *run)
    return json.loads((folder / "two.json").read_text())


def test_two_processes_equal_one(one_process, two_processes):
    """Through both phases, without DDP's search for unused parameters."""
    compare(one_process, two_processes["history"], two_processes["weights"])


def test_two_processes_evaluate_as_one(run, one_process, two_processes):
    """Ten rows in batches of two for each process: the last one is filled up with rows that do not count again."""
    found = runs.evaluate(one_process)
    assert found.keys() == two_processes["evaluation"].keys()
    for name in found.keys() - {"eval_token_variance_fraction"}:
        assert two_processes["evaluation"][name] == pytest.approx(found[name], rel=1e-4), name


def test_fsdp_equals_the_whole_objective(two_processes):
    """With torch's own FSDP: accelerate, and so Trainer, shards on accelerators only."""
    assert len(two_processes["sharded"]) == 8
    assert {name.split(", ")[-1] for name in two_processes["sharded"]} == {"first stage", "discriminator"}
    for name, values in two_processes["sharded"].items():
        for kind, (whole, sharded) in values.items():
            assert sharded == pytest.approx(whole, rel=1e-5), (name, kind)
