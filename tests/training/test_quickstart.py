"""What the demo says when its folder holds another run."""

import importlib
import json

import pretraining_runs
import pytest


def test_a_folder_of_another_run_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(pretraining_runs.TRAINING)
    quickstart = importlib.import_module("quickstart")
    folder = tmp_path / "demo-short" / "pretrained"
    (folder / "checkpoint-30").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"block_size": 64}))
    with pytest.raises(SystemExit) as end:
        quickstart.main(["--short", "--output_dir", str(tmp_path / "demo")])
    message = str(end.value)
    assert "\n" not in message
    assert f"{folder} was started otherwise: " in message
    assert "block_size was 64 and is 128 now" in message
    assert message.endswith("choose another output_dir (--output_dir), or remove the folder.")
