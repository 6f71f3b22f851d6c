"""Time and memory: peers measured in turn, peaks of fresh processes, and where the time goes by kind of operator."""

import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm


# Kinds of operators; the first pattern that an operator's name holds decides.
OPERATOR_KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear"),
    "attention": ("scaled_dot_product",),
    "recurrence": ("sru_recurrence",),
    "normalisation": ("layer_norm",),
    "optimiser": ("_fused_adam",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
}


def core_time(device: torch.device) -> float:
    """Read the clock: on a CPU the process's CPU time, which stands still while other programs have the core; on a GPU
    wall time, when all that was launched has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def interleave(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, title: str, warmup: int = 2
) -> dict[str, list[float]]:
    """
    Measure peers in turn, so that whatever else the machine does hits all alike.

    Args:
        runs (`Mapping[str, Callable]`): the peers by name.
        repeats (`int`): timed runs of each.
        device (`torch.device`): where they run.
        title (`str`): for the progress bar.
        warmup (`int`, defaults to 2): first runs that are not timed.

    Returns:
        `dict[str, list[float]]`: core seconds of each timed run, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in tqdm(range(repeats + warmup), desc=title, leave=False):
        for name, run in runs.items():
            start = core_time(device)
            run()
            if index >= warmup:
                seconds[name].append(core_time(device) - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Take the median of each peer's runs."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_growth(run: Callable[[], object]) -> int:
    """Run, and return the bytes by which this process's peak lies above what it held before."""
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def in_fresh_processes(measure: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> list[Any]:
    """
    Call `measure(*arguments)` in so many processes, one after the other, none of which has done anything before.

    Raises:
        ChildProcessError: if a process is killed, as the system does where memory does not suffice.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            return [pool.submit(measure, *arguments).result() for _ in range(repeats)]
    except BrokenProcessPool as error:
        raise ChildProcessError(f"A process was killed while it measured {arguments}; memory may be short.") from error


def operator_kind(operator: str) -> str:
    """Name the kind of an operator of torch."""
    return next((kind for kind, names in OPERATOR_KINDS.items() if any(name in operator for name in names)), "all else")


def operator_shares(run: Callable[[], object], repeats: int, warmup: int = 2) -> dict[str, float]:
    """
    Profile a run, and return the shares of its time by kind of operator; they add up to 1.

    Python's own work counts to the operator that it is inside of, else to "all else"; the profiler makes small
    operators look slower than they are.
    """
    for _ in range(warmup):
        run()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, torch.profiler.record_function("run"):
        for _ in range(repeats):
            run()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        found[operator_kind(event.key)] += event.self_cpu_time_total
    total = sum(found.values())
    return {kind: seconds / total for kind, seconds in sorted(found.items(), key=lambda item: -item[1])}
