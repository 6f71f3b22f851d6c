import sys
from collections import Counter

import numpy as np
import pytest

from hf_efficient.data import builtin
from hf_efficient.data.builtin import builtin_corpus, builtin_topic_pairs, prose_paragraphs


@pytest.fixture(scope="module")
def corpus():
    return builtin_corpus()


@pytest.fixture(scope="module")
def pairs():
    return builtin_topic_pairs()


def test_prose_is_kept_and_everything_else_left_out():
    text = """\
round(number[, ndigits]) -> number

Rounding
========

Round a *number* to the given precision, as :func:`math.floor` does, in
``decimal`` digits.

    >>> round(2.5)
    the number 2 is what you get to see

   if_stmt ::= "if" assignment_expression ":" suite

The keys are these:

- **name** is what it is called by the one who uses it
- when nothing is given, the default of the class is used

    def f(x): return x + y * g[3]
"""
    assert list(prose_paragraphs(text)) == [
        "Round a number to the given precision, as math.floor does, in decimal digits.",
        "name is what it is called by the one who uses it",
        "when nothing is given, the default of the class is used",
    ]


def test_corpus_is_english_prose_without_code_or_repetitions(corpus):
    assert corpus.column_names == ["topic", "text"]
    paragraphs = [paragraph for text in corpus["text"] for paragraph in text.split("\n\n")]
    assert sum(len(paragraph.split()) for paragraph in paragraphs) > 150_000
    assert len(paragraphs) == len({paragraph.casefold() for paragraph in paragraphs})
    assert not any(paragraph.startswith(">>>") or "\n" in paragraph for paragraph in paragraphs)
    words = Counter(word for paragraph in paragraphs for word in paragraph.split())
    assert words.most_common(1)[0][0] == "the"
    topics = set(corpus["topic"])
    assert {"asyncio", "email", "help:compound"} <= topics
    assert not topics & {"test", "idlelib", "turtledemo"}


def test_sources_are_not_imported_and_suffice_without_help_topics(monkeypatch, corpus):
    warnings = []
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(builtin.logger, "warning_once", warnings.append)
    documents = builtin._documents.__wrapped__()
    assert not {"antigravity", "this", "turtle"} & set(sys.modules)
    assert len(warnings) == 1
    assert "pydoc_data" in warnings[0]
    assert {topic for topic, _ in documents} >= {topic for topic in corpus["topic"] if "help:" not in topic}
    assert not any(topic.startswith("help:") for topic, _ in documents)


def test_without_sources_the_error_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        builtin._documents.__wrapped__()


def test_pairs_are_balanced_in_each_passage(pairs):
    """So neither a passage nor its style tells the label."""
    assert pairs["train"].features["label"].names == ["different_topic", "same_topic"]
    assert 6000 <= len(pairs["train"]) <= 12_000
    assert 900 <= len(pairs["validation"]) <= 1100
    for split, uses in (("train", builtin.ROUNDS), ("validation", 1)):
        rows = pairs[split].to_dict()
        assert rows["idx"] == list(range(len(rows["idx"])))
        counts = [
            Counter(
                passage
                for column in ("sentence1", "sentence2")
                for passage, label in zip(rows[column], rows["label"], strict=True)
                if label == wanted
            )
            for wanted in (0, 1)
        ]
        assert sum(counts[0].values()) == sum(counts[1].values())
        assert max(counts[0].values()) <= uses
        # A passage of a topic with an odd number of them may sit out a round, in both classes alike.
        assert counts[0] == counts[1]


def test_labels_say_whether_the_topics_agree(pairs):
    topic_of = {passage: topic for topic, passages in builtin._passages().items() for passage in passages}
    for rows in pairs.values():
        for row in rows:
            same = topic_of[row["sentence1"]] == topic_of[row["sentence2"]]
            assert row["label"] == same
            assert row["sentence1"] != row["sentence2"]


def test_no_passage_stands_in_both_splits(pairs):
    train, validation = ({*rows["sentence1"], *rows["sentence2"]} for rows in pairs.values())
    assert not {text.casefold() for text in train} & {text.casefold() for text in validation}
    lengths = [len(passage.split()) for passage in train | validation]
    assert (min(lengths), max(lengths)) == builtin.PASSAGE_WORDS


def test_one_passage_says_nothing_and_two_say_something(pairs):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, validation = (rows.to_dict() for rows in pairs.values())
    vectorizer = TfidfVectorizer(min_df=2).fit(train["sentence1"])
    single = LogisticRegression().fit(vectorizer.transform(train["sentence1"]), train["label"])
    chance = single.score(vectorizer.transform(validation["sentence1"]), validation["label"])
    assert abs(chance - 0.5) < 0.06

    def overlap(rows):
        vectors = [vectorizer.transform(rows[column]) for column in ("sentence1", "sentence2")]
        return np.asarray(vectors[0].multiply(vectors[1]).sum(axis=1))

    both = LogisticRegression(C=100).fit(overlap(train), train["label"])
    assert 0.58 < both.score(overlap(validation), validation["label"]) < 0.75


def test_seed_decides(pairs):
    assert builtin_topic_pairs(seed=0)["validation"][:] == pairs["validation"][:]
    assert builtin_topic_pairs(seed=1)["validation"][:] != pairs["validation"][:]
