"""
Attachment of notes to an objective, by hooks, without its knowledge.

The hooks take `note_spans` out of the batch, mix notes into the input of the encoder's embedding norm, and update them
from its last hidden states. The paper's sources leave open which words read and update notes. The rules here ensure
that no note reveals a label:

- Where the encoder reads masked words, a word with a target in it (hidden, replaced or kept alike) reads no note, but
  its states update its note. `NoteSettings` has a switch for each.
- Where the encoder reads words that a generator may have replaced (but for a stage one as a masked LM), a word reads
  and updates a note exactly when all its tokens are the original ones. Whether it was selected plays no part: the
  presence of a note is a function of the visible text. A rare word that is newly spelled by sampled tokens has no note.

In evaluation notes are read and not updated. They are no part of the encoder, which is trained on as it is.
"""

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from ...modules.adaptive_softmax import AdaptiveEmbedding
from ...modules.input_checks import values_can_be_read
from ...utils.labels import IGNORE_INDEX
from ..base import post_embedding_module
from ..masking import original_ids
from .dictionary import NoteDictionary


_READS = ("masked", "replaced")
_LOGGED = ("note_hits", "note_norm", "token_norm", "note_updates")


def note_insertion_point(encoder: PreTrainedModel) -> nn.Module:
    """
    Return the module into whose input notes are mixed; see [`~hf_efficient.objectives.base.post_embedding_module`].

    Raises:
        ValueError: if the encoder has none that is known, or embeddings of another width than its hidden states.
    """
    hidden_size = encoder.config.hidden_size
    embeddings = encoder.get_input_embeddings()
    width = None if isinstance(embeddings, AdaptiveEmbedding) else getattr(embeddings, "embedding_dim", None)
    if width != hidden_size:
        raise ValueError(
            f"Notes can't be used with {type(encoder).__name__}: a note is an average of its final states, "
            f"{hidden_size} wide, and is mixed into token embeddings, which are {width or 'of several widths'}"
            f"{' wide' if width else ''}. Make both widths the same (ELECTRA: embedding_size=hidden_size)."
        )
    return post_embedding_module(encoder)


def flatten_spans(note_spans: Tensor) -> Tensor:
    """
    Flatten `note_spans` `(batch, most, 3)` of (start, end, key), filled up with -1, to `(occurrences, 4)` of (row,
    start, end, key), in the order of rows and positions.
    """
    rows, slots = (note_spans[..., 2] >= 0).nonzero(as_tuple=True)
    return torch.cat([rows.unsqueeze(1), note_spans[rows, slots]], dim=1)


def _untouched(spans: Tensor, touched: Tensor) -> Tensor:
    """Tell which spans `(occurrences, 4)` hold no position of `touched` `(batch, length)`."""
    before = nn.functional.pad(touched.long().cumsum(1), (1, 0))
    rows, starts, ends, _ = spans.unbind(1)
    return before[rows, ends] == before[rows, starts]


class _Batch:
    """State that the hooks share during one forward pass of the objective."""

    def __init__(self, arguments: dict[str, Any], note_spans: Tensor):
        self.input_ids: Tensor = arguments["input_ids"]
        self.attention_mask: Tensor | None = arguments.get("attention_mask")
        self.labels: Tensor | None = arguments.get("labels")
        if self.attention_mask is not None and self.attention_mask.dim() != 2:
            raise ValueError("Notes need an `attention_mask` of shape (batch, length).")
        self.spans = flatten_spans(note_spans.to(self.input_ids.device))
        self.reading = self.updating = self.spans[:0]
        self.encoded = False
        self.logged = {name: torch.full((), torch.nan, device=self.input_ids.device) for name in _LOGGED}

    def holds(self, seen: Tensor | None) -> bool:
        """Return whether an encoder is given these rows themselves, or a copy with other ids at padding."""
        if seen is None or seen is self.input_ids:
            return seen is not None
        # On an accelerator the ids at padding are never replaced, and a comparison would stall it.
        if self.attention_mask is None or not values_can_be_read(seen) or seen.shape != self.input_ids.shape:
            return False
        differs = seen != self.input_ids
        return bool(differs.any()) and not bool(differs[self.attention_mask.bool()].any())


