"""The comparison of the compiled recurrence with the torch form, by the kernel for CPUs: a check that cannot fail shows
nothing."""

import re

import pytest
import torch

from hf_efficient.ops import sru, sru_reference
from hf_efficient.ops.kernel_loader import find_variant
from training.benchmarks.gpu import sru_recurrence_parity as parity


CPU = torch.device("cpu")
CASE = parity.Case("float32", (2, 5, 7), activation="tanh", reverse=True)
needs_build = pytest.mark.skipif(find_variant(sru.KERNEL, "cpu") is None, reason=f"{sru.KERNEL} is not built")


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
def test_one_failure_does_not_stop_the_others(first_comparison_fails):
    found = parity.check_parity([CASE, CASE], CPU)
    assert (found["compared"], len(found["failures"])) == (2, 1)


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
