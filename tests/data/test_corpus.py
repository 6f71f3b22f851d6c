"""Loading, splitting and packing text, on files made here and a tokenizer trained here."""

import gzip
import json

import datasets
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_efficient.data import packing as blocks
from hf_efficient.data.corpus import load_corpus, split_documents
from hf_efficient.data.packing import pack_blocks


WORDS = [f"w{i}" for i in range(60)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##x", "##y"]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=16,
    )


def documents(*lengths):
    return datasets.Dataset.from_dict({"text": [" ".join(WORDS[i] for i in range(n)) for n in lengths]})


def words_of(row):
    return [PIECES[i] for i in row if i not in (2, 3)]


def pack(dataset, tokenizer, tmp_path, block_size=10, **kwargs):
    return pack_blocks(dataset, tokenizer, block_size, cache_dir=tmp_path / "cache", **kwargs)


def test_txt_files_by_file_blank_line_and_line(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n\nthree\n\n\n\n")
    (tmp_path / "a.txt").write_text("zero")
    (tmp_path / "empty.txt").write_text(" \n")
    assert load_corpus(str(tmp_path / "*.txt"))["text"][:] == ["zero", "one\ntwo\n\nthree\n\n\n\n"]
    found = load_corpus(str(tmp_path), txt_documents="blank_line")["text"][:]
    assert [text.strip() for text in found] == ["zero", "one\ntwo", "three"]
    assert load_corpus(str(tmp_path / "b.txt"), txt_documents="line")["text"][:] == ["one", "two", "three"]


def test_jsonl_and_parquet_and_several_files(tmp_path):
    rows = [{"body": f"text {i}", "other": i} for i in range(3)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[:2])
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[2]) + "\n")
    loaded = load_corpus([str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")], text_column="body")
    assert loaded.column_names == ["text"]
    assert loaded["text"][:] == ["text 0", "text 1", "text 2"]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    assert load_corpus(str(tmp_path / "c.parquet"), text_column="body")["text"][:] == loaded["text"][:]


def test_builtin_corpus_loads():
    corpus = load_corpus("builtin")
    assert corpus.column_names == ["text"]
    assert len(corpus) > 100


def test_errors_say_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(FileNotFoundError, match=r"No text files match .*missing\.txt"):
        load_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(FileNotFoundError, match=r"no-folder"):
        load_corpus([str(tmp_path / "a.txt"), str(tmp_path / "no-folder")])
    with pytest.raises(ValueError, match="must be of one kind"):
        load_corpus(str(tmp_path))
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="has no column 'body'; it has 'text'"):
        load_corpus(str(tmp_path / "a.txt"), text_column="body")
    with pytest.raises(ValueError, match="`txt_documents`"):
        load_corpus(str(tmp_path / "a.txt"), txt_documents="page")


def test_split_depends_on_the_text_only():
    texts = [f"document {i}" for i in range(2000)]
    train, validation = split_documents(datasets.Dataset.from_dict({"text": texts}), 0.1)
    assert sorted([*train["text"], *validation["text"]]) == sorted(texts)
    assert 150 < len(validation) < 250
    again, validation_again = split_documents(datasets.Dataset.from_dict({"text": [*reversed(texts[500:])]}), 0.1)
    assert set(validation_again["text"]) == set(validation["text"]) & set(texts[500:])
    assert set(split_documents(datasets.Dataset.from_dict({"text": texts}), 0.1, seed=1)[1]["text"]) != set(
        validation["text"]
    )
    assert len(split_documents(again, 0.0)[1]) == 0
    with pytest.raises(ValueError, match="leaves 1 to train on and 0 to validate on"):
        split_documents(datasets.Dataset.from_dict({"text": ["a"]}), 0.0001)
    with pytest.raises(ValueError, match="must lie in"):
        split_documents(again, 1.0)


def test_rows_keep_all_tokens_and_never_cross_documents(tokenizer, tmp_path):
    lengths = (1, 8, 9, 15, 16, 17, 40)
    rows = pack(documents(*lengths), tokenizer, tmp_path, min_tail=3)["input_ids"][:]
    assert all(row[0] == 2 and row[-1] == 3 and len(row) <= 10 for row in rows)
    assert [len(row) - 2 for row in rows] == [1, 8, 5, 4, 8, 7, 8, 8, 8, 5, 4, 8, 8, 8, 8, 8]
    position = 0
    for length in lengths:
        tokens = []
        while len(tokens) < length:
            tokens += words_of(rows[position])
            position += 1
        assert tokens == WORDS[:length]
    assert position == len(rows)


def test_rows_may_cross_documents_when_asked(tokenizer, tmp_path):
    rows = pack(documents(5, 6, 20), tokenizer, tmp_path, cross_documents=True, min_tail=1)["input_ids"][:]
    assert [len(row) for row in rows] == [10, 10, 10, 10, 3]
    inner = [token for row in rows for token in row[1:-1]]
    assert [PIECES[i] for i in inner] == [*WORDS[:5], "[SEP]", *WORDS[:6], "[SEP]", *WORDS[:20]]


def test_word_ids_number_words_within_rows(tokenizer, tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["w1x w2xy w3", "w4y w5"]})
    rows = pack(texts, tokenizer, tmp_path, word_ids=True)
    assert rows["word_ids"][:] == [[-1, 0, 0, 1, 1, 1, 2, -1], [-1, 0, 0, 1, -1]]
    joined = pack(texts, tokenizer, tmp_path, block_size=20, word_ids=True, cross_documents=True)
    assert joined["word_ids"][:] == [[-1, 0, 0, 1, 1, 1, 2, -1, 3, 3, 4, -1]]
    assert [len(ids) for ids in joined["input_ids"]] == [12]
    assert "word_ids" not in pack(texts, tokenizer, tmp_path).column_names


