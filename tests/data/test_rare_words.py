"""Rare words: counting by the tokenizer's own words, a band of them, and where they stand in packed and masked rows."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_efficient.data.corpus import pack_blocks
from hf_efficient.data.rare_words import (
    RareWordCollator,
    RareWords,
    SpanFinder,
    choose_band,
    count_words,
    describe_band,
)
from hf_efficient.objectives.masking import MaskingCollator


PIECES = ["qu", "##ok", "##ka", "ax", "##olotl", "the", "a", "sees", ",", "ok", "##a"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUOKKA, AXOLOTL = (5, 6, 7), (8, 9)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *PIECES])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    )


TEXTS = [
    "The Quokka sees the quokka,quokka",
    "the axolotl sees a zebra",
    "QUOKKA",
    "the quokka axolotl sees the axolotl",
]


@pytest.fixture(scope="module")
def corpus():
    return Dataset.from_dict({"text": TEXTS})


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
        "share_of_words": 8 / 18,
        "share_of_tokens": 21 / 31,
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


def test_spans_of_whole_words_only():
    find = SpanFinder([QUOKKA, AXOLOTL, (5, 6), (13,)])
    # [CLS] quokka quokka axolotl "qu ##ok" , ok [SEP]: adjacent words stay apart, a key inside a word is no word.
    ids = [2, 5, 6, 7, 5, 6, 7, 8, 9, 5, 6, 13, 14, 3]
    words = [-1, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, -1]
    assert find(ids, words) == [(1, 4, 0), (4, 7, 0), (7, 9, 1), (9, 11, 2), (11, 12, 3)]
    assert find(ids[:-1], words[:-1]) == find(ids, words)
    # The first word of a row in the middle of a document and the last of any may be cut.
    later = [-1, *(word + 1 for word in words[1:-1]), -1]
    assert find(ids, later) == find(ids, words)[1:]
    assert find(ids[:4], words[:4]) == []
    assert find([2, 3], [-1, -1]) == []
    assert find([], []) == []


@pytest.mark.parametrize("block_size", [5, 7, 8, 30])
@pytest.mark.parametrize("cross_documents", [False, True])
def test_no_word_that_a_block_cuts_is_found(corpus, tokenizer, block_size, cross_documents, tmp_path):
    options = {"cross_documents": cross_documents, "word_ids": True, "min_tail": 1, "cache_dir": tmp_path}
    rows = pack_blocks(corpus, tokenizer, block_size, **options)
    # "ok ##a" is no word of the corpus; "qu" and "##ka" are what is left of a cut one.
    find = SpanFinder([QUOKKA, AXOLOTL, (5,), (5, 6), (6, 7), (7,), (8,), (9,)])
    found = Counter(key for row in rows for _, _, key in find(row["input_ids"], row["word_ids"]))
    assert set(found) <= {0, 1}
    if block_size == 30 and not cross_documents:
        assert found == {0: 3, 1: 2}  # all but the last words of documents


def test_collator_adds_spans_to_what_another_makes(tokenizer):
    features = [
        {"input_ids": [2, 5, 6, 7, 8, 9, 10, 3], "word_ids": [-1, 0, 0, 0, 1, 1, 2, -1]},
        {"input_ids": [2, 10, 3], "word_ids": [-1, 0, -1]},
        {"input_ids": [2, 10, 8, 9, 11, 3], "word_ids": [-1, 0, 1, 1, 2, -1]},
    ]
    masking = MaskingCollator(tokenizer, probability=0.5, seed=3, max_length=9)
    collator = RareWordCollator(masking, [QUOKKA, AXOLOTL])
    for epoch in (0, 2):
        collator.set_epoch(epoch)
        batch, plain = collator(features), masking(features)
        assert masking.epoch == epoch
        assert set(batch) == {*plain, "note_spans"}
        assert all(torch.equal(batch[name], value) for name, value in plain.items())
        assert batch["note_spans"].tolist() == [
            [[1, 4, 0], [4, 6, 1]],
            [[-1] * 3, [-1] * 3],
            [[2, 4, 1], [-1] * 3],
        ]
    other = collator.with_seed(4)
    assert other.collator.seed == 4
    assert torch.equal(other(features)["note_spans"], batch["note_spans"])
    assert collator(features[1:2])["note_spans"].shape == (1, 0, 3)
    with pytest.raises(ValueError, match="word_ids=True"):
        collator([{"input_ids": [2, 5, 3]}])
