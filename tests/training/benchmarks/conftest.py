"""What the tests of the GPU agenda and of its parts share."""

import time

import pytest
import torch

from training.benchmarks.gpu import sru_recurrence_parity as parity
from training.benchmarks.gpu.context import PartContext


@pytest.fixture
def make_context(tmp_path):
    """`make_context(**changes)` gives what a part is given in a rehearsal, with a folder of its own."""

    def make(**changes):
        folders = {"scratch": tmp_path, "out": tmp_path, "pack": tmp_path}
        settings = {"device": torch.device("cpu"), "rehearsal": True, "deadline": time.monotonic() + 60, "repeats": 3}
        return PartContext(**{**settings, **folders, **changes})

    return make


@pytest.fixture
def first_comparison_fails(monkeypatch):
    """The first case that is compared ends in an error; those after it are as they were."""
    exact, calls = parity.torch_results, []

    def wrong(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        return exact(*arguments)

    monkeypatch.setattr(parity, "torch_results", wrong)
