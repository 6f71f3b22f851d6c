"""Clocks and profiles of the benchmarks."""

import os
import signal
import time

import pytest
import torch

from training.benchmarks.timing import core_time, in_fresh_processes, interleave, medians, operator_shares, peak_growth


CPU = torch.device("cpu")


def test_the_clock_of_a_cpu_stands_still_in_sleep():
    start = core_time(CPU)
    time.sleep(0.2)
    assert core_time(CPU) - start < 0.1


def test_peers_take_turns_and_warm_ups_are_left_out():
    seen = []
    seconds = interleave({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, CPU, "peers", warmup=1)
    assert "".join(seen) == "ab" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_shares_of_time_add_up_and_name_the_costly_kind():
    square = torch.randn(300, 300)
    shares = operator_shares(lambda: square @ square @ square, repeats=3)
    assert sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == "matrix products"


def grow(size):
    return peak_growth(lambda: torch.ones(size, dtype=torch.uint8))


def test_the_peak_of_a_fresh_process_holds_what_it_allocates():
    (small,), (large,) = (in_fresh_processes(grow, (size,), 1) for size in (1, 2**27))
    assert large - small > 2**26


def end(number):
    os.kill(os.getpid(), number)


def test_a_process_that_is_killed_is_an_error():
    with pytest.raises(ChildProcessError, match="memory may be short"):
        in_fresh_processes(end, (signal.SIGKILL,), 1)
