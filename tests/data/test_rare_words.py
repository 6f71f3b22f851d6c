"""Rare words: counting by the tokenizer's own words, a band of them, and their file."""

import json
from dataclasses import replace

import pytest

from hf_efficient.data.rare_words import RareWords, choose_band, count_words, describe_band
from tests.helpers.rare_word_corpus import AXOLOTL, QUOKKA, make_corpus, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def test_words_are_counted_as_the_tokenizer_sees_them(corpus, tokenizer):
    counts = count_words(corpus, tokenizer)
    spelled = {" ".join(tokenizer.convert_ids_to_tokens(word)): count for word, count in counts.items()}
    assert spelled == {"the": 5, "qu ##ok ##ka": 5, "sees": 3, ",": 1, "ax ##olotl": 3, "a": 1}  # no zebra, unknown


def test_slow_tokenizers_are_refused(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="fast tokenizer"):
        count_words(corpus, tokenizer)


def test_band_and_what_it_covers(corpus, tokenizer):
    counts = count_words(corpus, tokenizer)
    words = choose_band(counts, tokenizer, min_count=3, max_count=5)
    assert words.keys == (QUOKKA, AXOLOTL)
    assert words.counts == (5, 3)
    assert describe_band(counts, words) == {
        "keys": 2,
        "occurrences": 8,
        "words_fraction": 8 / 18,
        "tokens_fraction": 21 / 31,
        "lowest_count": 3,
        "middle_count": 5,
        "highest_count": 5,
    }
    short = choose_band(counts, tokenizer, min_count=3, max_count=3, min_tokens=1)
    assert [" ".join(tokens) for tokens in short.tokens] == ["ax ##olotl", "sees"]
    assert choose_band(counts, tokenizer, min_count=1, max_count=9, max_keys=1).keys == (QUOKKA,)
    with pytest.raises(ValueError, match=f"choose another band. The most .* occurs {max(counts.values())} times"):
        choose_band(counts, tokenizer, min_count=100, max_count=500, min_tokens=1)
    with pytest.raises(ValueError, match="min_count <= max_count"):
        choose_band(counts, tokenizer, min_count=5, max_count=3)


def test_file_of_words_and_the_tokenizer_that_it_was_made_with(corpus, tokenizer, tmp_path):
    words = choose_band(count_words(corpus, tokenizer), tokenizer, min_count=3, max_count=5)
    words = replace(words, report={"share": 0.25, "band": [3, 5]})
    path = tmp_path / "words.json"
    words.save(path)
    assert RareWords.load(path, tokenizer) == words
    content = json.loads(path.read_text())
    assert content["words"][1] == {"tokens": ["ax", "##olotl"], "ids": list(AXOLOTL), "count": 3}
    content["words"][1]["ids"] = [8, 10]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another tokenizer: its ax ##olotl"):
        RareWords.load(path, tokenizer)
    path.write_text(json.dumps({**content, "version": 9}))
    with pytest.raises(ValueError, match="version 9"):
        RareWords.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a file of rare words"):
        RareWords.load(path)
