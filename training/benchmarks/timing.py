"""Peers measured in turn, so that whatever else the machine does hits all alike."""

import statistics
from collections.abc import Callable, Mapping

import torch
from race_track import core_time
from tqdm.auto import tqdm


def interleave(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, title: str, warmup: int = 2
) -> dict[str, list[float]]:
    """Core seconds of each repetition of each run, `warmup` first ones left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in tqdm(range(repeats + warmup), desc=title, leave=False):
        for name, run in runs.items():
            start = core_time(device)
            run()
            if index >= warmup:
                seconds[name].append(core_time(device) - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}
