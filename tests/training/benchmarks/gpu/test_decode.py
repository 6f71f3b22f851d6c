"""Decoding on a GPU, as far as it runs without one: a static cache, and the steps at tiny sizes."""

import pytest
import torch
from transformers import DynamicCache

from hf_efficient.utils.cache_naming import cache_kwarg
from training.benchmarks.decoding.races import TINY
from training.benchmarks.gpu import decode
from training.benchmarks.gpu.context import MissingPrerequisiteError


@pytest.mark.parametrize("kind", ["dense", "all"])
@torch.inference_mode()
def test_a_step_reads_the_whole_context_and_can_be_repeated(kind, make_context):
    """The logits of each call are those of a growing cache with the same keys, values and states."""
    model = decode.make_model(make_context(), TINY["full"], kind, "fp32")
    step = decode.Step(model, 16, torch.device("cpu"))
    cache = DynamicCache(config=model.config)
    inputs = {"input_ids": step.token, **cache_kwarg(cache), "use_cache": True}
    model(**inputs)
    for layer, filled in zip(cache.layers, step.cache.layers, strict=True):
        layer.keys, layer.values = filled.keys[:, :, :16].clone(), filled.values[:, :, :16].clone()
    expected = model(**inputs, position_ids=step.position).logits
    step()
    torch.testing.assert_close(step.logits, expected)
    step()
    assert step.cache.get_seq_length() == 17
    keys_and_values = 2 * 2 * 17 * 32 * 4
    assert step.bytes() == 4 * model.weights_read_per_token() + keys_and_values


def test_a_rehearsal_measures_every_kind(make_context):
    context = make_context()
    found = decode.measure_decoding(context)
    assert [(case["format"], [*case["models"]]) for case in found["cases"]] == [
        ("fp32", ["fp32 dense", "fp32 all"]),
        ("bf16", ["bf16 dense", "bf16 all"]),
    ]
    for case in found["cases"]:
        assert case["models"][f"{case['format']} dense"]["times_faster_than_dense"] == 1
    assert "tiny fp32 at 16: all" in found["line"]
    assert "CUDA graphs of a step" in context.not_rehearsed


def test_whole_models_one_after_the_other(make_context):
    found = decode.measure_17b(make_context())
    assert [case["kind"] for case in found["cases"]] == ["dense", "all"]
    assert "17B bf16 at 16: sparse" in found["line"]


def test_the_sizes_are_those_of_the_presets():
    for kind, depth in decode.DEPTHS.items():
        preset, _ = decode.WIDE.settings(kind)
        assert preset.startswith(f"{depth}x9216")


def test_too_little_memory_is_said(make_context, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(30e9), int(80e9)))
    with pytest.raises(MissingPrerequisiteError, match="wants 40 GB, and 30 are free"):
        decode.measure_17b(make_context(rehearsal=False))


class FailingTimer:
    def graph_of(self, run, calls):
        raise RuntimeError("operation not permitted\nwhile capturing")


def test_a_step_that_cannot_be_captured_is_timed_call_by_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    run, reason = decode.captured(FailingTimer(), lambda: calls.append(0))
    assert reason == "operation not permitted"
    run()
    assert len(calls) == decode.CALLS
