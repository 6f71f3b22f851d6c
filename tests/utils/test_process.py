"""Freed memory stays with the process; the first of several says what it does."""

import logging
import os
import platform
import subprocess
import sys

import pytest

from hf_efficient.utils import process


PROGRAM = """
import resource
import torch
from hf_efficient.utils.process import disable_malloc_trim

def faults(steps=20):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**22) + torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

torch.set_num_threads(1)
assert disable_malloc_trim()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's malloc")
def test_a_second_round_asks_the_system_for_nothing():
    """In a fresh process, since there is no way back."""
    command = [sys.executable, "-c", PROGRAM]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # of 4 KiB; without it 20 rounds of three tensors of 16 MiB are some 245,000


def test_without_glibc_nothing_happens(monkeypatch):
    def none(name):
        raise OSError

    monkeypatch.setattr(process.ctypes, "CDLL", none)
    assert process.disable_malloc_trim() is False


@pytest.mark.parametrize(("rank", "level"), [(None, logging.INFO), ("0", logging.INFO), ("3", logging.WARNING)])
def test_the_first_process_alone_says_what_it_does(rank, level, monkeypatch):
    monkeypatch.setattr(process, "disable_malloc_trim", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    before = logging.getLogger("hf_efficient").level
    try:
        process.start_script("some.script")
        assert logging.getLogger("some.script").level == logging.getLogger("hf_efficient").level == level
    finally:
        logging.getLogger("hf_efficient").setLevel(before)
