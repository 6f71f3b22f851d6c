"""The built recurrence on a GPU (marked `gpu`), and the program that looks at it there, as far as it runs without one:
a check that cannot fail shows nothing."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import sru, sru_reference
from hf_efficient.ops.backend import use_backend
from hf_efficient.ops.kernel_loader import find_variant


ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "kernels" / sru.KERNEL / "benchmarks"
CPU = torch.device("cpu")
FOUND_NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_build = pytest.mark.skipif(find_variant(sru.KERNEL, "cpu") is None, reason=f"{sru.KERNEL} is not built")
needs_nvcc = pytest.mark.skipif(FOUND_NVCC is None, reason="no nvcc")

spec = importlib.util.spec_from_file_location("gpu_parity", BENCHMARKS / "gpu_parity.py")
gpu_parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_parity)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*gpu_parity.SMALL_SHAPES, (8, 65, 512), (64, 40, 3072)], ids=str)
def test_the_built_op_on_a_gpu(shape):
    """Outputs, and gradients by name, in all dtypes, directions and forms."""
    gpu_parity.check_parity([shape])


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_the_same_each_time():
    inputs = gpu_parity.random_inputs((64, 40, 512), 3, torch.float32, torch.float32, gpu_parity.GPU)
    leaves = [values for values in inputs.values() if values.requires_grad]
    with use_backend("cuda"):
        runs = [torch.autograd.grad(sru.sru_recurrence(**inputs)[0].sum(), leaves) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


@needs_build
def test_the_form_for_cpus_passes_the_check_for_gpus():
    worst = gpu_parity.check_parity(gpu_parity.SMALL_SHAPES, CPU)
    names = {"float32", "float64", "bfloat16", "float16"}
    assert worst.keys() == {*names, "float32 against float64"}
    assert all(0.0 < worst[name] < 1.0 for name in names)


@needs_build
@pytest.mark.parametrize("name", ["h", "states", "u", "x", "weight_c", "bias", "c0"])
def test_the_check_finds_each_wrong_result(name, monkeypatch):
    exact = gpu_parity.our_results

    def wrong(*arguments):
        results, given = exact(*arguments)
        if name in results:
            results[name] = results[name].detach().clone(memory_format=torch.contiguous_format)
            results[name].view(-1)[0] += 0.1
        return results, given

    monkeypatch.setattr(gpu_parity, "our_results", wrong)
    with pytest.raises(SystemExit, match=rf"WRONG: (the gradient of )?{name} is .* \(float32, x .*, shape \(2, 5, 7\)"):
        gpu_parity.check_parity([(2, 5, 7)], CPU)


@needs_build
@pytest.mark.parametrize("name", [sru.OP_NAME, sru.BACKWARD_NAME])
def test_the_check_needs_the_compiled_form_in_both_passes(name, monkeypatch):
    exact = gpu_parity.last_backend
    monkeypatch.setattr(gpu_parity, "last_backend", lambda op: "reference" if op == name else exact(op))
    with pytest.raises(SystemExit, match=f"NOT COMPARED: .*'{name}': 'reference'"):
        gpu_parity.check_parity([(2, 5, 7)], CPU)


@needs_build
def test_what_is_expected_does_not_come_from_the_op(monkeypatch):
    """Autograd's threads for GPUs did not see which form was asked for, and took the compiled one for both sides."""
    inputs = gpu_parity.random_inputs((2, 5, 7), 3, torch.float32, torch.float32, CPU)
    options = {"reverse": True, "activation": "tanh", "scale_x": 0.8}
    _, given = gpu_parity.our_results(inputs, options)
    monkeypatch.setattr(gpu_parity, "sru_recurrence", None)
    called = []
    for name in ("forward", "backward"):
        exact = getattr(sru_reference, name)
        monkeypatch.setattr(sru_reference, name, lambda *a, exact=exact, name=name: called.append(name) or exact(*a))
    results = gpu_parity.torch_results(inputs, options, given, torch.float64)
    assert called == ["forward", "backward"]
    assert {values.dtype for name, values in results.items() if name not in ("mask", "document_start")} == {
        torch.float64
    }


