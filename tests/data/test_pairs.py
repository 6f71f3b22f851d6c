"""Documents with their summaries, from files of each kind, and as tokens."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.data.pairs import PairEncoder, join_pieces, lead, load_pairs, pairs_digest
from hf_efficient.data.text_files import CorpusError
from hf_efficient.data.tokenizers import seq2seq_tokenizer
from tests.training import tiny_glue


ROWS = [
    {"document": 'A "long"\ntext, one.', "summary": "one"},
    {"document": "Zwei Äpfel.\tTab", "summary": "zwei"},
    {"document": " ", "summary": "lost"},
    {"document": "no summary", "summary": None},
]
KEPT = [{**row, "references": [row["summary"]]} for row in ROWS[:2]]


def write(path: Path, rows) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz"])
def test_rows_of_each_kind_of_file(name, tmp_path, caplog):
    found = load_pairs(str(write(tmp_path / name, ROWS)))
    assert found.to_list() == KEPT
    assert "2 of 4 rows lack a document or a summary" in caplog.text


def test_columns_are_named_and_references_are_lists(tmp_path):
    rows = [
        {"article": "d", "abstract": "s", "all": ["s", "t", ""], "id": 3},
        {"article": "e", "abstract": "u", "all": []},
    ]
    names = {"document_column": "article", "summary_column": "abstract", "references_column": "all"}
    expected = [
        {"document": "d", "summary": "s", "references": ["s", "t"]},
        {"document": "e", "summary": "u", "references": ["u"]},
    ]
    for name in ("a.jsonl", "b.parquet"):
        assert load_pairs(str(write(tmp_path / name, rows)), **names).to_list() == expected
    both = load_pairs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")], **names)
    assert both.to_list() == expected * 2
    assert (
        pairs_digest(both)
        != pairs_digest(both.take(2))
        == pairs_digest(load_pairs(str(tmp_path / "b.parquet"), **names))
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text", r"a\.txt is text without columns"),
        (
            "a.jsonl",
            '{"document": "a", "abstract": "b"}',
            r"has no column 'summary'; it has 'document', 'abstract'\. .*--summary_column",
        ),
        ("a.csv", "article,summary\nx,y\n", r"has no column 'document'.*--document_column"),
        ("a.jsonl", '{"document": "a", "summary": 3}', r"line 1: the column 'summary' holds int"),
        ("a.jsonl", '{"document": "a", "summary": ""}', "holds no document with a summary"),
    ],
    ids=["txt", "no-summary", "no-document", "number", "empty"],
)
def test_errors_name_file_and_column(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_pairs(str(tmp_path / name))


def test_a_list_where_a_text_is_wanted(tmp_path):
    path = write(tmp_path / "a.parquet", [{"document": ["a"], "summary": "b"}])
    with pytest.raises(CorpusError, match="the column 'document' holds list"):
        load_pairs(str(path))


def test_the_lead():
    text = "One is here. Two is there! Three?\nFour"
    assert [lead(text, count) for count in (1, 3, 9)] == [
        "One is here.",
        "One is here.\nTwo is there!\nThree?",
        "One is here.\nTwo is there!\nThree?\nFour",
    ]


def test_tokenizer_for_an_encoder_decoder():
    tokenizer = seq2seq_tokenizer(["the old dog sees the old cat"] * 3, 280)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer("the dög")["input_ids"]
    assert ids[-1] == 1
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the dög"
    with pytest.raises(ValueError, match="at least 258 ids"):
        seq2seq_tokenizer(["a"], 257)


def test_pairs_are_cut_and_end():
    """Bytes have no end of their own, so that summaries alone get one."""
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<pad>")
    encoder = PairEncoder(tokenizer, 4, 3)
    found = encoder.encode({"document": ["abcdef", "a"], "summary": ["xyz", "x"]})
    a, x = (tokenizer(text)["input_ids"][0] for text in ("a", "x"))
    end = tokenizer.eos_token_id
    assert found == {
        "input_ids": [[a, a + 1, a + 2, a + 3], [a]],
        "labels": [[x, x + 1, end], [x, end]],
        "length": [4, 1],
    }


def test_special_tokens_of_the_tokenizer_are_kept():
    encoder = PairEncoder(tiny_glue.make_tokenizer(["a b c d e"]), 4, 9)
    found = encoder.encode({"document": ["a b c d"], "summary": ["e"]})
    assert [found["input_ids"][0][i] for i in (0, -1)] == [found["labels"][0][i] for i in (0, -1)] == [0, 2]
    assert (len(found["input_ids"][0]), len(found["labels"][0])) == (4, 3)


def test_pieces_of_a_document_and_their_summaries():
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<pad>")
    encoder = PairEncoder(tokenizer, 4, 9)
    found = encoder.encode_in_pieces({"document": ["abcdefgh", "a", "abcde"], "summary": ["x", "y", "z"]}, [3, 4, 7])
    assert found["document"] == [3, 3, 4, 7, 7]
    assert [len(ids) for ids in found["input_ids"]] == [4, 4, 1, 3, 2]
    assert [labels == [-100] for labels in found["labels"]] == [False, True, False, False, True]
    assert join_pieces(["a", "b", "c", "", "d"], found["document"]) == ["a b", "c", "d"]


def test_errors_of_the_encoder():
    with pytest.raises(ValueError, match="has no end of text"):
        PairEncoder(byte_tokenizer(), 8, 8)
    with pytest.raises(ValueError, match="leave no room"):
        PairEncoder(byte_tokenizer(eos_token="<eos>"), 8, 1)
