import json

import pytest
from transformers import TrainingArguments

from hf_efficient.trainer import run_directory


def test_numbers_unknown_to_json_become_none(tmp_path):
    run = run_directory.RunDirectory(tmp_path / "run")
    assert run.open({"lr": 1.0}, resume=False) is None
    written = run.close({"metrics": {"pearson": float("nan")}, "log": [{"loss": float("inf")}]}, lambda folder: None)
    assert written["metrics"] == {"pearson": None}
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == written
    assert run.open({"lr": 1.0}, resume=True) == written


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "settings.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON .*Remove it"):
        run_directory.RunDirectory(tmp_path).open({"lr": 1.0}, resume=True)


@pytest.mark.parametrize("places", [{}, {"checkpoints": ".", "result": "history.json"}], ids=["finetune", "pretrain"])
@pytest.mark.parametrize("resume", [False, True])
def test_settings_count_from_the_first_checkpoint_on(tmp_path, caplog, places, resume):
    run = run_directory.RunDirectory(tmp_path, **places)
    run.open({"lr": 1.0, "seed": 3}, resume)
    run.open({"lr": 1.0, "seed": 3}, resume)
    assert not caplog.messages
    run.open({"lr": 2.0, "seed": 3}, resume)
    assert caplog.messages == [
        f"{tmp_path} starts anew, since its last run left no checkpoint: lr was 1.0 and is 2.0 now."
    ]
    assert json.loads((tmp_path / "settings.json").read_text()) == {"lr": 2.0, "seed": 3}
    place = tmp_path / places.get("checkpoints", "checkpoints") / "checkpoint-5"
    place.mkdir(parents=True)
    with pytest.raises(FileExistsError if not resume else ValueError, match="or remove the folder"):
        run.open({"lr": 1.0}, resume)
    assert run.check({"lr": 2.0}, resume=True) == {"lr": 2.0, "seed": 3}
    place.rmdir()
    assert run.check({"lr": 2.0}, resume=True) is None
    (tmp_path / places.get("result", "results.json")).write_text('{"score": 1}')
    with pytest.raises(ValueError, match=r"was started otherwise: lr was 2.0 and is 1.0 now\. Use those,"):
        run.open({"lr": 1.0}, resume=True)
    assert run.open({"lr": 2.0}, resume=True) == {"score": 1}
    (tmp_path / "settings.json").unlink()
    with pytest.raises(FileExistsError, match=r"no settings\.json"):
        run.open({"lr": 2.0}, resume)


def test_a_finished_run_is_opened_for_a_further_stage(tmp_path):
    run = run_directory.RunDirectory(tmp_path, checkpoints=".", result="history.json")
    run.open({"lr": 1.0, "steps": 0}, resume=False)
    for name in ("history.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    run.reopen()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    run.reopen()
    assert run.open({"lr": 1.0, "steps": 5}, resume=True) is None


def test_rows_of_a_step_count_and_not_how_they_are_dealt_out(tmp_path):
    """A run may be resumed on other processes, whose batches are smaller, and in no other way."""

    def arguments(**sizes):
        settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "per_device_train_batch_size": 6}
        return TrainingArguments(**{**settings, **sizes})

    def critical(args):
        return run_directory.resume_critical_args(args)

    one = critical(arguments())
    assert one["rows_per_step"] == 6
    assert critical(arguments(per_device_train_batch_size=2, gradient_accumulation_steps=3)) == one
    assert critical(arguments(gradient_accumulation_steps=2))["rows_per_step"] == 12
    assert critical(arguments(learning_rate=0.5)) != one
