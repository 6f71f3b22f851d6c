"""That memory which is freed is kept."""

import importlib
import os
import platform
import subprocess
import sys

import pretraining_runs
import pytest


PROGRAM = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from heap import keep_freed_memory

def faults(steps=20):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**22) + torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

torch.set_num_threads(1)
assert keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's malloc")
def test_a_second_round_asks_the_system_for_nothing():
    """In a fresh process, since there is no way back."""
    command = [sys.executable, "-c", PROGRAM, str(pretraining_runs.TRAINING)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # of 4 KiB; without it 20 rounds of three tensors of 16 MiB are some 245,000


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.syspath_prepend(pretraining_runs.TRAINING)
    heap = importlib.import_module("heap")

    def none(name):
        raise OSError

    monkeypatch.setattr(heap.ctypes, "CDLL", none)
    assert heap.keep_freed_memory() is False
