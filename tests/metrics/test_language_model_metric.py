import math
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest

from hf_efficient.metrics import language_model_metric
from hf_efficient.metrics.language_model_metric import UNITS, load_language_model_metric


FILE = Path(language_model_metric.__file__)


@pytest.fixture(autouse=True)
def metric_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


def test_values_worked_out_by_hand():
    """Probabilities 1/2, 1/8 and 1/4 are 1, 3 and 2 bits."""
    losses, tokens = np.log([2.0, 8.0, 1e9, 4.0]), [3, 1, -100, 4]
    found = load_language_model_metric("byte").compute(predictions=losses, references=tokens)
    assert found == {"perplexity": pytest.approx(4.0), "bits_per_byte": pytest.approx(2.0)}
    found = load_language_model_metric("character").compute(predictions=losses, references=tokens, units_per_token=2.5)
    assert found == {"perplexity": pytest.approx(4.0), "bits_per_character": pytest.approx(2.0 / 2.5)}


def test_uniform_model_in_batches():
    metric = load_language_model_metric()
    for size in (7, 1, 30):
        metric.add_batch(predictions=np.full(size, math.log(205)), references=np.arange(size))
    found = metric.compute()
    assert found == {"perplexity": pytest.approx(205), "bits_per_token": pytest.approx(math.log2(205))}
    assert all(isinstance(value, float) for value in found.values())


def test_hopeless_model_is_infinite():
    assert load_language_model_metric().compute(predictions=[1e4], references=[0])["perplexity"] == math.inf


@pytest.mark.parametrize("unit", UNITS)
def test_loads_from_its_file_alone(unit, tmp_path):
    copy = shutil.copy(FILE, tmp_path / "language_model_metric.py")
    metric = evaluate.load(str(copy), unit, cache_dir=str(tmp_path / "cache"))
    assert set(metric.compute(predictions=[1.0], references=[5])) == {"perplexity", f"bits_per_{unit}"}


def test_errors():
    with pytest.raises(ValueError, match="No unit 'word'"):
        load_language_model_metric("word")
    with pytest.raises(ValueError, match="no token to score"):
        load_language_model_metric().compute(predictions=[1.0], references=[-100])
    with pytest.raises(ValueError, match="must be above 0"):
        load_language_model_metric().compute(predictions=[1.0], references=[1], units_per_token=0)
