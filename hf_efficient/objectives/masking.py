"""The masking rule of all pretraining objectives, and the collator that applies it anew in each epoch."""

import copy
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..modules.input_checks import check_has_values, check_tensor, read_attention_mask
from ..utils.labels import IGNORE_INDEX


class MaskingNoise(NamedTuple):
    """
    Uniform numbers in [0, 1) from which [`mask_tokens`] makes its choices.

    Args:
        rounding (`torch.Tensor` of shape `(batch,)`):
            A row of n candidates gets `floor(mlm_probability * n + rounding)` targets.
        order (`torch.Tensor` of shape `(batch, length)`):
            The candidates with the smallest numbers become targets.
        action (`torch.Tensor` of shape `(batch, length)`):
            Decides whether a target is hidden, replaced by a random id or kept.
        replacement (`torch.Tensor` of shape `(batch, length)`):
            Decides which random id a replaced target gets.
    """

    rounding: Tensor
    order: Tensor
    action: Tensor
    replacement: Tensor


def draw_masking_noise(
    batch: int, length: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> MaskingNoise:
    """Draw noise for `(batch, length)` tokens from `generator`, by default torch's global one."""
    rounding = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
    cells = torch.rand(3, batch, length, generator=generator, device=device, dtype=torch.float64)
    return MaskingNoise(rounding, *cells.unbind(0))


def token_mask(attention_mask: Any, input_ids: Tensor) -> Tensor | None:
    """
    Read which positions hold tokens.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for tokens, 0 for padding.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the ids that it belongs to.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`, or `None` where there is no mask.

    Raises:
        TypeError: if it is no tensor.
        ValueError: for another shape, since an objective counts tokens, or for values other than 0 and 1.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have shape {tuple(input_ids.shape)} (batch, length); got {shape}.")
    batch, length = input_ids.shape
    return read_attention_mask(attention_mask, batch, length, heads=1)


def check_labels(input_ids: Tensor, labels: Tensor | None) -> Tensor:
    """
    Return the labels of masked rows as int64, if there is one for each token.

    Raises:
        TypeError: if the rows are no tensor.
        ValueError: if there are no labels, or not one for each token, or they are not integers.
    """
    check_tensor("input_ids", input_ids)
    if isinstance(labels, Tensor):
        check_tensor("labels", labels)
    if not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, not "
            f"{tuple(labels.shape) if isinstance(labels, Tensor) else labels}: let MaskingCollator make the batches."
        )
    check_has_values("labels", labels, input_ids.device)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"`labels` are ids, of an integer dtype, not {labels.dtype}.")
    return labels.long()


def original_ids(input_ids: Tensor, labels: Tensor) -> Tensor:
    """Restore the rows before masking from masked rows and their labels."""
    return torch.where(labels == IGNORE_INDEX, input_ids, labels)


class MaskedBatch(NamedTuple):
    """Result of [`mask_tokens`]; both tensors have the shape and dtype of its `input_ids`."""

    input_ids: Tensor
    labels: Tensor

    @property
    def original_ids(self) -> Tensor:
        """The rows before masking."""
        return original_ids(self.input_ids, self.labels)


def _check_settings(
    mask_token_id, vocab_size, mlm_probability, mask_replace_prob, random_replace_prob, special_token_ids
) -> None:
    if mask_token_id is None:
        raise ValueError("Masking needs a mask token: set `tokenizer.mask_token`, and resize the embeddings.")
    if not 0.0 <= mlm_probability <= 1.0:
        raise ValueError(f"`mlm_probability` must lie in [0, 1], got {mlm_probability}.")
    if mask_replace_prob < 0 or random_replace_prob < 0 or mask_replace_prob + random_replace_prob > 1 + 1e-9:
        given = f"{mask_replace_prob} and {random_replace_prob}"
        raise ValueError(f"`mask_replace_prob` and `random_replace_prob` must add up to at most 1, got {given}.")
    outside = [i for i in (mask_token_id, *special_token_ids) if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"The special token ids {outside} are outside of a vocabulary of {vocab_size} ids.")


def _unit_starts(maskable: Tensor, word_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find where the units of masking (tokens or whole words) begin, and for each position the start of its unit."""
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
    mlm_probability: float = 0.15,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
    word_ids: Tensor | None = None,
    special_token_ids: Sequence[int] = (),
    bernoulli: bool = False,
    generator: torch.Generator | None = None,
    noise: MaskingNoise | None = None,
) -> MaskedBatch:
    """
    Choose targets and hide them (Devlin et al. 2019, section 3.1).

    Each row of n candidates gets exactly `floor(mlm_probability * n + u)` targets, u uniform in [0, 1), drawn without
    replacement, as in the released TUPE and MC-BERT. The number is thus right on average, and rows differ by at most
    one. A target becomes the mask token with probability `mask_replace_prob`, a random id with `random_replace_prob`,
    and stays as it is otherwise.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            Token ids; left unchanged.
        maskable (`torch.BoolTensor` of shape `(batch, length)`):
            Candidates. Padding must be False; whether [CLS] and [SEP] are candidates is the caller's choice (they are
            in the released TUPE and MC-BERT, they are not in BERT).
        mask_token_id (`int`):
            Id that hides a target.
        vocab_size (`int`):
            Random ids are uniform over `range(vocab_size)` without `special_token_ids`.
        mlm_probability (`float`, *optional*, defaults to 0.15):
            Fraction of the candidates that become targets.
        mask_replace_prob, random_replace_prob (`float`, *optional*, default to 0.8 and 0.1):
            Probabilities that a target becomes the mask token, and a random id.
        word_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Number of the word that a token belongs to, -1 for none. When given, whole words are drawn (n counts
            words), and all tokens of a word are treated alike.
        special_token_ids (`Sequence[int]`, *optional*):
            Ids that are never drawn as random ids.
        bernoulli (`bool`, *optional*, defaults to `False`):
            Draw each candidate independently with `mlm_probability` instead of an exact number per row.
        generator (`torch.Generator`, *optional*), noise ([`MaskingNoise`], *optional*):
            Source of the random numbers, on the device of `input_ids`, or the numbers themselves.

    Returns:
        [`MaskedBatch`]: masked ids, and labels that hold the original id at targets and -100 elsewhere.

    Raises:
        ValueError: for shapes that do not agree, or probabilities and ids out of range.
    """
    _check_settings(
        mask_token_id, vocab_size, mlm_probability, mask_replace_prob, random_replace_prob, special_token_ids
    )
    for name, value in (("maskable", maskable), ("word_ids", word_ids)):
        if value is not None and value.shape != input_ids.shape:
            shapes = f"{tuple(value.shape)}, but `input_ids` has {tuple(input_ids.shape)}"
            raise ValueError(f"`{name}` has shape {shapes}.")
    if noise is None:
        batch, length = input_ids.shape
        noise = draw_masking_noise(batch, length, generator=generator, device=input_ids.device)

    starts, start_of = _unit_starts(maskable.bool(), word_ids)
    if bernoulli:
        chosen = starts & (noise.order < mlm_probability)
    else:
        count = (mlm_probability * starts.sum(1).to(torch.float64) + noise.rounding).floor().long()
        ranking = noise.order.masked_fill(~starts, torch.inf).argsort(dim=1, stable=True)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = positions < count.minimum(starts.sum(1)).unsqueeze(1)
        chosen = torch.zeros_like(starts).scatter(1, ranking, first)
    action = noise.action
    if word_ids is not None:
        chosen = chosen.gather(1, start_of) & maskable
        action = action.gather(1, start_of)

    excluded = sorted(set(special_token_ids))
    random_ids = (noise.replacement * (vocab_size - len(excluded))).to(input_ids.dtype)
    for token_id in excluded:
        random_ids = random_ids + (random_ids >= token_id)
    masked = torch.where(chosen & (action < mask_replace_prob), mask_token_id, input_ids)
    randomised = chosen & (action >= mask_replace_prob) & (action < mask_replace_prob + random_replace_prob)
    masked = torch.where(randomised, random_ids, masked)
    return MaskedBatch(masked, torch.where(chosen, input_ids, IGNORE_INDEX))


