"""What the benchmarks say of their measurements, and of the code that was measured."""

import importlib
import shutil
import subprocess

import pytest

from tests.training import pretraining_runs


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(pretraining_runs.TRAINING / "benchmarks")


def entry():
    train = {"bert": [4.0, 4.0], "bert_eager": [2.0, 2.0], "tupe_r": [3.0, 3.0], "tupe_eager": [3.0, 3.0]}
    padded = {"bert": [2.0], "bert_eager": [5.0], "tupe_r": [1.0], "tupe_sdpa": [3.0], "tupe_rows": [0.8]}
    return {
        "size": "4x256",
        "length": 128,
        "seconds": {"train": {**train, "tupe_sdpa": [6.0, 6.0]}, "inference, padded": padded},
        "form_taken": {"train": "eager", "inference, padded": "sdpa"},
        "peak_bytes": {"bert": 200, "bert_eager": 100, "tupe_r": 150},
    }


def test_ratios_are_to_the_better_form():
    report = importlib.import_module("speed_report")
    assert report.ratios(entry()) == {"train": 1.5, "inference, padded": 0.5, "memory": 1.5}
    assert report.choice_ratios(entry()) == {"train": ("eager", 1.0), "inference, padded": ("rows", 1.25)}
    rows = report.rows_of(entry(), on_gpu=False)
    assert [row["value"] for row in rows] == [1.5, 0.5, 1.5, 1.0, 1.25]
    assert rows[-1]["name"] == (
        "inference, padded, what TUPE-R chooses (sdpa) / its best form (rows), 4x256, length 128"
    )
    assert report.table_of([entry()])["4x256"]["memory"] == 1.5


def test_the_form_that_was_taken_is_seen():
    torch = importlib.import_module("torch")
    speed = importlib.import_module("encoder_speed")
    device = torch.device("cpu")
    seen = {}
    for length in (128, 256):
        subject, batch = speed.Subject("tupe_r", 1, 64, length, device), speed.batch_of(1024, length, device)
        seen[length] = [speed.form_taken(subject, mode, batch) for mode in speed.MODES]
    assert seen == {128: ["eager", "sdpa", "sdpa"], 256: ["eager", "sdpa", "rows"]}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_result_says_when_its_code_was_changed(tmp_path):
    commit_of = importlib.import_module("environment").commit_of

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert commit_of(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is not the commit")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
