"""
Notes on rare words (TNF) as an addition to any pretraining objective.

```python
notes = NoteDictionary(keys, encoder.config.hidden_size)
trainer = EfficientTrainer(objective, data_collator=RareWordCollator(...), callbacks=[attach(objective, notes)], ...)
```

The objective need not know: hooks take `note_spans` out of the batch, mix notes into what goes into the encoder's
embedding norm, and take new ones from its last hidden states.

Which words read and take notes is decided here, where the paper's sources are silent, so that no note tells a label:

- Where the encoder sees masked words, a word with a target in it (hidden, replaced or kept alike) reads no note. One is
  taken from its states all the same. `NoteSettings` has a switch for each.
- Where it sees words that a generator may have replaced (and not in a first phase as a masked LM), a word reads and
  gives a note exactly when all its tokens are the original ones. Whether it was selected plays no part: the presence of
  a note is a function of the visible text. What remains is a rare word newly spelled by sampled tokens, which has no
  note.

In evaluation notes are read, never written. Nothing of them is part of the encoder, which is trained on as it is.
"""

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from .labels import IGNORE_INDEX, original_ids
from .mlm import MaskedLMObjective
from .note_dictionary import NoteDictionary
from .note_updates import NoteSettings


__all__ = ["NoteDictionary", "NoteSettings", "NoteUpdates", "attach", "embedding_norm", "flatten_spans"]

# Where the sum of embeddings is complete and not yet normed: BERT, RoBERTa, ELECTRA and their kin; ModernBERT; TUPE.
_PLACES = ("embeddings.LayerNorm", "embeddings.norm", "embed_norm")
# SRU++ has no embedding norm; the dropout is what comes next.
_PLACES_BY_TYPE = {"srupp": "dropout"}
_RULES = ("masked", "replaced")
_PARTS = ("note_hits", "note_norm", "token_norm", "note_updates")


def embedding_norm(encoder: PreTrainedModel) -> nn.Module:
    """
    The module before which notes are mixed in.

    Raises:
        ValueError: if the encoder has none that is known, or embeddings of another width than its hidden states.
    """
    name, hidden_size = type(encoder).__name__, encoder.config.hidden_size
    width = getattr(encoder.get_input_embeddings(), "embedding_dim", None)
    if width != hidden_size:
        raise ValueError(
            f"Notes can't be used with {name}: a note is an average of its final states, {hidden_size} wide, and is "
            f"mixed into token embeddings, which are {width or 'of several widths'}{' wide' if width else ''}. Make "
            "both widths the same (ELECTRA: embedding_size=hidden_size)."
        )
    special = _PLACES_BY_TYPE.get(encoder.config.model_type)
    for place in (special,) if special else _PLACES:
        try:
            return encoder.get_submodule(place)
        except AttributeError:
            continue
    raise ValueError(
        f"Notes can't be used with {name}: they are mixed in before the embedding norm, and it has none of "
        f"{', '.join(_PLACES)}."
    )


def flatten_spans(note_spans: Tensor) -> Tensor:
    """`note_spans` `(batch, most, 3)` of (start, end, key), filled up with -1, as `(occurrences, 4)` of (row, start,
    end, key) in the order of rows and positions."""
    rows, slots = (note_spans[..., 2] >= 0).nonzero(as_tuple=True)
    return torch.cat([rows.unsqueeze(1), note_spans[rows, slots]], dim=1)


def _untouched(spans: Tensor, touched: Tensor) -> Tensor:
    """Which spans `(occurrences, 4)` hold no position of `touched` `(batch, length)`."""
    before = nn.functional.pad(touched.long().cumsum(1), (1, 0))
    rows, starts, ends, _ = spans.unbind(1)
    return before[rows, ends] == before[rows, starts]


