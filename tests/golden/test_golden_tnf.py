"""One step of notes on rare words, worked out by hand: what is mixed in, each note, and the dictionary afterwards."""

import json
import os
from pathlib import Path

import pytest
import torch

from hf_efficient.objectives.notes import NoteDictionary, NoteSettings


pytestmark = pytest.mark.golden

EXAMPLE = Path(os.environ.get("HF_EFFICIENT_GOLDEN", Path(__file__).parent)) / "tnf" / "example.json"


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def example():
    return json.loads(EXAMPLE.read_text())


def make_notes(example, **changes):
    settings = NoteSettings(
        gamma=example["note_gamma"],
        note_weight=example["note_lambda"],
        half_window=example["half_window"],
        **changes,
    )
    words = list(example["notes_before"])
    keys = [(i, i + 1) for i in range(len(words))]
    notes = NoteDictionary(keys, example["hidden_size"], settings, dtype=torch.float64)
    notes.values.copy_(double(list(example["notes_before"].values())))
    return notes, words


def make_spans(example, words):
    return torch.tensor(
        [
            (row, span["start"], span["end"], words.index(span["word"]))
            for row, spans in enumerate(example["rare_word_spans"])
            for span in spans
        ]
    )


def close(found, expected):
    torch.testing.assert_close(found, double(expected), rtol=0, atol=1e-12)


def test_tnf_mixed_input(example):
    notes, words = make_notes(example)
    spans = make_spans(example, words)
    used = torch.tensor([occurrence["note_used_at_input"] for occurrence in example["expected"]["occurrences"]])
    tokens = double(example["token_embedding"])[torch.tensor(example["input_ids"])]
    embeds = tokens + double(example["position_embedding"])
    blended, _ = notes.mix_in(embeds, spans[used])
    close(blended, example["expected"]["blended_input"])


@pytest.mark.parametrize("update", ["mean", "occurrence"])
def test_tnf_notes_and_dictionary_afterwards(example, update):
    notes, words = make_notes(example, update=update)
    spans = make_spans(example, words)
    expected = example["expected"]
    mask = (torch.tensor(example["input_ids"]) != example["pad_token_id"]).long()
    taken = notes.pool_context(double(example["encoder_last_hidden"]), mask, spans)
    close(taken, [occurrence["note"] for occurrence in expected["occurrences"]])
    notes.enqueue(spans[:, 3], taken)
    notes.apply_updates()
    after = expected["notes_after" if update == "mean" else "notes_after_sequential"]
    close(notes.values, [after[word] for word in words])
    assert notes.updates.tolist() == ([1, 1, 0] if update == "mean" else [2, 2, 0])