def test_second_run_does_not_tokenise(tokenizer, tmp_path, monkeypatch):
    first = pack(documents(5, 30), tokenizer, tmp_path)["input_ids"][:]

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(blocks, "_join_documents", refuse)
    monkeypatch.setattr(blocks, "_block_ends", refuse)
    # Neither what the tokenizer was used for nor the identity of the data set matters.
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=3)
    assert pack(documents(5, 30), tokenizer, tmp_path)["input_ids"][:] == first
    for change in (
        {"dataset": documents(5, 31)},
        {"block_size": 11},
        {"cross_documents": True},
        {"word_ids": True},
        {"min_tail": 2},
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            pack(**{"dataset": documents(5, 30), "tokenizer": tokenizer, "tmp_path": tmp_path, **change})


def test_rows_of_the_cache_that_are_cut_off_are_named(tokenizer, tmp_path):
    rows = pack(documents(5, 30), tokenizer, tmp_path)["input_ids"][:]
    (kept,) = (tmp_path / "cache").glob("*.arrow")
    whole = kept.read_bytes()
    for end in (8, len(whole) // 2):
        kept.write_bytes(whole[:-end])
        with pytest.raises(ValueError, match=rf"{kept.name} of the cache is cut off: remove it"):
            pack(documents(5, 30), tokenizer, tmp_path)
    kept.unlink()
    assert pack(documents(5, 30), tokenizer, tmp_path)["input_ids"][:] == rows


def test_tokenizers_without_special_tokens(tmp_path):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    rows = pack(documents(7), bare, tmp_path, block_size=4, min_tail=1)["input_ids"][:]
    assert rows == [[1, 2, 3, 4], [5, 6, 7]]


def test_block_without_room_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no room beside the special tokens"):
        pack(documents(5), tokenizer, tmp_path, block_size=2)


@pytest.mark.data
def test_real_corpus_loads(data_dir):
    corpus = load_corpus(str(data_dir / "corpus" / "b*.parquet"))
    assert len(corpus) == 2127 + 500
    train, validation = split_documents(corpus)
    assert 20 < len(validation) < 90
    assert len(train) + len(validation) == len(corpus)
