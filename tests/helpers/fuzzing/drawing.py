"""Drawing of valid calls, in all forms in which they may come, with what they mean."""

import random
from typing import Any

import torch
from torch import Tensor

from hf_efficient.utils.labels import IGNORE_INDEX

from .cases import LOWEST, Case, Meaning
from .subjects import FIRST_WORD, MAX_LENGTH, VOCABULARY, build, draw_key


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MODES = ("eval", "grad", "train", "inference", "meta")
NUMBERS = (
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
)


def draw_inputs(case: Case) -> None:
    """Ids or embeddings, in one of the forms in which they may come."""
    rng, rows, length = case.rng, case.rows, case.length
    if rng.random() < 0.3 and not case.subject.key.is_objective:
        values = case.numbers(rows, length, case.subject.embedding_width).bfloat16().double()
        case.meaning.inputs = values
        dtype = case.subject.key.dtype if rng.random() < 0.95 else rng.choice(FLOATS)
        case.call["inputs_embeds"] = case.outside(values.to(dtype))
        case.changed("inputs_embeds")
        if dtype != case.subject.key.dtype:
            case.expects = "either"
            case.changed(f"{dtype} embeddings")
        return
    ids = case.integers(FIRST_WORD, VOCABULARY, rows, length)
    ids[:, 0] = 0
    case.meaning.inputs = ids
    given = ids
    if rng.random() < 0.15:
        dtype = rng.choice([torch.int32, torch.int32, torch.int32, torch.int16, torch.uint8])
        given = ids.to(dtype)
        case.changed(f"{dtype} ids")
        case.expects = "value" if dtype == torch.int32 else "either"
    case.call["input_ids"] = case.outside(given.clone())


def draw_padding(case: Case) -> None:
    """A mask of two dimensions of any dtype, with padding where the family takes it, and anything under it."""
    rng, real = case.rng, case.meaning.real
    # TUPE's positions are columns, and its heads for whole rows read the first one.
    checks_layout = getattr(case.subject.config, "cls_token_id", None) is not None
    right_only = not case.recurrent and (checks_layout or case.task in ("sequence", "choice"))
    kind = rng.choice(["ones", "right", "right", "inside", "a row of padding", *([] if right_only else ["left"])])
    for row in range(case.rows):
        hidden = rng.randrange(case.length)
        if kind == "right" and hidden:
            real[row, -hidden:] = False
        elif kind == "left":
            real[row, :hidden] = False
        elif kind == "inside":
            real[row] = case.integers(0, 3, case.length) > 0
            real[row, 0] = True
    if kind == "a row of padding" and case.rows > 1:
        real[rng.randrange(case.rows)] = False
    dtype = rng.choice(NUMBERS)
    case.call["attention_mask"] = case.outside(real.to(dtype))
    case.changed(f"mask: {kind}, {str(dtype).removeprefix('torch.')}")
    if kind != "ones" and rng.random() < 0.5:
        _fill_padding(case)
    if case.has_source and (_begins(real).sum(1) != 1).any():
        _refused(case, "padding between tokens of a source")


def _begins(real: Tensor) -> Tensor:
    """Where a run of tokens begins."""
    return real & ~torch.nn.functional.pad(real[:, :-1], (1, 0))


def _refused(case: Case, fault: str) -> None:
    """Expect a refusal, which on the meta device nobody has the values for."""
    if case.mode == "meta":
        case.expects = "either"
    else:
        case.expects, case.fault = "refusal", fault


def _fill_padding(case: Case) -> None:
    name = "inputs_embeds" if "inputs_embeds" in case.call else "input_ids"
    tensor, hidden = case.call[name], ~case.outside(case.meaning.real)
    fills: list[float] = [1, VOCABULARY - 1, VOCABULARY, 100 if tensor.dtype == torch.uint8 else -1]
    if name == "inputs_embeds":
        fills = [float("nan"), float("inf"), float("-inf"), torch.finfo(tensor.dtype).max]
        hidden = hidden.unsqueeze(-1)
    fill = case.rng.choice(fills)
    if case.task == "sampling objective" and not 0 <= fill < VOCABULARY:
        case.expects = "either"  # its collator pads with an id of the vocabulary
    case.call[name] = tensor.masked_fill(hidden, fill)
    case.changed(f"{fill:.6g} under the mask")


