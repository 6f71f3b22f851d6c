import pytest

from hf_efficient.trainer.arguments import parse_overrides


def test_overrides_hold_numbers_words_truths_and_lists():
    text = "hidden_size=16, attention_layers=[6,9],rescale=True,pad_token_id=null,recurrence_activation=tanh"
    assert parse_overrides(text) == {
        "hidden_size": 16,
        "attention_layers": [6, 9],
        "rescale": True,
        "pad_token_id": None,
        "recurrence_activation": "tanh",
    }
    assert parse_overrides(None) == {}
    with pytest.raises(ValueError, match="must look like 'name=value,name=value'; got 'depth'"):
        parse_overrides("depth")
