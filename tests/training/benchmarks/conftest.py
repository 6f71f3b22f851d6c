"""What the tests of the GPU agenda share."""

import time

import pytest
import torch

from training.benchmarks.gpu_context import PartContext


@pytest.fixture
def make_context(tmp_path):
    """`make_context(**changes)` gives what a part is given in a rehearsal, with a folder of its own."""

    def make(**changes):
        folders = {"scratch": tmp_path, "out": tmp_path, "pack": tmp_path}
        settings = {"device": torch.device("cpu"), "rehearsal": True, "deadline": time.monotonic() + 60, "repeats": 3}
        return PartContext(**{**settings, **folders, **changes})

    return make
