"""Notes through Trainer: accumulated, on two processes, interrupted and resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_efficient.trainer import EfficientTrainer
from tests.helpers.comparison import assert_allclose
from tests.helpers.processes import run_distributed
from tests.objectives.notes import note_runs


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


RUNS = [("mlm", "mean"), ("mlm", "occurrence"), ("replaced_token", "mean"), ("meta_controller", "mean")]


@pytest.fixture(scope="module", params=RUNS, ids=" ".join)
def whole(request, tmp_path_factory):
    """An objective, a rule of updates, and a run of them in steps of 4 rows."""
    objective, update = request.param
    folder = tmp_path_factory.mktemp("whole")
    trainer = note_runs.make_trainer(folder, update, objective, per_device_train_batch_size=4)
    trainer.train()
    return objective, update, trainer


def test_notes_are_logged_and_move(whole):
    _, update, trainer = whole
    notes = trainer.model.notes
    logs = note_runs.losses(trainer)
    assert len(logs) == note_runs.STEPS
    assert [entry["note_hits"] for entry in logs[:2]] == [0.0, 0.0]  # before the start step
    for entry in logs[2:]:
        assert entry["note_hits"] > 0
        assert entry["note_norm"] > 0
        assert entry["token_norm"] > 0
    updates = [entry["note_updates"] for entry in logs]
    assert updates == sorted(updates)
    assert updates[0] == 0.0
    assert updates[-1] > (2 if update == "mean" else 4)
    if update == "mean":
        assert notes.updates.max() <= note_runs.STEPS


def test_accumulated_steps_are_those_of_one_batch(whole, tmp_path):
    objective, update, one = whole
    if update == "mean":
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    else:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = note_runs.make_trainer(tmp_path, update, objective, **options)
    trainer.train()
    torch.testing.assert_close(trainer.model.notes.values, one.model.notes.values, rtol=0, atol=1e-4)
    assert torch.equal(trainer.model.notes.updates, one.model.notes.updates)
    assert_allclose("weights", dict(trainer.model.named_parameters()), dict(one.model.named_parameters()), atol=1e-4)


@pytest.mark.parametrize("kind", [EfficientTrainer, Trainer])
def test_resumed_is_uninterrupted_to_the_bit(whole, kind, tmp_path):
    objective, update, one = whole
    options = {"kind": kind, "per_device_train_batch_size": 4}
    if kind is Trainer:  # which tells the collator no epoch
        one = note_runs.make_trainer(tmp_path / "whole", update, objective, **options)
        one.train()
    stopped = note_runs.make_trainer(tmp_path, update, objective, callbacks=[StopAt(5)], save_steps=2, **options)
    stopped.train()
    assert not torch.equal(stopped.model.notes.values, one.model.notes.values)
    checkpoint = tmp_path / "checkpoint-4"
    assert {name for name in load_file(checkpoint / "model.safetensors") if name.startswith("notes.")}
    resumed = note_runs.make_trainer(tmp_path, update, objective, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in one.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    if kind is EfficientTrainer:
        assert note_runs.losses(resumed) == note_runs.losses(one)


def test_two_processes_keep_the_notes_of_one(whole, tmp_path):
    """Every objective's, whose processes draw the same samples as one does; and each process keeps the same notes."""
    objective, update, one = whole
    run_distributed(note_runs, tmp_path, update, objective)
    ranks = [load_file(tmp_path / f"rank-{rank}" / "rare_word_notes.safetensors") for rank in range(2)]
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    torch.testing.assert_close(ranks[0]["values"], one.model.notes.values, rtol=0, atol=1e-4)
    assert torch.equal(ranks[0]["updates"], one.model.notes.updates)
    found = json.loads((tmp_path / "losses.json").read_text())
    expected = note_runs.losses(one)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "note_updates"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sent"] == 0
    assert len(results["sharded"]) == (2 if objective == "mlm" else 0)
    for whole_batch, sharded in results["sharded"]:
        assert sharded == pytest.approx(whole_batch, abs=1e-5)
