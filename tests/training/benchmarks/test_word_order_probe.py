"""The probe of word order: its windows, its pooled states, and that it is tested on windows it was not trained on."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertModel

from tests.helpers.comparison import assert_close
from tests.training.tiny_glue import make_tokenizer, save_encoder
from training.benchmarks import word_order_probe as probe


LENGTH = 16


@pytest.fixture(scope="module")
def documents():
    texts = [" ".join(f"{document}x{word}" for word in range(LENGTH * 4 + 5)) for document in range(100)]
    return Dataset.from_dict({"text": texts})


def test_windows_are_distinct_and_half_of_them_exchanged(documents):
    texts, labels = probe.windows(documents, "text", 390, LENGTH)
    assert len(set(texts)) == len(texts) == len(labels) == 390
    exchanged = []
    for text in texts:
        document = text.split("x")[0]
        words = [int(word.removeprefix(f"{document}x")) for word in text.split()]
        start = min(words)
        assert start % LENGTH == 0
        moved = [place for place, word in enumerate(words) if word != start + place]
        assert len(moved) in (0, 2)
        if moved:
            assert moved[1] == moved[0] + 1
        exchanged.append(len(moved) // 2)
    assert exchanged == labels.tolist()
    assert 150 < labels.sum() < 240


@pytest.mark.parametrize("informed", [False, True], ids=["noise", "knows-the-label"])
def test_the_score_is_that_of_windows_it_was_not_trained_on(documents, monkeypatch, informed):
    """Wide noise is learned by heart: right on all windows seen in training, by chance on others."""
    _, labels = probe.windows(documents, "text", 390, LENGTH)

    def states(encoder, tokenizer, texts):
        found = np.random.default_rng(4).normal(size=(len(texts), 300))
        if informed:
            found[:, :100] = labels[:, None]
        return found

    monkeypatch.setattr(probe, "pooled_states", states)
    found = probe.word_order_probe(None, None, documents, "text", train=140, test=250)
    if informed:
        assert found["accuracy"] == 100.0
        assert found["standard_error"] == 0.0
    else:
        assert 35 < found["accuracy"] < 65
        share = found["accuracy"] / 100
        assert found["standard_error"] == pytest.approx(100 * (share * (1 - share) / 250) ** 0.5)
    share = labels[140:].mean()
    assert found["larger_class"] == pytest.approx(100 * max(share, 1 - share))


def test_pooled_states_of_a_row_do_not_depend_on_its_batch(tmp_path):
    texts = ["the film", "the film is a day and it was so very", "a", "it was the day"]
    tokenizer = make_tokenizer(texts)
    save_encoder(tmp_path, tokenizer)
    encoder = BertModel.from_pretrained(tmp_path)
    encoder.train()
    together = torch.from_numpy(probe.pooled_states(encoder, tokenizer, texts, batch_size=3))
    assert together.shape == (4, 2 * encoder.config.hidden_size)
    assert not encoder.training
    for row, text in enumerate(texts):
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert_close(text, together[row], torch.cat([states.mean(0), states.max(0).values]))
