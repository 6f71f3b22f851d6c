"""Settings of notes, and the updates that wait for the end of an optimiser step, in this process and all others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


UPDATE_RULES = ("mean", "occurrence")
MOST_WAITING = 10_000


@dataclass(frozen=True, kw_only=True)
class NoteSettings:
    """
    Args:
        gamma (`float`, *optional*, defaults to 0.1):
            Weight of the new context in each update, in (0, 1].
        note_weight (`float`, *optional*, defaults to 0.5):
            Weight of the note in a token's input, in [0, 1]; the paper's lambda.
        half_window (`int`, *optional*, defaults to 16):
            Number of tokens on each side of a word that belong to its context; the paper's k.
        update (`str`, *optional*, defaults to `"mean"`):
            `"mean"` moves a key once per optimiser step, by the mean of its occurrences; `"occurrence"` once for each.
        scale_to_tokens (`bool`, *optional*, defaults to `False`):
            Give each note the norm of the token's own input when it is mixed in. Notes are averages of normed
            states, and ten times longer than a sum of embeddings; the paper mixes them as they are.
        read_masked (`bool`, *optional*, defaults to `False`):
            Whether a word with a target of masked language modelling in it reads its note, which names the word.
        update_masked (`bool`, *optional*, defaults to `True`):
            Whether the context of such a word updates its note.
        start_step (`int`, *optional*, defaults to 0):
            Optimiser step from which notes are mixed in. They are updated from the first.
        keep_on_cpu (`bool`, *optional*, defaults to `False`):
            Keep the notes in the CPU's memory, wherever the model is, and move those of a batch only.

    Raises:
        ValueError: for a value out of range.
    """

    gamma: float = 0.1
    note_weight: float = 0.5
    half_window: int = 16
    update: str = "mean"
    scale_to_tokens: bool = False
    read_masked: bool = False
    update_masked: bool = True
    start_step: int = 0
    keep_on_cpu: bool = False

    def __post_init__(self):
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"`gamma` must lie in (0, 1], got {self.gamma}.")
        if not 0.0 <= self.note_weight <= 1.0:
            raise ValueError(f"`note_weight` must lie in [0, 1], got {self.note_weight}.")
        if self.half_window < 0 or self.start_step < 0:
            raise ValueError("`half_window` and `start_step` must be at least 0.")
        if self.update not in UPDATE_RULES:
            raise ValueError(f"`update` must be one of {', '.join(UPDATE_RULES)}, not {self.update!r}.")


def _gather_rows(rows: Tensor) -> list[Tensor]:
    """Gather the rows of every process, which may differ in number, in the order of processes."""
    world = dist.get_world_size()
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    counts = torch.cat(sizes).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    if max(counts):
        dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


def _nth_of_its_key(keys: Tensor) -> Tensor:
    """Count for each occurrence how many of the same key come before it, `(occurrences,)`."""
    ranking = keys.argsort(stable=True)
    ordered = keys[ranking]
    positions = torch.arange(len(keys), device=keys.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(starts, positions, 0).cummax(0).values
    return torch.empty_like(positions).scatter_(0, ranking, positions - first)


def _means(numbers: Tensor, sums: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Average all occurrences of each key, from parts of `sizes` rows (key, count) with their sums, one per process."""
    keys, slots = numbers[:, 0].unique(return_inverse=True)
    counts = torch.zeros_like(keys).index_add_(0, slots, numbers[:, 1])
    totals = sums.new_zeros(len(keys), sums.shape[1])
    # Part by part, each of which has a key once: the order is the same in all processes, so that no copy drifts.
    for part_slots, part in zip(slots.split(sizes), sums.split(sizes), strict=True):
        totals[part_slots] += part
    return keys, totals / counts.unsqueeze(-1)


class PendingNotes:
    """
    Queue of context vectors that wait for the end of an optimiser step.

    Args:
        hidden_size (`int`):
            Width of a note.
        dtype (`torch.dtype`):
            Dtype in which they are kept and added up.
        update (`str`):
            See [`NoteSettings`].
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, update: str):
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.update = update
        # Per forward pass: keys (N,) and context vectors (N, hidden).
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Tensor, notes: Tensor) -> None:
        """
        Add context vectors `(N, hidden)` of `keys` `(N,)`. Vectors that are not finite are dropped.

        Raises:
            RuntimeError: if so many wait that nobody can be applying them.
        """
        if len(self.waiting) >= MOST_WAITING:
            raise RuntimeError(
                f"The notes of {MOST_WAITING} batches wait to be applied. Give Trainer the callback that `attach` "
                "returned, or call `apply_updates` after each optimiser step."
            )
        finite = notes.isfinite().all(-1)
        self.waiting.append((keys[finite], notes[finite].to(self.dtype)))

    def clear(self) -> None:
        """Drop all that is waiting."""
        self.waiting = []

    def _own(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """This process's updates: integers (N, 2), the first of them a key, and vectors (N, hidden)."""
        keys = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *(keys for keys, _ in self.waiting)])
        notes = torch.cat(
            [torch.zeros(0, self.hidden_size, dtype=self.dtype, device=device), *(notes for _, notes in self.waiting)]
        )
        if self.update == "mean":  # per key: the number of its occurrences, and their sum
            unique, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
            sums = notes.new_zeros(len(unique), self.hidden_size).index_add_(0, inverse, notes)
            return torch.stack([unique, counts], dim=1), sums
        sizes = torch.tensor([len(keys) for keys, _ in self.waiting], dtype=torch.int64, device=device)
        batch = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        return torch.stack([keys, batch], dim=1), notes

    def steps(self, model_device: torch.device, note_device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Iterate over the steps of the moving average, from the queues of all processes and the same in each of them.

        Each step is a pair of distinct keys `(N,)` and the vectors `(N, hidden)` that their notes move towards.

        Args:
            model_device (`torch.device`):
                Device over which processes communicate.
            note_device (`torch.device`):
                Device of the notes.
        """
        own = self._own(model_device)
        self.clear()
        parts = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts = list(zip(*(_gather_rows(rows) for rows in own), strict=True))
        numbers = torch.cat([part for part, _ in parts]).to(note_device)
        vectors = torch.cat([part for _, part in parts]).to(note_device)
        if self.update == "mean":
            yield _means(numbers, vectors, [len(part) for part, _ in parts])
            return
        order = numbers[:, 1].argsort(stable=True)
        keys, notes = numbers[order, 0], vectors[order]
        nth = _nth_of_its_key(keys)
        for step in range(int(nth.max()) + 1 if len(nth) else 0):
            yield keys[nth == step], notes[nth == step]