class _Hooks:
    """Hooks of one objective; the docstring of the module gives their rules."""

    def __init__(self, objective: PreTrainedModel, notes: NoteDictionary, encoder_reads: str):
        self.notes = notes
        self.encoder_reads = encoder_reads
        self.signature = inspect.signature(objective.forward)
        self.batch: _Batch | None = None
        encoder: Any = objective.encoder
        objective.register_forward_pre_hook(self.begin, with_kwargs=True)
        objective.register_forward_hook(self.end, always_call=True)
        encoder.register_forward_pre_hook(self.choose, with_kwargs=True)
        note_insertion_point(encoder).register_forward_pre_hook(self.mix_in)
        # Before the objective's own hooks, which may keep a part of the states only.
        encoder.register_forward_hook(self.enqueue, prepend=True)

    def begin(self, objective: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take `note_spans` out of the objective's arguments."""
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
        """Choose the words that read and that update notes, by the input of the encoder."""
        batch = self.batch
        if batch is None or batch.labels is None:
            return
        seen = kwargs.get("input_ids", args[0] if args else None)
        # An objective whose encoder reads replaced words may give it the masked ones in stage one.
        if self.encoder_reads == "masked" or batch.holds(seen):
            free, settings = _untouched(batch.spans, batch.labels != IGNORE_INDEX), self.notes.settings
            batch.reading = batch.spans if settings.read_masked else batch.spans[free]
            batch.updating = batch.spans if settings.update_masked else batch.spans[free]
            return
        if seen is None:
            raise ValueError("Notes need an encoder that is given `input_ids`, to see which words are intact.")
        replaced = seen != original_ids(batch.input_ids, batch.labels)
        batch.reading = batch.updating = batch.spans[_untouched(batch.spans, replaced)]

    def mix_in(self, module: nn.Module, args: tuple) -> tuple | None:
        """Mix notes into the sum of embeddings."""
        batch = self.batch
        if batch is None or batch.encoded:
            return None
        spans = batch.reading if self.notes.reading else batch.reading[:0]
        embeds, norms = self.notes.mix_in(args[0], spans)
        batch.logged.update(norms, note_hits=torch.tensor(len(spans) / len(embeds), device=embeds.device))
        return (embeds, *args[1:])

    def enqueue(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        """Put the contexts of words into the queue of updates."""
        batch = self.batch
        if batch is None or batch.encoded:
            return
        batch.encoded = True
        if encoder.training and torch.is_grad_enabled() and len(batch.updating):
            contexts = self.notes.pool_context(output[0], batch.attention_mask, batch.updating)
            self.notes.enqueue(batch.updating[:, 3], contexts)

    def end(self, objective: nn.Module, args: tuple, output: Any) -> Any:
        """Add what is logged to the objective's output."""
        batch, self.batch = self.batch, None
        if batch is None or not objective.training or not isinstance(output, ModelOutput):
            return output
        batch.logged["note_updates"] = self.notes.updates.float().mean().to(batch.input_ids.device)
        return _with_notes(type(output))(**output, **batch.logged)


@functools.cache
def _with_notes(kind: type[ModelOutput]) -> type[ModelOutput]:
    """Derive from the output class `kind` one with fields for what is logged of the notes."""
    return dataclasses.make_dataclass(
        f"{kind.__name__}WithNotes", [(name, Tensor | None, None) for name in _LOGGED], bases=(kind,)
    )


class NoteUpdateCallback(TrainerCallback):
    """Moves the notes once per optimiser step, by all accumulated batches of all processes."""

    def __init__(self, notes: NoteDictionary):
        self.notes = notes

    def on_train_begin(self, args, state, control, **kwargs):
        self.notes.pending.clear()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.notes.apply_updates(args.device)


def attach(objective: PreTrainedModel, notes: NoteDictionary, encoder_reads: str | None = None) -> NoteUpdateCallback:
    """
    Let an objective's encoder read and update a dictionary of notes.

    Batches then also hold `note_spans`, `(batch, most, 3)`, as
    [`~hf_efficient.objectives.notes.RareWordCollator`] makes them; a batch without them is left alone. In training the
    objective's output has four more fields, which [`~hf_efficient.trainer.EfficientTrainer`] logs: `note_hits` (words
    of the batch that read a note, per row), `note_norm` and `token_norm` (mean norms of what is mixed, see
    [`NoteDictionary.mix_in`]) and `note_updates` (so far, mean over keys). The dictionary becomes `objective.notes`, so
    that checkpoints hold it and resuming restores it; `encoder.save_pretrained` leaves it out.

    Only the encoder, `objective.encoder`, has notes; a generator or controller beside it has none. Its layers may be
    recomputed (gradient checkpointing), which does not update notes a second time.

    Args:
        objective (`PreTrainedModel`):
            An objective with an `encoder`, and `input_ids` and `labels` in its forward pass.
        notes ([`NoteDictionary`]):
            A dictionary as wide as the encoder.
        encoder_reads (`str`, *optional*):
            `"masked"` if the encoder is given masked words, `"replaced"` if it is given words of which some may be
            replaced. By default the objective's attribute of this name, else `"replaced"`.

    Returns:
        [`NoteUpdateCallback`]: the callback to pass to Trainer. Without Trainer, call [`~NoteDictionary.apply_updates`]
        after each optimiser step instead.

    Raises:
        ValueError: if the encoder can't have notes, or its width is another one, or it has some already.
    """
    if encoder_reads is None:
        encoder_reads = getattr(objective, "encoder_reads", "replaced")
    if encoder_reads not in _READS:
        raise ValueError(f"`encoder_reads` must be one of {', '.join(_READS)}, not {encoder_reads!r}.")
    if getattr(objective, "notes", None) is not None:
        raise ValueError(f"{type(objective).__name__} has notes already.")
    masked = encoder_reads == "masked" or getattr(objective.config, "stage_one", None) == "masked_lm"
    if not masked and (notes.settings.read_masked or not notes.settings.update_masked):
        raise ValueError(
            f"read_masked and update_masked are about masked words, of which the encoder of {type(objective).__name__} "
            "reads none: leave them as they are."
        )
    encoder: Any = objective.encoder
    note_insertion_point(encoder)
    if notes.hidden_size != encoder.config.hidden_size:
        raise ValueError(
            f"The notes are {notes.hidden_size} wide, but {type(encoder).__name__} has a hidden_size of "
            f"{encoder.config.hidden_size}: make a NoteDictionary of that width."
        )
    objective.notes = notes.to(objective.device)
    _Hooks(objective, notes, encoder_reads)
    # DDP would send the whole dictionary around in each forward pass. All processes have the same one by themselves.
    # The attribute is private, but the only way to say so.
    ignored: list[str] = getattr(objective, "_ddp_params_and_buffers_to_ignore", [])
    buffers = [f"notes.{name}" for name, _ in notes.named_buffers()]
    objective._ddp_params_and_buffers_to_ignore = [*ignored, *buffers]  # type: ignore[assignment]
    return NoteUpdateCallback(notes)
