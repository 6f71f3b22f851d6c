"""Notes through Trainer: accumulated, on two processes, interrupted and resumed."""

import json
import subprocess
import sys
from pathlib import Path

import note_runs
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback


WORKER = Path(note_runs.__file__)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module", params=["mean", "occurrence"])
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = note_runs.make_trainer(folder, request.param, per_device_train_batch_size=4)
    trainer.train()
    return request.param, trainer


def test_notes_are_logged_and_move(whole):
    update, trainer = whole
    notes = trainer.model.notes
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
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
    update, one = whole
    if update == "mean":
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    else:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = note_runs.make_trainer(tmp_path, update, **options)
    trainer.train()
    torch.testing.assert_close(trainer.model.notes.values, one.model.notes.values, rtol=0, atol=1e-5)
    assert torch.equal(trainer.model.notes.updates, one.model.notes.updates)
    for a, b in zip(trainer.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["efficient", "plain"])
def test_resumed_is_uninterrupted_to_the_bit(whole, kind, tmp_path):
    update, one = whole
    options = {"kind": Trainer} if kind == "plain" else {}
    if kind == "plain":  # which tells the collator no epoch
        one = note_runs.make_trainer(tmp_path / "whole", update, per_device_train_batch_size=4, **options)
        one.train()
    stopped = note_runs.make_trainer(
        tmp_path, update, per_device_train_batch_size=4, callbacks=[StopAt(5)], save_steps=2, **options
    )
    stopped.train()
    assert not torch.equal(stopped.model.notes.values, one.model.notes.values)
    checkpoint = tmp_path / "checkpoint-4"
    assert {name for name in load_file(checkpoint / "model.safetensors") if name.startswith("notes.")}
    resumed = note_runs.make_trainer(tmp_path, update, per_device_train_batch_size=4, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in one.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    if kind == "efficient":
        assert note_runs.losses(resumed) == note_runs.losses(one)


def test_two_processes_keep_the_notes_of_one(whole, tmp_path):
    update, one = whole
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    done = subprocess.run([*command, str(tmp_path), update], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank-{rank}" / "rare_word_notes.safetensors") for rank in range(2)]
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    torch.testing.assert_close(ranks[0]["values"], one.model.notes.values, rtol=0, atol=1e-5)
    assert torch.equal(ranks[0]["updates"], one.model.notes.updates)
    found = json.loads((tmp_path / "losses.json").read_text())
    expected = note_runs.losses(one)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "note_updates"):
            assert a[name] == pytest.approx(b[name], abs=1e-4)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sent"] == 0
    for whole_batch, sharded in results["sharded"]:
        assert sharded == pytest.approx(whole_batch, abs=1e-5)