def draw_pairs(case: Case) -> None:
    """A mask of four dimensions, in place of the causal one."""
    rng, rows, length = case.rng, case.rows, case.length
    heads = case.subject.config.num_attention_heads
    shape = rng.choice([(rows, 1), (1, 1), (rows, heads)])
    allowed = case.integers(0, 2, *shape, length, length).bool() | torch.eye(length, dtype=torch.bool)
    dtype = case.subject.key.dtype if rng.random() < 0.9 else rng.choice(FLOATS)
    form = rng.choice(["bool", "int", "additive", "lowest"])
    if form == "additive":
        bias = case.numbers(*shape, length, length).bfloat16().double()
        given = bias.to(dtype)
    else:
        bias = torch.where(allowed, 0.0, LOWEST).double()
        given = {
            "bool": allowed,
            "int": allowed.to(rng.choice([torch.int64, torch.int32, torch.uint8])),
            "lowest": torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min),
        }[form]
    case.meaning.bias = bias.expand(rows, -1, -1, -1)
    case.call["attention_mask"] = given
    case.changed(f"4-D mask: {form} {(*('rows' if n == rows > 1 else n for n in shape),)}".replace("'", ""))
    if not case.packs:
        case.expects, case.fault = "refusal", "4-D mask"
        return
    if shape[0] != rows or (given.is_floating_point() and dtype != case.subject.key.dtype):
        case.expects = "either"


def draw_documents(case: Case) -> None:
    """Several documents in a row, told by one of the names that collators use."""
    rng, rows, length = case.rng, case.rows, case.length
    packed = rows == 1 and rng.random() < 0.3
    form = "cu_seq_lens" if packed else rng.choice(["position_ids", "position_ids", "seq_idx"])
    starts = case.integers(0, 3, rows, length) == 0
    starts[:, 0] = True
    documents = starts.cumsum(1) - 1
    case.meaning.documents = documents
    places = torch.arange(length).expand(rows, -1)
    if form == "position_ids":
        first = torch.where(starts, places, 0).cummax(1).values
        case.call["position_ids"] = (places - first).to(rng.choice([torch.int64, torch.int32]))
    elif form == "seq_idx":
        case.call["seq_idx"] = documents.to(torch.int32)
        case.expects = "either"
    else:
        edges = torch.cat([starts[0].nonzero().squeeze(-1), torch.tensor([length])]).int()
        case.call.update(cu_seq_lens_q=edges, cu_seq_lens_k=edges)
        case.call.update(max_length_q=length, max_length_k=length)
        case.expects = "either"
    if not case.packs or (not case.recurrent and (starts.sum(1) > 1).any()):
        case.expects, case.fault = "refusal", f"documents by {form}"
    elif not case.recurrent:
        case.expects = "either"
    case.changed(f"documents by {form}")


def draw_positions(case: Case) -> None:
    """Positions that begin no second document, and so say nothing."""
    start = case.rng.choice([0, 0, 5])
    if not case.has_memory and case.recurrent:
        start = 0  # elsewhere they would be other positions
    places = torch.arange(start, start + case.length)
    if case.rng.random() < 0.1:
        case.expects = "either"
    else:
        places = places.expand(case.rng.choice([1, case.rows]), -1).contiguous()
    case.call["position_ids"] = places
    case.changed("position_ids of one document")
    if not case.packs:
        case.expects, case.fault = "refusal", "position_ids"
    elif not case.recurrent:
        case.expects = "either"


def draw_past(case: Case) -> None:
    """What an earlier call has read, in a cache or, for training by segments, as memory; padded on the left or not."""
    rng, rows, model = case.rng, case.rows, case.subject.model.base_model
    past = case.integers(FIRST_WORD, VOCABULARY, rows, rng.randrange(1, 4))
    real = torch.ones_like(past).bool()
    if rng.random() < 0.4:
        real = torch.arange(past.shape[1]) >= case.integers(0, past.shape[1] + 1, rows)[:, None]
    case.meaning.past = past, real
    kind = rng.choice(["cache", "static cache", *(["memory", "memory"] if case.has_memory else [])])
    with torch.no_grad():
        if kind == "memory":
            case.call["memory"] = model(past, real, return_memory=True).memory
        else:
            static = kind == "static cache"
            cache = case.subject.new_cache(case.subject.config, past.shape[1] + case.length if static else None)
            case.subject.call(model, input_ids=past, attention_mask=real, cache=cache)
            case.call["cache"] = cache
    case.changed(kind)
    ones = torch.ones(rows, case.length).bool()
    if kind != "memory" and not real.all():
        case.call["attention_mask"] = torch.cat([real, ones], 1).to(rng.choice(NUMBERS))
        case.changed("padding in the past")
    elif rng.random() < 0.5:
        # A memory of a model without attention holds no positions.
        whole = rng.random() < 0.5 and (kind != "memory" or case.call["memory"].length > 0)
        case.call["attention_mask"] = (torch.cat([real, ones], 1) if whole else ones).to(rng.choice(NUMBERS))
        case.changed("mask over the past" if whole else "mask of ones")


