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
from .subjects import FIRST_WORD, VOCABULARY


PACKAGE = str(Path(hf_efficient.__file__).parent)
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15}
# Verdicts in the order in which they are printed; those of the second tuple are faults of the package.
GOOD = ("right", "clear refusal", "warning")
BAD = ("wrong value", "silent", "state damaged", "deep refusal", "refused though right", "crash")


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
        causes = [re.sub(r"^\S+ under the mask", "anything under the mask", name) for name in self.case.changes]
        told = [name for name in causes if re.search(r"documents|under|targets|num_items|4-D|cache|memory|batch", name)]
        return self.name, f"{detail} ({', '.join(told)})"


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
        return oracle.outputs(case, oracle.with_logits(case, model)(ids[:, None] if case.choices else ids))


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


def _input_damage(before: dict[str, Any], call: dict[str, Any], refused: bool) -> str | None:
    """What a call has done to its arguments: tensors stay as they are, and a refused call leaves a cache alone."""
    for name, old in before.items():
        new = _snapshot(call[name])
        if isinstance(old, Tensor) and not old.is_meta and not torch.equal(old.nan_to_num(), new.nan_to_num()):
            return f"{name} was changed"
        if refused and isinstance(old, int) and old != new:
            return f"a refused call left {name} {new} long, from {old}"
    return None


def _value_fault(case: Case, result: Any) -> str | None:
    """What is wrong with a result, in value or in gradients; `None` where all is right."""
    dtype = case.subject.key.dtype
    if case.batch == 0:
        found = oracle.outputs(case, result)
        return None if found is None or found.shape[0] == 0 else f"shape {tuple(found.shape)} of an empty batch"
    found = oracle.outputs(case, result)
    if case.mode == "meta":
        return None if found.is_meta else f"a model on the meta device gives {found.device}"
    with torch.set_grad_enabled(case.mode in ("grad", "train")):
        values, known = oracle.expected(case)
    given_loss = result.loss if "loss" in getattr(result, "keys", tuple)() else None
    fault = None
    if found is not None and not found.is_meta:
        fault, logits = _logits_fault(case, found, values, known)
    else:
        logits = values
    if fault is None and case.meaning.targets:
        if given_loss is None:
            return "there is no loss"
        full = values if found is None or case.task == "pretraining" else logits
        wanted = oracle.loss(case, full)
        if not given_loss.isfinite():
            fault = f"the loss is {given_loss.item()}"
        elif abs(given_loss.item() - wanted.item()) > TOLERANCES[dtype] * max(1.0, abs(wanted.item())):
            fault = f"the loss is {given_loss.item():.6g}, not {wanted.item():.6g}"
    return fault or _gradient_fault(case, given_loss, found)


def _logits_fault(case: Case, found: Tensor, values: Tensor, known: Tensor) -> tuple[str | None, Tensor]:
    """What is wrong with logits, and the logits in the form that losses take."""
    if case.task == "pretraining" and case.meaning.targets:
        targets = case.meaning.targets["labels"] != oracle.IGNORE_INDEX
        values, known, logits = values[targets], known[targets], found
    elif case.task in ("sequence", "choice"):
        logits = found.reshape(case.rows, 1, -1)
        if found.shape[0] != case.batch:
            return f"shape {tuple(found.shape)}", logits
    else:
        values, known, logits = oracle.kept(values, case.meaning.keep), oracle.kept(known, case.meaning.keep), found
    if logits.shape[:-1] != known.shape:
        return f"shape {tuple(found.shape)}, not {(*known.shape, values.shape[-1])}", logits
    if not found.isfinite().all():
        return "outputs are NaN or infinite", logits
    if known.any():
        error = relative_error(logits[known], values[known])
        if error > TOLERANCES[case.subject.key.dtype]:
            return f"outputs are off by {error:.2g}", logits
        fault = _difference_of_gradients(case, logits[known], values[known])
        if fault is not None:
            return fault, logits
    logits = logits.detach().double()
    return None, logits[:, 0] if case.task == "sequence" else logits.reshape(case.batch, -1) if case.choices else logits


def _difference_of_gradients(case: Case, found: Tensor, wanted: Tensor) -> str | None:
    """Compare the gradients of all parameters, of a random sum of the outputs, with those of the reference."""
    if not found.requires_grad or case.seed % 3 or case.meaning.past is not None:
        return None
    weights = case.numbers(*found.shape)
    gradients = []
    for model, outputs in ((case.subject.model, found), (case.subject.reference, wanted)):
        names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
        try:
            parts = torch.autograd.grad((outputs.double() * weights).sum(), parameters, None, True, allow_unused=True)
        except RuntimeError as error:
            return f"backward raises: {error}"
        gradients.append(dict(zip(names, parts, strict=True)))
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        if (ours is None or not ours.any()) and (theirs is None or not theirs.any()):
            continue
        if ours is None or theirs is None:
            return f"only one of the two gives a gradient for {name}"
        error = relative_error(ours, theirs, floor=0.1)
        if error > 20 * TOLERANCES[case.subject.key.dtype]:
            return f"the gradient of {name} is off by {error:.2g}"
    return None


def _gradient_fault(case: Case, loss: Tensor | None, found: Tensor | None) -> str | None:
    scalar = loss if loss is not None or found is None else found.float().square().mean()
    if scalar is None or not scalar.requires_grad:
        return "nothing to learn from" if case.mode in ("grad", "train") and scalar is not None else None
    model = case.subject.model
    model.zero_grad()
    try:
        scalar.backward()
    except RuntimeError as error:
        return f"backward raises: {error}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"gradients are not finite, that of {name} first"
    model.zero_grad()
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
    with recorded_warnings() as found, context():
        try:
            result = model(**case.call)
        except Exception as failure:
            error = failure
    verdict = _verdict(case, result, error, found)
    if verdict.name in GOOD:
        damage = _input_damage(before, case.call, error is not None) or _state_damage(
            case, config_before, error is not None
        )
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
    fault = _value_fault(case, result)
    return Verdict("wrong value", fault, case) if fault else Verdict("right", "", case)


def check(seed: int, head: str | None = None) -> Verdict:
    """Draw the case of a seed, for one head or for any, and judge it."""
    return judge(draw_case(seed, head))


__all__ = ["BAD", "GOOD", "Verdict", "check", "draw_case", "judge"]
