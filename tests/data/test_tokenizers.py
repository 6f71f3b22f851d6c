"""Tokenizers trained on text come out the same, save as tokenizer.json and load through AutoTokenizer."""

import pytest
from transformers import AutoTokenizer

from hf_efficient.data.tokenizers import add_extra_tokens, train_tokenizer


TEXT = [
    "The quick brown Fox jumps over the lazy dog.",
    "Déjà vu: the foxes jumped, and jumped, and the dogs slept; 1234 + 5678.",
    "Pack my box with five dozen liquor jugs, quickly!",
] * 5


@pytest.mark.parametrize(("algorithm", "size"), [("wordpiece", 120), ("bpe", 300)])
def test_trained_tokenizer(algorithm, size, tmp_path):
    tokenizer = train_tokenizer(TEXT, algorithm=algorithm, vocab_size=size, model_max_length=24)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    assert tokenizer.model_max_length == 24
    encoded = tokenizer("the fox", "a dog")
    assert sorted(encoded) == ["attention_mask", "input_ids"]
    ids = encoded["input_ids"]
    assert ids[0] == 2
    assert ids[-1] == 3
    assert ids.count(3) == 2
    assert tokenizer("THE Fox DÉJÀ")["input_ids"] == tokenizer("the fox deja")["input_ids"]
    inside = tokenizer("the [MASK] jumps")["input_ids"]
    assert inside.count(4) == 1
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"], skip_special_tokens=True).strip() == "the lazy dog"
    assert tokenizer(["dog", "the lazy dog"], padding=True)["attention_mask"][0][-1] == 0
    cased = train_tokenizer(TEXT, algorithm=algorithm, vocab_size=size, lowercase=False)
    assert cased("THE")["input_ids"] != cased("the")["input_ids"]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="must be one of wordpiece, bpe, not 'unigram'"):
        train_tokenizer(TEXT, algorithm="unigram")
    with pytest.raises(ValueError, match="at least 261 for bpe"):
        train_tokenizer(TEXT, algorithm="bpe", vocab_size=100)


def test_texts_that_can_be_read_once_are_read_once():
    once = train_tokenizer(iter(TEXT), vocab_size=100)
    assert once.get_vocab() == train_tokenizer(TEXT, vocab_size=100).get_vocab()


def test_extra_tokens_are_special_and_added_once():
    tokenizer = train_tokenizer(TEXT, vocab_size=100)
    size = len(tokenizer)
    for _ in range(2):
        add_extra_tokens(tokenizer, ["[NOTA]", "[MASK]"])
    add_extra_tokens(tokenizer, ["[MORE]"])
    assert len(tokenizer) == size + 2
    assert {"[NOTA]", "[MORE]", "[MASK]"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.convert_tokens_to_ids(["[NOTA]", "[MORE]"]) == [size, size + 1]
