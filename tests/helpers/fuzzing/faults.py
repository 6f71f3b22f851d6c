"""Faults that are put into valid calls, each of which a model must refuse, or warn of where that is enough."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_efficient.models.srupp.masking_srupp import SegmentMemory

from .cases import Case
from .subjects import FIRST_WORD, MAX_LENGTH, VOCABULARY


Fault = Callable[[Case], dict[str, Any] | None]
NAN = float("nan")
# What stands in place of the padding mask. Each gets the case, and gives a mask or what else someone may pass for one.
MASKS: dict[str, Callable[[Case], Any]] = {
    "1-D": lambda case: torch.ones(case.length),
    # One choice a row would make a right mask of one choice.
    "3-D": lambda case: torch.ones(case.rows, 2 if case.choices else 1, case.length),
    "of too many dimensions": lambda case: torch.ones(
        case.rows, *[1] * (3 if case.choices else 2), case.length, case.length
    ),
    "too long": lambda case: case.outside(torch.ones(case.rows, case.length + 4)),  # longer than with any past
    "of another batch": lambda case: torch.ones(case.rows + 1, case.length),
    "complex": lambda case: case.outside(torch.ones(case.rows, case.length, dtype=torch.complex64)),
    "of 2": lambda case: case.outside(torch.full((case.rows, case.length), 2)),
    "of -1": lambda case: case.outside(torch.full((case.rows, case.length), -1)),
    "of 0.5": lambda case: case.outside(torch.full((case.rows, case.length), 0.5)),
    "of NaN": lambda case: case.outside(torch.full((case.rows, case.length), NAN)),
    "of 0 and -inf": lambda case: case.outside(torch.full((case.rows, case.length), float("-inf"))),
    "a string": lambda case: "ones",
    "a number": lambda case: 1,
    "a list": lambda case: case.outside(torch.ones(case.rows, case.length)).tolist(),
    "an array": lambda case: case.outside(torch.ones(case.rows, case.length)).numpy(),
    "on the meta device": lambda case: case.outside(torch.ones(case.rows, case.length)).to("meta"),
    "4-D, another length of keys": lambda case: torch.ones(case.rows, 1, case.length, case.length + 1).bool(),
    "4-D, another length of queries": lambda case: torch.ones(case.rows, 1, case.length + 1, case.length).bool(),
    "4-D, another batch": lambda case: torch.ones(case.rows + 2, 1, case.length, case.length).bool(),
    "4-D, another number of heads": lambda case: torch.ones(case.rows, 7, case.length, case.length).bool(),
    "4-D of 2": lambda case: torch.full((case.rows, 1, case.length, case.length), 2),
    "4-D of -1": lambda case: torch.full((case.rows, 1, case.length, case.length), -1),
    "4-D of NaN": lambda case: torch.full((case.rows, 1, case.length, case.length), NAN),
    "4-D, complex": lambda case: torch.zeros(case.rows, 1, case.length, case.length, dtype=torch.complex64),
}
IDS: dict[str, Callable[[Case], Any]] = {
    "1-D": lambda case: torch.zeros(case.length, dtype=torch.int64),
    "of five dimensions": lambda case: torch.zeros(case.rows, 1, 1, 1, case.length, dtype=torch.int64),
    "0-D": lambda case: torch.tensor(0),
    "floats": lambda case: case.outside(torch.zeros(case.rows, case.length)),
    "complex": lambda case: case.outside(torch.zeros(case.rows, case.length, dtype=torch.complex64)),
    "a string": lambda case: "some text",
    "a list": lambda case: case.outside(torch.zeros(case.rows, case.length).long()).tolist(),
    "an array": lambda case: case.outside(torch.zeros(case.rows, case.length).long()).numpy(),
    "without tokens": lambda case: case.outside(torch.zeros(case.rows, 0, dtype=torch.int64)),
    "of VOCABULARY": lambda case: case.outside(_with_last(torch.zeros(case.rows, case.length).long(), VOCABULARY)),
    "of -1": lambda case: case.outside(_with_last(torch.zeros(case.rows, case.length).long(), -1)),
    "on the meta device": lambda case: case.outside(torch.zeros(case.rows, case.length, device="meta").long()),
}
EMBEDDINGS: dict[str, Callable[[Case], Any]] = {
    "of another width": lambda case: case.outside(
        torch.zeros(case.rows, case.length, case.subject.embedding_width + 1)
    ),
    "of no width": lambda case: case.outside(torch.zeros(case.rows, case.length, 0)),
    "2-D": lambda case: torch.zeros(case.length, case.subject.embedding_width),
    "integers": lambda case: _zeros(case, torch.int64),
    "complex": lambda case: _zeros(case, torch.complex64),
    "a string": lambda case: "some text",
    "a list": lambda case: _zeros(case, torch.float32).tolist(),
    "without tokens": lambda case: case.outside(torch.zeros(case.rows, 0, case.subject.embedding_width)),
    "on the meta device": lambda case: _zeros(case, case.subject.key.dtype).to("meta"),
}
POSITIONS: dict[str, Callable[[Case], Any]] = {
    "floats": lambda case: torch.zeros(case.rows, case.length),
    "complex": lambda case: torch.zeros(case.rows, case.length, dtype=torch.complex64),
    "too long": lambda case: torch.arange(case.length + 1).expand(case.rows, -1),
    "of another batch": lambda case: torch.arange(case.length).expand(case.rows + 2, -1),
    "3-D": lambda case: torch.arange(case.length).expand(case.rows, 1, -1),
    "a list": lambda case: [list(range(case.length))] * case.rows,
    "a string": lambda case: "0",
}
WINDOWS = (-1, -7, 2.5, "3", NAN, [1])
KEPT = (-1, 1.5, "1", [0], torch.tensor([0.5]), torch.tensor([99]), torch.tensor([-99]), torch.ones(1, 1, 1).long())
COUNTS = (-3, NAN, "4", [4], torch.tensor(-3), float("-inf"))
MISTYPED = (
    *("attention_maks", "attention_masks", "atention_mask", "inputs_embed", "input_id", "label", "lables", "cahce"),
    *("past_key_value", "use_cahce", "logit_to_keep", "position_id", "windows", "attention_windw", "head_mask", "foo"),
)


def _with_last(ids: Tensor, value: int) -> Tensor:
    ids[-1, -1] = value
    return ids


def _zeros(case: Case, dtype: torch.dtype) -> Tensor:
    return case.outside(torch.zeros(case.rows, case.length, case.subject.embedding_width, dtype=dtype))


def _one_of(kind: str, argument: str, values: dict[str, Callable[[Case], Any]]) -> Fault:
    def fault(case: Case) -> dict[str, Any]:
        name = case.rng.choice(list(values))
        case.changed(f"{kind}: {name}")
        return {argument: values[name](case)}

    return fault


def wrong_ids(case: Case) -> dict[str, Any] | None:
    case.call.pop("inputs_embeds", None)
    case.call.pop("attention_mask", None)
    return _one_of("ids", "input_ids", IDS)(case)


def wrong_embeddings(case: Case) -> dict[str, Any] | None:
    if case.subject.key.is_objective:
        return None
    case.call.pop("input_ids", None)
    case.call.pop("attention_mask", None)
    return _one_of("embeddings", "inputs_embeds", EMBEDDINGS)(case)


def wrong_positions(case: Case) -> dict[str, Any] | None:
    return None if case.choices else _one_of("position_ids", "position_ids", POSITIONS)(case)


def wrong_number_of_inputs(case: Case) -> dict[str, Any] | None:
    if case.subject.key.is_objective:
        return None
    if case.rng.random() < 0.5:
        if case.task == "target" and case.meaning.targets:  # which are its input then
            return None
        case.changed("no input")
        return {"input_ids": None, "inputs_embeds": None}
    case.changed("ids and embeddings")
    dtype = case.subject.key.dtype
    return {"input_ids": case.outside(torch.zeros(case.rows, case.length).long()), "inputs_embeds": _zeros(case, dtype)}


def wrong_layout(case: Case) -> dict[str, Any] | None:
    """Rows that TUPE cannot read: too long, without [CLS], or padded on the left."""
    if case.recurrent:
        return None
    kind = case.rng.choice(["too long", "no [CLS]", "padded on the left"])
    length = MAX_LENGTH + 1 if kind == "too long" else case.length
    if kind != "too long" and (case.subject.config.cls_token_id is None or length < 2):
        return None
    ids = torch.full((case.rows, length), FIRST_WORD)
    ids[:, 0] = FIRST_WORD if kind == "no [CLS]" else 0
    mask = torch.ones_like(ids)
    mask[:, 0] = kind != "padded on the left"
    case.call.pop("inputs_embeds", None)
    case.changed(kind)
    return {"input_ids": case.outside(ids), "attention_mask": case.outside(mask)}


def wrong_labels(case: Case) -> dict[str, Any] | None:
    """Labels of a wrong shape, dtype, device or value."""
    if case.task is None or (case.task == "causal" and case.length == 1):  # the first label is nobody's target
        return None
    case.call.pop("shift_labels", None)  # in their presence nobody reads `labels`
    names = ["start_positions", "end_positions"] if case.task == "answer" else ["labels"]
    by_token = case.subject.key.is_objective or case.task in (*("causal", "masked", "pretraining", "token", "target"),)
    right = torch.zeros((case.rows, case.length) if by_token else (case.batch,)).long()
    numbers = case.subject.key.problem is not None and not case.subject.key.problem.endswith("classes")
    values: dict[str, Any] = {
        "another batch": right[:1].expand(case.batch + 2, *right.shape[1:]),
        "a dimension more": right[None, ..., None].expand(1, *right.shape, 4),
        "complex": right.to(torch.complex64),
        "a list": [[0, 0, 0, 0, 0]] * (case.batch + 1),
        "a string": "0",
        "on the meta device": right.to("meta"),
    }
    if not numbers:
        values["floats"] = right.float() + 0.5
        if case.task != "answer":
            values["too large"] = right + 1000
            values["negative"] = right - 5
    if by_token:
        values["too long"] = torch.zeros(case.rows, case.length + 1).long()
    if numbers and case.subject.config.num_labels > 1:
        values["one a row in place of all"] = torch.zeros(case.batch)
    name = case.rng.choice(list(values))
    case.changed(f"labels: {name}")
    return {**dict.fromkeys(names, right), case.rng.choice(names): values[name]}


def wrong_count(case: Case) -> dict[str, Any] | None:
    if not case.meaning.targets:
        return None
    count = case.rng.choice(COUNTS)
    case.changed(f"num_items_in_batch: {count!r}")
    return {"num_items_in_batch": count}


def wrong_window(case: Case) -> dict[str, Any]:
    window = case.rng.choice(WINDOWS) if case.recurrent else 3
    case.changed(f"attention_window: {window!r}")
    return {"attention_window": window}


def wrong_keep(case: Case) -> dict[str, Any] | None:
    if case.task not in ("causal", "target"):
        case.changed("logits_to_keep of a head that has none")
        return {"logits_to_keep": 1}
    keep = case.rng.choice(KEPT)
    case.changed(f"logits_to_keep: {keep!r}")
    return {"logits_to_keep": keep}


def mistyped_keyword(case: Case) -> dict[str, Any]:
    name = case.rng.choice(MISTYPED)
    case.changed(f"keyword: {name}")
    return {name: case.rng.choice([torch.ones(case.rows, case.length), 1, True])}


def wrong_packing(case: Case) -> dict[str, Any] | None:
    """Documents told in a way that says nothing sensible."""
    if case.choices:
        return None
    rows, length = case.rows, case.length
    kind = case.rng.choice(["seq_idx of another length", "seq_idx a list", "edges too far", "edges in many rows"])
    case.changed(kind)
    if kind == "seq_idx of another length":
        return {"seq_idx": torch.arange(length + 1).expand(rows, -1).int()}
    if kind == "seq_idx a list":
        return {"seq_idx": [list(range(length))] * rows}
    edges = torch.tensor([0, length + 3] if kind == "edges too far" else [0, max(1, length - 1), length]).int()
    if kind == "edges in many rows" and (rows == 1 or length == 1):
        return None
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}


def wrong_cache(case: Case) -> dict[str, Any] | None:
    """A cache that does not belong to the call."""
    kind = case.rng.choice(["of another batch", "of another model", "a list", "a string", "of tuples", "bare"])
    case.changed(f"cache: {kind}")
    if kind == "a list":
        return {"cache": [1, 2]}
    if kind == "a string":
        return {"cache": "dynamic"}
    if kind == "of tuples":
        return {"cache": ((torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)),) * 2}
    if not case.causal:
        return None if case.recurrent else {"cache": DynamicCache()}
    if kind == "bare":
        case.expects = "either"
        return {"cache": DynamicCache()}
    model, rows = case.subject.model.base_model, case.rows + 2
    if kind == "of another model":
        other = case.subject.config.to_dict() | {"hidden_size": 24, "num_attention_heads": 2}
        if case.has_memory:
            other |= {"projection_size": 12, "embedding_size": 24, "attention_layers": [0, 1], "adaptive_cutoffs": None}
        model, rows = type(model)(type(case.subject.config)(**other)).to(case.subject.key.dtype), case.rows
    cache = case.subject.new_cache(model.config)
    with torch.no_grad():
        case.subject.call(model, input_ids=torch.zeros(rows, 2).long(), cache=cache)
    return {"cache": cache}


def wrong_memory(case: Case) -> dict[str, Any] | None:
    """A memory that does not belong to the call."""
    kind = case.rng.choice(["of another batch", "of fewer layers", "a list", "a string", "beside a cache"])
    case.changed(f"memory: {kind}")
    if kind == "a list":
        return {"memory": [1, 2]}
    if kind == "a string":
        return {"memory": "memory"}
    if not case.causal:
        return None if case.recurrent else {"memory": (torch.zeros(1),)}
    if not case.has_memory:
        return {"memory": (torch.zeros(1),)}
    rows = case.rows + 2 if kind == "of another batch" else case.rows
    with torch.no_grad():
        memory = case.subject.model.base_model(torch.zeros(rows, 2).long(), return_memory=True).memory
    if kind == "of fewer layers":
        return {"memory": SegmentMemory(memory.cell_states[:1], memory.layer_inputs[:1])}
    if kind == "beside a cache":
        return {"memory": memory, "cache": DynamicCache(config=case.subject.config)}
    return {"memory": memory}


FAULTS: tuple[tuple[int, Fault], ...] = (
    (3, _one_of("attention_mask", "attention_mask", MASKS)),
    (2, wrong_ids),
    (2, wrong_embeddings),
    (1, wrong_positions),
    (1, wrong_number_of_inputs),
    (1, wrong_layout),
    (3, wrong_labels),
    (1, wrong_count),
    (1, wrong_window),
    (1, wrong_keep),
    (2, mistyped_keyword),
    (1, wrong_packing),
    (1, wrong_cache),
    (1, wrong_memory),
)


def add_fault(case: Case) -> bool:
    """Put one fault into a valid call, where the drawn one applies; return whether it does."""
    weights = [weight for weight, _ in FAULTS]
    fault = case.rng.choices([fault for _, fault in FAULTS], weights=weights)[0]
    before = dict(case.call), list(case.changes)
    case.expects = "refusal"
    arguments = fault(case)
    if arguments is None:
        case.call, case.changes = before
        return False
    case.fault = case.changes[-1]
    case.call.update(arguments)
    return True