def draw_labels(case: Case) -> None:
    """Labels of the head's kind; sometimes none of them a target."""
    rng, task, config = case.rng, case.task, case.subject.config
    problem = case.subject.key.problem
    if task == "answer":
        names, shape, high = ("start_positions", "end_positions"), (case.batch,), case.length + 2
    elif task == "choice":
        names, shape, high = ("labels",), (case.batch,), case.choices or 1
    elif task == "sequence":
        names, shape, high = ("labels",), (case.batch,), config.num_labels
    else:
        high = config.num_labels if task == "token" else VOCABULARY
        names, shape = ("labels",), (case.rows, case.length)
    given: dict[str, Tensor] = {}
    if problem is not None and not problem.endswith("classes"):
        values = case.numbers(case.batch, config.num_labels)
        values = (values > 0).double() if "several" in problem else values.bfloat16().double()
        if config.num_labels == 1 and rng.random() < 0.5:
            values = values.squeeze(1)
        given["labels"] = values
        dtype = rng.choice([torch.float32, torch.float64, case.subject.key.dtype])
    else:
        share = rng.choice([0.0, 0.5, 1.0]) if task != "answer" else 0.0
        for name in names:
            values = case.integers(0, high, *shape)
            if task == "answer" and rng.random() < 0.1:
                values[rng.randrange(case.batch)] = rng.choice([-1, IGNORE_INDEX])
                case.expects = "either"
            given[name] = values.masked_fill(torch.rand(shape, generator=case.generator) < share, IGNORE_INDEX)
        if len(shape) == 2 and (_gives_no_logits(case) or case.rng.random() < 0.7):
            given["labels"] = _at_tokens(case, given["labels"])
        dtype = rng.choice([torch.int64] * 5 + [torch.int32] * 3 + [torch.int16])
        if dtype == torch.int16:
            case.expects = "either"
    if dtype in (torch.int32, torch.int16):
        case.changed(f"{str(dtype).removeprefix('torch.')} labels")
    name = "labels"
    if task == "causal" and rng.random() < 0.2:
        name, case.meaning.shifted = "shift_labels", True
        case.changed("shift_labels")
    if _without_targets(case, given):
        case.changed("no targets")
    case.meaning.targets = given
    case.call.update({name if key == "labels" else key: value.to(dtype) for key, value in given.items()})
    _draw_count(case)


def _gives_no_logits(case: Case) -> bool:
    """Whether a model gives no logits beside a loss, so that losses at padding cannot be computed from them."""
    adaptive = getattr(case.subject.config, "adaptive_cutoffs", None) is not None
    return case.subject.key.is_objective or case.task == "pretraining" or (case.task == "causal" and adaptive)


def _at_tokens(case: Case, labels: Tensor) -> Tensor:
    """Labels at tokens alone, and of a causal model, whose labels are moved, where the token before is one too."""
    real = case.meaning.real
    if case.task == "sampling objective":
        real = real & (torch.arange(case.length) > 0)  # no collator hides [CLS], and no sample may stand in its place
    if case.task == "causal":
        real = real & torch.cat([real[:, :1], real[:, :-1]], 1)
    return labels.masked_fill(~real, IGNORE_INDEX)


def _without_targets(case: Case, given: dict[str, Tensor]) -> bool:
    """Whether some loss has nothing to learn from."""
    if case.task == "answer":
        return any(((values >= case.length) | (values < 0)).all() for values in given.values())
    labels = given["labels"]
    moved = case.task == "causal" and not case.meaning.shifted
    return not labels.is_floating_point() and bool(((labels[:, 1:] if moved else labels) == IGNORE_INDEX).all())


def _draw_count(case: Case) -> None:
    """`num_items_in_batch`, as a number or as a tensor; 0 where nothing is a target."""
    draw = case.rng.random()
    if draw > 0.4:
        return
    empty = "no targets" in case.changes
    count = case.rng.choice([0, 5]) if empty else case.rng.choice([1, 5])
    case.meaning.count = count
    case.call["num_items_in_batch"] = count if draw < 0.2 else torch.tensor(count)
    case.changed(f"num_items_in_batch={count}")