SUMMARIES = {
    "memcheck": "========= ERROR SUMMARY: {} errors",
    "initcheck": "========= ERROR SUMMARY: {} errors",
    "racecheck": "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)",
}
ERROR = """========= {what}
=========     at {where}+0x150
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fc406200400
========= """
OURS = "void sru::<unnamed>::forward_kernel<float>(Problem, long)"
SANITIZED = {
    "clean": (None, "", "", 0),
    "out of bounds": ("memcheck", "Invalid __global__ write of size 4 bytes", OURS, 9),
    "left unwritten": ("initcheck", "Uninitialized __global__ memory read of size 4 bytes", "at::native::copy", 9),
    "CUB's own": ("initcheck", "Uninitialized __global__ memory read of size 1 bytes", "void cub::Scan<int>", 9),
    "a race": ("racecheck", "Error: Race reported between Write access", OURS, 9),
    "crashed": ("racecheck", "", "", 1),
}
ASK = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_check
for folder in sys.argv[2:]:
    gpu_check.os.environ["PATH"] = folder
    try:
        print(gpu_check.sanitize())
    except SystemExit as error:
        print(str(error).replace(chr(10), " "))
"""


def test_what_the_sanitizer_says_is_understood(tmp_path, run_python):
    for case, (wrong, what, where, code) in SANITIZED.items():
        folder = tmp_path / case
        folder.mkdir()
        for program, summary in SUMMARIES.items():
            error = ERROR.format(what=what, where=where) if program == wrong and what else ""
            said = f"========= COMPUTE-SANITIZER\n{error}\n{summary.format(1 if error else 0)}"
            (folder / program).write_text(f"cat <<'END'\n{said}\nEND\nexit {code if program == wrong else 0}\n")
        tool = folder / "compute-sanitizer"
        tool.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\n. "{folder}/$2"\n')
        tool.chmod(0o755)
    result = run_python("-c", ASK, BENCHMARKS, *(tmp_path / case for case in SANITIZED))
    assert result.returncode == 0, result.stderr
    said = dict(zip(SANITIZED, result.stdout.splitlines(), strict=True))
    for case in ("clean", "CUB's own"):
        assert said[case].startswith("{'ran': True"), said[case]
        assert all(program in said[case] for program in SUMMARIES)
    for case in said.keys() - {"clean", "CUB's own"}:
        wrong, what, where, code = SANITIZED[case]
        assert said[case].startswith(f"compute-sanitizer's {wrong} ended with exit code {code}: "), said[case]
        assert what in said[case]


@needs_nvcc
def test_the_bare_chain_is_bare(tmp_path):
    """At each step the state's way to the next, and no access to memory."""
    ptx = tmp_path / "chain.ptx"
    subprocess.run([FOUND_NVCC, "-O3", "-arch=sm_90", "-ptx", BENCHMARKS / "bare_chain.cu", "-o", ptx], check=True)
    text = ptx.read_text()
    (loop,) = (body for body in re.findall(r"^\$L\w+:\n(.*?)^\s*@", text, re.DOTALL | re.MULTILINE) if "16;" in body)
    steps = re.findall(r"^\s*(fma|ex2|add|rcp|sub)\.\S*f32", loop, re.MULTILINE)
    assert Counter(steps) == {"fma": 32, "ex2": 16, "add": 16, "rcp": 16, "sub": 16}
    assert not re.search(r"\b(ld|st)\.", loop)


@needs_nvcc
def test_the_bare_chain_is_compiled_for_the_card(tmp_path, run_python):
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(ROOT / "training" / "benchmarks")!r}]
import gpu_measure
start = gpu_measure.compile_bare_chain("sm_90", Path({str(tmp_path)!r}))
print(len(start.argtypes))
gpu_measure.compile_bare_chain("sm_1", Path({str(tmp_path)!r}))
"""
    result = run_python("-c", code)
    assert (result.returncode, result.stdout) == (1, "6\n"), result.stderr
    assert "bare_chain.cu, by which the floor is measured, could not be compiled" in result.stderr
