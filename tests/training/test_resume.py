"""Runs that are killed with SIGKILL, wherever they are, resume to the very same losses."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from hf_efficient.trainer.trainer import find_last_checkpoint
from hf_efficient.utils.atomic_write import STAGING_NAME
from tests.training import pretraining_runs


def while_writing(step):
    """Die with half of the optimizer's file on the disk."""

    def prepare():
        def killing_save(value, path, *args, **kwargs):
            original(value, path, *args, **kwargs)
            if f"checkpoint-{step}{os.sep}optimizer.pt" in str(path):
                os.truncate(path, os.path.getsize(path) // 2)
                pretraining_runs.kill_self()

        original, torch.save = torch.save, killing_save

    return prepare


def before_renaming(step):
    """Die when the checkpoint is complete, but does not have its name yet."""

    def prepare():
        def killing_rename(source, target):
            if str(target).endswith(f"checkpoint-{step}"):
                pretraining_runs.kill_self()
            original(source, target)

        original, os.rename = os.rename, killing_rename

    return prepare


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    pretraining_runs.write_corpus(folder / "corpus.txt")
    assert pretraining_runs.run_in_child(pretraining_runs.arguments(folder, folder / "run")) == 0
    return folder


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_killed_anywhere_and_resumed_is_the_same_run(whole_run, tmp_path, caplog):
    argv = [*pretraining_runs.arguments(whole_run, tmp_path), "--resume"]
    rng = random.Random(os.urandom(8))
    early, late = rng.randint(1, 9), rng.randint(11, 16)
    deaths = [
        pretraining_runs.at_step(early),
        while_writing(10),
        before_renaming(15),
        pretraining_runs.at_step(late),
        pretraining_runs.at_step(17),
    ]
    for prepare in deaths:
        assert pretraining_runs.run_in_child(argv, prepare) == -signal.SIGKILL
        assert not (tmp_path / "history.json").exists()
    assert pretraining_runs.run_in_child(argv) == 0
    assert pretraining_runs.history(tmp_path) == pretraining_runs.history(whole_run / "run"), (early, late)
    assert weights(tmp_path) == weights(whole_run / "run")
    assert not (tmp_path / STAGING_NAME).exists()


def test_truncated_checkpoint_is_passed_over(whole_run, tmp_path, caplog):
    argv = [*pretraining_runs.arguments(whole_run, tmp_path), "--resume"]
    assert pretraining_runs.run_in_child(argv, pretraining_runs.at_step(16)) == -signal.SIGKILL
    os.truncate(tmp_path / "checkpoint-15" / "model.safetensors", 1000)
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert f"{tmp_path / 'checkpoint-15'}: its file model.safetensors has 1000 bytes" in caplog.text
    assert pretraining_runs.run_in_child(argv) == 0
    assert pretraining_runs.history(tmp_path) == pretraining_runs.history(whole_run / "run")
    assert weights(tmp_path) == weights(whole_run / "run")


@pytest.mark.slow
def test_command_line_killed_at_random_times(tmp_path):
    pretraining_runs.write_corpus(tmp_path / "corpus.txt", documents=200)
    changes = {"max_steps": 300, "save_steps": 7, "logging_steps": 5, "eval_steps": 40, "dataloader_num_workers": 2}
    command = [sys.executable, str(pretraining_runs.TRAINING / "pretrain.py")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*command, *pretraining_runs.arguments(tmp_path, whole, **changes)], check=True)
    argv = [*command, *pretraining_runs.arguments(tmp_path, parts, **changes), "--resume"]
    rng = random.Random(5)
    for kill in range(3):
        process = subprocess.Popen(argv, start_new_session=True)
        started = {path.name for path in parts.glob("checkpoint-*")} if parts.is_dir() else set()
        while process.poll() is None and not {path.name for path in parts.glob("checkpoint-*")} - started:
            time.sleep(0.01)
        time.sleep(rng.random())
        assert process.poll() is None, f"the run ended before kill {kill}; give it more steps"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(argv, check=True)
    assert pretraining_runs.history(parts) == pretraining_runs.history(whole)
    assert weights(parts) == weights(whole)
