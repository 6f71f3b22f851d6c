"""Files of original checkpoints, which must not be trusted, and the command line that converts them."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, pipeline

from hf_efficient.data.byte_tokenizer import byte_alphabet, byte_tokenizer
from hf_efficient.models.srupp import convert_srupp
from hf_efficient.models.srupp.configuration_srupp import SruppConfig
from tests.helpers.processes import run_program


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)`: what the command line prints; where it is to fail, what the error says."""

    def run(*arguments, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_srupp", *map(str, arguments)])
        if not fails:
            convert_srupp.CONVERTER.run()
            return capsys.readouterr().out
        with pytest.raises((ValueError, OSError)) as refusal:
            convert_srupp.CONVERTER.run()
        return str(refusal.value)

    return run


def test_command_line_writes_a_folder_that_generates_text(make_original, tmp_path, capsys):
    text = "<page>\n  Anarchism ist größer [[than]] it was; 0123456789.\n</page>\n"
    alphabet = byte_alphabet(text)
    byte_tokenizer(alphabet).save_pretrained(tmp_path / "tokenizer")
    model, original = make_original(vocab_size=len(alphabet), num_attention_heads=1)
    torch.save(original, tmp_path / "model.pt")
    places = ("--checkpoint", tmp_path / "model.pt", "--output_dir", tmp_path / "out")
    run_program(convert_srupp, *places, "--tokenizer", tmp_path / "tokenizer", "--set", "dropout=0.1")
    said = capsys.readouterr().out
    assert f"Wrote SruppForCausalLM with {model.num_parameters():,} parameters" in said
    assert "num_attention_heads 1, has_skip_term True, highway_bias -2.0" in said
    assert "dropout 0.1" not in said
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.dropout == 0.1
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    writer = pipeline("text-generation", model=str(tmp_path / "out"))
    written = writer("<page>\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert written.startswith("<page>\n")
    ids = model.generate(
        torch.tensor([[alphabet.index(byte) for byte in b"<page>\n"]]), max_new_tokens=12, do_sample=False
    )
    assert written == bytes(alphabet[index] for index in ids[0]).decode(errors="replace")


def test_command_line_holds_a_checkpoint_against_its_preset(make_original, tmp_path, run, monkeypatch, word_fields):
    small = {"hidden_size": 18, "projection_size": 10, "num_hidden_layers": 3}
    published = SruppConfig.published_settings
    monkeypatch.setitem(published, "enwik8-small", {**published["enwik8-base"], **small})
    monkeypatch.setitem(published, "words", {**published["wikitext103-base"], **small, **word_fields, "vocab_size": 41})
    _, original = make_original(vocab_size=205, num_attention_heads=1)
    torch.save(original, tmp_path / "model.pt")
    arguments = ["--checkpoint", tmp_path / "model.pt", "--output_dir", tmp_path / "new" / "out", "--preset"]
    said = run(*arguments, "enwik8-base", fails=True)
    assert "hidden_size 18 (config: 3072); num_hidden_layers 3 (config: 10)" in said
    assert "vocab_size" not in said
    byte_tokenizer(range(204)).save_pretrained(tmp_path / "short")
    said = run(*arguments, "enwik8-small", "--tokenizer", tmp_path / "short", fails=True)
    assert "has 204 ids, the checkpoint 205" in said
    assert "write NAME=VALUE" in run(*arguments, "enwik8-small", "--set", "head=3", fails=True)
    assert not (tmp_path / "new").exists()
    said = run(*arguments, "enwik8-small")
    assert "set as in the preset enwik8-small" in said
    assert "No tokenizer was saved" in said
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").config.dropout == 0.22
    assert "is not empty" in run(*arguments, "enwik8-small", fails=True)
    model, original = make_original(**word_fields, tie_adaptive_projections=True, num_attention_heads=1)
    save_file({name: tensor.clone() for name, tensor in original.items()}, tmp_path / "words.safetensors")
    run("--checkpoint", tmp_path / "words.safetensors", "--output_dir", tmp_path / "words", "--preset", "words")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "words")
    assert loaded.num_parameters() == model.num_parameters()
    ids = torch.tensor([[3, 40, 12, 1, 25]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
