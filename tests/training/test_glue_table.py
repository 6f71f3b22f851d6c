import importlib
from pathlib import Path

import numpy as np
import pytest

from hf_efficient.data.glue import GLUE_TASKS


TRAINING = Path(__file__).resolve().parents[2] / "training"


@pytest.fixture
def glue_table(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)
    return importlib.import_module("glue_table")


def test_glue_average_is_that_of_the_eight_tasks(glue_table):
    scores = dict(zip(GLUE_TASKS, np.linspace(0.2, 0.9, len(GLUE_TASKS)), strict=True))
    results = {
        task: [{"metrics": {"accuracy": score + d}} for d in (-0.1, 0.0, 0.02)] for task, score in scores.items()
    }
    results["stsb"] = [{"metrics": {"pearson": p, "spearmanr": s}} for p, s in ((0.8, 0.6), (None, None), (0.5, 0.3))]
    summary = glue_table.summarise(results, {})
    counted = {**scores, "stsb": 0.4}
    expected = 100 * np.mean([counted[task] for task in scores if task not in ("wnli", "topic_pairs")])
    assert summary["average"] == pytest.approx(expected)
    assert summary["missing"] == []
    rows = {row["task"]: row for row in summary["rows"]}
    assert rows["stsb"]["note"] == "1 of 3 seeds predict a constant, counted as 0"
    assert (rows["stsb"]["min"], rows["stsb"]["median"]) == (0.0, pytest.approx(40.0))
    assert "the GLUE average, over all eight tasks" in glue_table.to_markdown(summary)
