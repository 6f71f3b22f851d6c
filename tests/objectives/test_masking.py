"""Each rule of masking with injected draws, and the collator's independence of everything but seed, epoch and row."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_efficient.objectives.masking import MaskingCollator, MaskingNoise, draw_masking_noise, mask_tokens


MASK, VOCAB = 4, 50


class Tokenizer:
    """The part of a tokenizer that the collator uses."""

    pad_token_id = 1
    mask_token_id = MASK
    all_special_ids = [0, 1, 2, 3, MASK]

    def __len__(self):
        return VOCAB


def noise(length, rounding=0.0, order=None, action=0.0, replacement=0.0):
    def cells(value):
        return torch.as_tensor(value, dtype=torch.float64).expand(1, length)

    order = torch.linspace(0, 0.9, length) if order is None else order
    return MaskingNoise(torch.tensor([rounding], dtype=torch.float64), cells(order), cells(action), cells(replacement))


def mask(ids, maskable=None, **kwargs):
    ids = torch.tensor([ids])
    maskable = (
        torch.ones_like(ids, dtype=torch.bool) if maskable is None else torch.tensor([maskable], dtype=torch.bool)
    )
    return mask_tokens(ids, maskable, mask_token_id=MASK, vocab_size=VOCAB, **kwargs)


@pytest.mark.parametrize(("rounding", "count"), [(0.0, 1), (0.04, 1), (0.06, 2), (0.999, 2)])
def test_number_of_targets_is_rounded_stochastically(rounding, count):
    row = list(range(5, 18))  # 0.15 * 13 = 1.95
    batch = mask(row, noise=noise(13, rounding))
    assert (batch.labels != -100).sum() == count
    maskable = [0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]  # 0.15 * 9 = 1.35
    assert (mask(row, maskable, noise=noise(13, rounding)).labels != -100).sum() == (1 if rounding < 0.65 else 2)


def test_targets_are_the_maskable_positions_of_lowest_order():
    order = [0.5, 0.1, 0.9, 0.3, 0.2, 0.0, 0.4]
    maskable = [1, 1, 1, 1, 0, 0, 1]
    batch = mask([11, 12, 13, 14, 15, 16, 17], maskable, mlm_probability=0.6, noise=noise(7, order=order))
    assert batch.labels.tolist() == [[-100, 12, -100, 14, -100, -100, 17]]
    assert batch.input_ids.tolist() == [[11, MASK, 13, MASK, 15, 16, MASK]]
    assert batch.original_ids.tolist() == [[11, 12, 13, 14, 15, 16, 17]]


def test_shares_of_mask_random_and_kept():
    action = [0.0, 0.79, 0.81, 0.89, 0.91, 0.99]
    replacement = [0.5, 0.5, 0.0, 0.999, 0.5, 0.5]
    settings = {"mlm_probability": 1.0, "noise": noise(6, 0.5, action=action, replacement=replacement)}
    row = [20, 21, 22, 23, 24, 25]
    assert mask(row, **settings).input_ids.tolist() == [[MASK, MASK, 0, 49, 24, 25]]
    kept_clear = mask(row, special_token_ids=[0, 2, 1, 49, 4], **settings)
    assert kept_clear.input_ids.tolist() == [[MASK, MASK, 3, 48, 24, 25]]
    assert kept_clear.labels.tolist() == [row]
    assert mask(row, mask_replace_prob=1.0, random_replace_prob=0.0, **settings).input_ids.tolist() == [[MASK] * 6]


def test_random_ids_are_uniform_over_the_ordinary_ids():
    ids = torch.full((40, 500), 7)
    batch = mask_tokens(
        ids,
        ids > 0,
        mask_token_id=MASK,
        vocab_size=11,
        mlm_probability=1.0,
        mask_replace_prob=0.0,
        random_replace_prob=1.0,
        special_token_ids=[0, 4, 10],
        generator=torch.Generator().manual_seed(5),
    )
    counts = torch.bincount(batch.input_ids.flatten(), minlength=11)
    assert counts[[0, 4, 10]].tolist() == [0, 0, 0]
    ordinary = counts[[1, 2, 3, 5, 6, 7, 8, 9]].double()
    assert ((ordinary - 2500) ** 2 / 2500).sum() < 24.3  # chi-square with 7 degrees of freedom, 0.1 %


def test_positions_are_uniform_and_shares_right_on_average():
    torch.manual_seed(0)
    ids = torch.full((3000, 11), 9)
    batch = mask_tokens(ids, ids > 0, mask_token_id=MASK, vocab_size=VOCAB)
    target = batch.labels != -100
    assert set(target.sum(1).tolist()) == {1, 2}  # 1.65 on average
    assert target.float().mean().item() == pytest.approx(0.15, abs=0.003)
    assert target.float().mean(0).sub(0.15).abs().max() < 0.025
    assert (batch.input_ids == MASK)[target].float().mean().item() == pytest.approx(0.8, abs=0.03)


def test_whole_words_meet_one_fate():
    words = [-1, 0, 0, 1, 2, 2, 2, 3, 3, -1]
    maskable = [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    order = [0, 0.9, 0.0, 0.5, 0.1, 0.0, 0.0, 0.3, 0.0, 0]  # a word's first token decides
    action = [0, 0, 0, 0, 0.5, 0.99, 0.99, 0.95, 0.0, 0]
    row = list(range(10, 20))
    batch = mask(
        row, maskable, word_ids=torch.tensor([words]), mlm_probability=0.5, noise=noise(10, order=order, action=action)
    )
    assert batch.labels.tolist() == [[-100] * 4 + [14, 15, 16, 17, 18, -100]]
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, MASK, MASK, MASK, 17, 18, 19]]


def test_whole_words_mask_the_same_share_of_tokens():
    torch.manual_seed(1)
    words = torch.arange(40).repeat_interleave(torch.arange(40) % 4 + 1).expand(600, -1)
    ids = torch.full(words.shape, 8)
    labels = mask_tokens(ids, ids > 0, mask_token_id=MASK, vocab_size=VOCAB, word_ids=words).labels
    assert (labels != -100).float().mean().item() == pytest.approx(0.15, abs=0.005)


def test_bernoulli_draws_each_position_by_itself():
    batch = mask([9] * 6, bernoulli=True, mlm_probability=0.3, noise=noise(6, order=[0.1, 0.29, 0.3, 0.9, 0.0, 0.5]))
    assert (batch.labels != -100).tolist() == [[True, True, False, False, True, False]]


def test_same_generator_same_masks():
    ids = torch.randint(5, VOCAB, (3, 17))
    a, b = (
        mask_tokens(ids, ids > 0, mask_token_id=MASK, vocab_size=VOCAB, generator=torch.Generator().manual_seed(2))
        for _ in range(2)
    )
    assert torch.equal(a.input_ids, b.input_ids)
    assert draw_masking_noise(2, 3).order.shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlm_probability": 1.5}, "probability"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "at most 1"),
        ({"mask_token_id": None}, "mask token"),
        ({"special_token_ids": [3, 99]}, r"\[99\] are outside"),
        ({"word_ids": torch.zeros(1, 2)}, "`word_ids` has shape"),
    ],
)
def test_bad_settings_are_named(settings, message):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=message):
        mask_tokens(ids, ids > 0, **{"mask_token_id": MASK, "vocab_size": VOCAB, **settings})


def make_rows(count=9):
    rng = np.random.default_rng(0)
    return [{"input_ids": [0, *rng.integers(5, VOCAB, int(rng.integers(3, 30))).tolist(), 2]} for _ in range(count)]


def by_row(collator, rows, batches):
    """Masked ids and labels of each row, whatever batch it was in, without padding."""
    result = {}
    for batch in batches:
        out = collator([rows[i] for i in batch])
        for place, i in enumerate(batch):
            length = len(rows[i]["input_ids"])
            result[i] = (out["input_ids"][place, :length].tolist(), out["labels"][place, :length].tolist())
    return result


def test_collator_pads_and_spares_special_tokens():
    rows = make_rows()
    batch = MaskingCollator(Tokenizer(), mlm_probability=0.9)(rows)
    length = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (9, length)
    for row, ids, labels, kept in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = len(row["input_ids"])
        assert kept.tolist() == [1] * n + [0] * (length - n)
        assert ids[n:].tolist() == [1] * (length - n)
        assert ids[0] == 0
        assert ids[n - 1] == 2
        assert labels[[0, n - 1]].tolist() == [-100, -100]
        assert torch.where(labels[:n] == -100, ids[:n], labels[:n]).tolist() == row["input_ids"]
        assert (labels != -100).sum() in (int(0.9 * (n - 2)), int(0.9 * (n - 2)) + 1)
    assert MaskingCollator(Tokenizer(), max_length=64)(rows)["input_ids"].shape == (9, 64)
    everything = MaskingCollator(Tokenizer(), mlm_probability=1.0, mask_special_tokens=True)(rows)
    assert (everything["labels"] != -100).sum() == sum(len(row["input_ids"]) for row in rows)


def test_masks_depend_on_seed_epoch_and_row_only():
    rows = make_rows()
    collator = MaskingCollator(Tokenizer(), seed=3)
    first = by_row(collator, rows, [[0, 1, 2, 3], [4, 5, 6, 7, 8]])
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert by_row(MaskingCollator(Tokenizer(), seed=3), rows, [[8, 3], [0, 7, 2], [1, 4, 6, 5]]) == first
    assert by_row(collator.with_seed(4), rows, [list(range(9))]) != first
    collator.set_epoch(1)
    second = by_row(collator, rows, [list(range(9))])
    assert second != first
    assert collator.with_seed(3).epoch == 0
    collator.set_epoch(0)
    assert by_row(collator, rows, [list(range(9))]) == first


def test_sample_seeds_depend_on_seed_epoch_and_row_only():
    rows = make_rows()
    collator = MaskingCollator(Tokenizer(), seed=3, sample_seeds=True)
    plain = MaskingCollator(Tokenizer(), seed=3)(rows)
    batch = collator(rows)
    first = batch.pop("sample_seeds")
    assert all(torch.equal(plain[name], batch[name]) for name in batch)
    assert set(plain) == set(batch)
    assert first.dtype == torch.int64
    assert first.min() >= 0
    assert collator(rows[5:][::-1])["sample_seeds"].tolist() == first[5:].tolist()[::-1]
    collator.set_epoch(1)
    others = [collator(rows)["sample_seeds"], collator.with_seed(4)(rows)["sample_seeds"]]
    assert torch.cat([first, *others]).unique().numel() == 27


def test_epoch_reaches_persistent_workers():
    rows = make_rows()
    collator = MaskingCollator(Tokenizer(), seed=3)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=collator
    )
    for epoch in range(2):
        collator.set_epoch(epoch)
        got = torch.cat([batch["labels"].flatten() for batch in loader])
        expected = [collator(rows[i : i + 4])["labels"].flatten() for i in (0, 4, 8)]
        assert torch.equal(got, torch.cat(expected))


def test_collator_masks_whole_words():
    rows = [{**row, "word_ids": [-1, *(i // 3 for i in range(len(row["input_ids"]) - 2)), -1]} for row in make_rows()]
    batch = MaskingCollator(Tokenizer(), whole_word_mask=True, mlm_probability=0.5)(rows)
    for row, labels in zip(rows, batch["labels"], strict=True):
        fate = {}
        for word, label in zip(row["word_ids"], labels.tolist(), strict=False):
            fate.setdefault(word, set()).add(label != -100)
        assert all(len(kinds) == 1 for kinds in fate.values())
    with pytest.raises(ValueError, match="remove_unused_columns"):
        MaskingCollator(Tokenizer(), whole_word_mask=True)(make_rows())


def test_collator_needs_mask_and_padding():
    class Bare(Tokenizer):
        mask_token_id = None

    with pytest.raises(ValueError, match="mask token"):
        MaskingCollator(Bare())
    with pytest.raises(ValueError, match="padding token"):
        MaskingCollator(SimpleNamespace(pad_token_id=None))
    with pytest.raises(ValueError, match="more than `max_length` 4"):
        MaskingCollator(Tokenizer(), max_length=4)(make_rows())


def test_rows_of_one_length_are_masked_apart():
    """A row is known by its tokens: rows of a corpus, nearly all of which are full, must not share their targets."""
    collator = MaskingCollator(Tokenizer(), seed=3, sample_seeds=True)
    rows = [{"input_ids": [0, *range(5 + k, 35 + k), 2]} for k in range(12)]
    batch = collator(rows)
    places = [tuple((labels != -100).nonzero().flatten().tolist()) for labels in batch["labels"]]
    assert len(set(places)) == 12
    assert len(set(batch["sample_seeds"].tolist())) == 12
    same = collator([rows[0], rows[0]])
    assert torch.equal(same["labels"][0], same["labels"][1])
