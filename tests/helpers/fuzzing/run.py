"""Judging of calls: what came of each, against what has to come of it."""

import copy
import linecache
import logging
import re
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

import hf_efficient
from tests.helpers.comparison import relative_error

from . import oracle
from .cases import Case
from .drawing import draw
from .faults import add_fault
from .results import TOLERANCES, value_fault
from .subjects import FIRST_WORD, VOCABULARY


PACKAGE = str(Path(hf_efficient.__file__).parent)
# Verdicts in the order in which they are printed; those of the second tuple are faults of the package.
GOOD = ("right", "clear refusal", "warning")
BAD = ("wrong value", "silent", "state damaged", "deep refusal", "refused though right", "crash")
# Changes of valid calls that tell kinds of failure apart, the likeliest first.
CAUSES_OF_LOSSES = ("no targets", "num_items_in_batch", "int32 labels", "int16 labels")
CAUSES = (
    *("meta device", "batch 0"),
    *("documents by seq_idx", "documents by cu_seq_lens", "documents by position_ids", "under the mask", "4-D mask"),
    *("padding in the past", "static cache", "cache", "memory", "window"),
)


@dataclass
class Verdict:
    """What came of a case.

    Args:
        name: one of `GOOD` and `BAD`.
        detail: the error's message, or what was wrong.
        kind: what failures of one kind have in common.
    """

    name: str
    detail: str
    case: Case

    @property
    def kind(self) -> tuple[str, str]:
        detail = re.sub(r"[0-9.e+-]*[0-9]+", "N", self.detail.splitlines()[0] if self.detail else "")[:150]
        if self.case.fault:
            return self.name, f"{self.case.fault}: {detail}"
        causes = (*CAUSES_OF_LOSSES, *CAUSES) if detail.startswith("the loss") else CAUSES
        cause = next((cause for cause in causes if any(cause in change for change in self.case.changes)), "")
        return self.name, f"{detail} ({cause})" if cause else detail


class _Warnings(logging.Handler):
    def __init__(self, found: list[str]):
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def recorded_warnings():
    """Messages of warnings and of the libraries' loggers, those that come once a process among them."""
    found: list[str] = []
    handler = _Warnings(found)
    loggers = [logging.getLogger("transformers"), logging.getLogger("hf_efficient")]
    transformers_logging.warning_once.cache_clear()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            yield found
        found += [str(warning.message) for warning in raised]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def is_clear(error: Exception, case: Case) -> bool:
    """Whether the package raised an error by itself, of a kind that callers expect, that names an argument."""
    message = str(error)
    unknown = re.search(r"(?:unexpected keyword argument|multiple values for argument) '(\w+)'", message)
    if isinstance(error, TypeError) and unknown and unknown[1] in case.call:
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    raised = frame.filename.startswith(PACKAGE) and line.startswith("raise ")
    names = {*case.call, "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "memory", "cache"}
    expected_type = isinstance(error, (ValueError, TypeError, NotImplementedError, IndexError))
    return raised and expected_type and any(name in message for name in (*names, "The input has", "Row "))


def _canonical(case: Case, model: Any) -> Tensor:
    """Outputs of a call without anything special, of the length of the case."""
    ids = torch.arange(2 * case.length).view(2, -1) % (VOCABULARY - FIRST_WORD) + FIRST_WORD
    ids[:, 0] = 0
    with torch.no_grad():
        ids = ids[:, None] if case.choices else ids
        return oracle.outputs(case, case.subject.call(oracle.with_outputs(case, model), input_ids=ids))


def _state_damage(case: Case, config_before: dict[str, Any], refused: bool) -> str | None:
    """What a call has left behind in the model: `None` where that is nothing."""
    model, known = case.subject.model, case.subject.canonical
    config = vars(case.subject.config)
    changed = {name for name in {*config, *config_before} if config.get(name) != config_before.get(name)}
    if changed - (set() if refused else {"problem_type"}):
        return f"the config's {sorted(changed)} changed"
    model.eval()
    if case.length not in known:
        known[case.length] = _canonical(case, case.subject.reference)
    try:
        error = relative_error(_canonical(case, model), known[case.length])
    except Exception as failure:
        return f"the next call raises {type(failure).__name__}: {failure}"
    return None if error <= TOLERANCES[case.subject.key.dtype] else f"the next call is off by {error:.2g}"


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else value.clone()
    return value.get_seq_length() if isinstance(value, Cache) else None


def _input_damage(case: Case, before: dict[str, Any], refused: bool) -> str | None:
    """What a call has done to its arguments: tensors stay as they are, and a refused call leaves a cache alone, but for
    a loss that cannot be computed of what the model has read already."""
    refused = refused and not case.fault.startswith(("labels", "num_items_in_batch", "logits_to_keep"))
    for name, old in before.items():
        new = _snapshot(case.call[name])
        if isinstance(old, Tensor) and not old.is_meta and not torch.equal(old.nan_to_num(), new.nan_to_num()):
            return f"{name} was changed"
        if refused and isinstance(old, int) and old != new:
            return f"a refused call left {name} {new} long, from {old}"
    return None


def draw_case(seed: int, head: str | None = None) -> Case:
    """Draw a call, in half of the cases with a fault."""
    case = draw(seed, head)
    if case.batch and case.expects == "value" and case.mode != "meta" and case.rng.random() < 0.5:
        for _ in range(5):
            if add_fault(case):
                return case
        case.expects = "value"
    return case


def judge(case: Case) -> Verdict:
    """Make a call and say what came of it."""
    model = case.subject.model
    if case.mode == "meta":
        model = copy.deepcopy(model).to("meta")
    model.train(case.mode == "train")
    config = case.subject.config
    config_before = dict(vars(config))
    before = {name: _snapshot(value) for name, value in case.call.items()}
    error = result = None
    context = {"eval": torch.no_grad, "meta": torch.no_grad, "inference": torch.inference_mode}.get(
        case.mode, torch.enable_grad
    )
    torch.manual_seed(case.seed)  # some objectives sample
    with recorded_warnings() as found, context():
        try:
            result = case.subject.call(model, **case.call)
        except Exception as failure:
            error = failure
    verdict = _verdict(case, result, error, found)
    if verdict.name in GOOD:
        damage = _input_damage(case, before, error is not None) or _state_damage(case, config_before, error is not None)
        verdict = Verdict("state damaged", damage, case) if damage else verdict
    config.problem_type = config_before["problem_type"]
    if verdict.name not in GOOD:
        case.subject.renew()
    return verdict


def _verdict(case: Case, result: Any, error: Exception | None, warned: list[str]) -> Verdict:
    if error is not None:
        detail = f"{type(error).__name__}: {error}"
        if not is_clear(error, case):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return Verdict("deep refusal", f"{detail.splitlines()[0]} [{Path(frame.filename).name}]", case)
        return Verdict("refused though right" if case.expects == "value" else "clear refusal", detail, case)
    if case.expects == "refusal":
        told = [message for message in warned if any(name in message for name in case.call)]
        found = None if told else oracle.outputs(case, result)
        if told or (found is not None and found.is_meta):
            return Verdict("warning" if told else "right", "; ".join(told), case)
        return Verdict("silent", "", case)
    fault = value_fault(case, result)
    return Verdict("wrong value", fault, case) if fault else Verdict("right", "", case)


def check(seed: int, head: str | None = None) -> Verdict:
    """Draw the case of a seed, for one head or for any, and judge it."""
    return judge(draw_case(seed, head))


__all__ = ["BAD", "GOOD", "Verdict", "check", "draw_case", "judge"]
