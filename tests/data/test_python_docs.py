import sys
from collections import Counter

import numpy as np
import pytest

from hf_efficient.data import python_docs as builtin
from hf_efficient.data.python_docs import (
    builtin_corpus,
    builtin_split,
    builtin_summaries,
    builtin_topic_pairs,
    builtin_word_order,
    prose_paragraphs,
)


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


def test_pairs_have_the_form_of_a_glue_task_and_natural_shares(pairs):
    assert pairs["train"].features["label"].names == ["different_topic", "same_topic"]
    for split, count in (("train", builtin.TRAIN_PAIRS), ("validation", builtin.VALIDATION_PAIRS)):
        rows = pairs[split].to_dict()
        assert rows["idx"] == list(range(count))
        assert len(set(zip(rows["sentence1"], rows["sentence2"], strict=True))) == count
        # The chance that two draws from shares of 8 : 4 : 2 : 1 agree is 0.38.
        assert 0.3 < sum(rows["label"]) / count < 0.5
        uses = Counter(rows["sentence1"] + rows["sentence2"])
        assert max(uses.values()) < 6 * 2 * count / len(uses)


def test_labels_say_whether_the_topics_agree(pairs):
    topic_of = {
        passage: topic for topic, passages in builtin._passages(builtin._documents()).items() for passage in passages
    }
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


def test_two_passages_say_more_than_one(pairs):
    """With bags of words: what the docstring says of the task's floor."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, validation = (rows.to_dict() for rows in pairs.values())
    vectorizer = TfidfVectorizer(min_df=2).fit(train["sentence1"])

    def score(features):
        model = LogisticRegression(C=10, max_iter=500).fit(features(train), train["label"])
        return model.score(features(validation), validation["label"])

    one = score(lambda rows: vectorizer.transform(rows["sentence1"]))
    both = score(lambda rows: vectorizer.transform(rows["sentence1"]) + vectorizer.transform(rows["sentence2"]))
    majority = 1 - np.mean(validation["label"])
    assert majority - 0.08 < one < 0.72
    assert max(one, majority) + 0.02 < both < 0.82


def test_seed_decides(pairs):
    assert builtin_topic_pairs(seed=0)["validation"][:] == pairs["validation"][:]
    assert builtin_topic_pairs(seed=1)["validation"][:] != pairs["validation"][:]


def test_the_split_shares_the_paragraphs_of_the_corpus_out(corpus):
    split = builtin_split()
    paragraphs = {name: [p for text in rows["text"] for p in text.split("\n\n")] for name, rows in split.items()}
    assert sorted(paragraphs["train"] + paragraphs["validation"]) == sorted(
        paragraph for text in corpus["text"] for paragraph in text.split("\n\n")
    )
    assert not {p.casefold() for p in paragraphs["train"]} & {p.casefold() for p in paragraphs["validation"]}
    size = {name: sum(map(len, found)) for name, found in paragraphs.items()}
    assert 0.09 < size["validation"] / sum(size.values()) < 0.16
    large = {topic for topic, text in zip(corpus["topic"], corpus["text"], strict=True) if len(text) > 20_000}
    assert large <= set(split["validation"]["topic"]) & set(split["train"]["topic"])


def test_word_order_is_that_of_the_text_in_half_of_the_sentences():
    rows = builtin_word_order(200, 100)
    corpus = {name: " ".join(part["text"]).replace("\n\n", " ") for name, part in builtin_split().items()}
    for name, count in (("train", 200), ("validation", 100)):
        assert Counter(rows[name]["label"]) == {"as written": count // 2, "shuffled": count // 2}
        for text, label in zip(rows[name]["text"], rows[name]["label"], strict=True):
            assert builtin.ORDERED_WORDS[0] <= len(text.split()) <= builtin.ORDERED_WORDS[1]
            assert (text in corpus[name]) == (label == "as written")
        assert len(set(rows[name]["text"])) == count
    assert not set(rows["train"]["text"]) & set(rows["validation"]["text"])


def test_shuffling_leaves_the_ends_and_changes_what_is_between():
    sentence = " ".join(f"w{i}" for i in range(8))
    for seed in range(20):
        changed = builtin._shuffled(sentence, builtin.random.Random(seed)).split()
        assert sorted(changed) == sorted(sentence.split())
        assert " ".join(changed) != sentence
        assert (changed[0], changed[-1]) == ("w0", "w7")
    assert builtin._shuffled("a " * 7 + "a", builtin.random.Random(0)) == "a " * 7 + "a"


def test_summaries_are_first_lines_of_what_they_sum_up():
    pairs = builtin_summaries()
    assert len(pairs) > 500
    assert len(set(pairs["document"])) == len(pairs)
    (found,) = [pair for pair in pairs if pair["summary"].startswith("Merge multiple sorted inputs")]
    assert found["document"].startswith("Similar to sorted")
    for pair in pairs:
        assert builtin.SUMMARY_WORDS[0] <= len(pair["summary"].split()) <= builtin.SUMMARY_WORDS[1]
        assert builtin.SUMMARISED_WORDS[0] <= len(pair["document"].split()) <= builtin.SUMMARISED_WORDS[1]
