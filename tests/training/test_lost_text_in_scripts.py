"""Scripts on texts that a tokenizer loses, and on files that hold none: a warning or one line, and never a model."""

import gzip
import os
import subprocess
import sys
import zipfile

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_efficient.utils.process import errors_in_one_line
from tests.helpers.processes import ROOT
from tests.training import pretraining_runs, test_train_lm
from tests.training.tiny_glue import save_encoder, write_glue
from training import count_rare_words, finetune_glue, pretrain, train_lm, train_tokenizer


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))


def save_words(folder, *words):
    """A tokenizer as of elsewhere, which knows some words alone, and nothing of a word of more than 100 characters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *words, *(f"##{word}" for word in words)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ("pad", "unk", "cls", "sep", "mask")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in zip(names, special, strict=True)}
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_text_without_spaces_is_learned(tmp_path, caplog):
    (tmp_path / "corpus.txt").write_text("\n\n".join("abcdefgh" * (90 + i) for i in range(60)))
    argv = pretraining_runs.arguments(tmp_path, tmp_path / "out", max_steps=2, eval_steps=2)
    with caplog.at_level("INFO"):
        trainer = pretraining_runs.run_here(argv)
    assert trainer.state.log_history[-1]["train_loss"] > 0.5
    assert "0.00% of the tokens of the text are unknown ([UNK])" in caplog.text


@pytest.mark.parametrize("is_run_on", [True, False])
def test_pretraining_on_nothing_but_unknown_tokens_is_refused(tmp_path, is_run_on):
    text = "abcdefgh" * 90 if is_run_on else "other words than those"
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{text}{i}" for i in range(60)))
    save_words(tmp_path / "tokenizer", *"abcdefgh")
    argv = pretraining_runs.arguments(tmp_path, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"are unknown \(\[UNK\]\).*--algorithm bpe"):
        pretrain.main(argv)
    assert not (tmp_path / "out").exists()


def test_language_models_say_what_they_do_not_know(tmp_path, caplog):
    pretraining_runs.write_corpus(tmp_path / "corpus.txt")
    changes = {"max_steps": 1, "sample_tokens": 0, "level": "word", "vocab_size": 6}
    test_train_lm.run(test_train_lm.arguments(tmp_path / "corpus.txt", tmp_path / "out", **changes))
    (warning,) = [record for record in caplog.records if "are unknown (<unk>)" in record.message]
    assert warning.levelname == "WARNING"
    assert "--level subword" in warning.message
    save_words(tmp_path / "tokenizer", "none")
    changes = {"level": "subword", "tokenizer": tmp_path / "tokenizer"}
    with pytest.raises(ValueError, match="There is nothing to learn from it"):
        train_lm.main(test_train_lm.arguments(tmp_path / "corpus.txt", tmp_path / "other", **changes))


def test_fine_tuning_says_what_it_does_not_know(tmp_path, caplog):
    known = ["the", "film", "is", "it", "was", "so", "very"]
    (tmp_path / "glue").mkdir()
    options = ["--tasks", "sst2", "--data_dir", str(write_glue(tmp_path / "glue")), "--use_cpu", "--max_steps", "1"]
    save_encoder(tmp_path / "some", save_words(tmp_path / "words", *known))
    argv = ["--model", str(tmp_path / "some"), "--output_dir", str(tmp_path / "out"), *options]
    finetune_glue.main(argv)
    assert "are unknown ([UNK])" in caplog.text
    assert "the tokenizer that the model was trained with (--tokenizer)" in caplog.text
    save_encoder(tmp_path / "none", save_words(tmp_path / "words", "nothing"))
    with pytest.raises(ValueError, match="There is nothing to learn from it"):
        finetune_glue.main(["--model", str(tmp_path / "none"), "--output_dir", str(tmp_path / "more"), *options])


def commands(corpus, folder, tokenizer):
    """Each script that reads a text, on that text."""
    output = ["--corpus", str(corpus), "--output_dir", str(folder / "out")]
    return {
        train_tokenizer.main: output,
        count_rare_words.main: ["--tokenizer", str(tokenizer), *output],
        pretrain.main: pretraining_runs.arguments(folder, folder / "out", corpus=corpus),
        train_lm.main: test_train_lm.arguments(corpus, folder / "out"),
    }


@pytest.mark.parametrize("kind", ["cut.jsonl.gz", "image.txt", "texts.tar", "numbers.jsonl"])
def test_every_script_ends_in_one_line_that_names_the_file(tmp_path, kind, capsys):
    content = {
        "cut.jsonl.gz": gzip.compress(os.urandom(900).hex().encode())[:-20],
        "image.txt": b"\x89PNG\r\n\x1a\n\0\0",
        "texts.tar": b"a.txt" + bytes(252) + b"ustar",
        "numbers.jsonl": b'{"text": 1}\n',
    }
    (tmp_path / kind).write_bytes(content[kind])
    save_words(tmp_path / "tokenizer", "a")
    for main, argv in commands(tmp_path / kind, tmp_path, tmp_path / "tokenizer").items():
        with pytest.raises(SystemExit) as raised, errors_in_one_line():
            main(argv)
        assert raised.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
        assert kind in line
        assert not (tmp_path / "out").exists()


def test_compressed_texts_in_a_fresh_process(tmp_path):
    pretraining_runs.write_corpus(tmp_path / "plain.txt")
    with zipfile.ZipFile(tmp_path / "CORPUS.ZIP", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "plain.txt", "plain.txt")
    plain, compressed = (
        ["--vocab_size", "70", "--corpus", str(tmp_path / corpus), "--output_dir", str(tmp_path / name)]
        for name, corpus in (("one", "plain.txt"), ("two", "CORPUS.ZIP"))
    )
    train_tokenizer.main(plain)
    command = [sys.executable, "training/train_tokenizer.py", *compressed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    vocabularies = [AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("one", "two")]
    assert vocabularies[0] == vocabularies[1]
