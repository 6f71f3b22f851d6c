import logging

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_efficient.data.segments import ColumnSegments, OverlappingWindows, RandomSegments


TEXT = torch.arange(1000, 1104)  # every token tells its place


def targets_of(dataset):
    return [int(label) for row in dataset for label in row["labels"] if label != -100]


def test_consecutive_batches_are_consecutive_segments_of_the_same_columns():
    segments = ColumnSegments(TEXT, length=7, columns=3)
    assert len(segments) == 4 * 3
    batches = list(DataLoader(segments, batch_size=3))
    inputs = torch.cat([batch["input_ids"] for batch in batches], dim=1)
    labels = torch.cat([batch["labels"] for batch in batches], dim=1)
    assert torch.equal(inputs, TEXT[: 3 * 28].view(3, 28))
    assert torch.equal(labels, inputs + 1), "the last position of a segment predicts the first of the next"


def test_processes_own_their_columns():
    """As accelerate deals out batches: process p of P takes batches p, p + P, ..."""
    segments = ColumnSegments(TEXT, length=5, columns=4)
    batches = list(DataLoader(segments, batch_size=2))
    whole = TEXT[: 4 * segments.column_length].view(4, -1)
    for process in range(2):
        mine = torch.cat([batch["input_ids"] for batch in batches[process::2]], dim=1)
        assert torch.equal(mine, whole[2 * process : 2 * process + 2])


@pytest.mark.parametrize("length", [1, 7, 103, 200])
@pytest.mark.parametrize("columns", [1, 3, 8, 70])
def test_without_dropping_every_token_is_a_target_once(columns, length):
    segments = ColumnSegments(TEXT, length, columns, drop_tail=False)
    assert sorted(targets_of(segments)) == TEXT[1:].tolist()
    for row in segments:
        real = row["labels"] != -100
        assert torch.equal(row["input_ids"][real] + 1, row["labels"][real])
        assert row["input_ids"].shape == row["labels"].shape == (length,)


def test_dropped_tail_is_told(caplog):
    caplog.set_level(logging.INFO)
    ColumnSegments(TEXT, length=7, columns=3)
    assert "the last 19 tokens of the text (18.27 %) fill none" in caplog.text
    caplog.clear()
    assert len(ColumnSegments(TEXT[:85], length=7, columns=3)) == 12
    assert not caplog.text


def test_random_segments_are_cut_anew_each_epoch():
    segments = RandomSegments(TEXT, length=10, seed=3)
    seen = []
    for epoch in range(5):
        segments.set_epoch(epoch)
        targets = targets_of(segments)
        assert len(set(targets)) == len(targets) == 10 * len(segments) == 90
        seen.append(targets[0])
    assert len(set(seen)) > 2
    again = RandomSegments(TEXT, length=10, seed=3)
    again.set_epoch(4)
    assert targets_of(again)[0] == seen[4]
    assert targets_of(RandomSegments(TEXT[:11], length=10)) == TEXT[1:11].tolist()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_stay_see_a_new_epoch(context):
    segments = RandomSegments(TEXT, length=10, seed=3)
    loader = DataLoader(segments, num_workers=1, persistent_workers=True, multiprocessing_context=context)
    for epoch in range(3):
        segments.set_epoch(epoch)
        assert [batch["labels"][0].tolist() for batch in loader] == [row["labels"].tolist() for row in segments]


@pytest.mark.parametrize(("length", "overlap"), [(10, None), (9, None), (10, 0), (10, 9), (200, 3), (103, 50)])
def test_windows_overlap_and_count_each_target_once(length, overlap):
    windows = OverlappingWindows(TEXT, length, overlap)
    assert targets_of(windows) == TEXT[1:].tolist()
    shared = length // 2 if overlap is None else overlap
    for before, after in zip(list(windows)[:-1], list(windows)[1:], strict=True):
        assert torch.equal(before["input_ids"][length - shared :], after["input_ids"][:shared])


def test_arrays_of_small_integers_mapped_from_a_file(tmp_path):
    np.save(tmp_path / "text.npy", np.arange(200, dtype=np.uint8))
    mapped = np.load(tmp_path / "text.npy", mmap_mode="r")
    row = ColumnSegments(mapped, length=40, columns=2)[1]
    assert row["input_ids"].dtype == torch.long
    assert row["labels"].tolist() == list(range(81, 121))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColumnSegments(TEXT, 60, columns=2), "too short for 2 columns of segments of 60: it takes 121"),
        (lambda: ColumnSegments(TEXT, 6, columns=0), "at least 1 column"),
        (lambda: ColumnSegments(TEXT[None], 6), "one long row"),
        (lambda: ColumnSegments(TEXT[:1], 6, drop_tail=False), "nothing to predict"),
        (lambda: RandomSegments(TEXT, 104), "too short for segments of 104"),
        (lambda: OverlappingWindows(TEXT, 10, 10), "must be at least 0 and less"),
        (lambda: OverlappingWindows(TEXT, 0), "at least 1 token long"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