class MaskingCollator:
    """
    Pads token rows on the right and masks them, differently in each epoch.

    The targets of a row depend on the seed, the epoch and the row's own tokens alone: not on the global random state,
    the batch that the row falls into, or the number of data loader workers or processes. So a resumed run, and one on
    another number of processes, see the same targets. [`~hf_efficient.trainer.EfficientTrainer`] calls
    [`~MaskingCollator.set_epoch`] by itself, which also reaches workers that are already running. Without such calls a
    collator stays in epoch 0: use one, with a seed of its own, for evaluation on fixed masks.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Gives the ids of padding, mask and special tokens. Special tokens are neither targets (unless
            `mask_special_tokens`) nor random ids.
        mlm_probability, mask_replace_prob, random_replace_prob, bernoulli:
            See [`mask_tokens`].
        whole_word_mask (`bool`, *optional*, defaults to `False`):
            Draw whole words; rows then need a list `word_ids` beside `input_ids`.
        mask_special_tokens (`bool`, *optional*, defaults to `False`):
            Let [CLS], [SEP] and [UNK] be targets too, as in the released TUPE and MC-BERT. A TUPE model then needs
            `cls_token_id=None` in its config, or it refuses rows whose [CLS] is hidden.
        max_length (`int`, *optional*):
            Pad every batch to this length, so that compiled models see one shape; else to its longest row.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random numbers, at least 0.
        sample_seeds (`bool`, *optional*, defaults to `False`):
            Also return `sample_seeds`, one per row, from which objectives with a generator draw their samples (see
            [`~hf_efficient.ops.counter_rng.counter_based_uniforms`]).

    Raises:
        ValueError: if the tokenizer has no mask or padding token, or a setting is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        whole_word_mask: bool = False,
        mask_special_tokens: bool = False,
        bernoulli: bool = False,
        max_length: int | None = None,
        seed: int = 0,
        sample_seeds: bool = False,
    ):
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token: set `tokenizer.pad_token`, say to '[PAD]'.")
        if seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {seed}.")
        self.tokenizer = tokenizer
        self.whole_word_mask = whole_word_mask
        self.mask_special_tokens = mask_special_tokens
        self.max_length = max_length
        self.bernoulli = bernoulli
        self.seed = seed
        self.sample_seeds = sample_seeds
        self._special = np.zeros(len(tokenizer), dtype=bool)
        self._special[tokenizer.all_special_ids] = True
        self._settings: dict[str, Any] = {
            "mask_token_id": tokenizer.mask_token_id,
            "vocab_size": len(tokenizer),
            "mlm_probability": mlm_probability,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
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
        """Draw the masks of another epoch from now on. Call it before the epoch's data loader is iterated."""
        self._epoch.fill_(epoch)

    def with_seed(self, seed: int) -> "MaskingCollator":
        """Return a collator of the same settings with another seed and an epoch of its own, say for evaluation."""
        other = copy.copy(self)
        other.seed = seed
        other._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        return other

    def _draw_row(self, row: np.ndarray) -> tuple[np.ndarray, int]:
        """Draw the 1 + 3 * len(row) uniform numbers of a row in this epoch, and a seed of 63 bits for further ones."""
        # Its own tokens name a row: Trainer drops index columns, and an index changes when data is added.
        name = zlib.crc32(row.astype("<i8", copy=False).tobytes())
        bits = np.random.Philox(counter=[0, 0, 0, name], key=[self.seed, self.epoch])
        return np.random.Generator(bits).random(1 + 3 * len(row)), bits.random_raw() >> 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Pad and mask rows.

        Args:
            features (`Sequence[Mapping]`):
                Rows with `input_ids`, optionally `attention_mask`, and `word_ids` for whole words.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape `(batch, length)`, and on
            request `sample_seeds` of shape `(batch,)`.
        """
        if self.whole_word_mask and "word_ids" not in features[0]:
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
        word_ids = np.full(shape, -1, dtype=np.int64) if self.whole_word_mask else None
        rounding = np.zeros(len(rows))
        cells = np.zeros((3, *shape))
        seeds = np.zeros(len(rows), dtype=np.int64)
        for i, (row, feature) in enumerate(zip(rows, features, strict=True)):
            length = len(row)
            input_ids[i, :length] = row
            attention_mask[i, :length] = feature.get("attention_mask", 1)
            if word_ids is not None:
                word_ids[i, :length] = feature["word_ids"]
            numbers, seeds[i] = self._draw_row(row)
            rounding[i] = numbers[0]
            cells[:, i, :length] = numbers[1:].reshape(3, length)

        maskable = attention_mask.astype(bool)
        if not self.mask_special_tokens:
            maskable &= ~self._special[input_ids]
        masked = mask_tokens(
            torch.from_numpy(input_ids),
            torch.from_numpy(maskable),
            word_ids=None if word_ids is None else torch.from_numpy(word_ids),
            noise=MaskingNoise(torch.from_numpy(rounding), *torch.from_numpy(cells).unbind(0)),
            bernoulli=self.bernoulli,
            **self._settings,
        )
        batch = {
            "input_ids": masked.input_ids,
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": masked.labels,
        }
        return {**batch, "sample_seeds": torch.from_numpy(seeds)} if self.sample_seeds else batch
