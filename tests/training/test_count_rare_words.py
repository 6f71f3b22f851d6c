"""The command line that chooses the words on which pretraining keeps notes."""

import pytest

from hf_efficient.data.rare_words import RareWords
from hf_efficient.data.tokenizers import train_tokenizer
from tests.helpers.processes import run_program
from tests.training import pretraining_runs
from training import count_rare_words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pretraining_runs.write_corpus(tmp_path / "corpus.txt")
    texts = (tmp_path / "corpus.txt").read_text().split("\n\n")
    train_tokenizer(texts, vocab_size=60).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def arguments(folder, **changes):
    settings = {
        "corpus": folder / "corpus.txt",
        "txt_documents": "blank_line",
        "tokenizer": folder / "tokenizer",
        "output_dir": folder / "words",
        "min_count": 5,
        "max_count": 300,
        "block_size": 20,
        "validation_size": 0.1,
        "training_rows": 1000,
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_words_counts_and_report(folder, capsys):
    from transformers import AutoTokenizer

    count_rare_words.main(arguments(folder))
    words = RareWords.load(folder / "words" / "rare_words.json", AutoTokenizer.from_pretrained(folder / "tokenizer"))
    assert words.keys
    assert all(5 <= count <= 300 for count in words.counts)
    assert all(len(key) >= 2 for key in words.keys)
    report = words.report
    assert report["keys"] == len(words.keys)
    assert report["occurrences"] == sum(words.counts)
    assert 0 < report["words_fraction"] < 1
    assert 0 < report["share_of_rows"] <= 1
    assert report["updates_per_word"] == pytest.approx(1000 * report["words_per_row"] / report["keys"])
    printed = capsys.readouterr().out
    assert f"{report['keys']:,} words of 2 tokens or more" in printed
    assert "rare_words.json" in printed


def test_an_empty_band_writes_nothing(folder):
    with pytest.raises(ValueError, match="choose another band"):
        count_rare_words.main(arguments(folder, min_count=10_000, max_count=20_000))
    assert not (folder / "words").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(count_rare_words, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for part in ("python training/count_rare_words.py", "--min_count", "--training_rows", "100 or more"):
        assert part in shown
