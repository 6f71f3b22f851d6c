"""The comparison of encoders: ratios to the better form of BERT, and the form of attention that TUPE takes."""

import torch

from training.benchmarks import encoder_speed


def entry():
    train = {"bert": [4.0, 4.0], "bert_eager": [2.0, 2.0], "tupe_r": [3.0, 3.0], "tupe_eager": [3.0, 3.0]}
    padded = {"bert": [2.0], "bert_eager": [5.0], "tupe_r": [1.0], "tupe_sdpa": [3.0], "tupe_rows": [0.8]}
    return {
        "size": "4x256",
        "length": 128,
        "seconds": {"train": {**train, "tupe_sdpa": [6.0, 6.0]}, "inference, padded": padded},
        "form_taken": {"train": "eager", "inference, padded": "sdpa"},
        "peak_bytes": {"bert": 200, "bert_eager": 100, "tupe_r": 150},
    }


def test_ratios_are_to_the_better_form():
    assert encoder_speed.ratios(entry()) == {"train": 1.5, "inference, padded": 0.5, "memory": 1.5}
    assert encoder_speed.choice_ratios(entry()) == {"train": ("eager", 1.0), "inference, padded": ("rows", 1.25)}
    rows = encoder_speed.rows_of(entry(), on_gpu=False)
    assert [row["value"] for row in rows] == [1.5, 0.5, 1.5, 1.0, 1.25]
    assert rows[-1]["name"] == (
        "inference, padded, what TUPE-R chooses (sdpa) / its best form (rows), 4x256, length 128"
    )
    assert encoder_speed.table_of([entry()])["4x256"]["memory"] == 1.5


def test_the_form_that_was_taken_is_seen():
    device = torch.device("cpu")
    seen = {}
    for length in (128, 256):
        case, batch = (
            encoder_speed.BenchmarkCase("tupe_r", 1, 64, length, device),
            encoder_speed.batch_of(1024, length, device),
        )
        seen[length] = [encoder_speed.form_taken(case, mode, batch) for mode in encoder_speed.MODES]
    assert seen == {128: ["eager", "sdpa", "sdpa"], 256: ["eager", "sdpa", "rows"]}


def test_rows_attend_one_by_one_at_any_length_when_they_are_asked_to():
    """The form that is measured beside the choice, below the length from which on it is chosen."""
    device = torch.device("cpu")
    batch = encoder_speed.batch_of(1024, 128, device)
    found = {}
    for name in ("tupe_r", "tupe_rows"):
        case = encoder_speed.BenchmarkCase(name, 1, 64, 128, device)
        found[name] = encoder_speed.form_taken(case, "inference, padded", batch)
    assert found == {"tupe_r": "sdpa", "tupe_rows": "rows"}
