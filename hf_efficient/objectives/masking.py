"""The masking rule of every pretraining objective, and the collator that applies it anew in each epoch."""

import copy
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .draws import MaskDraws, draw_mask
from .labels import IGNORE_INDEX, original_ids


class MaskedBatch(NamedTuple):
    """Result of [`mask_tokens`]; both tensors have the shape and dtype of its `input_ids`."""

    input_ids: Tensor
    labels: Tensor

    @property
    def original_ids(self) -> Tensor:
        """The rows before masking, for objectives that need the true id of every position."""
        return original_ids(self.input_ids, self.labels)


def _check_settings(mask_token_id, vocab_size, probability, mask_share, random_share, special_token_ids) -> None:
    if mask_token_id is None:
        raise ValueError("Masking needs a mask token: set `tokenizer.mask_token`, and resize the embeddings.")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"`probability` must lie in [0, 1], got {probability}.")
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1 + 1e-9:
        shares = f"{mask_share} and {random_share}"
        raise ValueError(f"`mask_share` and `random_share` must add up to at most 1, got {shares}.")
    outside = [i for i in (mask_token_id, *special_token_ids) if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"The special token ids {outside} are outside of a vocabulary of {vocab_size} ids.")


def _unit_starts(maskable: Tensor, word_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each unit of masking (a token, or a whole word) begins, and for each position the start of its
    unit."""
    positions = torch.arange(maskable.shape[1], device=maskable.device).expand_as(maskable)
    if word_ids is None:
        return maskable, positions
    starts = maskable.clone()
    same_word = (word_ids[:, 1:] == word_ids[:, :-1]) & (word_ids[:, 1:] >= 0)
    starts[:, 1:] &= ~(same_word & maskable[:, :-1])
    return starts, torch.where(starts, positions, 0).cummax(dim=1).values


def mask_tokens(
    input_ids: Tensor,
    maskable: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    word_ids: Tensor | None = None,
    special_token_ids: Sequence[int] = (),
    bernoulli: bool = False,
    generator: torch.Generator | None = None,
    draws: MaskDraws | None = None,
) -> MaskedBatch:
    """
    Choose targets and hide them (Devlin et al. 2019, section 3.1).

    Each row of n candidates gets exactly `floor(probability * n + u)` targets, u uniform in [0, 1), drawn
    without replacement, as the released TUPE and MC-BERT do. The number is thus right on average, and rows
    differ by at most one. A target becomes the mask token with probability `mask_share`, a random id with
    `random_share`, and stays as it is otherwise.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            Token ids; left unchanged.
        maskable (`torch.BoolTensor` of shape `(batch, length)`):
            Candidates. Padding must be False; whether [CLS] and [SEP] are candidates is the caller's choice
            (they are in the released TUPE and MC-BERT, they are not in BERT).
        mask_token_id (`int`):
            Id that hides a target.
        vocab_size (`int`):
            Random ids are uniform over `range(vocab_size)` without `special_token_ids`.
        probability (`float`, *optional*, defaults to 0.15):
            Share of the candidates that become targets.
        mask_share, random_share (`float`, *optional*, default to 0.8 and 0.1):
            Shares of the targets that become the mask token, and a random id.
        word_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Number of the word that a token belongs to, -1 for none. When given, whole words are drawn (n
            counts words), and all tokens of a word meet the same fate.
        special_token_ids (`Sequence[int]`, *optional*):
            Ids that are never drawn as random ids.
        bernoulli (`bool`, *optional*, defaults to `False`):
            Draw each candidate independently with `probability` instead of an exact number per row.
        generator (`torch.Generator`, *optional*), draws ([`MaskDraws`], *optional*):
            Source of the draws, on the device of `input_ids`, or the draws themselves.

    Returns:
        [`MaskedBatch`]: masked ids, and labels that hold the original id at targets and -100 elsewhere.

    Raises:
        ValueError: for shapes that do not agree, or shares and ids out of range.
    """
    _check_settings(mask_token_id, vocab_size, probability, mask_share, random_share, special_token_ids)
    for name, value in (("maskable", maskable), ("word_ids", word_ids)):
        if value is not None and value.shape != input_ids.shape:
            shapes = f"{tuple(value.shape)}, but `input_ids` has {tuple(input_ids.shape)}"
            raise ValueError(f"`{name}` has shape {shapes}.")
    if draws is None:
        batch, length = input_ids.shape
        draws = draw_mask(batch, length, generator=generator, device=input_ids.device)

    starts, start_of = _unit_starts(maskable.bool(), word_ids)
    if bernoulli:
        chosen = starts & (draws.order < probability)
    else:
        count = (probability * starts.sum(1).to(torch.float64) + draws.rounding).floor().long()
        ranking = draws.order.masked_fill(~starts, torch.inf).argsort(dim=1, stable=True)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = positions < count.minimum(starts.sum(1)).unsqueeze(1)
        chosen = torch.zeros_like(starts).scatter(1, ranking, first)
    action = draws.action
    if word_ids is not None:
        chosen = chosen.gather(1, start_of) & maskable
        action = action.gather(1, start_of)

    excluded = sorted(set(special_token_ids))
    random_ids = (draws.replacement * (vocab_size - len(excluded))).to(input_ids.dtype)
    for token_id in excluded:
        random_ids = random_ids + (random_ids >= token_id)
    masked = torch.where(chosen & (action < mask_share), mask_token_id, input_ids)
    randomised = chosen & (action >= mask_share) & (action < mask_share + random_share)
    masked = torch.where(randomised, random_ids, masked)
    return MaskedBatch(masked, torch.where(chosen, input_ids, IGNORE_INDEX))


class MaskingCollator:
    """
    Pads token rows on the right and masks them, differently in each epoch.

    What a row gets depends only on the seed, the epoch and the row's own tokens: not on the global random
    state, the batch it falls into, the number of data loader workers or of processes. So a resumed run and a
    run on another number of processes see the same targets. The epoch is told by
    [`~MaskingCollator.set_epoch`], which [`~hf_efficient.trainer.EfficientTrainer`] calls by itself; it also
    reaches workers that are already running. A collator that is never told stays in epoch 0: use one, with a
    seed of its own, for evaluation on fixed masks.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Gives the ids of padding, mask and special tokens. Special tokens are neither targets (unless
            `mask_special_tokens`) nor random ids.
        probability, mask_share, random_share, bernoulli:
            See [`mask_tokens`].
        whole_word (`bool`, *optional*, defaults to `False`):
            Draw whole words; rows then need a list `word_ids` beside `input_ids`.
        mask_special_tokens (`bool`, *optional*, defaults to `False`):
            Let [CLS], [SEP] and [UNK] be targets too, as in the released TUPE and MC-BERT. A TUPE model then needs
            `cls_token_id=None` in its config, or it refuses rows whose [CLS] is hidden.
        max_length (`int`, *optional*):
            Pad every batch to this length, so that compiled models see one shape; else to its longest row.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws, at least 0.
        draw_seeds (`bool`, *optional*, defaults to `False`):
            Also return `draw_seeds`, for objectives that make random choices of their own (see
            [`~hf_efficient.objectives.draws.row_uniforms`]).

    Raises:
        ValueError: if the tokenizer has no mask or padding token, or a setting is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        whole_word: bool = False,
        mask_special_tokens: bool = False,
        bernoulli: bool = False,
        max_length: int | None = None,
        seed: int = 0,
        draw_seeds: bool = False,
    ):
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token: set `tokenizer.pad_token`, say to '[PAD]'.")
        if seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {seed}.")
        self.tokenizer = tokenizer
        self.whole_word = whole_word
        self.mask_special_tokens = mask_special_tokens
        self.max_length = max_length
        self.bernoulli = bernoulli
        self.seed = seed
        self.draw_seeds = draw_seeds
        self._special = np.zeros(len(tokenizer), dtype=bool)
        self._special[tokenizer.all_special_ids] = True
        self._settings: dict[str, Any] = {
            "mask_token_id": tokenizer.mask_token_id,
            "vocab_size": len(tokenizer),
            "probability": probability,
            "mask_share": mask_share,
            "random_share": random_share,
            "special_token_ids": tokenizer.all_special_ids,
        }
        _check_settings(**self._settings)
        # Shared memory, because persistent workers hold copies of the collator that live through all epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose masks are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other masks from now on. Call before the epoch's data loader is iterated."""
        self._epoch.fill_(epoch)

    def with_seed(self, seed: int) -> "MaskingCollator":
        """The same settings with another seed and an epoch of its own, say for evaluation."""
        other = copy.copy(self)
        other.seed = seed
        other._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        return other

    def _draw_row(self, row: np.ndarray) -> tuple[np.ndarray, int]:
        """1 + 3 * len(row) uniform numbers that belong to this row in this epoch, and a seed of 63 bits for
        more."""
        # Its own tokens name a row: Trainer drops index columns, and an index changes when data is added.
        name = zlib.crc32(row.astype("<i8", copy=False).tobytes())
        bits = np.random.Philox(counter=[0, 0, 0, name], key=[self.seed, self.epoch])
        return np.random.Generator(bits).random(1 + 3 * len(row)), bits.random_raw() >> 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Rows with `input_ids` (optionally `attention_mask`; `word_ids` when `whole_word`) become tensors
        `input_ids`, `attention_mask` and `labels` of shape `(batch, length)`, and on request `draw_seeds` `(batch,)`.
        """
        if self.whole_word and "word_ids" not in features[0]:
            raise ValueError(
                "Whole-word masking needs `word_ids` in every row: make the rows with "
                "`pack_blocks(..., word_ids=True)` and pass `remove_unused_columns=False` to "
                "TrainingArguments."
            )
        rows = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        longest = max(len(row) for row in rows)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(f"A row has {longest} tokens, more than `max_length` {self.max_length}.")
        shape = (len(rows), self.max_length or longest)
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        word_ids = np.full(shape, -1, dtype=np.int64) if self.whole_word else None
        rounding = np.zeros(len(rows))
        cells = np.zeros((3, *shape))
        seeds = np.zeros(len(rows), dtype=np.int64)
        for i, (row, feature) in enumerate(zip(rows, features, strict=True)):
            length = len(row)
            input_ids[i, :length] = row
            attention_mask[i, :length] = feature.get("attention_mask", 1)
            if word_ids is not None:
                word_ids[i, :length] = feature["word_ids"]
            draws, seeds[i] = self._draw_row(row)
            rounding[i] = draws[0]
            cells[:, i, :length] = draws[1:].reshape(3, length)

        maskable = attention_mask.astype(bool)
        if not self.mask_special_tokens:
            maskable &= ~self._special[input_ids]
        masked = mask_tokens(
            torch.from_numpy(input_ids),
            torch.from_numpy(maskable),
            word_ids=None if word_ids is None else torch.from_numpy(word_ids),
            draws=MaskDraws(torch.from_numpy(rounding), *torch.from_numpy(cells).unbind(0)),
            bernoulli=self.bernoulli,
            **self._settings,
        )
        batch = {
            "input_ids": masked.input_ids,
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": masked.labels,
        }
        return {**batch, "draw_seeds": torch.from_numpy(seeds)} if self.draw_seeds else batch
