"""
Dictionary of notes on rare words: for each word a moving average of the contexts that it was seen in.

Source: Wu et al., "Taking Notes on the Fly Helps Language Pre-training", ICLR 2021, arXiv 2008.01466. With `w` a rare
word at token positions [s, t), `x_i` the input of token i before the embedding norm and `c_j` the last hidden states:

    x_i      <- (1 - lambda) x_i + lambda Note(w)                  i in [s, t)
    Note(w)  <- (1 - gamma) Note(w) + gamma mean_j c_j             j in [s - k, t + k), clipped to the row's tokens

The paper leaves open what happens to several occurrences in one batch, to accumulated batches and over processes. Here
all of one optimiser step read the same notes, and their mean moves a note once; `update="occurrence"` moves it once per
occurrence, in the order (accumulated batch, process, row, position).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.atomic_write import write_files
from .updates import NoteSettings, PendingNotes


FILE_NAME = "rare_word_notes.safetensors"
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class NoteDictionary(nn.Module):
    """
    Notes on rare words, held in buffers: without gradient, optimiser state or weight decay.

    They are kept in `dtype`, whatever a model is cast to: the buffer holds their bits as integers, since half
    precision, and FSDP's mixed precision, cast every floating-point buffer. `values` is a view in `dtype`.

    Occurrences are given as `spans`, one row `(row of the batch, start, end, key)` each, half-open in token positions;
    they must not overlap.

    Args:
        keys (`Sequence[Sequence[int]]`):
            Words, each as its token ids.
        hidden_size (`int`):
            Width of the encoder.
        settings ([`NoteSettings`], *optional*):
            Settings of the method.
        seed (`int`, *optional*, defaults to 0):
            Seed of the initial notes, which are normal with standard deviation 0.02 as embeddings are (the paper says
            random), and so the same in every process.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the notes and of all that is computed with them: float32 or float64.

    Raises:
        ValueError: if there are no keys, or two are the same, or one is empty; or for another dtype.
    """

    bits: Tensor
    updates: Tensor
    steps: Tensor
    key_ids: Tensor
    key_lengths: Tensor

    def __init__(
        self,
        keys: Sequence[Sequence[int]],
        hidden_size: int,
        settings: NoteSettings | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not keys or any(len(key) == 0 for key in keys) or len({tuple(key) for key in keys}) < len(keys):
            raise ValueError("A NoteDictionary needs keys: distinct words, each of one token id or more.")
        if dtype not in _BITS:
            raise ValueError(f"Notes are kept in float32 or float64, not {dtype}.")
        self.settings = settings or NoteSettings()
        self.hidden_size = hidden_size
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(len(keys), hidden_size, generator=generator, dtype=dtype) * 0.02
        self.register_buffer("bits", values.view(_BITS[dtype]))
        self.register_buffer("updates", torch.zeros(len(keys), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("key_ids", torch.tensor([i for key in keys for i in key], dtype=torch.int64))
        self.register_buffer("key_lengths", torch.tensor([len(key) for key in keys], dtype=torch.int64))
        self._reading = False  # once True, the count need not be read from its device
        self.pending = PendingNotes(hidden_size, dtype, self.settings.update)

    @property
    def keys(self) -> list[tuple[int, ...]]:
        """The words, each as its token ids."""
        words = self.key_ids.cpu().split(self.key_lengths.tolist())
        return [tuple(word.tolist()) for word in words]

    @property
    def reading(self) -> bool:
        """Return whether notes are mixed in: the number of optimiser steps has reached `settings.start_step`."""
        if not self._reading:
            self._reading = int(self.steps) >= self.settings.start_step
        return self._reading

    @property
    def values(self) -> Tensor:
        """The notes, `(keys, hidden)`, as a view that can be written to."""
        return self.bits.view(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NoteDictionary":
        # How a module is moved and cast, overridden as nn.RNNBase does.
        return self if self.settings.keep_on_cpu else super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        saved = {name: state_dict[prefix + name] for name in self.state_dict() if prefix + name in state_dict}
        for name in ("key_ids", "key_lengths"):
            if name in saved and not torch.equal(getattr(self, name).cpu(), saved[name].cpu()):
                errors.append("the notes were taken on other words: give the keys that the run began with")
                return
        if "bits" in saved and saved["bits"].dtype != self.bits.dtype:
            errors.append(f"the notes were kept in another dtype than {self.dtype}")
            return
        self._reading = False
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def lookup(self, keys: Tensor, device: torch.device | None = None) -> Tensor:
        """Return the notes `(N, hidden)` of `keys` `(N,)` on `device`, by default that of `keys`."""
        return self.values[keys.to(self.values.device)].to(device or keys.device)

    def mix_in(self, embeds: Tensor, spans: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Mix notes into the embeddings of the words' own tokens.

        Args:
            embeds (`torch.FloatTensor` of shape `(batch, length, hidden)`):
                Sum of embeddings, before the norm and dropout.
            spans (`torch.LongTensor` of shape `(occurrences, 4)`):
                Occurrences of words whose notes are read.

        Returns:
            `tuple`: the mixed embeddings, in the dtype of `embeds`, whose gradient is scaled by 1 - lambda where a note
            is mixed in; and the mean norms `note_norm`, of the notes as mixed, and `token_norm`, of the tokens' own
            embeddings there, NaN without spans.
        """
        if not len(spans):
            nothing = embeds.new_full((), torch.nan, dtype=torch.float32)
            return embeds, {"note_norm": nothing, "token_norm": nothing}
        rows, starts, ends, keys = spans.unbind(1)
        lengths = ends - starts
        occurrence = torch.arange(len(spans), device=spans.device).repeat_interleave(lengths)
        first = lengths.cumsum(0) - lengths
        positions = torch.arange(len(occurrence), device=spans.device) - first[occurrence] + starts[occurrence]
        where = (rows[occurrence], positions)
        with torch.no_grad():
            notes = self.lookup(keys, embeds.device)[occurrence]
            tokens = embeds[where].to(notes.dtype)
            token_norm = tokens.norm(dim=-1, keepdim=True)
            if self.settings.scale_to_tokens:
                notes = notes * (token_norm / notes.norm(dim=-1, keepdim=True).clamp(min=1e-12))
            weight = self.settings.note_weight
            added = torch.zeros_like(embeds).index_put_(where, (weight * notes).to(embeds.dtype))
            kept = torch.ones_like(embeds[..., :1]).index_put_(where, embeds.new_tensor(1 - weight))
            norms = {"note_norm": notes.norm(dim=-1).mean(), "token_norm": token_norm.mean()}
        return torch.addcmul(added, embeds, kept), norms

    @torch.no_grad()
    def pool_context(self, hidden: Tensor, attention_mask: Tensor | None, spans: Tensor) -> Tensor:
        """
        Average the states in the window around each occurrence.

        Args:
            hidden (`torch.FloatTensor` of shape `(batch, length, hidden)`):
                Last hidden states.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, special ones too, 0 for padding, which does not count.
            spans (`torch.LongTensor` of shape `(occurrences, 4)`):
                Occurrences of words.

        Returns:
            `torch.FloatTensor` of shape `(occurrences, hidden)`.
        """
        used, row = spans[:, 0].unique(return_inverse=True)
        length = hidden.shape[1]
        states = hidden.detach()[used].to(self.dtype)
        real = torch.ones(states.shape[:2], device=states.device, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[used].bool()
            states = states.masked_fill(~real.unsqueeze(-1), 0.0)
        sums = nn.functional.pad(states.cumsum(1), (0, 0, 1, 0))
        counts = nn.functional.pad(real.cumsum(1), (1, 0))
        start = (spans[:, 1] - self.settings.half_window).clamp(min=0)
        end = (spans[:, 2] + self.settings.half_window).clamp(max=length)
        total = sums[row, end] - sums[row, start]
        return total / (counts[row, end] - counts[row, start]).unsqueeze(-1)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, notes: Tensor) -> None:
        """
        Add context vectors `(N, hidden)` of `keys` `(N,)` to the updates of the next [`~NoteDictionary.apply_updates`].

        Vectors that are not finite, as after an overflow in float16, are dropped.
        """
        self.pending.add(keys, notes)

    @torch.no_grad()
    def apply_updates(self, device: torch.device | None = None) -> None:
        """
        Move the notes by all waiting updates of all processes; call it once per optimiser step, in each process.

        Args:
            device (`torch.device`, *optional*):
                Device of the model, over which processes communicate; by default that of the notes.
        """
        gamma = self.settings.gamma
        values = self.values
        for keys, notes in self.pending.steps(device or values.device, values.device):
            values[keys] = (1 - gamma) * values[keys] + gamma * notes
            self.updates[keys] += 1
        self.steps += 1

    def save(self, folder: str | os.PathLike) -> str:
        """Write keys, notes, numbers of updates and settings to `folder`, whole or not at all; return its path."""
        from safetensors.torch import save_file

        names = ("values", "updates", "steps", "key_ids", "key_lengths")
        tensors = {name: getattr(self, name).cpu().contiguous() for name in names}
        metadata = {"settings": json.dumps(asdict(self.settings))}
        write_files(folder, lambda staging: save_file(tensors, os.path.join(staging, FILE_NAME), metadata=metadata))
        return os.path.join(folder, FILE_NAME)

    @classmethod
    def load(cls, folder: str | os.PathLike, **changes: Any) -> "NoteDictionary":
        """
        Read a dictionary that [`~NoteDictionary.save`] wrote, with `changes` to its settings.

        Raises:
            FileNotFoundError: if `folder` holds no notes.
        """
        from safetensors import safe_open

        path = os.path.join(folder, FILE_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There are no notes in {folder} ({FILE_NAME}).")
        with safe_open(path, framework="pt") as file:
            settings = NoteSettings(**{**json.loads(file.metadata()["settings"]), **changes})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        words = tensors["key_ids"].split(tensors["key_lengths"].tolist())
        values = tensors["values"]
        notes = cls([word.tolist() for word in words], values.shape[1], settings, dtype=values.dtype)
        notes.values.copy_(values)
        notes.updates.copy_(tensors["updates"])
        notes.steps.copy_(tensors["steps"])
        return notes
