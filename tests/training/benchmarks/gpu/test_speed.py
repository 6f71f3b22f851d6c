"""Timings of the compiled recurrence on a GPU, as far as they run without one."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import sru
from hf_efficient.ops.kernel_loader import find_variant
from training.benchmarks.gpu import speed as gpu_speed


SOURCE = Path(gpu_speed.__file__).with_name("latency_floor.cu")
FOUND_NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(FOUND_NVCC is None, reason="no nvcc")
needs_build = pytest.mark.skipif(find_variant(sru.KERNEL, "cpu") is None, reason=f"{sru.KERNEL} is not built")


@needs_nvcc
def test_the_latency_floor_is_a_bare_chain(tmp_path):
    """At each step the state's way to the next, and no access to memory."""
    ptx = tmp_path / "chain.ptx"
    subprocess.run([FOUND_NVCC, "-O3", "-arch=sm_90", "-ptx", SOURCE, "-o", ptx], check=True)
    text = ptx.read_text()
    (loop,) = (body for body in re.findall(r"^\$L\w+:\n(.*?)^\s*@", text, re.DOTALL | re.MULTILINE) if "16;" in body)
    steps = re.findall(r"^\s*(fma|ex2|add|rcp|sub)\.\S*f32", loop, re.MULTILINE)
    assert Counter(steps) == {"fma": 32, "ex2": 16, "add": 16, "rcp": 16, "sub": 16}
    assert not re.search(r"\b(ld|st)\.", loop)


@needs_nvcc
def test_the_latency_floor_is_compiled_for_the_card(tmp_path):
    assert len(gpu_speed.compile_latency_floor("sm_90", tmp_path).argtypes) == 6
    with pytest.raises(RuntimeError, match=r"latency_floor\.cu could not be compiled"):
        gpu_speed.compile_latency_floor("sm_1", tmp_path)


def test_a_machine_without_nvcc_leaves_out_the_latency_floor(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_speed, "find_tool", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="could not be compiled"):
        gpu_speed.compile_latency_floor("sm_90", tmp_path)


@needs_build
@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, (604, 1007)), (torch.float16, (352, 554))], ids=["float32", "float16"]
)
def test_the_bytes_that_must_be_moved(dtype, expected):
    """Length 512, batch 16, width 3,072, in megabytes: what a share of the copy's bandwidth is reckoned by."""
    call = gpu_speed.Call(1, dtype, 1, 48, torch.device("cpu"))
    call.unit = 16 * 512 * 3072
    assert tuple(round(size / 1e6) for size in call.bytes().values()) == expected


@needs_build
def test_shares_and_ratios_come_from_the_times(monkeypatch, make_context):
    times = {"forward": [2.0], "backward": [4.0], "torch forward": [60.0], "torch backward": [40.0]}
    monkeypatch.setattr(gpu_speed.Timer, "in_turn", lambda self, runs, calls=1: {name: times[name] for name in runs})
    case = gpu_speed.measure_case(make_context(), 16, torch.float32, copy_rate=1000.0)
    unit = 2 * 7 * 48
    assert case["copy_bandwidth_fraction"] == {
        "forward": 24 * unit / 2.0 / 1000.0,
        "backward": 40 * unit / 4.0 / 1000.0,
    }
    assert case["faster_than_torch"] == {"forward": 30.0, "backward": 10.0}
