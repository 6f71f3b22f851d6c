"""Rows of a stream are those made of the same text in memory, and go on from any place to the same rows."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_efficient.data import row_streams
from hf_efficient.data.corpus import load_corpus
from hf_efficient.data.document_stream import DocumentSettings, DocumentStream
from hf_efficient.data.packing import pack_blocks
from hf_efficient.data.row_streams import BlockStream, ColumnStream, SegmentStream
from hf_efficient.data.segments import ColumnSegments, RandomSegments
from hf_efficient.data.text_files import CorpusError
from hf_efficient.data.token_stream import build_tokenizer, encode, encode_document, load_documents, txt_decoder
from hf_efficient.data.tokenizers import train_tokenizer
from tests.training.pretraining_runs import write_corpus


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus.txt", documents=61)
    return str(tmp_path / "corpus.txt")


@pytest.fixture
def tokenizer(corpus):
    return train_tokenizer(load_corpus(corpus, txt_documents="blank_line")["text"][:], vocab_size=60)


def documents(corpus, passes=1, txt_documents="blank_line", **options):
    names = {name: options.pop(name) for name in ("process", "processes") if name in options}
    settings = DocumentSettings(corpus=corpus, txt_documents=txt_documents, **options)
    return DocumentStream(settings, passes=passes, **names)


def plain(rows):
    """Rows as lists, to compare them."""
    return [{name: list(map(int, values)) for name, values in row.items()} for row in rows]


def take(stream, count=None):
    found = []
    for row in stream:
        found.append(row)
        if len(found) == count:
            break
    return plain(found)


def through_json(state):
    """What a checkpoint holds of a state."""
    arrays = {name: value.copy() for name, value in state.items() if isinstance(value, np.ndarray)}
    return {**arrays, **json.loads(json.dumps({name: state[name] for name in state if name not in arrays}))}


def check_every_place(make, counts):
    """The rest after each count of rows is that of a stream without a break."""
    whole = take(make(), 100)
    for count in counts:
        stream, other = make(), make()
        first = take(stream, count)
        other.load_state_dict(through_json(stream.state_dict()))
        assert first + take(other, len(whole) - count) == whole, count


@pytest.mark.parametrize("cross_documents", [False, True])
@pytest.mark.parametrize("word_ids", [False, True])
@pytest.mark.parametrize("group", [1000, 7])
def test_blocks_are_those_in_memory(corpus, tokenizer, monkeypatch, cross_documents, word_ids, group):
    options = {"cross_documents": cross_documents, "word_ids": word_ids}
    if group == 1000 or not cross_documents:  # which joins the documents of a group
        expected = pack_blocks(load_corpus(corpus, txt_documents="blank_line"), tokenizer, 19, **options)
        monkeypatch.setattr(row_streams, "_GROUP", group)
        assert take(BlockStream(documents(corpus), tokenizer, 19, **options)) == plain(expected)


@pytest.mark.parametrize("size", [0, 1, 2, 13, 1000])
def test_blocks_go_on_from_every_place(corpus, tokenizer, monkeypatch, size):
    monkeypatch.setattr(row_streams, "_GROUP", 7)
    check_every_place(
        lambda: BlockStream(documents(corpus, 2), tokenizer, 19, word_ids=True, shuffle_buffer_size=size, seed=5),
        (1, 2, 20, 55, 99),
    )


def test_shuffling_keeps_all_rows_and_follows_the_seed(corpus, tokenizer):
    def rows(seed, size=30):
        return take(BlockStream(documents(corpus), tokenizer, 19, shuffle_buffer_size=size, seed=seed))

    def in_order(found):
        return sorted(found, key=lambda row: row["input_ids"])

    ordered = rows(0, 0)
    assert rows(1) == rows(1)
    assert rows(1) != rows(2) != ordered
    assert in_order(rows(1)) == in_order(rows(2)) == in_order(ordered)
    # A row goes out at the earliest as the first of those in the buffer.
    places = [ordered.index(row) for row in rows(1)]
    assert all(place - number < 30 for number, place in enumerate(places))
    with pytest.raises(ValueError, match="`shuffle_buffer_size`"):
        rows(0, -1)


def test_processes_shuffle_each_in_its_own_way(corpus, tokenizer, tmp_path):
    (tmp_path / "same.txt").write_text((tmp_path / "corpus.txt").read_text())
    orders = [
        take(
            BlockStream(
                documents(str(tmp_path / "*.txt"), process=process, processes=2),
                tokenizer,
                19,
                shuffle_buffer_size=30,
            )
        )
        for process in range(2)
    ]
    assert orders[0] != orders[1]
    assert len(orders[0]) == len(orders[1])


def level_streams(corpus, level, txt_documents="file"):
    """The tokens of a text in memory, and what a stream of it takes."""
    found = load_documents(corpus, level, txt_documents=txt_documents)
    tokenizer = build_tokenizer(level, found, vocab_size=300 if level == "subword" else None)
    decode = txt_decoder(corpus, level, txt_documents)

    def ids(document, is_next):
        return encode_document(document, tokenizer, level, is_next)[0]

    return encode(found, tokenizer, level).tokens, ids, {"txt_documents": txt_documents, "decode": decode}


@pytest.mark.parametrize("txt_documents", ["file", "blank_line"])
@pytest.mark.parametrize("level", ["byte", "char", "word", "subword"])
def test_segments_are_those_in_memory(corpus, level, txt_documents):
    tokens, ids, options = level_streams(corpus, level, txt_documents)
    # Parts of 100 bytes, so that a file is read in many.
    stream = SegmentStream(documents(corpus, longest=100, **options), ids, 23)
    expected = RandomSegments(tokens, 23)
    expected._offset.fill_(0)
    rows = take(stream)
    # Which leave out a segment to be cut at other places.
    assert rows[: len(expected)] == plain(expected[i] for i in range(len(expected)))
    assert len(rows) == (len(tokens) - 1) // 23
    column = ColumnSegments(tokens, 23)
    assert take(ColumnStream(documents(corpus, longest=100, **options), ids, 23, 1)) == plain(
        column[i] for i in range(len(column))
    )


def test_bytes_are_read_as_they_are(tmp_path):
    path = tmp_path / "bytes.txt"
    path.write_bytes(b"caf\xe9\r\nau lait " * 30)
    tokens, ids, options = level_streams(str(path), "byte")
    rows = take(SegmentStream(documents(str(path), longest=50, **options), ids, 16))
    assert bytes(token for row in rows for token in row["input_ids"]) == path.read_bytes()[: 16 * len(rows)]
    assert len(rows) == (len(tokens) - 1) // 16


@pytest.mark.parametrize("columns", [1, 3])
def test_columns_hold_whole_documents_one_after_another(corpus, columns):
    _, ids, options = level_streams(corpus, "byte", "blank_line")
    stream = ColumnStream(documents(corpus, **options), ids, 16, columns)
    assert stream.columns == columns
    rows = take(stream)
    expected = set(load_corpus(corpus, txt_documents="blank_line")["text"][:])
    seen = []
    for column in range(columns):
        own = rows[column::columns]
        for row, following in pairwise(own):
            assert row["labels"][:-1] == row["input_ids"][1:]
            assert row["labels"][-1] == following["input_ids"][0]
        text = bytes(token for row in own for token in row["input_ids"]).decode()
        *whole, last = text.split("\n\n")
        assert set(whole) <= expected
        assert any(text.startswith(last) for text in expected)
        seen += whole
    assert len(seen) == len(set(seen)) >= 58 - columns


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("longest", [1 << 19, 60])
def test_segments_go_on_from_every_place(corpus, columns, longest):
    _, ids, options = level_streams(corpus, "subword", "file" if longest == 60 else "blank_line")

    def make():
        source = documents(corpus, 2, longest=longest, **options)
        if columns is None:
            return SegmentStream(source, ids, 8, shuffle_buffer_size=17, seed=3)
        return ColumnStream(source, ids, 8, columns)

    check_every_place(make, (1, 2, 3, 40, 98))


def test_rewinding_begins_anew(corpus, tokenizer):
    _, ids, options = level_streams(corpus, "byte", "blank_line")
    for stream in (
        BlockStream(documents(corpus, None), tokenizer, 19, shuffle_buffer_size=9),
        SegmentStream(documents(corpus, None, **options), ids, 16, shuffle_buffer_size=9),
        ColumnStream(documents(corpus, None, **options), ids, 16, 3),
    ):
        first = take(stream, 600)
        assert stream.epoch > 0
        stream.rewind()
        assert take(stream, 600) == first


def test_a_stream_is_a_dataset_of_torch(corpus):
    _, ids, options = level_streams(corpus, "byte", "blank_line")
    batches = list(DataLoader(SegmentStream(documents(corpus, **options), ids, 16), batch_size=5))
    assert batches[0]["input_ids"].shape == (5, 16)
    assert batches[0]["labels"].dtype == torch.int64


def test_faults_are_refused(corpus, tokenizer):
    with pytest.raises(ValueError, match="has no room beside the special tokens"):
        BlockStream(documents(corpus), tokenizer, 2)
    with pytest.raises(ValueError, match="at least 1 column"):
        ColumnStream(documents(corpus), None, 16, 0)


@pytest.mark.parametrize("kind", ["blocks", "segments"])
def test_a_corpus_that_makes_no_row_is_refused(tmp_path, tokenizer, kind):
    path = tmp_path / "nothing.txt"
    path.write_text("\u200b\n\n\u200b\n")  # of which the tokenizer keeps nothing
    text = documents(str(path), passes=None)
    if kind == "blocks":
        rows = BlockStream(text, tokenizer, 16)
    else:
        rows = SegmentStream(text, lambda document, follows: [np.empty(0, np.uint8)], 16)
    with pytest.raises(CorpusError, match="has documents, but none of them makes a row"):
        next(iter(rows))
