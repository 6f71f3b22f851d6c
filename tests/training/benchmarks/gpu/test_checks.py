"""Parts of the GPU agenda that look for mistakes: they find them, and tell a machine that refuses from a kernel that is
wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_efficient.ops import sru
from hf_efficient.ops.kernel_loader import find_variant
from training.benchmarks.environment import ROOT
from training.benchmarks.gpu import checks as gpu_checks
from training.benchmarks.gpu import models as gpu_models
from training.benchmarks.gpu import sru_recurrence_parity as parity
from training.benchmarks.gpu.context import MissingPrerequisiteError


CASE = parity.Case("float32", (2, 5, 7))
NCU = """==PROF== Connected to process 7
==PROF== Profiling "forward_kernel" - 0: 0%....100% - 8 passes
3 cases ran
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","void sru::<unnamed>::forward_kernel<float, (int)4>(Params, long)","SOL","DRAM Throughput","%","81.50"
"0","7","void sru::<unnamed>::forward_kernel<float, (int)4>(Params, long)","SOL","Unheard Of","%","1"
"0","7","void sru::<unnamed>::forward_kernel<float, (int)4>(Params, long)","L","Registers Per Thread","register","96"
"1","7","void sru::(anonymous namespace)::backward_kernel<float>(Params)","SOL","DRAM Throughput","%","77.00"
==PROF== Disconnected
"""
needs_build = pytest.mark.skipif(find_variant(sru.KERNEL, "cpu") is None, reason=f"{sru.KERNEL} is not built")


@needs_build
def test_wrong_cases_end_the_comparison_at_its_end(first_comparison_fails, make_context, tmp_path):
    with pytest.raises(parity.ParityError, match=r"1 of 3 cases failed:\s.*no memory"):
        gpu_checks.compare_all(make_context(), [CASE] * 3, size=2)
    assert json.loads((tmp_path / "outcome.json").read_text())["partial"]["compared"] == 3


@needs_build
@pytest.mark.parametrize("name", ["_check_graph", "_check_compiled", "_check_op"])
def test_a_wrong_capture_does_not_stop_the_other_checks(monkeypatch, make_context, capsys, name):
    def wrong(*arguments):
        raise RuntimeError("not the same")

    monkeypatch.setattr(gpu_checks, name, wrong)
    with pytest.raises(parity.ParityError, match="not the same"):
        gpu_checks.check_capture(make_context())
    assert capsys.readouterr().out.count(": right") == 3


@needs_build
def test_results_that_differ_are_found(monkeypatch):
    step = gpu_checks.Step(torch.device("cpu"), (1, 3, 5))
    results = step()
    with pytest.raises(parity.ParityError, match="a graph: results differ"):
        gpu_checks.same([results[0] + 1, *results[1:]], results, "a graph")


@needs_build
def test_gradients_that_change_from_run_to_run_are_found(monkeypatch):
    exact, calls = torch.autograd.grad, []

    def changing(*arguments):
        calls.append(arguments)
        return [gradient + (len(calls) == 3) for gradient in exact(*arguments)]

    monkeypatch.setattr(torch.autograd, "grad", changing)
    with pytest.raises(parity.ParityError, match="differ from run to run"):
        gpu_checks.check_repeated(torch.device("cpu"))


@pytest.mark.parametrize(
    ("status", "said", "error", "match"),
    [
        ("errors", "a write out of bounds", RuntimeError, "memcheck: errors: a write out of bounds"),
        ("failed", "Device not supported", MissingPrerequisiteError, "refuses this machine's GPU"),
        ("missing", "not installed", MissingPrerequisiteError, "not installed"),
        ("failed", "did not end", RuntimeError, "did not end"),
    ],
)
def test_what_memcheck_says(monkeypatch, make_context, status, said, error, match):
    result = gpu_checks.sanitizer.SanitizerResult(status, said)
    monkeypatch.setattr(gpu_checks.sanitizer, "run_sanitizer", lambda *arguments: result)
    with pytest.raises(error, match=match):
        gpu_checks.check_memory(make_context(rehearsal=False))


def test_a_clean_memcheck_ends_well(monkeypatch, make_context):
    seen = []
    result = gpu_checks.sanitizer.SanitizerResult("clean", "ERROR SUMMARY: 0 errors")
    monkeypatch.setattr(gpu_checks.sanitizer, "run_sanitizer", lambda *arguments: seen.append(arguments) or result)
    assert "0 errors" in gpu_checks.check_memory(make_context(rehearsal=False))["line"]
    ((name, command, seconds),) = seen
    assert (name, command[1:4]) == ("memcheck", ["-m", "training.benchmarks.gpu.checks", "cases"])
    assert seconds < 60


@pytest.mark.parametrize(
    ("code", "output", "error"),
    [
        (0, NCU, None),
        (1, "==ERROR== Failed to initialize the profiler: LibraryNotLoaded", MissingPrerequisiteError),
        (1, NCU, RuntimeError),
        (0, "3 cases ran", RuntimeError),
    ],
    ids=["counters", "refused", "failed", "no-kernel"],
)
def test_what_ncu_says(monkeypatch, make_context, code, output, error):
    monkeypatch.setattr(gpu_checks, "run_logged", lambda *arguments: (code, output))
    context = make_context(rehearsal=False)
    if error:
        with pytest.raises(error):
            gpu_checks.profile_kernels(context)
        return
    assert gpu_checks.profile_kernels(context)["counters"] == {
        "forward_kernel": {"DRAM Throughput": "81.50 %", "Registers Per Thread": "96 register"},
        "backward_kernel": {"DRAM Throughput": "77.00 %"},
    }


def test_a_kernel_that_was_not_carried_and_cannot_be_built_is_missing(monkeypatch, make_context):
    monkeypatch.setattr(gpu_checks, "find_variant", lambda *arguments: None)
    monkeypatch.setattr(gpu_checks, "find_tool", lambda name: None)
    with pytest.raises(MissingPrerequisiteError, match="not carried along, and there is no nvcc"):
        gpu_checks.load_kernels(make_context(rehearsal=False, device=torch.device("cuda")))


@needs_build
def test_a_build_of_other_sources_is_found(monkeypatch, make_context, tmp_path):
    variant = find_variant(sru.KERNEL, "cpu")
    record = json.loads((variant / "build_record.json").read_text())
    record["library"]["files"]["include/sru_cell.h"] = "another"
    (tmp_path / "build_record.json").write_text(json.dumps(record))
    exact = Path.read_text

    def read(path, *arguments, **options):
        return exact(tmp_path / path.name if path == variant / "build_record.json" else path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert gpu_checks.changed_sources(variant) == ["include/sru_cell.h"]
    with pytest.raises(RuntimeError, match=r"built before include/sru_cell\.h changed"):
        gpu_checks.load_kernels(make_context())


def test_a_failing_test_ends_pytest_s_part_by_name(monkeypatch, make_context):
    output = "F.\nFAILED tests/test_x.py::test_y - assert 1 == 2\n1 failed, 1 passed in 0.1s"
    monkeypatch.setattr(gpu_checks, "run_logged", lambda *arguments: (1, output))
    with pytest.raises(RuntimeError, match=r"1 failed, 1 passed.*tests/test_x\.py::test_y"):
        gpu_checks.run_pytest(make_context())


def test_a_peer_by_another_attention_is_no_peer():
    model = gpu_models.GPT2LMHeadModel(gpu_models.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, 3, dtype=torch.long)
    step = gpu_models.TrainStep(model, {"input_ids": ids, "labels": ids}, flash=True)
    with pytest.raises(gpu_models.WrongBackendError, match="explicit"):
        gpu_models.check_attention({"gpt2": step})
    step.flash = False
    assert gpu_models.check_attention({"gpt2": step}) == {"gpt2": ["explicit"]}


def test_compiled_steps_record_that_their_attention_is_not_asserted(make_context):
    measured = gpu_models.measure_encoders(make_context())["measured"]
    models = {title: case["models"] for title, case in measured.items()}
    asserted = {
        title: {name: case["attention_asserted"] for name, case in cases.items()} for title, cases in models.items()
    }
    assert asserted == {
        "length 8": {"tupe_r": False, "bert": True},
        "length 8, compiled": {"tupe_r": False, "bert": False},
    }
    assert [cases["bert"]["attention"] for cases in models.values()] == [["flash"], None]


def test_another_recurrence_than_the_one_to_be_measured_is_an_error(monkeypatch):
    monkeypatch.setattr(gpu_models, "last_backend", lambda name: "reference")
    with pytest.raises(gpu_models.WrongBackendError, match="'cuda'"):
        gpu_models.recurrence_ran("cuda")


def test_no_part_imports_what_a_bare_machine_lacks():
    """In a process where these cannot be imported: what the parts import at the top, and the models' objective."""
    lacking = ("datasets", "evaluate", "kernels", "matplotlib")
    program = f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
    program += "import training.benchmarks.gpu_agenda, training.benchmarks.gpu.checks, training.benchmarks.gpu.race"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
