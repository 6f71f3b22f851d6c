from types import SimpleNamespace

import pytest

from hf_efficient.data.byte_tokenizer import byte_tokenizer
from hf_efficient.utils.text_pieces import source_limit, special_ids, split_document, split_sentences
from tests.training import tiny_glue


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        (
            "Dr. A. Smith met J. Doe et al. in St. Louis. They left.",
            ["Dr. A. Smith met J. Doe et al. in St. Louis.", "They left."],
        ),
        ("It cost 3.5 million. 20 came, e.g. Ann.", ["It cost 3.5 million.", "20 came, e.g. Ann."]),
        ("#A: hi there\n#B: hello\n\n", ["#A: hi there", "#B: hello"]),
        ("Это раз. Это два.", ["Это раз.", "Это два."]),
        ("  \n ", []),
        ("", []),
    ],
    ids=["marks", "quote", "abbreviations", "numbers", "lines", "cyrillic", "blank", "empty"],
)
def test_sentences(text, expected):
    assert split_sentences(text) == expected


TEXT = "Ab cd. Efg hi jk. Lmnop q. Rs"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("max_length", [None, *range(1, 40)])
def test_pieces_are_the_document(tokenizer, max_length):
    pieces = split_document(tokenizer, TEXT, max_length)
    assert [token for piece in pieces for token in piece] == tokenizer(TEXT)["input_ids"]
    assert max(map(len, pieces)) <= (max_length or 99)
    assert min(map(len, pieces)) > 0


def test_pieces_end_with_sentences(tokenizer):
    assert [tokenizer.decode(piece) for piece in split_document(tokenizer, TEXT, 18)] == [
        "Ab cd. Efg hi jk.",
        " Lmnop q. Rs",
    ]


def test_pieces_without_sentences_are_equally_long(tokenizer):
    assert [len(piece) for piece in split_document(tokenizer, "x" * 31, 10)] == [8, 8, 8, 7]


def test_pieces_have_special_tokens_of_their_own():
    bert = tiny_glue.make_tokenizer(["a b c d e f g h"])
    assert special_ids(bert) == ([0], [2])
    pieces = split_document(bert, "a b c d e f g", 5)
    assert [bert.decode(piece) for piece in pieces] == ["[CLS] a b c [SEP]", "[CLS] d e [SEP]", "[CLS] f g [SEP]"]
    assert split_document(bert, " ", 5) == [[0, 2]]
    with pytest.raises(ValueError, match="Pieces of 2 tokens have no room"):
        split_document(bert, "a b", 2)


@pytest.mark.parametrize(
    ("fields", "tokens", "expected"),
    [
        ({"max_position_embeddings": 40}, 1e30, 40),
        ({"max_position_embeddings": 40}, 32, 32),
        ({"max_position_embeddings": 40, "position_embedding_type": "none"}, 1e30, None),
        ({"max_position_embeddings": 40, "position_embedding_type": "fixed_base"}, 512, 512),
        ({}, 1e30, None),
    ],
    ids=["table", "tokenizer", "no-positions", "fixed-base", "neither"],
)
def test_source_limit(fields, tokens, expected):
    assert source_limit(SimpleNamespace(**fields), SimpleNamespace(model_max_length=tokens)) == expected
