import shutil
from pathlib import Path

import evaluate
import pytest

from hf_efficient.metrics import rouge_metric
from hf_efficient.metrics.rouge_metric import ROUGE_TYPES, load_rouge_metric


FILE = Path(rouge_metric.__file__)


@pytest.fixture(autouse=True)
def metric_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


def f1(hits, predicted, expected):
    precision, recall = hits / predicted, hits / expected
    return 2 * precision * recall / (precision + recall)


def test_values_worked_out_by_hand():
    """Of "the cat sat" and "the cat ate the fish" two words, one pair, and a subsequence of two are common."""
    found = load_rouge_metric().compute(predictions=["The cat sat."], references=["the cat ate the fish"])
    expected = {"rouge1": f1(2, 3, 5), "rouge2": f1(1, 2, 4), "rougeL": f1(2, 3, 5), "rougeLsum": f1(2, 3, 5)}
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


def test_sentences_are_divided_by_line_breaks():
    """In another order they have no long common subsequence, but each has one of its own."""
    prediction, reference = "a red dog\nthe old house", "the old house\na red dog"
    found = load_rouge_metric().compute(predictions=[prediction], references=[reference])
    assert (found["rouge1"], found["rougeLsum"]) == (1.0, 1.0)
    assert found["rougeL"] == pytest.approx(0.5)


def test_the_best_of_several_references_counts_for_each_measure():
    rows = {"predictions": ["a b c d", "x"], "references": [["d c b a", "a b z z"], ["y"]]}
    found = load_rouge_metric().compute(**rows, use_aggregator=False)
    assert found["rouge1"] == [1.0, 0.0]
    assert found["rouge2"] == pytest.approx([1 / 3, 0.0])
    means = load_rouge_metric().compute(**rows)
    assert means == pytest.approx({name: sum(values) / 2 for name, values in found.items()})


def test_batches_are_one_set():
    metric = load_rouge_metric()
    for prediction, reference in (("a b", "a c"), ("a", "a"), ("", "b")):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert metric.compute()["rouge1"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_stemming_and_own_words():
    rows = {"predictions": ["die Häuser stehen"], "references": ["Häuser"]}
    assert load_rouge_metric().compute(**rows, tokenizer=str.split)["rouge1"] == pytest.approx(f1(1, 3, 1))
    assert load_rouge_metric().compute(predictions=["пёс"], references=["пёс"])["rouge1"] == 0
    walks = {"predictions": ["walks"], "references": ["walking"]}
    assert load_rouge_metric().compute(**walks)["rouge1"] == 0
    assert load_rouge_metric().compute(**walks, use_stemmer=True)["rouge1"] == 1


def test_loads_from_its_file_alone(tmp_path):
    copy = shutil.copy(FILE, tmp_path / "rouge_metric.py")
    metric = evaluate.load(str(copy), cache_dir=str(tmp_path / "cache"))
    assert metric.compute(predictions=["a b"], references=["a b"]) == dict.fromkeys(ROUGE_TYPES, 1.0)


def test_a_row_without_reference_is_named():
    with pytest.raises(ValueError, match="Row 1 has no reference"):
        load_rouge_metric().compute(predictions=["a", "b"], references=[["a"], []])
