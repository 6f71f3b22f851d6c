"""Comparison of a call's results with the plain reference: outputs, loss and gradients."""

from typing import Any

import torch
from torch import Tensor

from tests.helpers.comparison import relative_error

from . import oracle
from .cases import Case


TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15}


def value_fault(case: Case, result: Any) -> str | None:
    """What is wrong with a result, in value or in gradients; `None` where all is right."""
    dtype = case.subject.key.dtype
    if case.batch == 0:
        found = oracle.outputs(case, result)
        return None if found is None or found.shape[0] == 0 else f"shape {tuple(found.shape)} of an empty batch"
    found = oracle.outputs(case, result)
    if case.mode == "meta":
        return None if found.is_meta else f"a model on the meta device gives {found.device}"
    if case.task == "sampling objective":
        # What it samples is its own business; that what is hidden stays so shows in a loss that is finite.
        finite = result.loss.isfinite()
        return _gradient_fault(case, result.loss, None) if finite else f"the loss is {result.loss.item()}"
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
