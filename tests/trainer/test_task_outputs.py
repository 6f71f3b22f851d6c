"""Outputs of fine-tuned models: what metrics compare, answers in words, and outputs that are no numbers."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from hf_efficient.data.task_labels import CLASSIFICATION, MULTI_LABEL, REGRESSION, TOKEN_CLASSIFICATION
from hf_efficient.trainer.finetuning import FinetuningTask
from hf_efficient.trainer.task_outputs import answers, check_outputs, decode


def task(kind, names, columns=("text",)):
    return FinetuningTask("toy", kind, columns, names, ())


def test_outputs_become_what_metrics_compare():
    logits = np.array([[[3.0, 0.0], [0.0, 1.0], [0.0, 9.0]]])
    prediction = EvalPrediction(logits, np.array([[0, -100, 1]]))
    assert decode(task(TOKEN_CLASSIFICATION, ("O", "B-X")), prediction, (0.0, 1.0)) == ([["O", "B-X"]], [["O", "B-X"]])
    prediction = EvalPrediction(np.array([[0.5], [-1.0]]), np.array([0.0, 1.0]))
    found, true = decode(task(REGRESSION, ("y",)), prediction, (10.0, 2.0))
    assert (found.tolist(), true.tolist()) == ([11.0, 8.0], [10.0, 12.0])
    prediction = EvalPrediction(np.array([[0.5, -0.5]]), np.array([[0.0, 1.0]]))
    found, true = decode(task(MULTI_LABEL, ("a", "b")), prediction, (0.0, 1.0))
    assert (found.tolist(), true.tolist()) == ([[1, 0]], [[0, 1]])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: (logits, np.zeros(1))], ids=["array", "tuple"])
def test_outputs_that_are_not_finite_are_refused(wrong, wrap):
    logits = np.zeros((3, 2))
    check_outputs(EvalPrediction(wrap(logits), np.zeros(3)), 0.1)
    logits[2, 1] = wrong
    with pytest.raises(ValueError, match=r"not finite: training at --learning_rate 0.1 has diverged"):
        check_outputs(EvalPrediction(wrap(logits), np.zeros(3)), 0.1)


def test_answers_in_words():
    rows, none = Dataset.from_dict({"text": ["x"]}), Dataset.from_dict({})
    (found,) = answers(task(CLASSIFICATION, ("a", "b")), np.log([[0.25, 0.75]]), rows, none)
    assert found == {"prediction": "b", "score": pytest.approx(0.75)}
    (found,) = answers(task(MULTI_LABEL, ("a", "b")), (np.array([[2.0, -1.0]]), None), rows, none)
    assert found == {"prediction": ["a"], "score": [pytest.approx(1 / (1 + np.exp(-2)))]}
    assert answers(task(REGRESSION, ("y",)), np.array([[2.5]]), rows, none) == [{"prediction": 2.5}]
    rows, encoded = Dataset.from_dict({"tokens": [["p", "q", "r"]]}), Dataset.from_dict({"words": [[-1, 0, -1, 1]]})
    logits = np.zeros((1, 5, 2))
    logits[0, 3, 1] = 1
    (found,) = answers(task(TOKEN_CLASSIFICATION, ("O", "X"), ("tokens",)), logits, rows, encoded)
    assert found == {"prediction": ["O", "X", None]}
