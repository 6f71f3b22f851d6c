"""Finding rare words in packed rows, and batches that say where they occur."""

from collections import Counter

import pytest
import torch

from hf_efficient.data.packing import pack_blocks
from hf_efficient.objectives.masking import MaskingCollator
from hf_efficient.objectives.notes import RareWordCollator, SpanFinder
from tests.helpers.rare_word_corpus import AXOLOTL, QUOKKA, make_corpus, make_tokenizer


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
@pytest.mark.parametrize("cross_documents", [False, True], ids=["within documents", "across documents"])
def test_no_word_that_a_block_cuts_is_found(block_size, cross_documents, tmp_path):
    options = {"cross_documents": cross_documents, "word_ids": True, "min_tail": 1, "cache_dir": tmp_path}
    rows = pack_blocks(make_corpus(), make_tokenizer(), block_size, **options)
    # "ok ##a" is no word of the corpus; "qu" and "##ka" are what is left of a cut one.
    find = SpanFinder([QUOKKA, AXOLOTL, (5,), (5, 6), (6, 7), (7,), (8,), (9,)])
    found = Counter(key for row in rows for _, _, key in find(row["input_ids"], row["word_ids"]))
    assert set(found) <= {0, 1}
    if block_size == 30 and not cross_documents:
        assert found == {0: 3, 1: 2}  # all but the last words of documents


def test_collator_adds_spans_to_the_batches_of_another():
    features = [
        {"input_ids": [2, 5, 6, 7, 8, 9, 10, 3], "word_ids": [-1, 0, 0, 0, 1, 1, 2, -1]},
        {"input_ids": [2, 10, 3], "word_ids": [-1, 0, -1]},
        {"input_ids": [2, 10, 8, 9, 11, 3], "word_ids": [-1, 0, 1, 1, 2, -1]},
    ]
    masking = MaskingCollator(make_tokenizer(), mlm_probability=0.5, seed=3, max_length=9)
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
