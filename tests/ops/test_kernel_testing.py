"""The helpers that tests of kernels share: a check that cannot fail shows nothing."""

import os

import pytest
import torch
from kernel_testing import sanitizer
from kernel_testing.guarded_memory import GUARD, GuardedTensor


SUMMARIES = {
    "memcheck": "========= ERROR SUMMARY: {} errors",
    "initcheck": "========= ERROR SUMMARY: {} errors",
}
ERROR = """========= {what}
=========     at {where}+0x150
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fc406200400
========= """
OURS = "void sru::<unnamed>::forward_kernel<float>(SruParams, long)"
# The program, what it says is wrong and where, its exit code, and how the run counts.
RUNS = {
    "clean": ("memcheck", "", "", 0, "clean"),
    "out-of-bounds": ("memcheck", "Invalid __global__ write of size 4 bytes", OURS, 9, "errors"),
    "left-unwritten": (
        "initcheck", "Uninitialized __global__ memory read of size 4 bytes", "at::native::copy", 9, "errors",
    ),
    "of-cub": ("initcheck", "Uninitialized __global__ memory read of size 1 bytes", "void cub::Scan<int>", 9, "clean"),
    "crashed": ("memcheck", "", "", 1, "failed"),
}  # fmt: skip


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
    """`fake_tool(output, code)` puts a compute-sanitizer first on the path that only says `output`."""

    def make(output: str, code: int, seconds: int = 0):
        (tmp_path / "said").write_text(output)
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            f'#!/bin/sh\nsleep {seconds}\necho "$@" > "{tmp_path}/asked"\ncat "{tmp_path}/said"\nexit {code}\n'
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
        return tmp_path / "asked"

    return make


@pytest.mark.parametrize("case", RUNS)
def test_what_the_sanitizer_says_is_understood(case, fake_tool):
    program, what, where, code, status = RUNS[case]
    error = ERROR.format(what=what, where=where) if what else ""
    summary = SUMMARIES[program].format(1 if error else 0)
    asked = fake_tool(f"========= COMPUTE-SANITIZER\n{error}\n{summary}\n", code)
    result = sanitizer.run_sanitizer(program, ["python", "program.py"])
    assert result.status == status, result.said
    assert asked.read_text().split() == ["--tool", program, "--error-exitcode", "9", "python", "program.py"]
    if status == "errors":
        assert what in result.said
    if status == "failed":
        assert "exit code 1" in result.said


def test_a_run_without_a_summary_is_not_clean(fake_tool):
    """As under a runtime that refuses the device."""
    fake_tool("========= COMPUTE-SANITIZER\n========= Error: the device is not supported\n", 0)
    assert sanitizer.run_sanitizer("memcheck", ["true"]).status == "failed"


def test_a_run_ends_in_time(fake_tool):
    fake_tool("", 0, seconds=30)
    result = sanitizer.run_sanitizer("memcheck", ["true"], timeout=0.5)
    assert (result.status, "did not end" in result.said) == ("failed", True)


def test_a_missing_sanitizer_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    assert sanitizer.run_sanitizer("memcheck", ["true"]).status == "missing"


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_write_beside_a_tensor_is_seen(dtype, misaligned):
    guarded = GuardedTensor((3, 5), dtype, misaligned, torch.ones(3, 5))
    assert (guarded.tensor.data_ptr() % 16 == 0) != misaligned
    guarded.tensor.fill_(2.0)
    guarded.check("inside")
    for place in (0, guarded.inside.start - 1, guarded.inside.stop, -1):
        beside = GuardedTensor((3, 5), dtype, misaligned)
        beside.memory[place] = 0.0
        with pytest.raises(AssertionError, match="beside: written outside"):
            beside.check("beside")
    assert guarded.inside.start >= GUARD
