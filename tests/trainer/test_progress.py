"""What a run prints: lines, not dictionaries."""

import pytest
from transformers import ProgressCallback, TrainerCallback

from hf_efficient.trainer.progress import in_lines, log_line
from tests.trainer.toy_trainer import make_trainer


def test_a_line_has_the_names_and_figures_of_the_log():
    logs = {"loss": 2.34567, "eval_accuracy": 1.0, "total_flos": 1e9, "sample": "text", "epoch": 3}
    assert log_line(20, logs) == "step 20: loss 2.346, eval_accuracy 1, sample text, epoch 3"
    assert "total_flos" in logs


@pytest.mark.parametrize("disable_tqdm", [False, True], ids=["bar", "no-bar"])
def test_a_run_prints_lines(tmp_path, capsys, disable_tqdm):
    trainer = make_trainer(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, disable_tqdm=disable_tqdm)
    trainer.train()
    said = capsys.readouterr()
    lines = [line.strip() for line in said.out.splitlines()]
    assert "{" not in said.out + said.err
    for entry in trainer.state.log_history:
        shown = {name: value for name, value in entry.items() if name not in ("total_flos", "step")}
        assert log_line(entry["step"], shown) in [line.removeprefix("\x1b[A") for line in lines]
    if not disable_tqdm:
        assert "4/4" in said.err
        trainer.remove_callback(ProgressCallback)
        assert not any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)


def test_callbacks_of_others_stay():
    class Own(ProgressCallback):
        """A user's own way to print."""

    for callback in (Own(), TrainerCallback()):
        assert in_lines(callback) is callback
