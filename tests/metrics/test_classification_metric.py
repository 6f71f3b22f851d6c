"""Scores of classes, several labels and numbers beside worked examples; all of them without a network."""

import numpy as np
import pytest

from hf_efficient.metrics.classification_metric import METRIC_NAMES, load_classification_metric


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


def compute(kind, predictions, references, *metrics):
    return load_classification_metric(kind).compute(
        predictions=np.asarray(predictions), references=np.asarray(references), metrics=list(metrics) or None
    )


def test_classes():
    found = compute("classification", [0, 0, 1, 2, 2], [0, 1, 1, 2, 0], "accuracy", "macro_f1", "macro_recall")
    # F1 of the classes: 1/2, 2/3, 2/3; recalls 1/2, 1/2, 1
    assert found == pytest.approx({"accuracy": 0.6, "macro_f1": (1 / 2 + 4 / 3) / 3, "macro_recall": 2 / 3})
    assert compute("classification", [0, 1, 1], [0, 0, 1], "f1") == pytest.approx({"f1": 2 / 3})
    assert set(compute("classification", [0], [0])) == {"accuracy", "macro_f1"}


def test_several_labels():
    found = compute(
        "multi_label", [[1, 0], [1, 1], [0, 0]], [[1, 0], [0, 1], [0, 0]], "micro_f1", "accuracy", "samples_f1"
    )
    assert found == pytest.approx({"micro_f1": 4 / 5, "accuracy": 2 / 3, "samples_f1": (1 + 2 / 3 + 0) / 3})


def test_numbers():
    found = compute("regression", [1.0, 2.0, 4.0], [1.0, 3.0, 4.0], "rmse", "mae", "mse", "pearson")
    pearson = np.corrcoef([1.0, 2.0, 4.0], [1.0, 3.0, 4.0])[0, 1]
    assert found == pytest.approx({"rmse": 3**-0.5, "mae": 1 / 3, "mse": 1 / 3, "pearson": pearson})


@pytest.mark.parametrize("kind", METRIC_NAMES)
def test_every_score_is_a_number(kind):
    rng = np.random.default_rng(0)
    shape = (41, 3) if kind == "multi_label" else 41
    values = [rng.normal(size=41) if kind == "regression" else rng.integers(0, 2, shape) for _ in range(2)]
    found = compute(kind, *values, *METRIC_NAMES[kind])
    assert list(found) == list(METRIC_NAMES[kind])
    assert all(type(score) is float for score in found.values())


def test_one_number_has_no_correlation():
    found = compute("regression", [1.0], [3.0], "pearson", "spearmanr", "rmse")
    assert found == pytest.approx({"pearson": np.nan, "spearmanr": np.nan, "rmse": 2.0}, nan_ok=True)


def test_what_there_is_not_is_named():
    with pytest.raises(ValueError, match="No score 'bleu' of classification; there are accuracy"):
        compute("classification", [0], [0], "bleu")
    with pytest.raises(ValueError, match="No scores for 'ranking'"):
        load_classification_metric("ranking")
