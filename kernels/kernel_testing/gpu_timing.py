"""Times on a GPU: CUDA events, peers in turn, and CUDA graphs where a launch from Python costs as much as the call."""

import statistics
from collections.abc import Callable, Mapping

import torch


def time_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, list[float]]:
    """Microseconds of one of the `calls` that each run makes, for each repetition after three of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 3):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if index >= 3:
                times[name].append(1e3 * start.elapsed_time(end) / calls)
    return times


def graph_of(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """A CUDA graph of `calls` calls, after some on a stream of their own, as capturing wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bytes_per_microsecond(repeats: int) -> float:
    """Bytes read and written by a copy of 1 GiB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians(time_in_turn({"copy": lambda: target.copy_(source)}, repeats))["copy"]
