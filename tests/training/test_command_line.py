import importlib
from pathlib import Path

import pytest


TRAINING = Path(__file__).resolve().parents[2] / "training"


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)
    return importlib.import_module("command_line")


def test_overrides_hold_numbers_words_truths_and_lists(command_line):
    text = "hidden_size=16, attention_layers=[6,9],rescale=True,pad_token_id=null,recurrence_activation=tanh"
    assert command_line.parse_overrides(text) == {
        "hidden_size": 16,
        "attention_layers": [6, 9],
        "rescale": True,
        "pad_token_id": None,
        "recurrence_activation": "tanh",
    }
    assert command_line.parse_overrides(None) == {}
    with pytest.raises(ValueError, match="must look like 'name=value,name=value'; got 'depth'"):
        command_line.parse_overrides("depth")
