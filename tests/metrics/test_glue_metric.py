import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from hf_efficient.metrics import glue_metric
from hf_efficient.metrics.glue_metric import METRIC_KEYS, load_glue_metric


FILE = Path(glue_metric.__file__)
RNG = np.random.default_rng(3)
CLASSES = {task: 3 if task.startswith("mnli") else 2 for task in METRIC_KEYS}


@pytest.fixture(autouse=True)
def metric_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


def expected(key, references, predictions):
    return {
        "accuracy": lambda: metrics.accuracy_score(references, predictions),
        "f1": lambda: metrics.f1_score(references, predictions),
        "matthews_correlation": lambda: metrics.matthews_corrcoef(references, predictions),
        "pearson": lambda: stats.pearsonr(references, predictions)[0],
        "spearmanr": lambda: stats.spearmanr(references, predictions)[0],
    }[key]()


@pytest.mark.parametrize("task", METRIC_KEYS)
def test_equals_scikit_learn_and_scipy(task):
    if task == "stsb":
        references = RNG.uniform(0, 5, 131).astype("float32")
        predictions = (references + RNG.normal(0, 1, 131)).astype("float32")
    else:
        references, predictions = RNG.integers(CLASSES[task], size=(2, 131))
    metric = load_glue_metric(task)
    for start in range(0, 131, 50):
        metric.add_batch(predictions=predictions[start : start + 50], references=references[start : start + 50])
    result = metric.compute()
    assert set(result) == set(METRIC_KEYS[task])
    for key, value in result.items():
        assert isinstance(value, float)
        assert value == pytest.approx(expected(key, references, predictions), abs=1e-6)


def test_values_worked_out_by_hand():
    predictions, references = [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]
    assert load_glue_metric("mrpc").compute(predictions=predictions, references=references) == {
        "accuracy": pytest.approx(3 / 5),
        "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1)),
    }
    result = load_glue_metric("cola").compute(predictions=predictions, references=references)
    assert result["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_constant_predictions_give_a_number_or_nan():
    assert load_glue_metric("cola").compute(predictions=[1, 1, 1], references=[0, 1, 1]) == {
        "matthews_correlation": 0.0
    }
    assert load_glue_metric("mrpc").compute(predictions=[0, 0], references=[1, 1]) == {
        "accuracy": 0.0,
        "f1": 0.0,
    }
    result = load_glue_metric("stsb").compute(predictions=[2.0, 2.0, 2.0], references=[0.5, 1.0, 4.0])
    assert set(result) == {"pearson", "spearmanr"}
    assert all(map(math.isnan, result.values()))


def test_one_pair_has_no_correlation():
    scores = load_glue_metric("stsb").compute(predictions=[1.0], references=[3.0])
    assert all(map(math.isnan, scores.values()))
    assert set(scores) == set(METRIC_KEYS["stsb"])


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"'sst3'.*sst2"):
        load_glue_metric("sst3")


def test_loads_by_path_in_a_fresh_process(tmp_path):
    """By the file, and by a folder, which has to be called like the file inside."""
    folder = tmp_path / "glue_metric"
    folder.mkdir()
    shutil.copy(FILE, folder)
    code = (
        "import evaluate\n"
        f"for path in {[str(FILE), str(folder)]!r}:\n"
        "    metric = evaluate.load(path, 'stsb')\n"
        "    print(metric.compute(predictions=[0.0, 2.0, 5.0], references=[0.0, 1.0, 2.5])['pearson'])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [float(line) for line in run.stdout.split()] == pytest.approx([1.0, 1.0])


def test_is_an_evaluate_metric_that_can_be_combined():
    both = evaluate.combine([load_glue_metric("sst2"), load_glue_metric("cola")])
    result = both.compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1])
    assert result["accuracy"] == 0.75
    assert result["matthews_correlation"] == pytest.approx(2 / math.sqrt(3 * 2 * 1 * 2))
