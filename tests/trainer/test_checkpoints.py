"""Checkpoints that are whole or absent."""

import errno
import json
import logging
import os
import re
import shutil

import pytest
import torch

from hf_efficient.trainer.checkpoints import MANIFEST_NAME, find_damage
from hf_efficient.trainer.trainer import find_last_checkpoint
from hf_efficient.utils.atomic_write import STAGING_NAME, write_files
from tests.helpers.hostile_files import write_archive, write_pickle
from tests.trainer.toy_trainer import losses, make_trainer


def test_checkpoint_is_complete_and_named(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, save_total_limit=2)
    trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-5"]
    for name in os.listdir(tmp_path):
        assert find_damage(tmp_path / name) is None
        files = json.loads((tmp_path / name / MANIFEST_NAME).read_text())["files"]
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
            files
        )
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "its file optimizer.pt is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20), "its file model.safetensors has 20 bytes"),
        (
            lambda folder: (folder / "scheduler.pt").write_bytes(
                bytes(b ^ 1 for b in (folder / "scheduler.pt").read_bytes())
            ),
            "the content of its file scheduler.pt was altered",
        ),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), f"it has no {MANIFEST_NAME}"),
        (lambda folder: os.truncate(folder / MANIFEST_NAME, 30), f"its {MANIFEST_NAME} is damaged"),
    ],
)
def test_damaged_checkpoint_is_passed_over_by_name(tmp_path, caplog, damage, reason):
    make_trainer(tmp_path, max_steps=4).train()
    damage(tmp_path / "checkpoint-4")
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    message = caplog.messages[0]
    assert str(tmp_path / "checkpoint-4") in message
    assert reason in message


def test_resuming_from_a_named_checkpoint_checks_it(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 can't be used: its file optimizer\.pt is missing"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-2" / MANIFEST_NAME).unlink()
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "is used unchecked" in caplog.text
    assert trainer.state.global_step == 3


def test_resuming_without_any_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "new", max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert f"no complete checkpoint in {tmp_path / 'new'}" in caplog.text


def test_failure_while_saving_leaves_no_checkpoint_of_that_name(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4)
    save = torch.save

    def fail_at_step_4(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and str(path).endswith("scheduler.pt"):
            raise OSError("disk full")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_at_step_4)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert sorted(os.listdir(tmp_path)) == [STAGING_NAME, "checkpoint-2"]
    monkeypatch.undo()

    resumed = make_trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]
    whole = make_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    assert losses(resumed) == losses(whole)


def test_best_checkpoint_is_named_by_its_final_place_and_kept(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.5,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert best.is_dir()
    assert find_damage(best) is None
    assert STAGING_NAME not in os.listdir(tmp_path)
    written = json.loads((best / "trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == str(best)


def test_write_files_replaces_whole_files_only(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")

    def broken(folder):
        with open(os.path.join(folder, "config.json"), "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, broken)
    assert (tmp_path / "config.json").read_text() == "old"

    def write(folder):
        for name in ("config.json", "weights.bin"):
            with open(os.path.join(folder, name), "w") as file:
                file.write("new")

    write_files(tmp_path, write)
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents == {"config.json": "new", "weights.bin": "new", "mine.txt": "kept"}


def other_optimizer(folder, mark):
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")


def other_random_state(folder, mark):
    torch.save({"python": (3, (), None)}, folder / "rng_state.pth")


def other_state(folder, mark, **changes):
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {"global_step": "four"})))


FORGED = {
    **{
        f"{name}, {write.__name__}": (name, lambda f, mark, name=name, write=write: write(f / name, mark))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        for write in (write_pickle, write_archive)
    },
    **{
        f"{name}, cut off": (name, lambda f, mark, name=name: os.truncate(f / name, 100))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors")
    },
    "model.safetensors, write_pickle": (
        "model.safetensors",
        lambda f, mark: write_pickle(f / "model.safetensors", mark),
    ),
    "optimizer.pt, of another model": ("optimizer.pt", other_optimizer),
    "rng_state.pth, of nothing": ("rng_state.pth", other_random_state),
    "trainer_state.json, a step in words": ("trainer_state.json", other_state),
    "trainer_state.json, a field too much": (
        "trainer_state.json",
        lambda f, mark: other_state(f, mark, run_this="code"),
    ),
    "trainer_state.json, a list": (
        "trainer_state.json",
        lambda f, mark: (f / "trainer_state.json").write_text("[]"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, max_steps=2).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_file_is_named_and_not_unpickled(trained, tmp_path, forged):
    """Checked by a manifest that was forged along, or by none, as a checkpoint of plain Trainer."""
    name, forge = FORGED[forged]
    checkpoint = shutil.copytree(trained, tmp_path / "checkpoint-2")
    (checkpoint / MANIFEST_NAME).unlink()
    forge(checkpoint, tmp_path / "ran")
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert str(checkpoint) in str(error.value)
    assert "\n" not in str(error.value)
    assert "Resume from another checkpoint" in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["write", "torch.save"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch, kind):
    def full(*args, **kwargs):
        if kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left to write") as error:
        make_trainer(tmp_path / "run", max_steps=2).train()
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path / "run") in str(error.value)
    with pytest.raises(OSError, match="No space left to write"):
        write_files(tmp_path / "model", full)
    assert find_last_checkpoint(tmp_path / "run") is None
    assert not list((tmp_path / "model").iterdir())