def draw_options(case: Case) -> None:
    """Arguments that models of transformers take."""
    rng, call = case.rng, case.call
    option = rng.choice(
        ["output_hidden_states", "return_dict", "use_cache", "none", "token_type_ids", "window", "keep"]
    )
    if (option == "return_dict" and case.meaning.targets) or (option == "use_cache" and not case.recurrent):
        return
    if option in ("output_hidden_states", "return_dict", "use_cache"):
        call[option] = rng.choice([True, False, None])
    elif option == "none":
        call.setdefault(rng.choice(["attention_mask", "num_items_in_batch", "output_attentions"]))
        option = "None"
    elif option == "token_type_ids" and (not case.recurrent or case.task in ("masked", "sequence")):
        call[option] = case.outside(case.integers(0, 2, case.rows, case.length))
    elif option == "window" and case.has_memory and "documents" not in " ".join(case.changes) and _window_fits(case):
        call["attention_window"] = case.meaning.window = rng.randrange(case.length + 1)
    elif option == "keep" and case.task in ("causal", "target") and not case.meaning.targets:
        _draw_keep(case)
    else:
        return
    case.changed(option)


def _window_fits(case: Case) -> bool:
    """Whether the meaning of a window is beyond doubt: nothing hidden inside a row, and no other mask."""
    plain = case.meaning.bias is None and case.meaning.past is None
    return plain and not any("inside" in name for name in case.changes)


def _draw_keep(case: Case) -> None:
    rows, length = case.rows, case.length
    keep: Any = case.rng.choice(["number", "positions", "positions of rows", "mask"])
    if keep == "number":
        keep = case.rng.randrange(length + 2)
    elif keep == "positions" or case.mode == "meta":
        keep = case.integers(0, length, case.rng.randrange(1, length + 1))
    elif keep == "positions of rows":
        keep = case.integers(0, length, rows, case.rng.randrange(1, length + 1))
    else:
        keep = case.integers(0, 2, rows, length).bool()
    case.call["logits_to_keep"] = case.meaning.keep = keep


def draw_layout(case: Case) -> None:
    """The same values, laid out in memory in another way."""
    for name, tensor in case.call.items():
        if not isinstance(tensor, Tensor) or tensor.dim() < 1 or case.rng.random() < 0.75:
            continue
        layout = case.rng.choice(["transposed", "strided", "expanded", "a slice"])
        if layout == "transposed" and tensor.dim() > 1:
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "strided":
            tensor = torch.stack([tensor, tensor], -1)[..., 0]
        elif layout == "expanded" and tensor.shape[0] > 1 and (tensor == tensor[:1]).all():
            tensor = tensor[:1].expand_as(tensor)
        elif layout == "a slice":
            tensor = torch.cat([tensor[:1], tensor])[1:]
        else:
            continue
        case.call[name] = tensor
        case.changed(f"{name}: {layout}")


def draw(seed: int, head: str | None = None) -> Case:
    """Draw a valid call, of one head or of any."""
    rng = random.Random(seed)
    subject = build(draw_key(rng, head))
    batch = rng.choices([0, 1, 2, 3], weights=(1, 8, 8, 8))[0]
    length = rng.randrange(1, MAX_LENGTH + 1)
    choices = rng.randrange(1, 4) if subject.key.task == "choice" else None
    rows = batch * (choices or 1)
    meaning = Meaning(torch.empty(0), torch.ones(rows, length, dtype=torch.bool))
    generator = torch.Generator().manual_seed(seed)
    modes = MODES if batch and not subject.key.is_objective else MODES[:-1]
    mode = rng.choices(modes, weights=(3, 3, 3, 2, 1)[: len(modes)])[0]
    if mode == "train" and getattr(subject.config, "position_embedding_type", None) == "fixed_base":
        mode = "grad"  # in training it draws where rows begin
    case = Case(seed, rng, generator, subject, batch, choices, length, mode, meaning)
    draw_inputs(case)
    if batch == 0:
        case.expects = "either"
        case.changed("batch 0")
        return case
    # Of a soft mask in training nothing remains in a cache that was filled in evaluation.
    is_soft = mode == "train" and getattr(subject.config, "ff_sparsity", None) is not None
    can_have_past = case.causal and not getattr(subject.config, "layer_norm", False) and not is_soft
    forms = [draw_padding] * 4
    if case.choices is None and not subject.key.is_objective:
        forms += [draw_pairs, draw_positions]
        forms += [draw_documents] if case.task not in ("sequence", "answer", None) or case.recurrent else []
        forms += [draw_past] if can_have_past and case.task != "sequence" and mode != "meta" else []
    if case.task == "sequence" and case.recurrent:
        forms = [form for form in forms if form is not draw_documents]
    if rng.random() < 0.75:
        rng.choice(forms)(case)
    if subject.key.is_objective or (case.task is not None and mode != "meta" and rng.random() < 0.6):
        draw_labels(case)
    if rng.random() < 0.4:
        draw_options(case)
    if mode == "meta":
        case.call = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in case.call.items()}
        case.changed("a model on the meta device")
    elif rng.random() < 0.4:
        draw_layout(case)
    return case
