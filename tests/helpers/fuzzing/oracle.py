"""The plain reference: rows one by one, without padding, document by document, in float64 and eager form; and losses
computed from logits by their formulas."""

from typing import Any

import torch
from torch import Tensor

from hf_efficient.utils.labels import IGNORE_INDEX

from .cases import LOWEST, Case, Meaning


def outputs(case: Case, result: Any) -> Any:
    """What a result says of each row: hidden states, or logits of shape `(rows, length or none, classes)`; `None` where
    it holds no logits."""
    if isinstance(result, tuple):
        return torch.stack(result[:2], -1) if case.task == "answer" else result[0]
    if case.task == "answer":
        return torch.stack([result.start_logits, result.end_logits], -1)
    if case.task in (None, "sampling objective"):
        return getattr(result, "last_hidden_state", None)
    return getattr(result, "logits", None)


def with_outputs(case: Case, model: Any) -> Any:
    """The model that gives logits or hidden states: an objective gives losses alone, and wraps one."""
    if case.task == "objective":
        return model.model
    return model.encoder if case.subject.key.is_objective else model


def _call(case: Case, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Call the reference on one row: `(tokens, values)`, or `(1, values)` of heads that give one for the row."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    inputs = inputs[None, None] if case.choices else inputs[None]
    model = with_outputs(case, case.subject.reference)
    given = {name: inputs}
    if bias is not None:
        # Of multiple choice the mask goes to the encoder through a head that flattens two dimensions.
        given["attention_mask"] = bias[None] if case.choices is None else bias[None, None]
    # Masks of sparse layers are soft in training.
    model.train(case.mode == "train" and case.subject.key.family in ("scaling_transformer", "terraformer"))
    found = outputs(case, case.subject.call(model, **given, **({"use_cache": False} if case.recurrent else {})))
    model.eval()
    return (found if case.task in ("sequence", "choice") else found[0]).double()


def _embedded(case: Case, ids: Tensor) -> Tensor:
    return case.subject.reference.get_input_embeddings()(ids)


def _windowed(case: Case, length: int) -> Tensor | None:
    """The mask of a window, as a bias; `None` without one."""
    window = case.meaning.window
    if window is None:
        return None
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    allowed = key >= query - window
    if case.causal:
        allowed = allowed & (key <= query)
    return torch.where(allowed, 0.0, LOWEST).double()[None]


def _row(case: Case, row: int) -> list[tuple[Tensor, Tensor]]:
    """Places of tokens in a row, and the outputs there, for each document."""
    meaning = case.meaning
    inputs, real = meaning.inputs[row], meaning.real[row]
    if not case.recurrent:
        # A position is a column, so padding inside a row stays and is hidden; that at the end is cut off.
        end = int(real.nonzero().max()) + 1
        bias = meaning.bias
        if bias is not None:
            return [(torch.arange(end), _call(case, inputs, bias[row]))]
        hidden = None if real[:end].all() else torch.where(real[:end], 0.0, LOWEST).double().expand(1, end, end)
        return [(torch.arange(end), _call(case, inputs[:end], hidden))]
    if meaning.past is not None:
        past = meaning.past[0][row][meaning.past[1][row]]
        if inputs.is_floating_point():
            past = _embedded(case, past)
        found = _call(case, torch.cat([past, inputs]), None)
        return [(torch.arange(case.length), found[-case.length :])]
    documents = torch.zeros_like(real).long() if meaning.documents is None else meaning.documents[row]
    found = []
    for document in documents.unique():
        places = (real & (documents == document)).nonzero().squeeze(-1)
        if places.numel():
            bias = _windowed(case, places.numel()) if meaning.bias is None else meaning.bias[row]
            found.append((places, _call(case, inputs[places], bias)))
    return found


def expected(case: Case) -> tuple[Tensor, Tensor]:
    """Outputs of all rows, differentiable, and which of them are beyond doubt: not those at padding."""
    values: Tensor | None = None
    by_row = case.task in ("sequence", "choice")
    known = torch.zeros(case.rows, 1 if by_row else case.length, dtype=torch.bool)
    for row in range(case.rows):
        if not case.meaning.real[row].any():
            continue
        for places, found in _row(case, row):
            places = torch.zeros(1).long() if by_row else places
            if values is None:
                values = torch.zeros(*known.shape, found.shape[-1], dtype=torch.float64)
            values = values.index_put((torch.tensor(row), places), found[: len(places)])
            known[row, places] = True
    if values is None:
        values = torch.zeros(*known.shape, 1, dtype=torch.float64)
    return values, known if by_row else known & case.meaning.real


def kept(tensor: Tensor, keep: Any) -> Tensor:
    """The positions of `(rows, length, ...)` that `logits_to_keep` names."""
    if isinstance(keep, int):
        return tensor[:, -keep:] if keep else tensor
    if keep.dtype == torch.bool:
        return tensor[keep]
    if keep.dim() == 1:
        return tensor[:, keep]
    return torch.stack([tensor[row, places] for row, places in enumerate(keep)])


def _cross_entropy(logits: Tensor, targets: Tensor, ignored: Tensor, count: Any) -> Tensor:
    logits, targets, ignored = logits.reshape(-1, logits.shape[-1]), targets.flatten(), ignored.flatten()
    log_probs = logits.log_softmax(-1)[~ignored]
    total = -log_probs.gather(1, targets[~ignored][:, None]).sum()
    return total / max(1, int((~ignored).sum()) if count is None else count)


def loss(case: Case, logits: Tensor) -> Tensor:
    """The loss of float64 logits, by the formula of the head's task."""
    meaning: Meaning = case.meaning
    targets, count = meaning.targets, meaning.count
    problem = case.subject.key.problem
    if case.task == "answer":
        parts = []
        for part, name in enumerate(("start_positions", "end_positions")):
            outside = (targets[name] < 0) | (targets[name] >= logits.shape[1])
            parts.append(_cross_entropy(logits[..., part], targets[name], outside, count))
        return (parts[0] + parts[1]) / 2
    labels = targets["labels"]
    if problem is not None and not problem.endswith("classes"):
        labels = labels.reshape(logits.shape)
        if "number" in problem:
            terms = (logits - labels).square()
        else:
            terms = torch.log1p(torch.exp(-logits.abs())) + logits.clamp(min=0) - logits * labels
        return terms.sum() / (labels.numel() if count is None else max(1, count))
    if case.task == "causal" and not meaning.shifted:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)
    return _cross_entropy(logits, labels, labels == IGNORE_INDEX, count)
