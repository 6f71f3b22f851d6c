"""The machine, the code and the command that a result says it was made by."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT
from training.benchmarks.environment import commit_of


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_result_says_when_its_code_was_changed(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert commit_of(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "code.py").write_text("a = 1\n")
    result = tmp_path / "training" / "results" / "speed.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is not the commit")
    result.write_text('{"seconds": 1}')  # what a benchmark has just written is no change of code
    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit_of(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_the_command_of_a_result_can_be_run(tmp_path):
    """A module by its name, a program by its path from the root, both with their arguments."""
    line = "from training.benchmarks.environment import describe; print(describe()['command'])"
    (tmp_path / "asks.py").write_text(line)
    for arguments, expected in (("-m asks --size 3", "python -m asks --size 3"), ("asks.py --long", "asks.py --long")):
        environment = {"PATH": "", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        command = [sys.executable, *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.strip().endswith(expected), done.stderr
