"""Tokenizers trained on text come out the same, save as tokenizer.json and load through AutoTokenizer."""

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer


SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train_tokenizer.py"
TEXT = [
    "The quick brown Fox jumps over the lazy dog.",
    "Déjà vu: the foxes jumped, and jumped, and the dogs slept; 1234 + 5678.",
    "Pack my box with five dozen liquor jugs, quickly!",
] * 5


@pytest.fixture(autouse=True)
def _script_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.parametrize(("algorithm", "size"), [("wordpiece", 120), ("bpe", 300)])
def test_trained_tokenizer(algorithm, size, tmp_path):
    from train_tokenizer import train_tokenizer

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


def test_command_line_comes_to_the_same_tokenizer_each_time(tmp_path, monkeypatch, capsys):
    import train_tokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXT))
    for name in ("a", "b", "c"):
        command = ["train_tokenizer.py", "--corpus", str(corpus), "--vocab_size", "120", "--output_dir"]
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / name)])
        train_tokenizer.main()
    assert "wordpiece tokenizer of 120 ids" in capsys.readouterr().out
    files = {(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b", "c")}
    assert len(files) == 1


def test_bad_settings_are_named():
    from train_tokenizer import train_tokenizer

    with pytest.raises(ValueError, match="must be one of wordpiece, bpe, not 'unigram'"):
        train_tokenizer(TEXT, algorithm="unigram")
    with pytest.raises(ValueError, match="at least 261 for bpe"):
        train_tokenizer(TEXT, algorithm="bpe", vocab_size=100)


def test_texts_that_can_be_read_once_are_read_once():
    from train_tokenizer import train_tokenizer

    once = train_tokenizer(iter(TEXT), vocab_size=100)
    assert once.get_vocab() == train_tokenizer(TEXT, vocab_size=100).get_vocab()
