import importlib
from pathlib import Path

import numpy as np
import pytest


TRAINING = Path(__file__).resolve().parents[2] / "training"


@pytest.fixture
def length_groups(monkeypatch):
    monkeypatch.syspath_prepend(TRAINING)
    return importlib.import_module("length_groups")


def test_length_groups_depend_on_seed_and_epoch(length_groups):
    lengths = list(np.random.default_rng(0).integers(3, 60, 97))
    sampler = length_groups.ResumableLengthGroupedSampler(4, lengths, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert sorted(first) == sorted(second) == list(range(97))
    spread = [np.ptp([lengths[i] for i in first[start : start + 4]]) for start in range(0, 96, 4)]
    assert np.mean(spread) < 20
