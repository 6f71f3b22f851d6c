import importlib
import json
from pathlib import Path

import pytest


TRAINING = Path(__file__).resolve().parents[2] / "training"


@pytest.fixture
def run_folder(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)
    return importlib.import_module("run_folder")


def test_numbers_unknown_to_json_become_none(run_folder, tmp_path):
    run = run_folder.RunFolder(tmp_path / "run")
    assert run.open({"lr": 1.0}, resume=False) is None
    written = run.close({"metrics": {"pearson": float("nan")}, "log": [{"loss": float("inf")}]}, lambda folder: None)
    assert written["metrics"] == {"pearson": None}
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == written
    assert run.open({"lr": 1.0}, resume=True) == written


def test_a_broken_file_is_named(run_folder, tmp_path):
    (tmp_path / "settings.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON .*Remove it"):
        run_folder.RunFolder(tmp_path).open({"lr": 1.0}, resume=True)
