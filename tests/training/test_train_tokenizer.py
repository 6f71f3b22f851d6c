"""The command line that trains a tokenizer."""

from tests.data.test_tokenizers import TEXT
from training import train_tokenizer


def test_command_line_comes_to_the_same_tokenizer_each_time(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXT))
    for name in ("a", "b", "c"):
        train_tokenizer.main(["--corpus", str(corpus), "--vocab_size", "120", "--output_dir", str(tmp_path / name)])
    assert "wordpiece tokenizer of 120 ids" in capsys.readouterr().out
    files = {(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b", "c")}
    assert len(files) == 1
