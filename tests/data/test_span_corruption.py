"""Span corruption with draws that are given, and its shares with draws that are not."""

import itertools
from collections import Counter

import numpy as np
import pytest

from hf_efficient.data.span_corruption import (
    SpanCorruptionCollator,
    TextWindows,
    corrupt_spans,
    count_spans,
    draw_spans,
    text_length,
)


def test_with_given_spans():
    """Sentinels count down from the last id, and both sides end with the end of text."""
    source, target = corrupt_spans([11, 12, 13, 14, 15, 16, 17], [1, 2], [2, 2], vocab_size=50, eos_token_id=1)
    assert source == [11, 49, 14, 15, 48, 1]
    assert target == [49, 12, 13, 48, 16, 17, 1]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(2, (1, 1)), (3, (1, 1)), (20, (3, 1)), (40, (6, 2)), (100, (15, 5)), (512, (77, 26))],
)
def test_counts(length, expected):
    assert count_spans(length) == expected


def test_dense_noise_has_no_more_spans_than_tokens_that_stay():
    assert count_spans(10, 0.9, 1.0) == (9, 1)
    kept, left_out = draw_spans(10, 0.6, 1.0)
    assert (sum(kept), sum(left_out), len(kept)) == (4, 6, 4)


@pytest.mark.parametrize("length", [2, 3, 7, 63, 500])
def test_source_and_target_hold_the_text(length):
    ids = list(range(100, 100 + length))
    for seed in range(5):
        kept, left_out = draw_spans(length, generator=np.random.default_rng(seed))
        assert min(kept) > 0 < min(left_out)
        source, target = corrupt_spans(ids, kept, left_out, 10_000, 1)
        noise, spans = count_spans(length)
        assert (len(source), len(target)) == (length - noise + spans + 1, noise + spans + 1)
        parts = {}
        for sentinel, group in itertools.groupby(target[:-1], key=lambda i: i if i > 9000 else 0):
            if sentinel:
                last = sentinel
            else:
                parts[last] = list(group)
        assert list(itertools.chain.from_iterable(parts.get(i, [i]) for i in source[:-1])) == ids


def test_every_division_is_equally_likely():
    """Of 5 tokens that stay and 3 that go, in 2 spans: 4 times 2 ways."""
    rng = np.random.default_rng(0)
    found = Counter(str(draw_spans(8, 0.375, 1.5, rng)) for _ in range(4000))
    assert len(found) == 8
    assert all(abs(count / 500 - 1) < 0.2 for count in found.values())


@pytest.mark.parametrize(("source", "target"), [(512, 256), (512, 20), (5, 5), (3, 3)])
def test_the_longest_text_fits(source, target):
    length = text_length(source, target)
    for longer, fits in ((length, True), (length + 1, False)):
        noise, spans = count_spans(longer)
        assert (longer - noise + spans + 1 <= source and noise + spans + 1 <= target) == fits


def test_text_length_of_the_paper():
    """568 tokens with 85 of them left out in 28 spans fill a source of 512, as in T5."""
    assert text_length(512, 256) == 568
    with pytest.raises(ValueError, match="no room for a text of two tokens"):
        text_length(2, 9)


def test_windows():
    windows = TextWindows(np.arange(11), 5)
    assert [row["tokens"].tolist() for row in windows] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [len(TextWindows(np.arange(count), 5)) for count in (1, 2, 5, 6, 7, 10)] == [0, 1, 1, 1, 2, 2]


def collate(seed=0, epoch=0, rows=(0, 1, 2)):
    windows = TextWindows(np.arange(100, 220), 40)
    collator = SpanCorruptionCollator(lambda pairs: pairs, 5000, 1, seed=seed)
    collator.set_epoch(epoch)
    return collator([windows[i] for i in rows])


def test_draws_depend_on_row_epoch_and_seed_alone():
    first = collate()
    assert first == collate()
    assert first[2:] == collate(rows=(2,))
    assert all(a != b for a, b in zip(first, collate(epoch=1), strict=True))
    assert all(a != b for a, b in zip(first, collate(seed=1), strict=True))
    shapes = {tuple(i >= 4000 for i in row["input_ids"]) for row in first}
    assert len(shapes) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 6, 7], [1], [1], 50, 1), "do not divide a text of 3"),
        (([5, 6, 7], [1, 1], [1], 50, 1), "do not divide"),
        (([5, 6] * 4, [1] * 4, [1] * 4, 4, 1), "no sentinels for 4 spans"),
    ],
    ids=["sum", "number", "sentinels"],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt_spans(*arguments)
