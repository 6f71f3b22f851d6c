"""Where the time of a language model goes: self time of torch's operators by kind, out of its profiler."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


# The first pattern that an operator's name holds decides its kind.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear"),
    "attention": ("scaled_dot_product",),
    "recurrence": ("sru_recurrence",),
    "normalisation": ("layer_norm",),
    "optimiser": ("_fused_adam",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
}


def kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if any(name in operator for name in names)), "all else")


def shares(run: Callable[[], object], repeats: int, warmup: int = 2) -> dict[str, float]:
    """
    Shares of the time of `run`, by kind; they add up to 1.

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
        found[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(found.values())
    return {kind: seconds / total for kind, seconds in sorted(found.items(), key=lambda item: -item[1])}
