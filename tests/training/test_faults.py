"""Faults in what scripts are given: one line that names the file, exit code 2, nothing unpickled. Others keep their
traceback."""

import ast
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hf_efficient.hub import __main__ as hub
from hf_efficient.utils.process import errors_in_one_line
from tests.helpers.hostile_files import write_archive, write_pickle
from tests.helpers.processes import ROOT
from tests.training.tiny_glue import GOOD, make_tokenizer, save_encoder, write_glue
from training import count_rare_words, finetune_glue, pretrain, train_lm, train_tokenizer
from training.benchmarks import __main__ as benchmarks


BY_LINES = ["--txt_documents", "blank_line", "--max_steps", "1"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model with its tokenizer, GLUE tables, and a corpus."""
    folder = tmp_path_factory.mktemp("sound")
    save_encoder(folder / "model", make_tokenizer([" ".join(GOOD), "the film is"]))
    (folder / "glue").mkdir()
    write_glue(folder / "glue")
    (folder / "corpus.txt").write_text("".join(f"the film {i} is fine\n\n" for i in range(200)))
    return folder


@pytest.fixture
def place(sound, tmp_path):
    shutil.copytree(sound / "model", tmp_path / "model")
    return tmp_path


def run(script, argv):
    """Run a script as its user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *argv])
        patch.delitem(sys.modules, script.__name__)  # as in a fresh process, where runpy does not warn
        runpy.run_module(script.__name__, run_name="__main__")


def finetune(sound, place):
    options = ["--data_dir", str(sound / "glue"), "--tasks", "sst2", "--max_steps", "1", "--use_cpu"]
    run(finetune_glue, ["--model", str(place / "model"), "--output_dir", str(place / "out"), *options])


def pretrain_by_config(sound, place):
    options = ["--corpus", str(sound / "corpus.txt"), *BY_LINES, "--tokenizer", str(sound / "model")]
    run(pretrain, ["--config", str(place / "model"), "--output_dir", str(place / "out"), *options])


def pretrain_with_tokenizer(sound, place):
    options = ["--corpus", str(sound / "corpus.txt"), *BY_LINES]
    run(pretrain, ["--tokenizer", str(place / "model"), "--output_dir", str(place / "out"), *options])


def train_lm_with_tokenizer(sound, place):
    options = ["--corpus", str(sound / "corpus.txt"), "--level", "subword", "--max_steps", "1"]
    run(train_lm, ["--tokenizer", str(place / "model"), "--output_dir", str(place / "out"), *options])


def count_words(sound, place):
    options = ["--corpus", str(sound / "corpus.txt"), "--output_dir", str(place / "out")]
    run(count_rare_words, ["--tokenizer", str(place / "model"), *options])


def export(sound, place):
    run(hub, ["export", "--model", str(place / "model"), "--output", str(place / "out")])


def pickled_weights(write):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        write(folder / "pytorch_model.bin", folder / "ran")

    return spoil


MODEL_FAULTS = {
    "weights a pickle": (pickled_weights(write_pickle), "pytorch_model.bin"),
    "weights an archive": (pickled_weights(write_archive), "pytorch_model.bin"),
    "safetensors a pickle": (lambda f: write_pickle(f / "model.safetensors", f / "ran"), "model.safetensors"),
    "safetensors cut off": (lambda f: os.truncate(f / "model.safetensors", 999), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
}
CONFIG_FAULTS = {
    "config cut off": (lambda f: os.truncate(f / "config.json", 30), "config.json"),
    "config foreign": (lambda f: (f / "config.json").write_text('{"model_type": "resnext9"}'), "config.json"),
}
TOKENIZER_FAULTS = {
    "tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 99), "tokenizer.json"),
    "tokenizer of nonsense": (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'), "tokenizer.json"),
    "tokenizer's settings cut off": (lambda f: os.truncate(f / "tokenizer_config.json", 9), "tokenizer_config.json"),
}
SCRIPTS = {
    finetune: MODEL_FAULTS | CONFIG_FAULTS | TOKENIZER_FAULTS,
    export: {name: CONFIG_FAULTS[name] for name in ("config cut off", "config foreign")},
    pretrain_by_config: CONFIG_FAULTS,
    pretrain_with_tokenizer: TOKENIZER_FAULTS,
    train_lm_with_tokenizer: TOKENIZER_FAULTS,
    count_words: TOKENIZER_FAULTS,
}


@pytest.mark.parametrize(
    ("script", "fault"),
    [(script, fault) for script, faults in SCRIPTS.items() for fault in faults],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_faulty_file_is_told_in_one_line(script, fault, sound, place, capsys):
    spoil, file = SCRIPTS[script][fault]
    spoil(place / "model")
    with pytest.raises(SystemExit) as end:
        script(sound, place)
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == str(end.value)
    assert line.startswith("Error: ")
    assert str(place / "model") in line
    assert file in line
    assert not (place / "model" / "ran").exists()


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (train_tokenizer, ["--corpus", "absent.txt", "--output_dir", "out"]),
        (benchmarks, ["run", "pretraining_comparison", "report", "--output_dir", "absent"]),
        (pretrain, ["--corpus", "absent.txt", "--output_dir", "out"]),
        (train_lm, ["--corpus", "absent.txt", "--output_dir", "out"]),
    ],
    ids=["train_tokenizer", "benchmarks", "pretrain", "train_lm"],
)
def test_an_absent_file_is_told_in_one_line(script, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(script, argv)
    assert end.value.code == 2
    assert "absent" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_in_place_of_the_output_folder(sound, place, capsys):
    (place / "out").write_text("mine")
    with pytest.raises(SystemExit) as end:
        pretrain_with_tokenizer(sound, place)
    assert end.value.code == 2
    assert str(place / "out") in capsys.readouterr().err.splitlines()[-1]
    assert (place / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in [*(ROOT / "hf_efficient").rglob("*.py"), *(ROOT / "training").glob("*.py"), benchmarks.__file__]
        if "__main__" in Path(path).read_text() and Path(path).stem != "cli"  # whose `main` is the console command
    ],
    ids=lambda path: str(Path(path).relative_to(ROOT)),
)
def test_faults_end_in_one_line_in_the_script_alone(path):
    """Whoever calls a script's functions from Python gets exceptions."""
    *statements, last = ast.parse(Path(path).read_text()).body
    assert "errors_in_one_line()" not in "".join(map(ast.unparse, statements))
    assert ast.unparse(last).startswith("if __name__ == '__main__':\n    with errors_in_one_line():\n        ")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), TypeError("x"), ZeroDivisionError("x")], ids=repr)
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)), errors_in_one_line():
        raise error


def test_a_value_that_torch_refuses_keeps_its_traceback():
    with pytest.raises(ValueError, match="dropout probability"), errors_in_one_line():
        torch.nn.Dropout(3.0)
    with pytest.raises(SystemExit, match=r"^Error: one line$") as end, errors_in_one_line():
        raise ValueError("one\n  line")
    assert end.value.code == 2
