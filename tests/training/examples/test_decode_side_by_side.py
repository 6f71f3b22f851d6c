"""The example in which a dense and a sparse model write beside each other, at tiny size."""

import io
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_efficient import ScalingTransformerForCausalLM
from hf_efficient.data.byte_tokenizer import byte_tokenizer
from training.benchmarks.decoding.races import TINY
from training.benchmarks.decoding.torch_engine import build
from training.examples import decode_side_by_side as example


def test_random_models_write_and_say_that_it_is_noise(capsys):
    writers = example.main(["--tiny", "--max_new_tokens", "5", "--format", "fp32", "--temperature", "0"])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.rstrip().endswith(example.NOISE)
    assert "dense, fp32, 2 x 32, random" in said
    assert "tokens/s" in said
    for writer in writers:
        assert 1 <= len(writer.tokens) <= 5
        last = len(writer.tokens) + writer.prompt.shape[1]
        keys_and_values = 2 * 2 * last * 32 * 4
        assert writer.bytes_a_token == writer.model.weights_read_per_token() * 4 + keys_and_values
        ids = torch.cat([writer.prompt, torch.tensor([writer.tokens])], dim=1)
        logits = writer.model(input_ids=ids).logits[0, writer.prompt.shape[1] - 1 : -1]
        assert logits.argmax(-1).tolist() == writer.tokens


def test_models_from_folders_go_on_with_the_prompt(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for kind in ("dense", "all"):
        preset, settings = TINY["full"].settings(kind)
        model = build(preset, "fp32", settings)
        assert isinstance(model, ScalingTransformerForCausalLM)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    folders = [str(tmp_path / kind) for kind in ("dense", "all")]
    writers = example.main([*folders, "--prompt", "The castle", "--max_new_tokens", "3"])
    said = capsys.readouterr().out
    assert said.count("The castle") == 2
    assert example.NOISE not in said
    assert [writer.name for writer in writers] == folders
    with pytest.raises(SystemExit, match="--prompt is empty"):
        example.main([*folders, "--prompt", ""])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_drawn_over(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    writers = example.main(["--tiny", "--max_new_tokens", "2"])
    frames = terminal.getvalue().split(example.HOME)
    assert len(frames) >= 2 + sum(len(writer.tokens) for writer in writers)


class Clock:
    """Stand in for a model: a token takes a fixed time."""

    def __init__(self, seconds):
        self.each, self.seconds, self.tokens = seconds, 0.0, []

    def write_token(self):
        self.tokens.append(0)
        self.seconds += self.each


def test_each_is_given_the_same_time():
    dense, sparse = Clock(5.0), Clock(1.0)
    example.race([dense, sparse], 10, live=False)
    assert (len(sparse.tokens), len(dense.tokens)) == (10, 8), "after four times the fast one's time it ends"
    equal = Clock(1.0), Clock(1.0)
    example.race(equal, 7, live=False)
    assert [len(one.tokens) for one in equal] == [7, 7]


def test_made_up_words_tell_ids_apart():
    words = {example.made_up_word(token) for token in range(32_000)}
    assert len(words) == 32_000
    assert example.made_up_text([0, 1, 70]) == "ba be babe"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["one-folder"], "give two folders"),
        (["--max_new_tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "must not be negative"),
    ],
    ids=["one-folder", "no-tokens", "negative-temperature"],
)
def test_mistakes_are_named(argv, message, capsys):
    with pytest.raises(SystemExit):
        example.main(argv)
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        example.main(["--help"])
    said = capsys.readouterr().out
    for word in ("DENSE_FOLDER SPARSE_FOLDER", "the same time", "noise", "--max_new_tokens"):
        assert word in said
