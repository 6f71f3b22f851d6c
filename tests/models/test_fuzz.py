"""No call of any head gives a wrong value, passes over a fault, or leaves a trace in the model.

Thirty seconds in all, shared by the heads; `--fuzz-seconds` or `--fuzz-cases` make it longer, `--fuzz-seed` other.
"""

import itertools
import time

import pytest
import torch

from hf_efficient.auto import FAMILIES
from tests.helpers.fuzzing.drawing import draw
from tests.helpers.fuzzing.run import BAD, GOOD, check, judge
from tests.helpers.fuzzing.snippets import as_code
from tests.helpers.fuzzing.subjects import VARIANTS, heads


HEADS = list(dict.fromkeys(head for family in FAMILIES for head in heads(family)))


def test_every_family_has_small_models_to_fuzz():
    assert set(VARIANTS) == set(FAMILIES)


@pytest.mark.parametrize("head", HEADS)
def test_calls_are_right_or_refused_clearly(head, request):
    first, cases = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-cases")
    stop = time.monotonic() + request.config.getoption("--fuzz-seconds") / len(HEADS)
    seeds = itertools.count(first) if cases is None else range(first, first + -(-cases // len(HEADS)))
    failures, verdicts = {}, set()
    for seed in seeds:
        verdict = check(seed, head)
        verdicts.add(verdict.name)
        if verdict.name in BAD:
            command = f"python -m tests.helpers.fuzzing --head {head} --only {seed}"
            failures.setdefault(verdict.kind, f"{command}: {verdict.name}: {verdict.detail}\n{as_code(verdict.case)}")
        # On a busy machine the time may be over before both kinds of calls were drawn.
        if cases is None and time.monotonic() > stop and len(verdicts) > 1:
            break
    assert not failures, "\n\n".join(failures.values())
    assert {"right", "clear refusal"} <= verdicts <= set(GOOD)


def _first(head, wanted):
    """The first drawn call with a property, on a model that no other test has."""
    case = next(case for case in (draw(seed, head) for seed in itertools.count()) if wanted(case))
    case.subject.renew()
    return case


def _plain(case):
    return case.batch > 1 and case.mode == "eval" and case.expects == "value" and not case.changes


def test_a_wrong_value_is_found():
    case = _first("TupeForTokenClassification", _plain)
    torch.nn.init.normal_(case.subject.model.classifier.bias)
    assert judge(case).name == "wrong value"


def test_a_wrong_loss_is_found():
    case = _first("TupeForMaskedLM", lambda case: case.changes == ["num_items_in_batch=5"])
    case.call["num_items_in_batch"] = 4
    verdict = judge(case)
    assert (verdict.name, verdict.detail[:11]) == ("wrong value", "the loss is")


def test_a_wrong_gradient_is_found():
    def wanted(case):
        return case.mode == "train" and case.seed % 3 == 0 and case.batch and not case.changes

    case = _first("SruppModel", wanted)
    case.subject.model.layers[0].projection.out_proj.weight.register_hook(lambda grad: grad * 1.5)
    assert "the gradient of layers.0.projection.out_proj.weight is off by" in judge(case).detail


def test_a_fault_that_passes_is_found():
    case = _first("SruppModel", _plain)
    case.expects = "refusal"
    assert judge(case).name == "silent"


def test_a_deep_error_is_found():
    case = _first("SruppModel", _plain)
    case.subject.model.layers[0].projection.out_proj = torch.nn.Linear(1, 1)
    case.expects = "refusal"
    assert judge(case).name == "deep refusal"


def test_a_trace_in_the_model_is_found():
    case = _first("TupeModel", _plain)
    model = case.subject.model

    def drift(module, args, output):
        model.final_norm = torch.nn.Softmax(-1)

    model.register_forward_hook(drift)
    verdict = judge(case)
    assert (verdict.name, verdict.detail[:20]) == ("state damaged", "the next call is off")
