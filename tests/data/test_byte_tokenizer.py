"""One token a byte: ids, round trips, what is refused, and the library's own loading."""

import random
import subprocess
import sys
import time

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from hf_efficient.data import byte_tokenizer as module
from hf_efficient.data.byte_tokenizer import byte_alphabet, byte_tokenizer, encode_bytes


TEXTS = [
    "plain words",
    " two  spaces, a tab\t, lines\r\n\n and a stop .",
    "it's <eos> <unk> <|endoftext|> [MASK] ##a Ġ Ā",
    "Grüße, 漢字, עברית, 😀\U0010ffff",
    "".join(chr(code) for code in range(0x300)),
    "e\u0301 is not \u00e9",
    "",
]


def test_the_characters_are_those_of_the_library():
    assert sorted(module._characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(set(module._characters())) == 256


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("special", [{}, {"eos_token": "<eos>", "unk_token": "<unk>", "mask_token": "[MASK]"}])
def test_any_text_is_its_bytes_and_comes_back(text, special):
    tokenizer = byte_tokenizer(**special)
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert encode_bytes(text.encode(), tokenizer).tolist() == ids


def test_ids_are_ranks_and_special_tokens_follow():
    text = "enwik8 ist größer\n"
    alphabet = byte_alphabet(text)
    assert alphabet == sorted(set(text.encode())) == byte_alphabet(text.encode())
    special = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = byte_tokenizer(reversed(alphabet * 2), **special, model_max_length=64)
    size = len(alphabet)
    assert tokenizer(text).input_ids == [alphabet.index(byte) for byte in text.encode()]
    names = ("unk_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    assert [getattr(tokenizer, name) for name in names] == list(range(size, size + 4))
    assert (len(tokenizer), tokenizer.model_max_length) == (size + 4, 64)
    assert tokenizer("ABe").input_ids == [size, size, alphabet.index(ord("e"))]
    assert encode_bytes(b"ABe", tokenizer).tolist() == tokenizer("ABe").input_ids
    padded = tokenizer(["is", "größer"], padding=True)
    assert padded.attention_mask[0] == [1] * 2 + [0] * 6
    assert tokenizer.decode(padded.input_ids[0], skip_special_tokens=True) == "is"


def test_special_tokens_are_read_from_a_text_only_if_asked():
    tokenizer = byte_tokenizer(eos_token="<eos>")
    assert tokenizer("<eos>").input_ids == list(b"<eos>")
    tokenizer.split_special_tokens = False
    assert tokenizer("<eos>").input_ids == [256]


def test_a_byte_outside_the_alphabet_is_no_silence(tmp_path):
    tokenizer = byte_tokenizer(byte_alphabet("abc "))
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        with pytest.raises(Exception, match="a byte outside the alphabet"):
            one("a cab, a bad cab")
        with pytest.raises(ValueError, match=r"Byte 0x2c at 5 is outside .* alphabet of 4 bytes"):
            encode_bytes(b"a cab, a bad cab", one)
        assert one.unk_token is None
        assert one("a cab").input_ids == encode_bytes(b"a cab", one).tolist() == [1, 0, 3, 1, 2]


def test_bytes_that_are_no_text_are_encoded():
    data = bytes(range(255, -1, -1)) * 3
    assert encode_bytes(data, byte_tokenizer()).tolist() == list(data)
    assert encode_bytes(data[:300], byte_tokenizer(data)).dtype == "uint8"


def test_what_makes_no_tokenizer_is_refused():
    for alphabet in ([], [3, 256], [-1]):
        with pytest.raises(ValueError, match="from 0 to 255"):
            byte_tokenizer(alphabet)
    with pytest.raises(ValueError, match="eos_token 'Ġ' would be taken for a byte"):
        byte_tokenizer(eos_token="Ġ")


def test_a_saved_tokenizer_is_loaded_without_this_package(tmp_path):
    text = "ein Bär, <eos> 漢\n"
    byte_tokenizer(byte_alphabet(text), eos_token="<eos>").save_pretrained(tmp_path)
    code = f"""
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
ids = tokenizer({text!r}).input_ids
assert tokenizer.decode(ids) == {text!r} and tokenizer.is_fast and "hf_efficient" not in sys.modules
print(ids, tokenizer.eos_token_id, len(tokenizer))
"""
    alphabet = byte_alphabet(text)
    expected = [alphabet.index(byte) for byte in text.encode()]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == f"{expected} {len(alphabet)} {len(alphabet) + 1}", result.stderr


def test_the_command_line_takes_the_bytes_of_all_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "one").write_bytes(b"abc\xff")
    (tmp_path / "two").write_bytes(b"cd\n")
    files = [str(tmp_path / "one"), str(tmp_path / "two")]
    output = str(tmp_path / "tokenizer")
    monkeypatch.setattr(
        sys, "argv", ["byte_tokenizer", "--text", *files, "--output_dir", output, "--eos_token", "<eos>"]
    )
    module.main()
    assert "7 ids" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert encode_bytes(b"\nabcd\xff", tokenizer).tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(sys, "argv", ["byte_tokenizer", "--text", "missing", "--output_dir", output])
    with pytest.raises(FileNotFoundError, match="missing"):
        module.main()


def test_a_megabyte_is_encoded_in_seconds():
    generator = random.Random(0)
    words = [bytes(generator.choices(range(97, 123), k=generator.randint(1, 12))).decode() for _ in range(500)]
    text = " ".join(generator.choices(words, k=140_000))
    tokenizer = byte_tokenizer()
    start = time.process_time()
    ids = tokenizer(text).input_ids
    seconds = time.process_time() - start
    assert len(ids) == len(text) > 900_000
    assert seconds < 10.0
    assert encode_bytes(text.encode(), tokenizer).tolist() == ids
