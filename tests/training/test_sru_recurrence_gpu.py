"""The programs that look at the compiled recurrence on a GPU, as far as they run without one: a check that cannot fail
shows nothing."""

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import sru, sru_reference
from hf_efficient.ops.kernel_loader import find_variant
from training.benchmarks import sru_recurrence_gpu as gpu
from training.benchmarks import sru_recurrence_parity as parity


SOURCE = Path(gpu.__file__).with_name("latency_floor.cu")
CPU = torch.device("cpu")
CASE = parity.Case("float32", (2, 5, 7), activation="tanh", reverse=True)
FOUND_NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_build = pytest.mark.skipif(find_variant(sru.KERNEL, "cpu") is None, reason=f"{sru.KERNEL} is not built")
needs_nvcc = pytest.mark.skipif(FOUND_NVCC is None, reason="no nvcc")


@needs_build
def test_the_form_for_cpus_passes_the_check_for_gpus():
    found = parity.check_parity([*parity.kernel_cases(CPU), *parity.shape_cases(parity.ODD_SHAPES)], CPU)
    names = {"float32", "float64", "bfloat16", "float16"}
    worst = found["largest_error_of_the_allowed"]
    assert not found["failures"]
    assert worst.keys() == {*names, "float32 against float64"}
    assert all(0.0 < worst[name] < 1.0 for name in names)


def test_the_cases_differ_in_all_that_chooses_a_kernel():
    """The names of kernels that the host emulation finds: tests/ops/test_sru_cuda_source.py compares them all."""
    cases = list(parity.kernel_cases(CPU))
    assert len(set(map(str, cases))) == len(cases)
    kernels = {(case.types, case.shape[2], case.activation, case.flags == "no-flags") for case in cases}
    forward_types = 23  # one for each of the dtypes and widths of access of the forward pass
    assert len(kernels) == forward_types * 2 * 2
    assert all(case.flags == "no-flags" for case in parity.smoke_cases(CPU))
    assert len(list(parity.sanitizer_cases(CPU))) <= 20


@needs_build
@pytest.mark.parametrize("name", ["h", "states", "u", "x", "weight_c", "bias", "c0"])
def test_the_check_finds_each_wrong_result(name, monkeypatch):
    exact = parity.our_results

    def wrong(*arguments):
        results, given = exact(*arguments)
        results[name] = results[name].detach().clone(memory_format=torch.contiguous_format)
        results[name].view(-1)[0] += 0.1
        return results, given

    monkeypatch.setattr(parity, "our_results", wrong)
    (failure,) = parity.check_parity([CASE], CPU)["failures"]
    assert re.search(rf"WRONG: (the gradient of )?{name} is .* \(float32, float32-B2-T5-D7-both-tanh-reverse", failure)


@needs_build
def test_one_failure_does_not_stop_the_others(monkeypatch):
    exact = parity.torch_results
    calls = []

    def wrong(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        return exact(*arguments)

    monkeypatch.setattr(parity, "torch_results", wrong)
    found = parity.check_parity([CASE, CASE], CPU)
    assert (found["compared"], len(found["failures"])) == (2, 1)
    calls.clear()
    monkeypatch.setattr(parity, "smoke_cases", lambda device: [CASE, CASE])
    with pytest.raises(parity.ParityError, match=r"1 of 2 cases failed:\s.*no memory"):
        gpu.check_cases("smoke", CPU)


@needs_build
@pytest.mark.parametrize("name", [sru.OP_NAME, sru.BACKWARD_NAME])
def test_the_check_needs_the_compiled_form_in_both_passes(name, monkeypatch):
    exact = parity.last_backend
    monkeypatch.setattr(parity, "last_backend", lambda op: "reference" if op == name else exact(op))
    with pytest.raises(parity.ParityError, match=f"NOT COMPARED: .*'{name}': 'reference'"):
        parity.compare(CASE, CPU)


@needs_build
def test_the_check_looks_at_calls_for_the_last_state_alone(monkeypatch):
    exact = parity.sru_recurrence

    def wrong(**arguments):
        h, state = exact(**arguments)
        return (h, state) if arguments.get("return_all_states") else (h, state + 1e-3)

    monkeypatch.setattr(parity, "sru_recurrence", wrong)
    with pytest.raises(parity.ParityError, match="the last state differ"):
        parity.compare(CASE, CPU)


@needs_build
def test_what_is_expected_does_not_come_from_the_op(monkeypatch):
    """Autograd's threads for GPUs did not see which form was asked for, and took the compiled one for both sides."""
    inputs, options = parity.random_inputs(CASE, CPU), parity.options_of(CASE)
    _, given = parity.our_results(inputs, options)
    monkeypatch.setattr(parity, "sru_recurrence", None)
    called = []
    for name in ("forward", "backward"):
        exact = getattr(sru_reference, name)
        monkeypatch.setattr(sru_reference, name, lambda *a, exact=exact, name=name: called.append(name) or exact(*a))
    results = parity.torch_results(inputs, options, given, torch.float64)
    assert called == ["forward", "backward"]
    flags = ("mask", "document_start")
    assert {values.dtype for name, values in results.items() if name not in flags} == {torch.float64}


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(monkeypatch, tmp_path):
    result = tmp_path / "result.json"
    parts = {"smoke": lambda repeats: gpu.sanitizer.no_such_name, "repeated": lambda repeats: {"runs": repeats}}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr("sys.argv", ["gpu", "--parts", "smoke", "repeated", "--repeats", "7", "--result", str(result)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    written = json.loads(result.read_text())["parts"]
    assert "AttributeError" in written["smoke"]["failed"]
    assert written["repeated"] == {"runs": 7}


def test_what_the_sanitizer_finds_ends_its_part(monkeypatch):
    said = {"memcheck": gpu.sanitizer.SanitizerResult("errors", "a write out of bounds")}
    clean = gpu.sanitizer.SanitizerResult("clean", "ERROR SUMMARY: 0 errors")
    monkeypatch.setattr(gpu.sanitizer, "run_sanitizer", lambda program, *rest: said.get(program, clean))
    with pytest.raises(RuntimeError, match="memcheck: errors: a write out of bounds"):
        gpu.sanitize()
    said["memcheck"] = gpu.sanitizer.SanitizerResult("missing", "not installed")
    assert {name: found["status"] for name, found in gpu.sanitize().items()} == {
        "memcheck": "missing",
        "initcheck": "clean",
    }


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
    assert len(gpu.compile_latency_floor("sm_90", tmp_path).argtypes) == 6
    with pytest.raises(RuntimeError, match=r"latency_floor\.cu could not be compiled"):
        gpu.compile_latency_floor("sm_1", tmp_path)
