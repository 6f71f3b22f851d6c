"""A corpus as one row of ids, at each level."""

import gzip
import lzma

import datasets
import numpy as np
import pytest

from hf_efficient.data.token_stream import build_tokenizer, encode, load_documents, split_validation
from hf_efficient.data.tokenizers import character_tokenizer, subword_tokenizer, word_tokenizer


TEXT = "Él ate an apple.\nThe cat ate the rest\n\n  and an egg — twice.\n"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Texts are cut into pieces to be tokenised, which must not show."""
    monkeypatch.setattr("hf_efficient.utils.text_batches.CHUNK", 9)
    monkeypatch.setattr("hf_efficient.utils.text_batches.CHUNKS", 2)


def tokenised(documents, level, **changes):
    tokenizer = build_tokenizer(level, documents, **changes)
    return tokenizer, encode(documents, tokenizer, level)


def test_bytes_of_any_kind_and_compression(tmp_path):
    raw = bytes(range(7, 256)) * 3
    for name, opened in (("a.bin", open), ("a.xml.xz", lzma.open), ("a.gz", gzip.open)):
        path = tmp_path / name
        with opened(path, "wb") as file:
            file.write(raw)
        assert load_documents(str(path)) == [raw]
    tokenizer, stream = tokenised([raw], "byte")
    assert len(tokenizer) == 258
    assert stream.tokens.tobytes() == raw
    assert stream.size == len(raw)
    tokenizer, stream = tokenised([raw], "byte", alphabet="corpus")
    assert len(tokenizer) == 251
    assert stream.tokens[:249].tolist() == list(range(249))
    with pytest.raises(ValueError, match=r"not text in UTF-8.*--level byte"):
        load_documents(str(path), "char")


def test_characters():
    tokenizer, stream = tokenised([TEXT, "an\n"], "char")
    assert stream.size == len(stream.tokens) == len(TEXT) + 2 + 3
    assert tokenizer.decode(stream.tokens) == TEXT + "\n\n" + "an\n"
    assert tokenizer.convert_ids_to_tokens(range(3)) == ["\n", " ", "."]
    assert tokenizer("a☃")["input_ids"][1] == tokenizer.unk_token_id == len(tokenizer) - 1


def test_words_come_by_frequency_and_lines_end():
    tokenizer, stream = tokenised(["the cat saw\nthe dog\n", "a cat\n"], "word")
    assert tokenizer.convert_ids_to_tokens(stream.tokens) == (
        ["the", "cat", "saw", "<eos>", "the", "dog", "<eos>", "<eos>", "<eos>", "a", "cat", "<eos>"]
    )
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert vocabulary == ["<eos>", "cat", "the", "a", "dog", "saw", "<unk>"]
    small = word_tokenizer(["the cat saw\nthe dog\n", "a cat\n"], vocab_size=4)
    assert small.convert_ids_to_tokens(range(len(small))) == ["<eos>", "<unk>", "cat", "the"]
    assert small.decode(small("the dog\n")["input_ids"]) == " the <unk> <eos>"


def test_subwords_know_every_text():
    tokenizer, stream = tokenised([TEXT * 3, "☃ an egg"], "subword", vocab_size=280)
    assert len(tokenizer) == 280
    assert tokenizer.decode(stream.tokens) == TEXT * 3 + "<|endoftext|>" + "☃ an egg"
    assert stream.size == len((TEXT * 3 + "☃ an egg").encode())
    whole = tokenizer(TEXT * 3)["input_ids"]
    assert stream.tokens[: len(whole)].tolist() == whole, "cutting into pieces shows"


@pytest.mark.parametrize("level", ["byte", "char", "word", "subword"])
def test_tokenizers_come_back_from_a_folder(level, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, stream = tokenised([TEXT], level)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode([TEXT], again, level).digest == stream.digest
    assert again.decode(stream.tokens) == tokenizer.decode(stream.tokens)


def test_validation_split():
    """The end of files; whole documents of a corpus of several; the end of one of a single document."""
    assert split_validation([b"abcdef", b"ghij"], 0.2) == ([b"abcdef", b"gh"], [b"ij"])
    assert split_validation([b"abcdef", b"ghij"], 4) == ([b"abcdef"], [b"ghij"])
    assert split_validation([b"abcdef", b"ghij"], 7) == ([b"abc"], [b"def", b"ghij"])
    assert split_validation(["äbc"], 0) == (["äbc"], None)
    single = datasets.Dataset.from_dict({"text": ["äbcd"]})
    assert split_validation(single, 0.25) == (["äbc"], ["d"])
    several = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(60)]})
    train, validation = split_validation(several, 0.2)
    assert sorted([*train["text"], *validation["text"]]) == sorted(several["text"])
    assert 3 < len(validation) < 25
    with pytest.raises(ValueError, match="a fraction is kept"):
        split_validation(several, 5)
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        split_validation([b"ab"], 2)


def test_documents_of_tables_and_lines(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two words"]}).to_parquet(tmp_path / "a.parquet")
    documents = load_documents(str(tmp_path / "a.parquet"))
    assert list(documents["text"]) == ["one", "two words"]
    stream = tokenised(documents, "byte")[1]
    assert stream.tokens.tobytes() == b"one\n\ntwo words"
    assert stream.tokens.dtype == np.uint8
    (tmp_path / "lines.txt").write_text("one\ntwo words\n")
    by_line = load_documents(str(tmp_path / "lines.txt"), txt_documents="line")
    assert list(by_line["text"]) == ["one", "two words"]


def test_errors():
    with pytest.raises(ValueError, match="at least 257"):
        subword_tokenizer(["a"], 200)
    with pytest.raises(ValueError, match="at least 3"):
        word_tokenizer(["a"], 2)
    with pytest.raises(ValueError, match="no text"):
        encode([""], character_tokenizer(["a"]), "char")


@pytest.mark.parametrize("level", ["byte", "char", "word", "subword"])
def test_the_size_of_a_text_counts_what_its_tokens_stand_for(level):
    """Bits are counted by size: what stands between documents is predicted, and so belongs to it."""
    documents = [TEXT, "an egg\n", "the cat"]
    _, stream = tokenised(documents, level, **({"vocab_size": 300} if level == "subword" else {}))
    length = len if level == "char" else lambda text: len(text.encode())
    separators = 0 if level == "subword" else 2 * len("\n\n")
    assert stream.size == sum(map(length, documents)) + separators
    if level in ("byte", "char"):
        assert stream.size == len(stream.tokens)


@pytest.mark.parametrize("level", ["byte", "char", "word", "subword"])
def test_a_corpus_without_text_is_refused_by_name(tmp_path, level):
    for name, content in (("empty.txt", ""), ("blank.txt", " \n\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"^The corpus '.*{name}' holds no text\.$"):
            load_documents(str(tmp_path / name), level)
