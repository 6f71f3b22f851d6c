"""The example in which a dense and a sparse model write beside each other, at tiny size."""

import io
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

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
    with pytest.raises(ValueError, match="--prompt is empty"):
        example.main([*folders, "--prompt", ""])
    with pytest.raises(ValueError, match="A prompt of 4 tokens and 9999 more do not fit into"):
        example.main([*folders, "--prompt", "four", "--max_new_tokens", "9999"])
    with pytest.raises(OSError, match="nowhere"):
        example.main([folders[0], str(tmp_path / "nowhere")])


def test_a_gpt2_runs_as_its_dense_twin(tmp_path):
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    gpt2.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    options = ["--prompt", "The", "--max_new_tokens", "4", "--temperature", "0"]
    writers = example.main([str(tmp_path), str(tmp_path), *options])
    for writer in writers:
        assert isinstance(writer.model, ScalingTransformerForCausalLM)
        assert writer.name == f"{tmp_path}, as its dense twin"
        ids = torch.cat([writer.prompt, torch.tensor([writer.tokens])], dim=1)
        assert gpt2.eval()(ids).logits[0, writer.prompt.shape[1] - 1 : -1].argmax(-1).tolist() == writer.tokens


def test_a_text_ends_with_the_end_of_text():
    preset, settings = TINY["full"].settings("dense")
    model, prompt = build(preset, "fp32", settings), torch.tensor([[3, 1, 4]])
    free = example.Writer("", model, prompt, str, 0.0, 0)
    example.race([free], 6, live=False)
    assert len(free.tokens) == 6
    bound = example.Writer("", model, prompt, str, 0.0, 0, end=free.tokens[2])
    example.race([bound], 6, live=False)
    assert bound.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


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
        self.each, self.seconds, self.tokens, self.has_ended = seconds, 0.0, [], False

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
        (["--threads", "0"], "--threads must be at least 1"),
    ],
    ids=["one-folder", "no-tokens", "negative-temperature", "no-threads"],
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
