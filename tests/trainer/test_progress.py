"""What a run prints: rows of a table, not dictionaries."""

import pytest
from transformers import ProgressCallback, TrainerCallback

from hf_efficient.trainer.progress import LogTable, in_lines
from tests.trainer.toy_trainer import make_trainer


def test_names_are_said_once_and_figures_stand_below_them():
    table, logs = LogTable(), {"loss": 2.34567, "grad_norm": 1.0, "learning_rate": 3e-4, "total_flos": 1e9, "epoch": 1}
    lines = list(table.lines(20, logs))
    assert lines == [
        "                              grad   learning",
        "        step       loss       norm       rate      epoch",
        "train     20      2.346          1     0.0003          1",
    ]
    assert list(table.lines(40, {**logs, "loss": 0.5}))[-1] == lines[-1].replace("20 ", "40 ").replace("2.346", "  0.5")
    assert len(list(table.lines(60, logs))) == 1
    assert "total_flos" in logs


def test_kinds_have_columns_of_their_own_and_texts_a_line():
    table = LogTable()
    list(table.lines(1, {"loss": 1.5, "epoch": 0.5}))
    measured = {
        "eval_loss": 1.25,
        "eval_generator_loss": 6.0,
        "eval_steps_per_second": 3.0,
        "sample": "once",
        "epoch": 1,
    }
    assert list(table.lines(2, measured)) == [
        "                         generator",
        "        step       loss       loss      epoch",
        "eval       2       1.25          6          1",
        "sample: once",
    ]
    assert list(table.lines(3, {"loss": 1.0, "epoch": 1})) == ["train      3          1          1"]
    assert list(table.lines(4, {"eval_loss": 1.0, "epoch": 2})) == ["eval       4          1                     2"]
    assert list(table.lines(4, {"train_loss": 1.0}))[-1] == "end        4          1"


def test_new_figures_are_named_and_missing_ones_leave_room():
    table = LogTable()
    list(table.lines(1, {"loss": 1.0}))
    named = list(table.lines(2, {"loss": 1.0, "token_variance_fraction": 0.25}))
    assert [line.split() for line in named] == [
        ["token"],
        ["variance"],
        ["step", "loss", "fraction"],
        ["train", "2", "1", "0.25"],
    ]
    assert list(table.lines(3, {"token_variance_fraction": None, "loss": 2.0})) == ["train      3          2"]


@pytest.mark.parametrize("disable_tqdm", [False, True], ids=["bar", "no-bar"])
def test_a_run_prints_a_table(tmp_path, capsys, disable_tqdm):
    trainer = make_trainer(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, disable_tqdm=disable_tqdm)
    trainer.train()
    said = capsys.readouterr()
    lines = [line.strip().removeprefix("\x1b[A") for line in said.out.splitlines()]
    assert "{" not in said.out + said.err
    for entry in trainer.state.log_history:
        kind = "eval" if "eval_loss" in entry else "end" if "train_loss" in entry else "train"
        loss = entry[{"eval": "eval_loss", "end": "train_loss", "train": "loss"}[kind]]
        rows = [line.split() for line in lines if line.split()[:2] == [kind, str(entry["step"])]]
        assert len(rows) == 1, (entry, lines)
        assert f"{loss:.4g}" in rows[0]
    assert len([line for line in lines if line.startswith("step")]) == 3  # of training, evaluation and the whole run
    if not disable_tqdm:
        assert "4/4" in said.err
        trainer.remove_callback(ProgressCallback)
        assert not any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)


def test_callbacks_of_others_stay():
    class Own(ProgressCallback):
        """A user's own way to print."""

    for callback in (Own(), TrainerCallback()):
        assert in_lines(callback) is callback
