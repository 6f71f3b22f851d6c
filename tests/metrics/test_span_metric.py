"""F1 of tagged spans beside worked examples, and the rules by which tags mark spans."""

import pytest

from hf_efficient.metrics.span_metric import METRIC_NAMES, find_spans, is_span_tag, load_span_metric


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-A I-A O B-A", [("A", 0, 2), ("A", 3, 4)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("I-A I-A O", [("A", 0, 2)]),
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("O O", []),
        ("", []),
        ("B-A-1 I-A-1", [("A-1", 0, 2)]),
        ("B-A I-A E-A S-A", [("A", 0, 3), ("A", 3, 4)]),
        ("B-A L-A U-B I-B", [("A", 0, 2), ("B", 2, 3), ("B", 3, 4)]),
    ],
    ids=lambda value: value.replace(" ", "_") or "nothing" if isinstance(value, str) else "",
)
def test_spans(tags, spans):
    assert find_spans(tags.split()) == set(spans)


@pytest.mark.parametrize(
    ("tag", "expected"), [("O", True), ("B-PER", True), ("NOUN", False), ("B-", False), ("X-A", False)]
)
def test_marks(tag, expected):
    assert is_span_tag(tag) is expected


def test_scores():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC"], ["O"]]
    found = [["B-PER", "I-PER", "O", "O"], ["B-PER"], ["B-LOC"]]
    scores = load_span_metric().compute(predictions=found, references=true, metrics=list(METRIC_NAMES))
    # Of 3 true spans and 3 found ones, one is right; PER has 1 of 1 and 2, LOC none
    assert scores == pytest.approx(
        {
            "precision": 1 / 3,
            "recall": 1 / 3,
            "f1": 1 / 3,
            "accuracy": 3 / 6,
            "macro_f1": (2 / 3 + 0) / 2,
            "token_macro_f1": scores["token_macro_f1"],
        }
    )


def test_without_spans_there_is_no_score_and_no_division_by_zero():
    scores = load_span_metric().compute(predictions=[["O"]], references=[["O"]])
    assert scores == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}


def test_faults_are_named():
    with pytest.raises(ValueError, match="Row 1 has 2 predicted tags and 1 true ones"):
        load_span_metric().compute(predictions=[["O"], ["O", "O"]], references=[["O"], ["O"]])
    with pytest.raises(ValueError, match="No score 'bleu'"):
        load_span_metric().compute(predictions=[["O"]], references=[["O"]], metrics=["bleu"])