class _Batch:
    """What the hooks tell each other during one forward pass of the objective."""

    def __init__(self, arguments: dict[str, Any], note_spans: Tensor):
        self.input_ids: Tensor = arguments["input_ids"]
        self.attention_mask: Tensor | None = arguments.get("attention_mask")
        self.labels: Tensor | None = arguments.get("labels")
        if self.attention_mask is not None and self.attention_mask.dim() != 2:
            raise ValueError("Notes need an `attention_mask` of shape (batch, length).")
        self.spans = flatten_spans(note_spans.to(self.input_ids.device))
        self.read = self.taken = self.spans[:0]
        self.seen = False
        self.parts = {name: torch.full((), torch.nan, device=self.input_ids.device) for name in _PARTS}


class _Hooks:
    """The hooks of one objective; see the module's docstring for the rules."""

    def __init__(self, objective: PreTrainedModel, notes: NoteDictionary, rule: str):
        self.notes = notes
        self.rule = rule
        self.signature = inspect.signature(objective.forward)
        self.batch: _Batch | None = None
        encoder: Any = objective.encoder
        objective.register_forward_pre_hook(self.begin, with_kwargs=True)
        objective.register_forward_hook(self.end, always_call=True)
        encoder.register_forward_pre_hook(self.choose, with_kwargs=True)
        embedding_norm(encoder).register_forward_pre_hook(self.blend)
        # Before the objective's own hooks, which may keep a part of the states only.
        encoder.register_forward_hook(self.take, prepend=True)

    def begin(self, objective: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if getattr(objective, "_is_replica", False):
            raise RuntimeError(
                "Notes can't be used with torch.nn.DataParallel, whose replicas share one dictionary: start a process "
                "for each GPU (torchrun --nproc_per_node N ...), or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        note_spans = kwargs.get("note_spans")
        kwargs = {name: value for name, value in kwargs.items() if name != "note_spans"}
        self.batch = None
        if note_spans is not None:
            self.batch = _Batch(self.signature.bind_partial(*args, **kwargs).arguments, note_spans)
        return args, kwargs

    def choose(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The words that read notes, and those that give them, by what this encoder is about to see."""
        batch = self.batch
        if batch is None or batch.labels is None:
            return
        seen = kwargs.get("input_ids", args[0] if args else None)
        # An objective whose encoder sees replaced words may show it the masked ones in a first phase.
        if self.rule == "masked" or seen is batch.input_ids:
            free, settings = _untouched(batch.spans, batch.labels != IGNORE_INDEX), self.notes.settings
            batch.read = batch.spans if settings.read_masked else batch.spans[free]
            batch.taken = batch.spans if settings.take_masked else batch.spans[free]
            return
        if seen is None:
            raise ValueError("Notes need an encoder that is given `input_ids`, to see which words are intact.")
        replaced = seen != original_ids(batch.input_ids, batch.labels)
        batch.read = batch.taken = batch.spans[_untouched(batch.spans, replaced)]

    def blend(self, norm: nn.Module, args: tuple) -> tuple | None:
        batch = self.batch
        if batch is None or batch.seen:
            return None
        spans = batch.read if self.notes.reading else batch.read[:0]
        embeds, norms = self.notes.blend(args[0], spans)
        batch.parts.update(norms, note_hits=torch.tensor(len(spans) / len(embeds), device=embeds.device))
        return (embeds, *args[1:])

    def take(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        batch = self.batch
        if batch is None or batch.seen:
            return
        batch.seen = True
        if encoder.training and torch.is_grad_enabled() and len(batch.taken):
            self.notes.collect(batch.taken[:, 3], self.notes.take(output[0], batch.attention_mask, batch.taken))

    def end(self, objective: nn.Module, args: tuple, output: Any) -> Any:
        batch, self.batch = self.batch, None
        if batch is None or not objective.training or not isinstance(output, ModelOutput):
            return output
        batch.parts["note_updates"] = self.notes.updates.float().mean().to(batch.input_ids.device)
        return _with_notes(type(output))(**output, **batch.parts)


@functools.cache
def _with_notes(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The output class `kind` with fields for what is logged of the notes."""
    return dataclasses.make_dataclass(
        f"{kind.__name__}WithNotes", [(name, Tensor | None, None) for name in _PARTS], bases=(kind,)
    )


class NoteUpdates(TrainerCallback):
    """Moves the notes once per optimiser step, by all accumulated batches of all processes."""

    def __init__(self, notes: NoteDictionary):
        self.notes = notes

    def on_train_begin(self, args, state, control, **kwargs):
        self.notes.pending.clear()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.notes.apply_updates(args.device)


def attach(objective: PreTrainedModel, notes: NoteDictionary, rule: str | None = None) -> NoteUpdates:
    """
    Let an objective's encoder use and feed a dictionary of notes.

    Batches then hold `note_spans` besides, `(batch, most, 3)`, as
    [`~hf_efficient.data.rare_words.RareWordCollator`] makes them; a batch without them is left alone. In training the
    objective's output has four fields more, which [`~hf_efficient.trainer.EfficientTrainer`] logs: `note_hits` (words
    of the batch that read a note, per row), `note_norm` and `token_norm` (mean norms of what is mixed, see
    [`NoteDictionary.blend`]) and `note_updates` (so far, mean over keys). The dictionary becomes `objective.notes`, so
    that checkpoints hold it and resuming restores it; `encoder.save_pretrained` leaves it out.

    Only the encoder, `objective.encoder`, has notes; a generator or controller beside it has none. Its layers may be
    recomputed (gradient checkpointing), which takes no notes a second time.

    Args:
        objective (`PreTrainedModel`):
            With an `encoder`, and `input_ids` and `labels` in its forward pass.
        notes ([`NoteDictionary`]):
            As wide as the encoder.
        rule (`str`, *optional*):
            What the encoder is given: `"masked"` words, or words of which some are `"replaced"`. By default `"masked"`
            for [`MaskedLMObjective`] and `"replaced"` for all others.

    Returns:
        [`NoteUpdates`]: the callback to give to Trainer; in a loop of one's own call
        [`~NoteDictionary.apply_updates`] after each optimiser step instead.

    Raises:
        ValueError: if the encoder can't have notes, or its width is another one, or it has some already.
    """
    if rule is None:
        rule = "masked" if isinstance(objective, MaskedLMObjective) else "replaced"
    if rule not in _RULES:
        raise ValueError(f"`rule` must be one of {', '.join(_RULES)}, not {rule!r}.")
    if getattr(objective, "notes", None) is not None:
        raise ValueError(f"{type(objective).__name__} has notes already.")
    masked = rule == "masked" or getattr(objective.config, "first_phase", None) == "masked_lm"
    if not masked and (notes.settings.read_masked or not notes.settings.take_masked):
        raise ValueError(
            f"read_masked and take_masked speak of masked words, of which the encoder of {type(objective).__name__} "
            "sees none: leave them as they are."
        )
    encoder: Any = objective.encoder
    embedding_norm(encoder)
    if notes.hidden_size != encoder.config.hidden_size:
        raise ValueError(
            f"The notes are {notes.hidden_size} wide, but {type(encoder).__name__} has a hidden_size of "
            f"{encoder.config.hidden_size}: make a NoteDictionary of that width."
        )
    objective.notes = notes.to(objective.device)
    _Hooks(objective, notes, rule)
    # DDP would send the whole dictionary around in each forward pass. All processes have the same one by themselves.
    # The attribute is private, but the only way to say so.
    ignored: list[str] = getattr(objective, "_ddp_params_and_buffers_to_ignore", [])
    buffers = [f"notes.{name}" for name, _ in notes.named_buffers()]
    objective._ddp_params_and_buffers_to_ignore = [*ignored, *buffers]  # type: ignore[assignment]
    return NoteUpdates(notes)
